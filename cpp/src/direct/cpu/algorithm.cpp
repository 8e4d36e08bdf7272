#include "direct/algorithm.h"

#include "cpu/sums.h"
#include "cpu/widened.h"
#include "direct/cpu/tiles.h"
#include "workspace.h"

namespace convt3d::direct {
namespace {

template <class T>
void run(const Plan& plan, const Operands& operands, char* workspace, int threads) {
  const Problem& problem = plan.problem;
  const T* weight = static_cast<const T*>(operands.weight);
  const T* input = static_cast<const T*>(operands.input);
  const T* grad_output = static_cast<const T*>(operands.grad_output);
  if (plan.op == Operator::forward) {
    gather_tiles(problem, Operator::forward, input, weight, static_cast<const T*>(operands.bias),
                 static_cast<T*>(operands.output), threads);
  }
  if (operands.grad_input != nullptr) {
    gather_tiles<T>(problem, Operator::grad_input, grad_output, weight, nullptr, static_cast<T*>(operands.grad_input),
                    threads);
  }
  if (operands.grad_weight != nullptr) {
    T* result = static_cast<T*>(operands.grad_weight);
    T* partials = plan.partials == 1 ? result : reinterpret_cast<T*>(workspace + WorkspaceLayout(plan).partials);
    reduce_tiles(problem, grad_output, input, plan.partials, partials, threads);
    if (plan.partials > 1) sum_partials(partials, plan.partials, problem.weight_elements(), result, threads);
  }
}

}  // namespace

void run_cpu(const Plan& plan, const Operands& operands, void* workspace, const Execution& execution) {
  char* const bytes = static_cast<char*>(workspace);
  const auto run_float = [&](const Plan& wide_plan, const Operands& wide) {
    run<float>(wide_plan, wide, bytes, execution.threads);
  };
  void* const copies = bytes + WorkspaceLayout(plan).conversion;
  switch (plan.problem.dtype) {
    case DataType::float64:
      return run<double>(plan, operands, bytes, execution.threads);
    case DataType::float32:
      return run<float>(plan, operands, bytes, execution.threads);
    case DataType::float16:
      return run_widened<Float16>(plan, operands, copies, execution.threads, run_float);
    case DataType::bfloat16:
      return run_widened<BFloat16>(plan, operands, copies, execution.threads, run_float);
  }
}

}  // namespace convt3d::direct
