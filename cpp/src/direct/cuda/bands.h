// What the depthwise kernels by bands have in common.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cuda/ptx.h"
#include "geometry.h"

namespace convt3d::direct {

__device__ __forceinline__ bool inside(int position, int size) {
  return static_cast<unsigned>(position) < static_cast<unsigned>(size);
}

// Whether all of the results that it has seen are finite, as zeros of a band make infinities and NaNs spread: 0 times
// one is 0 then, else NaN.
template <class T>
class Finiteness {
 public:
  __device__ void see(uint32_t pair) {
#if CONVT3D_HAS_MMA
    sum_ = __hfma2(*reinterpret_cast<const Pair*>(&pair), Pair{}, sum_);
#endif
  }
  __device__ bool all() const { return (*reinterpret_cast<const uint32_t*>(&sum_) & 0x7fff7fffu) == 0; }

 private:
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  Pair sum_ = Pair{};
};

// How many of all steps a block takes, so that all blocks are there at once, for which there is `room`, and end at
// about the same time. A tile's planes are `tile_steps` of them, and what a block begins a tile with, its bands and
// first sources, takes as long as `begin` more.
inline int64_t share_of_block(int64_t steps, int64_t tile_steps, int64_t room, int64_t begin) {
  const int64_t share = std::max(ceil_divide(steps, room), begin + 1);
  // A share that ends with a tile, or with one of its equal parts.
  const int64_t whole =
      share < tile_steps ? ceil_divide(tile_steps, tile_steps / share) : ceil_divide(share, tile_steps) * tile_steps;
  if (whole < tile_steps && tile_steps % whole != 0) return share;
  const int64_t begins = ceil_divide(share - 1, tile_steps) + 1, whole_begins = ceil_divide(whole, tile_steps);
  return whole + begin * whole_begins <= share + begin * begins ? whole : share;
}

}  // namespace convt3d::direct
