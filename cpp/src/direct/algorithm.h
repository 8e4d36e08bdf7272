// The direct algorithm as the operators call it: one entry per backend.
#pragma once

#include "convt3d/convt3d.h"
#include "operands.h"

namespace convt3d::direct {

void run_cpu(const Plan& plan, const Operands& operands, void* workspace, const Execution& execution);
void run_cuda(const Plan& plan, const Operands& operands, void* workspace, const Execution& execution);

}  // namespace convt3d::direct
