// What the tables of both tensor-core gathers are checked against: the definition of the transposed convolution.
#pragma once

#include <array>

#include "check.h"
#include "convt3d/convt3d.h"
#include "problems.h"

namespace convt3d::test {

using Triple = std::array<int64_t, 3>;

// Input position, tap and output position meet where output = input * stride - padding + tap * dilation; of the two
// positions along `axis`, the destination's is in the first block of its stride.
inline bool is_contact(const Problem& problem, Operator op, int axis, int64_t offset, int64_t tap, int64_t residue) {
  const bool forward = op == Operator::forward;
  const int64_t input = forward ? offset : residue, output = forward ? residue : offset;
  return output == input * problem.stride[axis] - problem.padding[axis] + tap * problem.dilation[axis];
}

// The residues that a slot of a block of them stands for.
template <class Gather, class Phase>
Triple residues_of(const Gather& gather, const Phase& phase, int slot) {
  const int w = gather.slot_extent[2], h = gather.slot_extent[1];
  return {phase.residue[0] + slot / w / h, phase.residue[1] + slot / w % h, phase.residue[2] + slot % w};
}

template <class Gather>
void check_contact(const NamedProblem& named, Operator op, const Gather& gather, const Triple& offset,
                   const Triple& taps, const Triple& residue) {
  for (int axis = 0; axis < 3; ++axis) {
    CHECK(residue[axis] < gather.destination_stride[axis]) << named << ": a slot beyond the residues";
    CHECK(is_contact(named.problem, op, axis, offset[axis], taps[axis], residue[axis]))
        << named << " axis " << axis << " offset " << offset[axis] << " tap " << taps[axis] << " residue "
        << residue[axis];
  }
}

}  // namespace convt3d::test
