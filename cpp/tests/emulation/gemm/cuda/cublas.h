// In place of the sources' file of this name: products by their definition, one multiplication at a time.
#pragma once

#include <library_types.h>

#include "gemm/gemm.h"

using cublasHandle_t = void*;
enum cublasComputeType_t { CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_32F_FAST_TF32, CUBLAS_COMPUTE_64F };

namespace convt3d::gemm {

struct CublasTypes {
  cudaDataType_t operand, result;
  cublasComputeType_t compute;
};

inline cublasHandle_t cublas_handle(int, cudaStream_t, void*, int64_t) { return nullptr; }
void cublas_gemm(cublasHandle_t handle, const Gemm& gemm, const CublasTypes& types, const void* a, const void* b,
                 void* c);

}  // namespace convt3d::gemm
