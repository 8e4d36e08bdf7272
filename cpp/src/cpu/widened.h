// Half-precision problems on the CPU: operands are widened into the workspace, everything is computed in float32, and
// results are rounded once.
#pragma once

#include <algorithm>

#include "convt3d/convt3d.h"
#include "cpu/half.h"
#include "operands.h"
#include "parallel.h"
#include "workspace.h"

namespace convt3d {

// The bytes of one widened tensor, aligned.
inline int64_t widened_bytes(int64_t elements) { return align(elements * static_cast<int64_t>(sizeof(float))); }

// The bytes of everything that an operator reads and writes.
inline int64_t widened_bytes(const Problem& problem, Operator op) {
  const int64_t input = widened_bytes(problem.input_elements()), weight = widened_bytes(problem.weight_elements());
  const int64_t bytes = widened_bytes(problem.output_elements()) + input + weight + widened_bytes(problem.out_channels);
  return op == Operator::grad_input_weight ? bytes + input + weight : bytes;
}

template <class Half>
class ThroughFloat32 {
 public:
  ThroughFloat32(void* copies, int threads) : next_(static_cast<char*>(copies)), threads_(threads) {}

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
    next_ += widened_bytes(elements);
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

// Calls run(plan, operands) with a float32 plan and float32 copies of the operands, which take widened_bytes(problem,
// op) from `copies` on.
template <class Half, class Run>
void run_widened(const Plan& plan, const Operands& operands, void* copies, int threads, const Run& run) {
  const Problem& problem = plan.problem;
  ThroughFloat32<Half> through(copies, threads);
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
  run(wide_plan, wide);
  through.round(wide.output, operands.output, problem.output_elements());
  through.round(wide.grad_input, operands.grad_input, problem.input_elements());
  through.round(wide.grad_weight, operands.grad_weight, problem.weight_elements());
  through.round(wide.grad_bias, operands.grad_bias, problem.out_channels);
}

}  // namespace convt3d
