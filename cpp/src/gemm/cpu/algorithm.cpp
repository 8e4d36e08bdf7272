#include "gemm/algorithm.h"

#include <algorithm>

#include "gemm/cpu/backend.h"
#include "gemm/cpu/half.h"
#include "parallel.h"

namespace convt3d::gemm {
namespace {

// Runs a half-precision problem in float32: operands are widened into the workspace, results rounded once.
template <class Half>
class ThroughFloat32 {
 public:
  ThroughFloat32(const Plan& plan, void* workspace, int threads)
      : next_(static_cast<char*>(workspace) + WorkspaceLayout(plan).conversion), threads_(threads) {}

  const float* widen(const void* half, int64_t elements) {
    if (half == nullptr) return nullptr;
    const Half* source = static_cast<const Half*>(half);
    float* target = take(elements);
    in_runs(elements, [&](int64_t i) { target[i] = source[i].widen(); });
    return target;
  }

  float* room(const void* half, int64_t elements) { return half == nullptr ? nullptr : take(elements); }

  void round(const void* wide, void* half, int64_t elements) const {
    if (half == nullptr) return;
    const float* source = static_cast<const float*>(wide);
    Half* target = static_cast<Half*>(half);
    in_runs(elements, [&](int64_t i) { target[i] = Half::round(source[i]); });
  }

 private:
  float* take(int64_t elements) {
    float* taken = reinterpret_cast<float*>(next_);
    next_ += (elements * sizeof(float) + 255) / 256 * 256;
    return taken;
  }

  template <class Body>
  void in_runs(int64_t elements, const Body& body) const {
    constexpr int64_t kRun = 1 << 15;
    parallel_for(threads_, (elements + kRun - 1) / kRun, [&](int64_t run) {
      const int64_t end = std::min((run + 1) * kRun, elements);
      for (int64_t i = run * kRun; i < end; ++i) body(i);
    });
  }

  char* next_;
  int threads_;
};

template <class Half>
void run_half(const CpuBackend& backend, const Plan& plan, const Operands& operands, void* workspace, int threads) {
  const Problem& problem = plan.problem;
  ThroughFloat32<Half> through(plan, workspace, threads);
  Plan wide_plan = plan;
  wide_plan.problem.dtype = DataType::float32;
  Operands wide;
  wide.input = through.widen(operands.input, problem.input_elements());
  wide.weight = through.widen(operands.weight, problem.weight_elements());
  wide.bias = through.widen(operands.bias, problem.out_channels);
  wide.grad_output = through.widen(operands.grad_output, problem.output_elements());
  wide.output = through.room(operands.output, problem.output_elements());
  wide.grad_input = through.room(operands.grad_input, problem.input_elements());
  wide.grad_weight = through.room(operands.grad_weight, problem.weight_elements());
  wide.grad_bias = through.room(operands.grad_bias, problem.out_channels);
  run<float>(backend, wide_plan, wide, workspace);
  through.round(wide.output, operands.output, problem.output_elements());
  through.round(wide.grad_input, operands.grad_input, problem.input_elements());
  through.round(wide.grad_weight, operands.grad_weight, problem.weight_elements());
  through.round(wide.grad_bias, operands.grad_bias, problem.out_channels);
}

}  // namespace

void run_cpu(const Plan& plan, const Operands& operands, void* workspace, const Execution& execution) {
  const CpuBackend backend(execution.threads);
  switch (plan.problem.dtype) {
    case DataType::float64:
      return run<double>(backend, plan, operands, workspace);
    case DataType::float32:
      return run<float>(backend, plan, operands, workspace);
    case DataType::float16:
      return run_half<Float16>(backend, plan, operands, workspace, execution.threads);
    case DataType::bfloat16:
      return run_half<BFloat16>(backend, plan, operands, workspace, execution.threads);
  }
}

}  // namespace convt3d::gemm
