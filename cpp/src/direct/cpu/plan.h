// How the direct algorithm cuts its work on a CPU. Heuristics live here, and only here.
#pragma once

#include "convt3d/convt3d.h"

namespace convt3d::direct {

// Sets everything of a direct plan but the problem, operator and target.
void plan_cpu(Plan& plan, int64_t workspace_limit);

}  // namespace convt3d::direct
