// A program outside the repository as it would use the installed library: one small convolution and its gradients on
// the CPU, held against numbers worked out by hand.
#include <cmath>
#include <cstdio>
#include <vector>

#include "convt3d/convt3d.h"

namespace {

bool same(const char* name, const std::vector<float>& result, const std::vector<float>& expected) {
  for (size_t i = 0; i < expected.size(); ++i) {
    if (std::abs(result[i] - expected[i]) > 1e-4f) {
      std::fprintf(stderr, "%s[%zu] is %g, not %g\n", name, i, result[i], expected[i]);
      return false;
    }
  }
  return true;
}

}  // namespace

int main() {
  using namespace convt3d;

  // Along the width: input 2, kernel 3, stride 2, so output (2 - 1) * 2 + 3 = 5.
  Problem problem;
  problem.input = {1, 1, 2};
  problem.kernel = {1, 1, 3};
  problem.stride = {1, 1, 2};
  problem.validate();

  constexpr int64_t kLimit = 1 << 20;
  const Target target = Target::cpu(1);
  const Execution execution;
  std::vector<char> workspace;
  const auto plan_for = [&](Operator op) {
    const Plan plan = make_plan(problem, op, target, kLimit);
    workspace.resize(static_cast<size_t>(plan.workspace_bytes));
    return plan;
  };

  const std::vector<float> input{1, 2}, weight{10, 20, 30}, bias{1}, grad_output{1, 2, 3, 4, 5};
  std::vector<float> output(5), input_gradient(2), weight_gradient(3), bias_gradient(1);

  const Plan forward_plan = plan_for(Operator::forward);
  forward(forward_plan, input.data(), weight.data(), bias.data(), output.data(), workspace.data(), execution);
  const Plan input_plan = plan_for(Operator::grad_input);
  grad_input(input_plan, grad_output.data(), weight.data(), input_gradient.data(), workspace.data(), execution);
  const Plan weight_plan = plan_for(Operator::grad_weight);
  grad_weight(weight_plan, grad_output.data(), input.data(), weight_gradient.data(), workspace.data(), execution);
  const Plan bias_plan = plan_for(Operator::grad_bias);
  grad_bias(bias_plan, grad_output.data(), bias_gradient.data(), workspace.data(), execution);

  const bool right = same("output", output, {11, 21, 51, 41, 61}) & same("grad_input", input_gradient, {140, 260}) &
                     same("grad_weight", weight_gradient, {7, 10, 13}) & same("grad_bias", bias_gradient, {15});
  if (right) std::printf("convt3d %s computed on %s\n", build_info().version.c_str(), build_info().cblas.c_str());
  return right ? 0 : 1;
}
