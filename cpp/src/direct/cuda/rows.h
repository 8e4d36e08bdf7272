// Rows of elements that begin anywhere between vectors: what the kernels for narrow groups load, round and store them
// by.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/ptx.h"
#include "geometry.h"
#include "operands.h"

namespace convt3d::direct {

// Neighbouring elements that a thread loads or stores at once.
template <class T, int Width>
struct alignas(sizeof(T) * Width) Elements {
  T element[Width];
};

// Sums in the tensors' type; half types by pairs, one instruction each.
template <class T, int Count>
__device__ __forceinline__ Elements<T, Count> rounded(const Accumulator<T> (&sums)[Count]) {
  Elements<T, Count> result;
  if constexpr (Count % 2 == 0 && std::is_same_v<T, __half>) {
#pragma unroll
    for (int i = 0; i < Count; i += 2) {
      *reinterpret_cast<__half2*>(result.element + i) = __floats2half2_rn(sums[i], sums[i + 1]);
    }
  } else if constexpr (Count % 2 == 0 && std::is_same_v<T, __nv_bfloat16>) {
#pragma unroll
    for (int i = 0; i < Count; i += 2) {
      *reinterpret_cast<__nv_bfloat162*>(result.element + i) = __floats2bfloat162_rn(sums[i], sums[i + 1]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < Count; ++i) result.element[i] = static_cast<T>(sums[i]);
  }
  return result;
}

// Elements between the last multiple of 16 bytes and `pointer`.
template <class T>
CONVT3D_HOST_DEVICE int elements_past_vector(const T* pointer) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(pointer) / sizeof(T) % (16 / sizeof(T)));
}

// Steps in bytes take no more than an addition.
template <class T>
__device__ __forceinline__ T* advanced(T* pointer, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(pointer) + bytes);
}

// A run of memory from shared memory, where it lies between multiples of 16 bytes as it does in `to`.
template <class T>
__device__ __forceinline__ void store_run(T* to, const T* from, int length) {
  constexpr int kVector = 16 / sizeof(T);
  const int thread = static_cast<int>(threadIdx.x);
  const int head = smaller((kVector - elements_past_vector(to)) % kVector, length);
  const int vectors = (length - head) / kVector, tail = (length - head) % kVector;
  for (int i = thread; i < vectors; i += static_cast<int>(blockDim.x)) {
    reinterpret_cast<Elements<T, kVector>*>(to + head)[i] =
        reinterpret_cast<const Elements<T, kVector>*>(from + head)[i];
  }
  if (thread < head) to[thread] = from[thread];
  if (thread < tail) to[length - tail + thread] = from[length - tail + thread];
}

// The same by one warp of the block, and behind its back, where the GPU can do that, but called by all: whole vectors
// are one copy, which that warp waits for by ptx::wait_for_bulk_stores before a barrier frees `from`. Writes to `from`
// end with a ptx::fence_shared_for_wgmma.
template <class T>
__device__ __forceinline__ void store_run_in_bulk(T* to, const T* from, int length, int by) {
#if CONVT3D_HAS_WGMMA
  constexpr int kVector = 16 / sizeof(T);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (static_cast<int>(threadIdx.x) / 32 != by) return;
  const int head = smaller((kVector - elements_past_vector(to)) % kVector, length);
  const int whole = (length - head) / kVector * kVector;
  if (lane == 0 && whole > 0) {
    ptx::store_bulk(to + head, ptx::shared_address(from + head), static_cast<uint32_t>(whole * sizeof(T)));
  }
  ptx::commit_bulk_stores();
  // A vector's worth of lanes for what comes before them, and the next ones for what follows.
  const int element = lane < kVector ? lane : head + whole + lane - kVector;
  if (element < (lane < kVector ? head : length)) to[element] = from[element];
#else
  store_run(to, from, length);
#endif
}

}  // namespace convt3d::direct
