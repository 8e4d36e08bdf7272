// What the depthwise kernels by bands look at their results by: zeros of a band make infinities and NaNs spread.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/ptx.h"

namespace convt3d::direct {

// Whether all of the results that it has seen are finite: 0 times one is 0 then, else NaN.
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

}  // namespace convt3d::direct
