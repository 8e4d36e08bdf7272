// The GEMM path as the operators call it: one entry per backend.
#pragma once

#include "convt3d/convt3d.h"
#include "gemm/driver.h"
#include "operands.h"

namespace convt3d::gemm {

void run_cpu(const Plan& plan, const Operands& operands, void* workspace, const Execution& execution);
void run_cuda(const Plan& plan, const Operands& operands, void* workspace, const Execution& execution);

// Runs the plan's operator on tensors of type T.
template <class T, class Backend>
void run(const Backend& backend, const Plan& plan, const Operands& operands, void* workspace) {
  const Driver<Backend, T> driver(backend, plan, workspace);
  const T* input = static_cast<const T*>(operands.input);
  const T* weight = static_cast<const T*>(operands.weight);
  const T* grad_output = static_cast<const T*>(operands.grad_output);
  if (plan.op == Operator::forward) {
    const T* bias = static_cast<const T*>(operands.bias);
    T* output = static_cast<T*>(operands.output);
    if constexpr (sizeof(T) == 2) {
      if (plan.column_dtype == DataType::float32) {
        return driver.template forward<float>(input, weight, bias, output);
      }
    }
    driver.template forward<T>(input, weight, bias, output);
  } else if (plan.op == Operator::grad_bias) {
    driver.grad_bias(grad_output, static_cast<T*>(operands.grad_bias));
  } else {
    driver.gradients(grad_output, input, weight, static_cast<T*>(operands.grad_input),
                     static_cast<T*>(operands.grad_weight));
  }
}

}  // namespace convt3d::gemm
