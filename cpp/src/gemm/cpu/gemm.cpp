// Batched products over a single-threaded CBLAS: the batch and slices of each product are what the threads share.
// One pool of threads then serves products and loops alike, and none of them waits spinning for the other.
#include <algorithm>
#include <limits>
#include <stdexcept>

#include "gemm/cpu/backend.h"
#include "gemm/cpu/cblas.h"
#include "parallel.h"

namespace convt3d::gemm {
namespace {

// Narrower slices than this spend more on packing than they gain.
constexpr int64_t kMinimumSlice = 64;

CBLAS_TRANSPOSE transposed(bool transpose) { return transpose ? CblasTrans : CblasNoTrans; }

int narrowed(int64_t size) {
  if (size > std::numeric_limits<int>::max()) throw std::runtime_error("a matrix exceeds the 32-bit sizes of CBLAS");
  return static_cast<int>(size);
}

template <class T>
void multiply(const Gemm& gemm, const T* a, const T* b, T* c) {
  const int m = narrowed(gemm.m), n = narrowed(gemm.n), k = narrowed(gemm.k);
  const int lda = narrowed(gemm.lda), ldb = narrowed(gemm.ldb), ldc = narrowed(gemm.ldc);
  const T beta = gemm.accumulate ? T{1} : T{0};
  cblas_gemm(transposed(gemm.transpose_a), transposed(gemm.transpose_b), m, n, k, T{1}, a, lda, b, ldb, beta, c, ldc);
}

}  // namespace

template <class T>
void CpuBackend::gemm(const Gemm& gemm, const T* a, const T* b, T* c) const {
  const SingleThreadedBlas single_threaded;
  // Slices of the longer side of the result, enough of them that the threads even out.
  const bool slice_rows = gemm.m > gemm.n;
  const int64_t extent = slice_rows ? gemm.m : gemm.n;
  const int64_t wanted = threads_ == 1 ? 1 : (4 * threads_ + gemm.batch - 1) / gemm.batch;
  const int64_t slices = std::clamp<int64_t>(extent / kMinimumSlice, 1, wanted);
  const int64_t slice = ((extent + slices - 1) / slices + 15) / 16 * 16;
  const int64_t step_a = !slice_rows ? 0 : gemm.transpose_a ? 1 : gemm.lda;
  const int64_t step_b = slice_rows ? 0 : gemm.transpose_b ? gemm.ldb : 1;
  const int64_t step_c = slice_rows ? gemm.ldc : 1;
  parallel_for(std::min(threads_, kBlasCallers), gemm.batch * slices, [&](int64_t task) {
    const int64_t member = task / slices, begin = task % slices * slice;
    if (begin >= extent) return;
    Gemm part = gemm;
    (slice_rows ? part.m : part.n) = std::min(slice, extent - begin);
    multiply(part, a + member * gemm.stride_a + begin * step_a, b + member * gemm.stride_b + begin * step_b,
             c + member * gemm.stride_c + begin * step_c);
  });
}

template void CpuBackend::gemm(const Gemm&, const float*, const float*, float*) const;
template void CpuBackend::gemm(const Gemm&, const double*, const double*, double*) const;

}  // namespace convt3d::gemm
