// What is added beside the products: bias written ahead of a pointwise product, and the bias gradient's partial sums.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/launch.h"
#include "gemm/cuda/backend.h"

namespace convt3d::gemm {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;

unsigned blocks_for(int64_t threads) { return static_cast<unsigned>((threads + kThreads - 1) / kThreads); }

// One thread writes one element; blockIdx.y is the sample (NCDHW: the sample's channel). Bound by the store.
template <class T, bool ChannelsFirst>
__global__ void __launch_bounds__(kThreads)
    fill_bias_kernel(const T* bias, T* volume, int64_t volumes, int64_t elements, int channels) {
  const int64_t element = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (element >= elements) return;
  for (int64_t index = blockIdx.y; index < volumes; index += gridDim.y) {
    volume[index * elements + element] = bias[ChannelsFirst ? index % channels : element % channels];
  }
}

// Where one part of `count` begins in `total` items.
__device__ int64_t part_begin(int64_t total, int64_t part, int64_t count) {
  return total / count * part + total % count * part / count;
}

// NCDHW. One block sums one channel's voxels [begin, end) over all samples; threads read along the row, and a fixed
// tree adds them up. Bound by reading the volume.
template <class T>
__global__ void __launch_bounds__(kThreads)
    bias_partials_ncdhw(const T* volume, int64_t batch, int64_t channels, int64_t voxels, Accumulator<T>* partials) {
  const int64_t channel = blockIdx.x, part = blockIdx.y, count = gridDim.y;
  const int64_t begin = part_begin(voxels, part, count), end = part_begin(voxels, part + 1, count);
  Accumulator<T> sum = 0;
  for (int64_t sample = 0; sample < batch; ++sample) {
    const T* row = volume + (sample * channels + channel) * voxels;
    for (int64_t voxel = begin + threadIdx.x; voxel < end; voxel += kThreads) {
      sum += static_cast<Accumulator<T>>(row[voxel]);
    }
  }
  __shared__ Accumulator<T> sums[kThreads];
  sums[threadIdx.x] = sum;
  for (int width = kThreads / 2; width > 0; width /= 2) {
    __syncthreads();
    if (threadIdx.x < width) sums[threadIdx.x] += sums[threadIdx.x + width];
  }
  if (threadIdx.x == 0) partials[part * channels + channel] = sums[0];
}

// NDHWC. One block sums 32 channels over the rows [begin, end) of the (sample, voxel) by channel matrix: a warp reads
// neighbouring channels, and the block's warps, adding up in order, every eighth row. Bound by reading the volume.
template <class T>
__global__ void __launch_bounds__(kThreads)
    bias_partials_ndhwc(const T* volume, int64_t rows, int64_t channels, Accumulator<T>* partials) {
  constexpr int kWarps = kThreads / kWarp;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kWarp + lane, part = blockIdx.y, count = gridDim.y;
  const int64_t begin = part_begin(rows, part, count), end = part_begin(rows, part + 1, count);
  Accumulator<T> sum = 0;
  if (channel < channels) {
    for (int64_t row = begin + warp; row < end; row += kWarps) {
      sum += static_cast<Accumulator<T>>(volume[row * channels + channel]);
    }
  }
  __shared__ Accumulator<T> sums[kWarps][kWarp];
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || channel >= channels) return;
  for (int other = 1; other < kWarps; ++other) sum += sums[other][lane];
  partials[part * channels + channel] = sum;
}

}  // namespace

template <class T>
void CudaBackend::fill_bias(const Problem& problem, const T* bias, T* volume) const {
  const int64_t voxels = problem.output_voxels(), channels = problem.out_channels;
  const bool channels_first = problem.layout == Layout::ncdhw;
  const int64_t volumes = channels_first ? problem.batch * channels : problem.batch;
  const int64_t elements = channels_first ? voxels : voxels * channels;
  const dim3 grid(blocks_for(elements), static_cast<unsigned>(smaller<int64_t>(volumes, 65535)));
  if (channels_first) {
    launch("launching fill_bias", fill_bias_kernel<T, true>, grid, kThreads, 0, stream_, bias, volume, volumes,
           elements, static_cast<int>(channels));
  } else {
    launch("launching fill_bias", fill_bias_kernel<T, false>, grid, kThreads, 0, stream_, bias, volume, volumes,
           elements, static_cast<int>(channels));
  }
}

template <class T>
void CudaBackend::bias_partials(const Problem& problem, int64_t count, const T* volume,
                                Accumulator<T>* partials) const {
  const int64_t channels = problem.out_channels, voxels = problem.output_voxels();
  if (problem.layout == Layout::ncdhw) {
    const dim3 grid(static_cast<unsigned>(channels), static_cast<unsigned>(count));
    launch("launching bias_partials", bias_partials_ncdhw<T>, grid, kThreads, 0, stream_, volume, problem.batch,
           channels, voxels, partials);
  } else {
    const dim3 grid(static_cast<unsigned>((channels + kWarp - 1) / kWarp), static_cast<unsigned>(count));
    launch("launching bias_partials", bias_partials_ndhwc<T>, grid, kThreads, 0, stream_, volume,
           problem.batch * voxels, channels, partials);
  }
}

#define CONVT3D_INSTANTIATE(T)                                              \
  template void CudaBackend::fill_bias(const Problem&, const T*, T*) const; \
  template void CudaBackend::bias_partials<T>(const Problem&, int64_t, const T*, Accumulator<T>*) const;
CONVT3D_INSTANTIATE(double)
CONVT3D_INSTANTIATE(float)
CONVT3D_INSTANTIATE(__half)
CONVT3D_INSTANTIATE(__nv_bfloat16)
#undef CONVT3D_INSTANTIATE

}  // namespace convt3d::gemm
