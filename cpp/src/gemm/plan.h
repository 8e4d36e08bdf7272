// How the GEMM path cuts a problem into pieces that fit a workspace. Heuristics live here, and only here.
#pragma once

#include "convt3d/convt3d.h"

namespace convt3d::gemm {

Plan plan_columns(const Problem& problem, Operator op, const Target& target, int64_t workspace_limit);

// Where the parts of the workspace begin, in bytes.
struct WorkspaceLayout {
  int64_t columns, partials, conversion, library;

  explicit WorkspaceLayout(const Plan& plan);
};

}  // namespace convt3d::gemm
