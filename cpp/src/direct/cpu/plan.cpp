#include "direct/cpu/plan.h"

#include <algorithm>

#include "cpu/widened.h"
#include "workspace.h"

namespace convt3d::direct {
namespace {

// Partial sums beyond this many bytes cost more than they save, where they are not for the sake of threads.
constexpr int64_t kPartialBytes = 1 << 20;

}  // namespace

void plan_cpu(Plan& plan, int64_t workspace_limit) {
  const Problem& problem = plan.problem;
  plan.configuration = "tiles";
  if (plan.op == Operator::grad_weight || plan.op == Operator::grad_input_weight) {
    const int64_t partial = problem.weight_elements() * (problem.dtype == DataType::float64 ? 8 : 4);
    const int64_t planes = problem.batch * problem.input[0];
    // Depth taps, groups and blocks of channels (about so many) are tasks already; planes are shared out where these
    // are few.
    const int64_t tasks = problem.groups * problem.kernel[0] * ((problem.group_in_channels() + 31) / 32) *
                          ((problem.group_out_channels() + 7) / 8);
    int64_t wanted = plan.target.parallelism == 1 ? 1 : (4 * plan.target.parallelism + tasks - 1) / tasks;
    // In NDHWC neighbouring groups share cache lines, so they are to be read while a plane is in the cache.
    if (problem.layout == Layout::ndhwc && problem.groups > 1) {
      wanted = std::max(wanted, std::min(planes, kPartialBytes / partial));
    }
    plan.partials = std::clamp<int64_t>(std::min(workspace_limit / partial, planes), 1, wanted);
    // A single sum is made in place.
    plan.partial_bytes = plan.partials == 1 ? 0 : align(plan.partials * partial);
  }
  if (element_size(problem.dtype) == 2) plan.conversion_bytes = widened_bytes(problem, plan.op);
  plan.workspace_bytes = plan.weight_bytes + plan.partial_bytes + plan.conversion_bytes;
}

}  // namespace convt3d::direct
