// cuBLAS, bound at run time to the copy that is already in the process (PyTorch's, say), so that there is never a
// second.
#pragma once

#include <cublas_v2.h>

#include <string>

#include "convt3d/problem.h"
#include "gemm/gemm.h"

namespace convt3d::gemm {

// The entry points used here, of cuBLAS 12 or 13.
struct CublasLibrary {
  decltype(&cublasCreate_v2) create = nullptr;
  decltype(&cublasSetStream_v2) set_stream = nullptr;
  decltype(&cublasSetWorkspace_v2) set_workspace = nullptr;
  decltype(&cublasSetMathMode) set_math_mode = nullptr;
  decltype(&cublasGetProperty) get_property = nullptr;
  decltype(&cublasGetStatusString) status_string = nullptr;
  decltype(&cublasGemmStridedBatchedEx_64) gemm_strided_batched = nullptr;
  decltype(&cublasGemmEx_64) gemm = nullptr;
  std::string name;  // empty where no cuBLAS could be bound; then `missing` says why
  std::string missing;

  static const CublasLibrary& instance();

  std::string description() const;
  void check(cublasStatus_t status, const char* what) const;
};

// A handle of this host thread for the current device, with the given stream and workspace set.
cublasHandle_t cublas_handle(int device, cudaStream_t stream, void* workspace, int64_t workspace_bytes);

// Types and compute mode of a product.
struct CublasTypes {
  cudaDataType_t operand, result;
  cublasComputeType_t compute;
};

void cublas_gemm(cublasHandle_t handle, const Gemm& gemm, const CublasTypes& types, const void* a, const void* b,
                 void* c);

}  // namespace convt3d::gemm
