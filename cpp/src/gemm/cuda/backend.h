// The GEMM path's steps on a GPU: cuBLAS products and the kernels of lowering.cu and sums.cu, all on one stream.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cuda/check.h"
#include "cuda/sums.h"
#include "gemm/columns.h"
#include "gemm/cuda/cublas.h"
#include "gemm/driver.h"
#include "gemm/gemm.h"
#include "geometry.h"

namespace convt3d::gemm {

template <class T>
cudaDataType_t cuda_type();

class CudaBackend {
 public:
  CudaBackend(int device, cudaStream_t stream, Precision precision, void* workspace, int64_t workspace_bytes)
      : stream_(stream), precision_(precision) {
    handle_ = workspace_bytes > 0 ? cublas_handle(device, stream, workspace, workspace_bytes) : nullptr;
  }

  template <class Operand, class Result>
  void gemm(const Gemm& gemm, const Operand* a, const Operand* b, Result* c) const {
    CublasTypes types{cuda_type<Operand>(), cuda_type<Result>(), CUBLAS_COMPUTE_32F};
    if (std::is_same_v<Operand, double>) types.compute = CUBLAS_COMPUTE_64F;
    if (std::is_same_v<Operand, float> && precision_ == Precision::tf32) types.compute = CUBLAS_COMPUTE_32F_FAST_TF32;
    cublas_gemm(handle_, gemm, types, a, b, c);
  }

  template <class T, class Column>
  void col2vol(const Problem& problem, const ColumnBlock& block, Range<int64_t> planes, const Column* columns,
               const T* bias, T* output) const;

  template <class T>
  void vol2col(const Problem& problem, const ColumnBlock& block, const T* volume, T* columns) const;

  template <class T>
  void fill_bias(const Problem& problem, const T* bias, T* volume) const;

  template <class T>
  void sum_partials(const Accumulator<T>* partials, int64_t count, int64_t elements, T* result) const {
    convt3d::sum_partials<T>(partials, count, elements, result, stream_);
  }

  template <class T>
  void bias_partials(const Problem& problem, int64_t count, const T* volume, Accumulator<T>* partials) const;

  void clear(void* pointer, int64_t bytes) const {
    check_cuda(cudaMemsetAsync(pointer, 0, static_cast<size_t>(bytes), stream_), "cudaMemsetAsync");
  }

 private:
  cublasHandle_t handle_ = nullptr;
  cudaStream_t stream_;
  Precision precision_;
};

}  // namespace convt3d::gemm
