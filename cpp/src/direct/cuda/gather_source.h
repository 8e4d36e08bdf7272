// What the tensor-core gathers share: how a volume lies in memory, and how its channels get to shared memory and back.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "convt3d/problem.h"
#include "cuda/ptx.h"
#include "geometry.h"
#include "operands.h"

namespace convt3d::direct {

// One side of the gather.
struct GatherVolume {
  int size[3];                       // depth, height, width
  int channels, group_channels;      // of all groups, and of one
  int64_t sample_stride;             // in elements
  int channel_stride, voxel_stride;  // likewise
  int sample_voxels;                 // from one sample to the next, in voxels of all their channels

  GatherVolume(const Problem& problem, bool is_input) {
    const Extent extent = is_input ? problem.input : problem.output();
    for (int axis = 0; axis < 3; ++axis) size[axis] = static_cast<int>(extent[axis]);
    const int64_t all = is_input ? problem.in_channels : problem.out_channels;
    const VolumeStrides strides(problem.layout, all, is_input ? problem.input_voxels() : problem.output_voxels());
    channels = static_cast<int>(all);
    group_channels = static_cast<int>(all / problem.groups);
    sample_stride = strides.sample;
    channel_stride = static_cast<int>(strides.channel);
    voxel_stride = static_cast<int>(strides.voxel);
    sample_voxels = static_cast<int>(strides.sample / strides.voxel);
  }
};

// What a gather's kernel reads and writes.
template <class T>
struct GatherOperands {
  const T* source;
  const unsigned char* packed;
  const T* bias;
  T* destination;
  GatherVolume from, to;
  int64_t batch;
};

// Takes the last digit off `number`, whose digits have bases of their own, and returns it.
__device__ __forceinline__ int take_digit(int& number, const Divisor<int32_t>& base) {
  const int quotient = base.quotient(number), digit = number - quotient * base.value;
  number = quotient;
  return digit;
}

template <class T>
__device__ __forceinline__ uint32_t pack_pair(T low, T high) {
  if constexpr (sizeof(T) == 2) {
    return static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(&low)) |
           static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(&high)) << 16;
  }
  return 0;
}

// Two neighbours in one aligned write.
template <class T>
__device__ __forceinline__ void store_pair(T* destination, T low, T high) {
  if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<float2*>(destination) = make_float2(low, high);
  } else {
    *reinterpret_cast<uint32_t*>(destination) = pack_pair(low, high);
  }
}

// What the tensor cores get for a float: its tf32, or in a product of three parts what that leaves over.
__device__ __forceinline__ float tf32_part(float value, bool low) {
  const float high = ptx::round_to_tf32(value);
  return low ? ptx::round_to_tf32(value - high) : high;
}

// 16 bytes of channels of one position, on their way from global to shared memory: as loaded, so that nothing waits for
// them before they are stored.
template <class T>
struct Unit {
  static constexpr int kChannels = 16 / sizeof(T);
  uint32_t raw[kChannels];  // one channel each, or four of them 16 adjacent bytes

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kChannels; ++i) raw[i] = 0;
  }

  // `count` channels, `stride` elements apart; the others are left as they are.
  __device__ __forceinline__ void load(const T* source, int stride, int count, bool vector) {
    if (vector) {
      const uint4 loaded = __ldg(reinterpret_cast<const uint4*>(source));
      raw[0] = loaded.x, raw[1] = loaded.y, raw[2] = loaded.z, raw[3] = loaded.w;
      return;
    }
    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
    const Bits* bits = reinterpret_cast<const Bits*>(source);
    if (count >= kChannels) {
#pragma unroll
      for (int i = 0; i < kChannels; ++i) raw[i] = __ldg(bits + i * stride);
    } else {
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        if (i < count) raw[i] = __ldg(bits + i * stride);
      }
    }
  }

  // What the tensor cores get: half types as they are, a float's tf32, or what that leaves over.
  template <bool kExact>
  __device__ __forceinline__ uint4 finish(bool vector, bool low) const {
    low = kExact && low;
    if constexpr (sizeof(T) == 4) {
      return make_uint4(rounded(raw[0], low), rounded(raw[1], low), rounded(raw[2], low), rounded(raw[3], low));
    } else {
      if (vector) return make_uint4(raw[0], raw[1], raw[2], raw[3]);
      return make_uint4(raw[0] | raw[1] << 16, raw[2] | raw[3] << 16, raw[4] | raw[5] << 16, raw[6] | raw[7] << 16);
    }
  }

 private:
  static __device__ __forceinline__ uint32_t rounded(uint32_t bits, bool low) {
    return __float_as_uint(tf32_part(__uint_as_float(bits), low));
  }
};

}  // namespace convt3d::direct
