#include "direct/algorithm.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/check.h"
#include "cuda/sums.h"
#include "direct/cuda/kernels.h"
#include "workspace.h"

namespace convt3d::direct {
namespace {

template <class T>
class Runner {
 public:
  Runner(const Plan& plan, const Operands& operands, void* workspace, cudaStream_t stream)
      : plan_(plan), operands_(operands), workspace_(static_cast<char*>(workspace)), layout_(plan), stream_(stream) {}

  void run() const {
    if (plan_.op == Operator::forward) {
      gather(Operator::forward, operands_.input, operands_.output);
    } else {
      if (operands_.grad_input != nullptr) gather(Operator::grad_input, operands_.grad_output, operands_.grad_input);
      if (operands_.grad_weight != nullptr) reduce();
    }
  }

 private:
  const Schedule& schedule() const { return *plan_.schedule; }

  void gather(Operator op, const void* from, void* to) const {
    const Problem& problem = plan_.problem;
    if (problem.batch == 0) return;
    const T* source = static_cast<const T*>(from);
    const T* weight = static_cast<const T*>(operands_.weight);
    const T* bias = static_cast<const T*>(operands_.bias);
    T* destination = static_cast<T*>(to);
    switch (schedule().gather) {
      case Family::depthwise:
        return gather_depthwise<T>(problem, op, plan_.target, source, weight, bias, destination, stream_);
      case Family::tensor:
        if constexpr (!std::is_same_v<T, double>) {
          return gather_tensor<T>(problem, op, schedule().tensor_gather, source, weight, bias, destination,
                                  workspace_ + layout_.weights, stream_);
        }
        return;
      case Family::pipelined:
        if constexpr (!std::is_same_v<T, double>) {
          return gather_pipelined<T>(problem, op, schedule().pipelined_gather, source, weight, bias, destination,
                                     workspace_ + layout_.weights, stream_);
        }
        return;
      case Family::simt:
        return gather_simt<T>(problem, op, source, weight, bias, destination, stream_);
    }
  }

  void reduce() const {
    const Problem& problem = plan_.problem;
    T* result = static_cast<T*>(operands_.grad_weight);
    if (problem.batch == 0) {
      return check_cuda(cudaMemsetAsync(result, 0, problem.weight_elements() * sizeof(T), stream_), "cudaMemsetAsync");
    }
    const T* grad_output = static_cast<const T*>(operands_.grad_output);
    const T* input = static_cast<const T*>(operands_.input);
    auto* partials = reinterpret_cast<Accumulator<T>*>(workspace_ + layout_.partials);
    switch (schedule().reduction) {
      case Family::depthwise:
        reduce_depthwise<T>(problem, plan_.partials, grad_output, input, partials, stream_);
        break;
      case Family::tensor:
        if constexpr (!std::is_same_v<T, double>) {
          reduce_tensor<T>(problem, schedule().tensor_reduction, grad_output, input, partials, result, stream_);
        }
        break;
      case Family::pipelined:
      case Family::simt:
        reduce_simt<T>(problem, plan_.partials, grad_output, input, partials, stream_);
        break;
    }
    if (plan_.partial_bytes == 0) return;
    const Begins begins = plan_.target.compute_capability == 90 ? Begins::early : Begins::in_turn;
    sum_partials<T>(partials, plan_.partials, problem.weight_elements(), result, stream_, begins);
  }

  const Plan& plan_;
  const Operands& operands_;
  char* workspace_;
  WorkspaceLayout layout_;
  cudaStream_t stream_;
};

}  // namespace

void run_cuda(const Plan& plan, const Operands& operands, void* workspace, const Execution& execution) {
  const DeviceGuard guard(execution.device);
  const auto stream = static_cast<cudaStream_t>(execution.stream);
  switch (plan.problem.dtype) {
    case DataType::float64:
      return Runner<double>(plan, operands, workspace, stream).run();
    case DataType::float32:
      return Runner<float>(plan, operands, workspace, stream).run();
    case DataType::float16:
      return Runner<__half>(plan, operands, workspace, stream).run();
    case DataType::bfloat16:
      return Runner<__nv_bfloat16>(plan, operands, workspace, stream).run();
  }
}

}  // namespace convt3d::direct
