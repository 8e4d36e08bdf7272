#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "gemm/algorithm.h"
#include "gemm/cuda/backend.h"
#include "workspace.h"

namespace convt3d::gemm {

template <>
cudaDataType_t cuda_type<double>() {
  return CUDA_R_64F;
}
template <>
cudaDataType_t cuda_type<float>() {
  return CUDA_R_32F;
}
template <>
cudaDataType_t cuda_type<__half>() {
  return CUDA_R_16F;
}
template <>
cudaDataType_t cuda_type<__nv_bfloat16>() {
  return CUDA_R_16BF;
}

void run_cuda(const Plan& plan, const Operands& operands, void* workspace, const Execution& execution) {
  const DeviceGuard guard(execution.device);
  char* library_workspace = static_cast<char*>(workspace) + WorkspaceLayout(plan).library;
  const CudaBackend backend(execution.device, static_cast<cudaStream_t>(execution.stream), plan.problem.precision,
                            library_workspace, plan.library_bytes);
  switch (plan.problem.dtype) {
    case DataType::float64:
      return run<double>(backend, plan, operands, workspace);
    case DataType::float32:
      return run<float>(backend, plan, operands, workspace);
    case DataType::float16:
      return run<__half>(backend, plan, operands, workspace);
    case DataType::bfloat16:
      return run<__nv_bfloat16>(backend, plan, operands, workspace);
  }
}

}  // namespace convt3d::gemm
