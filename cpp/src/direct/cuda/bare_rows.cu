// Rows of the output that no tap reaches, as where strides exceed the kernel or share a factor with the dilation: the
// bias alone. The pipelined gather, which comes after, leaves them out, unless its runs have them.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "cuda/launch.h"
#include "direct/cuda/kernels.h"
#include "geometry.h"

namespace convt3d::direct {
namespace {

constexpr int kThreads = 256;

template <class T>
struct BareRowsArguments {
  T* destination;
  const T* bias;
  int64_t volumes;    // samples, and in NCDHW their channels
  int depth, height;  // planes of a volume, rows of a plane
  int row;            // elements of a row
  int channels;       // in NCDHW of one volume after the other, in NDHWC of one element after the other
  bool channels_first;
  bool fills_planes;  // see PipelinedGather
  int stride[2];      // of the depth and the height
  uint64_t residues[2];
};

// `count` elements, by `threads`: 16 bytes at a time between the ends. `value_at` an element of these.
template <class T, class Value>
__device__ __forceinline__ void fill(T* begin, int count, int thread, int threads, const Value& value_at) {
  constexpr int kVector = 16 / sizeof(T);
  const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(begin) % 16 / sizeof(T));
  const int head = min(misaligned == 0 ? 0 : kVector - misaligned, count), vectors = (count - head) / kVector;
  for (int i = thread; i < vectors; i += threads) {
    alignas(16) T values[kVector];
    const int first = head + i * kVector;
#pragma unroll
    for (int k = 0; k < kVector; ++k) values[k] = value_at(first + k);
    *reinterpret_cast<uint4*>(begin + first) = *reinterpret_cast<const uint4*>(values);
  }
  const int tail = head + vectors * kVector;
  if (thread < head) begin[thread] = value_at(thread);
  if (thread < count - tail) begin[tail + thread] = value_at(tail + thread);
}

// Blocks of threads take a volume by x and a plane by y, and share it by z: as one run of elements, or a warp takes a
// row at a time. Traffic: each bare row once, and short rows beside them. Bound by these writes.
template <class T>
__global__ void __launch_bounds__(kThreads)
    fill_bare_rows_kernel(const __grid_constant__ BareRowsArguments<T> arguments) {
  const auto is_bare = [&arguments](int axis, int position) {
    return (arguments.residues[axis] >> position % arguments.stride[axis] & 1) != 0;
  };
  const int thread = static_cast<int>(blockIdx.z * kThreads + threadIdx.x);
  const int threads = static_cast<int>(gridDim.z) * kThreads;
  for (int64_t volume = blockIdx.x; volume < arguments.volumes; volume += gridDim.x) {
    T constant(0.0f);
    if (arguments.bias != nullptr && arguments.channels_first) constant = arguments.bias[volume % arguments.channels];
    const auto fill_run = [&](T* run, int count, int first, int step) {
      if (arguments.bias == nullptr || arguments.channels_first) {
        fill(run, count, first, step, [constant](int) { return constant; });
      } else {
        fill(run, count, first, step,
             [&arguments](int element) { return arguments.bias[element % arguments.channels]; });
      }
    };
    for (int depth = static_cast<int>(blockIdx.y); depth < arguments.depth; depth += static_cast<int>(gridDim.y)) {
      T* plane = arguments.destination + (volume * arguments.depth + depth) * arguments.height * arguments.row;
      if (is_bare(0, depth) || arguments.fills_planes) {
        fill_run(plane, arguments.height * arguments.row, thread, threads);
      } else if (arguments.residues[1] != 0) {
        for (int row = thread / 32; row < arguments.height; row += threads / 32) {
          if (is_bare(1, row)) fill_run(plane + int64_t{row} * arguments.row, arguments.row, thread % 32, 32);
        }
      }
    }
  }
}

}  // namespace

template <class T>
void fill_bare_rows(const Problem& problem, const PipelinedGather& gather, const T* bias, T* output,
                    cudaStream_t stream) {
  const Extent extent = problem.output();
  if (gather.fills_runs || (gather.bare_residues[0] == 0 && gather.bare_residues[1] == 0)) return;
  const bool channels_first = problem.layout == Layout::ncdhw;
  const int64_t row = extent[2] * (channels_first ? 1 : problem.out_channels);
  const BareRowsArguments<T> arguments{output,
                                       bias,
                                       problem.batch * (channels_first ? problem.out_channels : 1),
                                       static_cast<int>(extent[0]),
                                       static_cast<int>(extent[1]),
                                       static_cast<int>(row),
                                       static_cast<int>(problem.out_channels),
                                       channels_first,
                                       gather.fills_planes,
                                       {gather.destination_stride[0], gather.destination_stride[1]},
                                       {gather.bare_residues[0], gather.bare_residues[1]}};
  constexpr int64_t kMostOfGrid = 65535, kEnoughBlocks = 4096, kElementsOfBlock = 4096;
  const int64_t volumes = std::min(arguments.volumes, kMostOfGrid), planes = std::min(extent[0], kMostOfGrid);
  const int64_t shares =
      std::clamp<int64_t>(extent[1] * row / kElementsOfBlock, 1, ceil_divide<int64_t>(kEnoughBlocks, volumes * planes));
  launch("launching fill_bare_rows", fill_bare_rows_kernel<T>,
         dim3(static_cast<unsigned>(volumes), static_cast<unsigned>(planes), static_cast<unsigned>(shares)), kThreads,
         0, stream, arguments);
}

template void fill_bare_rows(const Problem&, const PipelinedGather&, const float*, float*, cudaStream_t);
template void fill_bare_rows(const Problem&, const PipelinedGather&, const __half*, __half*, cudaStream_t);
template void fill_bare_rows(const Problem&, const PipelinedGather&, const __nv_bfloat16*, __nv_bfloat16*,
                             cudaStream_t);

}  // namespace convt3d::direct
