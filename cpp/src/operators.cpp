// The public operators: they check that the plan and the call belong together, and pick algorithm and backend.
#include <stdexcept>

#include "convt3d/convt3d.h"
#include "direct/algorithm.h"
#include "direct/schedule.h"
#include "gemm/algorithm.h"
#include "gemm/plan.h"
#include "operands.h"

namespace convt3d {
namespace {

void run(const Plan& plan, Operator expected, const Operands& operands, void* workspace, const Execution& execution) {
  if (plan.op != expected) throw std::invalid_argument("the plan was made for another operator");
  if (plan.workspace_bytes > 0 && workspace == nullptr) throw std::invalid_argument("the plan needs a workspace");
  const bool is_direct = plan.algorithm == Algorithm::direct;
  if (plan.target.backend == Backend::cpu) {
#ifdef CONVT3D_WITH_CPU
    return (is_direct ? direct::run_cpu : gemm::run_cpu)(plan, operands, workspace, execution);
#endif
  } else {
#ifdef CONVT3D_WITH_CUDA
    return (is_direct ? direct::run_cuda : gemm::run_cuda)(plan, operands, workspace, execution);
#endif
  }
  throw std::runtime_error("this build has no backend for the plan's target");
}

}  // namespace

Plan make_plan(const Problem& problem, Operator op, const Target& target, int64_t workspace_limit,
               Algorithm algorithm) {
  // The bias gradient is a sum, and no algorithm's business.
  return algorithm == Algorithm::gemm || op == Operator::grad_bias
             ? gemm::plan_columns(problem, op, target, workspace_limit)
             : direct::plan_direct(problem, op, target, workspace_limit);
}

void forward(const Plan& plan, const void* input, const void* weight, const void* bias, void* output, void* workspace,
             const Execution& execution) {
  Operands operands;
  operands.input = input;
  operands.weight = weight;
  operands.bias = bias;
  operands.output = output;
  run(plan, Operator::forward, operands, workspace, execution);
}

void grad_input(const Plan& plan, const void* grad_output, const void* weight, void* grad_input, void* workspace,
                const Execution& execution) {
  Operands operands;
  operands.grad_output = grad_output;
  operands.weight = weight;
  operands.grad_input = grad_input;
  run(plan, Operator::grad_input, operands, workspace, execution);
}

void grad_weight(const Plan& plan, const void* grad_output, const void* input, void* grad_weight, void* workspace,
                 const Execution& execution) {
  Operands operands;
  operands.grad_output = grad_output;
  operands.input = input;
  operands.grad_weight = grad_weight;
  run(plan, Operator::grad_weight, operands, workspace, execution);
}

void grad_input_weight(const Plan& plan, const void* grad_output, const void* input, const void* weight,
                       void* grad_input, void* grad_weight, void* workspace, const Execution& execution) {
  Operands operands;
  operands.grad_output = grad_output;
  operands.input = input;
  operands.weight = weight;
  operands.grad_input = grad_input;
  operands.grad_weight = grad_weight;
  run(plan, Operator::grad_input_weight, operands, workspace, execution);
}

void grad_bias(const Plan& plan, const void* grad_output, void* grad_bias, void* workspace,
               const Execution& execution) {
  Operands operands;
  operands.grad_output = grad_output;
  operands.grad_bias = grad_bias;
  run(plan, Operator::grad_bias, operands, workspace, execution);
}

}  // namespace convt3d
