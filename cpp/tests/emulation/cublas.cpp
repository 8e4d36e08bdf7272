#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>

#include "gemm/cuda/cublas.h"

namespace convt3d::gemm {
namespace {

template <class Operand, class Result, class Sum>
void multiply(const Gemm& gemm, const Operand* a, const Operand* b, Result* c) {
  for (int64_t member = 0; member < gemm.batch; ++member) {
    for (int64_t row = 0; row < gemm.m; ++row) {
      for (int64_t column = 0; column < gemm.n; ++column) {
        Result& result = c[member * gemm.stride_c + row * gemm.ldc + column];
        Sum sum = gemm.accumulate ? static_cast<Sum>(result) : Sum(0);
        for (int64_t k = 0; k < gemm.k; ++k) {
          const int64_t from_a = gemm.transpose_a ? k * gemm.lda + row : row * gemm.lda + k;
          const int64_t from_b = gemm.transpose_b ? column * gemm.ldb + k : k * gemm.ldb + column;
          sum += static_cast<Sum>(a[member * gemm.stride_a + from_a]) *
                 static_cast<Sum>(b[member * gemm.stride_b + from_b]);
        }
        result = static_cast<Result>(sum);
      }
    }
  }
}

template <class Half>
void multiply_halves(const Gemm& gemm, cudaDataType_t result, const void* a, const void* b, void* c) {
  const Half *first = static_cast<const Half*>(a), *second = static_cast<const Half*>(b);
  if (result == CUDA_R_32F) return multiply<Half, float, float>(gemm, first, second, static_cast<float*>(c));
  multiply<Half, Half, float>(gemm, first, second, static_cast<Half*>(c));
}

}  // namespace

void cublas_gemm(cublasHandle_t, const Gemm& gemm, const CublasTypes& types, const void* a, const void* b, void* c) {
  switch (types.operand) {
    case CUDA_R_64F:
      return multiply<double, double, double>(gemm, static_cast<const double*>(a), static_cast<const double*>(b),
                                              static_cast<double*>(c));
    case CUDA_R_32F:
      return multiply<float, float, float>(gemm, static_cast<const float*>(a), static_cast<const float*>(b),
                                           static_cast<float*>(c));
    case CUDA_R_16F:
      return multiply_halves<__half>(gemm, types.result, a, b, c);
    case CUDA_R_16BF:
      return multiply_halves<__nv_bfloat16>(gemm, types.result, a, b, c);
    default:
      throw std::logic_error("a product of a type that no problem has");
  }
}

}  // namespace convt3d::gemm
