// What the warps of the pipelined gather that store do while nothing has been handed over to them (see
// direct/cuda/pipelined_storer.h).
#pragma once

#include <cstdint>

#include "cuda/ptx.h"
#include "direct/cuda/pipelined_block.h"

namespace convt3d::direct {

// Of planes and rows without taps what is in no run, in NCDHW: the bias of its channel alone, stored in bulk from a few
// KB of it. What lies between the runs of two planes is a gap, which one warp stores. Traffic: each gap once, beside
// the products; few KB at a time, so that what the same unit copies, such as weights, need not wait long. Bound by
// memory.
template <class T>
class GapFiller {
 public:
  __device__ __forceinline__ GapFiller(const PipelinedArguments<T>& arguments, const PipelinedMemory& memory, int warp)
      : arguments_(arguments),
        gather_(arguments.gather),
        constants_(reinterpret_cast<T*>(memory.constants(gather_, warp))),
        lane_(static_cast<int>(threadIdx.x) % 32),
        gap_(static_cast<int64_t>(blockIdx.x) * gather_.storing_warps + warp) {
    fill_constants(T(0.0f));
  }

  // All lanes of the warp. False where nothing is left.
  __device__ __forceinline__ bool store_some() {
    constexpr int kSector = 32 / sizeof(T), kConstants = kConstantBytes / sizeof(T), kTogether = 8;
    if (left_ == 0 && !next_gap()) return false;
    const int to_sector = static_cast<int>(-reinterpret_cast<uintptr_t>(next_) % 32 / sizeof(T));
    int count;
    if (to_sector > 0 || left_ < kSector) {  // what it has of a sector
      count = to_sector > 0 ? min(to_sector, left_) : left_;
      if (lane_ < count) next_[lane_] = constant_;
    } else {
      count = min(left_ / kSector * kSector, kTogether * kConstants);
      const int own = min(count - lane_ * kConstants, kConstants);
      if (lane_ < kTogether && own > 0) {
        ptx::wait_for_bulk_stores<1>();
        ptx::store_bulk(next_ + lane_ * kConstants, ptx::shared_address(constants_), own * static_cast<int>(sizeof(T)));
        ptx::commit_bulk_stores();
      }
    }
    next_ += count;
    left_ -= count;
    return true;
  }

 private:
  // A gap has the rows behind a plane's runs, and the plane after it if that has no tap. Those of all channels follow
  // each other, as in tiles, so that warps write where tiles do.
  __device__ __forceinline__ bool next_gap() {
    const GatherVolume& to = arguments_.to;
    const int row = to.size[2], plane = to.size[1] * row, planes = to.size[0] + 1;
    const int behind = max(to.size[1] - static_cast<int>(gather_.first_bare_row()), 0) * row;
    for (; left_ == 0; gap_ += static_cast<int64_t>(gridDim.x) * gather_.storing_warps) {
      const int64_t number = gap_ / to.channels, sample = number / planes;
      if (sample >= arguments_.batch) return false;
      const int channel = static_cast<int>(gap_ - number * to.channels);
      const int depth = static_cast<int>(number - sample * planes);
      const int before = depth > 0 && !has_no_tap(depth - 1) ? behind : 0;
      left_ = before + (depth < to.size[0] && has_no_tap(depth) ? plane : 0);
      next_ = arguments_.destination + sample * to.sample_stride + channel * static_cast<int64_t>(to.channel_stride) +
              (depth * plane - before);
      if (left_ > 0 && arguments_.bias != nullptr) {
        ptx::wait_for_bulk_stores<0>();
        __syncwarp();
        fill_constants(arguments_.bias[channel]);
      }
    }
    return true;
  }
  __device__ __forceinline__ bool has_no_tap(int depth) const {
    return gather_.is_bare(0, depth % gather_.destination_stride[0]);
  }
  __device__ __forceinline__ void fill_constants(T constant) {
    constant_ = constant;
#pragma unroll 1
    for (int i = lane_; i < static_cast<int>(kConstantBytes / sizeof(T)); i += 32) constants_[i] = constant;
    ptx::fence_shared_for_wgmma();  // and for bulk stores
    __syncwarp();
  }

  const PipelinedArguments<T>& arguments_;
  const PipelinedGather& gather_;
  T* const constants_;
  T constant_;
  const int lane_;
  int64_t gap_;        // the next one
  T* next_ = nullptr;  // of this one, what is left
  int left_ = 0;
};

}  // namespace convt3d::direct
