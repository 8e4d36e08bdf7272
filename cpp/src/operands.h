// The tensors of one call, as every algorithm takes them.
#pragma once

#include <cstdint>
#include <type_traits>

#include "convt3d/problem.h"

namespace convt3d {

// float64 sums in float64, everything else in float32.
template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Those that the plan's operator does not use are null.
struct Operands {
  const void* input = nullptr;
  const void* weight = nullptr;
  const void* bias = nullptr;
  const void* grad_output = nullptr;
  void* output = nullptr;
  void* grad_input = nullptr;
  void* grad_weight = nullptr;
  void* grad_bias = nullptr;
};

// Element strides of a dense volume (N, C, D, H, W), whatever its layout.
struct VolumeStrides {
  int64_t sample, channel, voxel;

  VolumeStrides(Layout layout, int64_t channels, int64_t voxels)
      : sample(channels * voxels),
        channel(layout == Layout::ncdhw ? voxels : 1),
        voxel(layout == Layout::ncdhw ? 1 : channels) {}

  int64_t offset(int64_t sample_index, int64_t channel_index, int64_t voxel_index) const {
    return sample_index * sample + channel_index * channel + voxel_index * voxel;
  }
};

}  // namespace convt3d
