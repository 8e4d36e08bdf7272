// How the GEMM path cuts a problem into pieces that fit a workspace. Heuristics live here, and only here.
#pragma once

#include "convt3d/convt3d.h"

namespace convt3d::gemm {

Plan plan_columns(const Problem& problem, Operator op, const Target& target, int64_t workspace_limit);

}  // namespace convt3d::gemm
