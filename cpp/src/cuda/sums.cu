#include "cuda/sums.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/ptx.h"

namespace convt3d {
namespace {

constexpr int kThreads = 256;

// One thread adds one element of all partial sums, from the first to the last, in float64: there may be thousands.
// Bound by reading them.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_partials_kernel(const Accumulator<T>* partials, int64_t count, int64_t elements, T* result) {
  ptx::wait_for_previous_kernel();
  const int64_t element = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (element >= elements) return;
  double sum = 0;
  for (int64_t part = 0; part < count; ++part) sum += partials[part * elements + element];
  result[element] = static_cast<T>(sum);
}

}  // namespace

template <class T>
void sum_partials(const Accumulator<T>* partials, int64_t count, int64_t elements, T* result, cudaStream_t stream,
                  Begins begins) {
  const unsigned blocks = static_cast<unsigned>((elements + kThreads - 1) / kThreads);
  launch(begins, "launching sum_partials", sum_partials_kernel<T>, blocks, kThreads, 0, stream, partials, count,
         elements, result);
}

template void sum_partials(const double*, int64_t, int64_t, double*, cudaStream_t, Begins);
template void sum_partials(const float*, int64_t, int64_t, float*, cudaStream_t, Begins);
template void sum_partials(const float*, int64_t, int64_t, __half*, cudaStream_t, Begins);
template void sum_partials(const float*, int64_t, int64_t, __nv_bfloat16*, cudaStream_t, Begins);

}  // namespace convt3d
