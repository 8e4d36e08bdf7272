#include "direct/schedule.h"

#include <algorithm>
#include <optional>

#include "direct/cpu/plan.h"
#include "workspace.h"

namespace convt3d::direct {
namespace {

const char* name(Family family) {
  switch (family) {
    case Family::depthwise:
      return "depthwise";
    case Family::pipelined:
      return "pipelined";
    case Family::tensor:
      return "tensor";
    case Family::simt:
      return "simt";
  }
  return "";
}

// One input and one output channel in each group.
bool is_depthwise(const Problem& problem) {
  return problem.group_in_channels() == 1 && problem.group_out_channels() == 1;
}

// A float32 sum over so few voxels that three products of TF32 would be further off than float32 arithmetic is.
bool is_short_sum(const Problem& problem) {
  constexpr int64_t kShortest = 2048;
  return problem.dtype == DataType::float32 && problem.precision == Precision::ieee &&
         problem.batch * problem.input_voxels() < kShortest;
}

}  // namespace

Plan plan_direct(const Problem& problem, Operator op, const Target& target, int64_t workspace_limit) {
  problem.validate();
  Plan plan;
  plan.problem = problem;
  plan.op = op;
  plan.target = target;
  plan.algorithm = Algorithm::direct;
  if (target.backend == Backend::cpu) {
    plan_cpu(plan, workspace_limit);
    return plan;
  }
  Schedule schedule;
  std::optional<double> gather_cycles, reduction_cycles;
  const bool gathers = op != Operator::grad_weight, reduces = op != Operator::forward && op != Operator::grad_input;
  if (gathers) {
    const Operator gather = op == Operator::forward ? Operator::forward : Operator::grad_input;
    if (is_depthwise(problem)) {
      schedule.gather = Family::depthwise;
    } else if ((gather_cycles = cut_pipelined_gather(problem, gather, target, schedule.pipelined_gather))) {
      schedule.gather = Family::pipelined;
      plan.weight_bytes = align(schedule.pipelined_gather.packed_bytes);
    } else if ((gather_cycles = cut_tensor_gather(problem, gather, target, schedule.tensor_gather))) {
      schedule.gather = Family::tensor;
      plan.weight_bytes = align(schedule.tensor_gather.packed_bytes);
    }
  }
  if (reduces) {
    const int64_t partial = problem.weight_elements() * (problem.dtype == DataType::float64 ? 8 : 4);
    // Enough parts to fill the machine.
    plan.partials = std::clamp<int64_t>(workspace_limit / std::max<int64_t>(partial, 1), 1, 2 * target.parallelism);
    if (is_depthwise(problem)) {
      schedule.reduction = Family::depthwise;
    } else if (!is_short_sum(problem) &&
               (reduction_cycles = cut_tensor_reduction(problem, target, workspace_limit, schedule.tensor_reduction))) {
      schedule.reduction = Family::tensor;
      plan.partials = schedule.tensor_reduction.parts;
    }
    const bool in_place = schedule.reduction == Family::tensor && plan.partials == 1;
    plan.partial_bytes = in_place ? 0 : align(plan.partials * partial);
  }
  plan.workspace_bytes = plan.weight_bytes + plan.partial_bytes;
  // Part of an expectation is none.
  if ((gather_cycles || !gathers) && (reduction_cycles || !reduces)) {
    plan.expected_cycles = gather_cycles.value_or(0) + reduction_cycles.value_or(0);
  }
  plan.configuration = gathers ? name(schedule.gather) : "";
  if (gathers && schedule.gather == Family::pipelined) {
    const PipelinedGather& gather = schedule.pipelined_gather;
    plan.configuration += ' ' + gather.name();
    if (gather.storing_warps > 0) plan.configuration += " handing over";
    if (gather.stores_runs) plan.configuration += gather.fills_runs ? " filled runs" : " runs";
  }
  if (reduces) plan.configuration += std::string(gathers ? ", " : "") + name(schedule.reduction);
  plan.schedule = std::make_shared<Schedule>(schedule);
  return plan;
}

}  // namespace convt3d::direct
