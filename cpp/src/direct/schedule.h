// Which direct kernels compute an operator, and how they cut the work. The choice is made here and in gather.cpp and
// reduction.cpp, and only there.
#pragma once

#include "convt3d/convt3d.h"
#include "direct/gather.h"
#include "direct/pipelined_gather.h"
#include "direct/reduction.h"

namespace convt3d::direct {

// The kernels, from the most special to the one that takes everything.
enum class Family { depthwise, pipelined, tensor, simt };

struct Schedule {
  // Forward and grad_input.
  Family gather = Family::simt;
  PipelinedGather pipelined_gather;  // where gather is pipelined
  TensorGather tensor_gather;        // where gather is tensor

  // grad_weight, in `plan.partials` partial sums.
  Family reduction = Family::simt;
  TensorReduction tensor_reduction;  // where reduction is tensor
};

Plan plan_direct(const Problem& problem, Operator op, const Target& target, int64_t workspace_limit);

}  // namespace convt3d::direct
