#include "gemm/algorithm.h"

#include "cpu/widened.h"
#include "gemm/cpu/backend.h"
#include "workspace.h"

namespace convt3d::gemm {

void run_cpu(const Plan& plan, const Operands& operands, void* workspace, const Execution& execution) {
  const CpuBackend backend(execution.threads);
  void* const copies = static_cast<char*>(workspace) + WorkspaceLayout(plan).conversion;
  const auto run_float = [&](const Plan& wide_plan, const Operands& wide) {
    run<float>(backend, wide_plan, wide, workspace);
  };
  switch (plan.problem.dtype) {
    case DataType::float64:
      return run<double>(backend, plan, operands, workspace);
    case DataType::float32:
      return run<float>(backend, plan, operands, workspace);
    case DataType::float16:
      return run_widened<Float16>(plan, operands, copies, execution.threads, run_float);
    case DataType::bfloat16:
      return run_widened<BFloat16>(plan, operands, copies, execution.threads, run_float);
  }
}

}  // namespace convt3d::gemm
