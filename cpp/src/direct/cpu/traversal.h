// Which positions of the two volumes meet, as all loops on the CPU walk them.
//
// Along an axis, output = stride * m + residue. The outputs of one residue are a phase, and a tap takes input i to
// element i + shift of one phase: so a tap joins runs of neighbours. Inputs are one phase, which is all of them.
#pragma once

#include <algorithm>
#include <vector>

#include "convt3d/convt3d.h"
#include "geometry.h"
#include "operands.h"

namespace convt3d::direct {

using Indices = Geometry<int64_t>;

struct PhaseTap {
  int64_t tap = 0, phase = 0, shift = 0;
};

// The taps of an axis that meet anything, and the phases they reach, in ascending order.
struct AxisPhases {
  std::vector<int64_t> residues;  // of the phases
  std::vector<PhaseTap> taps;
  int64_t lowest_shift = 0, highest_shift = 0;

  int64_t phases() const { return static_cast<int64_t>(residues.size()); }

  explicit AxisPhases(const Axis<int64_t>& axis) {
    const auto residue = [&](const PhaseTap& tap) { return axis.output_at(0, tap.tap) - tap.shift * axis.stride; };
    for (int64_t tap = 0; tap < axis.kernel; ++tap) {
      const Range<int64_t> inputs = axis.inputs_of(tap);
      if (inputs.begin == inputs.end) continue;
      taps.push_back({tap, 0, floor_divide(axis.output_at(0, tap), axis.stride)});
      residues.push_back(residue(taps.back()));
    }
    std::sort(residues.begin(), residues.end());
    residues.erase(std::unique(residues.begin(), residues.end()), residues.end());
    for (PhaseTap& tap : taps) {
      tap.phase = std::lower_bound(residues.begin(), residues.end(), residue(tap)) - residues.begin();
    }
    // Shifts ascend with the taps.
    if (!taps.empty()) lowest_shift = taps.front().shift, highest_shift = taps.back().shift;
  }
};

// One axis of a volume, taken apart into phases. Positions count within a phase.
struct PhasedAxis {
  int64_t size;
  int64_t step;                   // between neighbours within a phase
  std::vector<int64_t> residues;  // where the phases begin

  int64_t phases() const { return static_cast<int64_t>(residues.size()); }
  int64_t positions() const { return (size + step - 1) / step; }  // of the longest phase
  int64_t positions(int64_t phase) const { return (size - residues[phase] + step - 1) / step; }
};

// A volume of one problem, as loops over its planes see it.
struct PhasedVolume {
  VolumeStrides strides;
  int64_t channels;  // of a group
  int64_t planes;
  PhasedAxis height, width;

  static PhasedVolume of_inputs(const Problem& problem) {
    return {{problem.layout, problem.in_channels, problem.input_voxels()},
            problem.group_in_channels(),
            problem.input[0],
            {problem.input[1], 1, {0}},
            {problem.input[2], 1, {0}}};
  }
  static PhasedVolume of_outputs(const Problem& problem, const AxisPhases& height, const AxisPhases& width) {
    const Extent output = problem.output();
    return {{problem.layout, problem.out_channels, problem.output_voxels()},
            problem.group_out_channels(),
            output[0],
            {output[1], problem.stride[1], height.residues},
            {output[2], problem.stride[2], width.residues}};
  }

  int64_t phases() const { return height.phases() * width.phases(); }
  int64_t offset(int64_t channel, int64_t plane) const {
    return channel * strides.channel + plane * height.size * width.size * strides.voxel;
  }
};

// A plane of the source volume that a plane of the destination sums over, and the depth tap by which they meet.
struct Meeting {
  int64_t plane, tap;
};

// The meetings of a destination plane. Sources are inputs in forward, and outputs in grad_input.
inline void find_meetings(const Axis<int64_t>& depth, bool is_forward, int64_t plane, std::vector<Meeting>& meetings) {
  meetings.clear();
  if (is_forward) {
    const TapWalk<int64_t> walk = depth.taps_at(plane);
    for (int64_t i = 0; i < walk.count; ++i) {
      meetings.push_back({walk.index - i * depth.index_step, walk.tap + i * depth.tap_step});
    }
  } else {
    for (int64_t tap = 0; tap < depth.kernel; ++tap) {
      const int64_t source = depth.output_at(plane, tap);
      if (source >= 0 && source < depth.output) meetings.push_back({source, tap});
    }
  }
}

// The most meetings that a destination plane has.
inline int64_t most_meetings(const Axis<int64_t>& depth, bool is_forward) {
  return is_forward ? std::min(depth.most_taps(), depth.input) : std::min(depth.kernel, depth.output);
}

// Element strides of the weight, by input channel, output channel of its group, and tap.
struct WeightStrides {
  int64_t input, output, tap;

  explicit WeightStrides(const Problem& problem)
      : input(problem.group_out_channels() * problem.taps()),
        output(problem.layout == Layout::ncdhw ? problem.taps() : 1),
        tap(problem.layout == Layout::ncdhw ? 1 : problem.group_out_channels()) {}
};

}  // namespace convt3d::direct
