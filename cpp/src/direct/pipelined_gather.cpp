#include "direct/pipelined_gather.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <iterator>
#include <limits>
#include <set>
#include <vector>

#include "direct/shared_memory.h"

namespace convt3d::direct {
namespace {

constexpr int kMostStages = 4, kMostKeptStages = 8;

// Terms of a destination, on average. Of fewer, float32 arithmetic is nearer to the truth than three products of TF32;
// and where tensor cores mostly get zeros, it is also faster, for some more.
int64_t fewest_exact_terms(int64_t sources, int64_t destinations) { return sources < 8 || destinations < 4 ? 192 : 24; }

using Axes = std::array<GatherAxis, 3>;

Axes axes_of(const Problem& problem, Operator op, const PipelinedGather& gather) {
  Axes axes{GatherAxis(problem, op, 0, gather.fold[0]), GatherAxis(problem, op, 1, gather.fold[1]),
            GatherAxis(problem, op, 2, gather.fold[2])};
  for (GatherAxis& axis : axes) axis.thin();
  return axes;
}

// Places `slots` residues: at most two along the width, which make whole rows, and the height, the others along the
// depth. Where an axis has fewer residues, several of its positions count as one: of the depth, and wherever a band
// wants two. False where that cannot be.
bool place_slots(const Extent& residues, PipelinedGather& gather) {
  int left = gather.slots, band = gather.band();
  for (int axis = 2; axis >= 0; --axis) {
    const int64_t most = axis == 0 ? left
                         : gather.pattern == Pattern::windows
                             ? 1
                             : std::max<int64_t>(std::min<int64_t>(residues[axis], 2), std::min(band, 2));
    int extent = 1, bits = 0;
    for (; extent < left && extent < most; ++bits) extent *= 2;
    if (extent > residues[axis] && extent % residues[axis] != 0) return false;
    gather.fold[axis] = static_cast<int>(std::max<int64_t>(extent / residues[axis], 1));
    gather.slot_bits[axis] = bits;
    gather.slot_extent[axis] = extent;
    left /= extent;
    band = std::max(band / extent, 1);
  }
  return true;
}

// Where the offsets that one pass reads lie, in its own steps, ascending.
std::vector<int64_t> places_in_pass(const std::vector<int64_t>& offsets, int64_t passes, int64_t residue) {
  std::vector<int64_t> places;
  for (const int64_t offset : offsets) {
    const int64_t place = floor_divide(offset, passes);
    if (offset - place * passes == residue) places.push_back(place);
  }
  return places;
}

// Source positions along an axis that a tile reads in one pass, whose places lie so far apart.
int source_extent(const PipelinedGather& gather, int axis, int64_t reach) {
  return static_cast<int>(int64_t{gather.tile[axis] - 1} * gather.source_stride[axis] + reach + 1);
}

// Voxels of a row of the destination.
int64_t destination_row(const Problem& problem, Operator op) {
  return op == Operator::forward ? problem.output()[2] : problem.input[2];
}

// Positions q along an axis, up to the last one that has a destination which nothing else fills.
int64_t written_positions(const GatherAxis& axis, int number, const PipelinedGather& gather) {
  int64_t most = 1;
  for (int64_t residue = 0; residue < axis.destination_stride; ++residue) {
    const bool is_filled =
        number < 2 ? gather.is_bare(number, residue) : gather.fills_planes && axis.residues[residue].empty();
    if (!is_filled) most = std::max(most, ceil_divide(axis.destination - residue, axis.destination_stride));
  }
  return most;
}

// What tiles walk through, whatever their size.
struct Walk {
  double steps = 1, units = 1;  // of an average phase, before channel groups repeat them: fragments, and products
  double weights = 1;           // units of the weights for them, which windows share
  double sets = 1;              // of bands, that they differ in
  double passes = 1;            // of an average phase that has taps
  double busy = 1;              // the share of phases that have taps
  int64_t all_steps = 1, all_units = 1;  // of all phases
  int64_t reach[3] = {0, 0, 0};          // how far the offsets of one pass lie apart, at most, in its own steps
  int64_t positions[3] = {1, 1, 1};      // q, up to the last one that has something to write

  Walk(const Axes& axes, const PipelinedGather& gather) {
    for (int axis = 0; axis < 3; ++axis) {
      positions[axis] = written_positions(axes[axis], axis, gather);
      const int64_t extent = gather.slot_extent[axis], residues = axes[axis].destination_stride;
      const bool in_band = axis == 2 ? gather.band() > 1 : axis == 1 && gather.band() > gather.slot_extent[2];
      int64_t all_offsets = 0, all_contacts = 0, all_sets = 0, all_passes = 0, busy_blocks = 0;
      for (int64_t first = 0; first < residues; first += extent) {
        const std::vector<int64_t> offsets = axes[axis].offsets(first, extent);
        all_offsets += static_cast<int64_t>(offsets.size());
        if (!offsets.empty()) ++busy_blocks;
        for (int64_t residue = 0; residue < gather.passes[axis]; ++residue) {
          const std::vector<int64_t> places = places_in_pass(offsets, gather.passes[axis], residue);
          if (places.empty()) continue;
          ++all_passes;
          reach[axis] = std::max(reach[axis], places.back() - places.front());
        }
        const int64_t end = std::min(first + extent, residues);
        for (int64_t residue = first; residue < end; ++residue)
          all_contacts += static_cast<int64_t>(axes[axis].residues[residue].size());
        std::set<std::vector<bool>> sets_here;
        for (const int64_t offset : offsets) {
          std::vector<bool> set;
          for (int64_t residue = first; residue < end; ++residue)
            set.push_back(axes[axis].tap_at(residue, offset) >= 0);
          sets_here.insert(set);
        }
        all_sets += in_band ? 1 : static_cast<int64_t>(sets_here.size());
      }
      if (in_band) all_contacts = all_offsets;
      const double blocks = axis < 2 ? busy_blocks : static_cast<double>(ceil_divide<int64_t>(residues, extent));
      steps *= static_cast<double>(all_offsets) / blocks;
      units *= static_cast<double>(all_contacts) / blocks;
      const bool is_windows = gather.pattern == Pattern::windows && axis == 0;
      if (is_windows || gather.pattern == Pattern::cubes) all_offsets = 1;  // one step has them all
      if (is_windows) all_contacts = StepPattern(gather.configuration()).units();
      weights *= static_cast<double>(all_contacts) / blocks;
      sets *= static_cast<double>(all_sets) / blocks;
      passes *= static_cast<double>(all_passes) / static_cast<double>(busy_blocks);
      busy *= static_cast<double>(busy_blocks) / blocks;
      all_steps *= all_offsets;
      all_units *= all_contacts;
    }
  }
};

// Which one of a kernel's sets of bands this is, or -1.
int number_of(int bands, uint16_t set) {
  const auto find = [set](const auto& sets) {
    const auto found = std::find(std::begin(sets), std::end(sets), set);
    return found == std::end(sets) ? -1 : static_cast<int>(found - std::begin(sets));
  };
  return bands == 1 ? find(kSetsOf1) : bands == 2 ? find(kSetsOf2) : bands == 4 ? find(kSetsOf4) : find(kSetsOf8);
}

// One step of a pass: an offset and its place in the stage, one group of channels, the bands that have taps there, and
// the taps of their slots, or -1.
struct Step {
  std::array<int64_t, 3> place;
  int group = 0;
  uint16_t bands = 0;
  std::vector<int64_t> taps;

  Step(const Problem& problem, const Axes& axes, const PipelinedGather& gather, const PipelinedPhase& phase,
       const std::array<int64_t, 3>& offset, const std::array<int64_t, 3>& place)
      : place(place) {
    if (gather.has_neighbours()) {
      add_pattern(problem, axes, gather, phase, offset);
      return;
    }
    const int width = gather.slot_extent[2], height = gather.slot_extent[1];
    const auto tap_of = [&](int slot) {
      const int64_t found[3] = {axes[0].tap_at(phase.residue[0] + slot / width / height, offset[0]),
                                axes[1].tap_at(phase.residue[1] + slot / width % height, offset[1]),
                                axes[2].tap_at(phase.residue[2] + slot % width, offset[2])};
      return found[0] < 0 || found[1] < 0 || found[2] < 0
                 ? -1
                 : (found[0] * problem.kernel[1] + found[1]) * problem.kernel[2] + found[2];
    };
    const int band = gather.band();
    for (int number = 0; number < gather.bands(); ++number) {
      std::vector<int64_t> taps_here;
      for (int slot = 0; slot < band; ++slot) taps_here.push_back(tap_of(number * band + slot));
      if (std::all_of(taps_here.begin(), taps_here.end(), [](int64_t tap) { return tap < 0; })) continue;
      bands = static_cast<uint16_t>(bands | 1u << number);
      taps.insert(taps.end(), taps_here.begin(), taps_here.end());
    }
  }

  // The taps of the units of a pattern with neighbours, whose first part is at this offset.
  void add_pattern(const Problem& problem, const Axes& axes, const PipelinedGather& gather, const PipelinedPhase& phase,
                   const std::array<int64_t, 3>& offset) {
    const StepPattern pattern(gather.configuration());
    const bool is_windows = pattern.is_windows();
    const auto tap_of = [&](int axis, int digit) {  // of cubes, see StepPattern
      return axes[axis].tap_at(phase.residue[axis] + (digit > 0 ? 1 : 0), offset[axis] + (digit > 1 ? 1 : 0));
    };
    bands = 1;
    for (int unit = 0; unit < pattern.units(); ++unit) {
      const int64_t depth = is_windows ? axes[0].tap_at(phase.residue[0], offset[0] + unit) : tap_of(0, unit / 9);
      const int64_t height = tap_of(1, is_windows ? 0 : unit / 3 % 3), width = tap_of(2, is_windows ? 0 : unit % 3);
      taps.push_back((depth * problem.kernel[1] + height) * problem.kernel[2] + width);
    }
  }

  int32_t shift(const PipelinedGather& gather) const {
    const int64_t row = place[0] * gather.rows + place[1], stride = gather.source_stride[2];
    const int64_t position = row * gather.row_pitch + place[2] % stride * gather.residue_pitch + place[2] / stride;
    return static_cast<int32_t>(int64_t{group} * gather.group_bytes() + (gather.boxed() ? 4 : 16) * position);
  }
};

// Makes the lists that the kernel walks through.
class TableMaker {
 public:
  TableMaker(const Problem& problem, Operator op, const Axes& axes, PipelinedGather& gather)
      : problem_(problem), axes_(axes), gather_(gather), tables_(gather.tables), terms_(most_terms(problem, op)) {}

  // False where they do not fit.
  bool make() {
    int phases = 0;
    for (int64_t depth = 0; depth < gather_.destination_stride[0]; depth += gather_.slot_extent[0]) {
      for (int64_t height = 0; height < gather_.destination_stride[1]; height += gather_.slot_extent[1]) {
        for (int64_t width = 0; width < gather_.destination_stride[2]; width += gather_.slot_extent[2]) {
          if (gather_.is_bare(0, depth) || gather_.is_bare(1, height)) continue;
          PipelinedPhase& phase = tables_.phases[phases++];
          phase = {static_cast<uint16_t>(passes_),
                   0,
                   {static_cast<int16_t>(depth), static_cast<int16_t>(height), static_cast<int16_t>(width)}};
          if (!add_passes(phase)) return false;
        }
      }
    }
    gather_.units = units_;
    return true;
  }

 private:
  bool add_passes(PipelinedPhase& phase) {
    for (int depth = 0; depth < gather_.passes[0]; ++depth) {
      for (int height = 0; height < gather_.passes[1]; ++height) {
        for (int width = 0; width < gather_.passes[2]; ++width) {
          PipelinedPass pass;
          const std::vector<Step> steps = steps_of(phase, {depth, height, width}, pass);
          if (steps.empty()) continue;
          if (passes_ == kMaximumPasses || !add_steps(pass, steps)) return false;
          tables_.passes[passes_++] = pass;
        }
      }
    }
    phase.passes = static_cast<uint16_t>(passes_ - phase.first_pass);
    return true;
  }

  // Those that read one residue of the source, ordered by their bands; and what of the source that pass reads.
  std::vector<Step> steps_of(const PipelinedPhase& phase, const std::array<int, 3>& residue,
                             PipelinedPass& pass) const {
    std::vector<int64_t> places[3];
    for (int axis = 0; axis < 3; ++axis) {
      const int passes = gather_.passes[axis];
      places[axis] =
          places_in_pass(axes_[axis].offsets(phase.residue[axis], gather_.slot_extent[axis]), passes, residue[axis]);
      if (places[axis].empty()) return {};
    }
    for (int axis = 0; axis < 3; ++axis) {
      const int64_t first = places[axis].front() * gather_.passes[axis] + residue[axis];
      pass.origin[axis] = static_cast<int32_t>(first * axes_[axis].source_step + axes_[axis].source_origin);
    }
    pass.planes = source_extent(gather_, 0, places[0].back() - places[0].front());
    pass.rows = source_extent(gather_, 1, places[1].back() - places[1].front());
    if (gather_.has_pattern()) places[0].resize(1);
    if (gather_.pattern == Pattern::cubes) {
      places[1].resize(1);
      places[2].resize(1);
    }
    std::vector<Step> steps;
    for (const int64_t depth : places[0]) {
      for (const int64_t height : places[1]) {
        for (const int64_t width : places[2]) {
          const int64_t along[3] = {depth, height, width};
          std::array<int64_t, 3> offset, place;
          for (int axis = 0; axis < 3; ++axis) {
            offset[axis] = along[axis] * gather_.passes[axis] + residue[axis];
            place[axis] = along[axis] - places[axis].front();
          }
          Step step(problem_, axes_, gather_, phase, offset, place);
          for (; step.group < gather_.channel_groups && !step.taps.empty(); ++step.group) steps.push_back(step);
        }
      }
    }
    std::stable_sort(steps.begin(), steps.end(), [](const Step& a, const Step& b) { return a.bands < b.bands; });
    return steps;
  }

  // Those of the same bands go together, up to a step's units.
  bool add_steps(PipelinedPass& pass, const std::vector<Step>& singles) {
    pass.first_piece = static_cast<uint16_t>(pieces_);
    for (auto single = singles.cbegin(); single != singles.cend();) {
      int members = 1;
      while (members < gather_.step_units() && single + members != singles.cend() &&
             single[members].bands == single->bands)
        ++members;
      const int count = members * static_cast<int>(single->taps.size()) / gather_.band();
      const bool begins =
          pieces_ == pass.first_piece || tables_.pieces[pieces_ - 1].units + count > gather_.piece_units;
      const int set = number_of(gather_.bands(), single->bands);
      if (set < 0 || steps_ == kMaximumPipelinedSteps || (units_ + count) * gather_.band() > kMaximumTaps ||
          (begins && pieces_ == kMaximumPieces))
        return false;
      if (begins) {
        tables_.pieces[pieces_++] = {static_cast<uint16_t>(steps_), 0, static_cast<uint16_t>(units_), 0};
      }
      WeightPiece& piece = tables_.pieces[pieces_ - 1];
      PipelinedStep& step = tables_.steps[steps_++];
      step.weights = static_cast<uint32_t>(piece.units) * static_cast<uint32_t>(gather_.unit_bytes / 16);
      step.code = static_cast<uint16_t>(set * gather_.step_units() + members - 1);
      step.bands = static_cast<uint8_t>(single->bands);
      if (!begins && tables_.steps[steps_ - 2].bands == step.bands && unfolded_ < folded_steps(terms_)) {
        step.starts = tables_.steps[steps_ - 2].folds = false;
        ++unfolded_;
      } else {
        unfolded_ = 1;
      }
      for (int member = 0; member < kMaximumUnitsOfStep; ++member) {
        step.shift[member] = single[std::min(member, members - 1)].shift(gather_);
      }
      for (int member = 0; member < members; ++member, ++single) {
        for (const int64_t tap : single->taps) {
          gather_.has_gaps = gather_.has_gaps || tap < 0;
          gather_.unit_order[taps_++] =
              tap < 0 ? PipelinedGather::kNoTap : static_cast<uint16_t>(tap * gather_.channel_groups + single->group);
        }
      }
      units_ += count;
      ++piece.steps;
      piece.units = static_cast<uint16_t>(piece.units + count);
    }
    pass.pieces = static_cast<uint16_t>(pieces_ - pass.first_piece);
    return true;
  }

  const Problem& problem_;
  const Axes& axes_;
  PipelinedGather& gather_;
  PipelinedTables& tables_;
  const int64_t terms_;
  int passes_ = 0, pieces_ = 0, steps_ = 0, units_ = 0, taps_ = 0;
  int unfolded_ = 0;  // steps whose exact sums are being added to
};

// Eight rows of a fragment meet in no bank where they are one row of the tile, or where rows are so far apart that they
// are as if they were.
bool is_spread(const PipelinedGather& gather) {
  return gather.tile[2] % 8 == 0 || gather.tile[2] % 8 == gather.row_pitch % 8 || gather.lines() == 1;
}

// Whether a boxed stage's channels are so far apart that what a warp loads of four of them, eight positions of each,
// meets in no bank: of neighbouring channels, or of every other one.
bool is_spread_box(const PipelinedGather& gather, int row_pitch) {
  const int pitch = gather.planes * gather.rows * row_pitch;
  return pitch % 16 == 8 || pitch % 8 == 4;
}

// Gives a box's rows whole vectors, wherever the first begins, and with `spread` one more row where that spreads it.
// False where it does not, or where the box is larger than a tensor map may ask for.
bool widen_box(bool spread, PipelinedGather& gather) {
  constexpr int kMost = 256, kVector = 4;
  gather.row_pitch = ceil_divide(gather.row_pitch + kVector - 1, kVector) * kVector;
  if (spread) ++gather.rows;
  if (std::max({gather.row_pitch + kVector, gather.rows, gather.planes, gather.samples}) > kMost) return false;
  if (!is_spread_box(gather, gather.row_pitch) && is_spread_box(gather, gather.row_pitch + kVector)) {
    gather.row_pitch += kVector;
  }
  return !spread || is_spread_box(gather, gather.row_pitch);
}

// With `spread`, rows are as far apart as that takes, where they are not anyway. False where a stage holds more than
// any shared memory, as where taps are far apart.
bool set_tile(const Walk& walk, const Extent& tile, bool spread, PipelinedGather& gather) {
  for (int axis = 0; axis < 3; ++axis) {
    gather.tile[axis] = static_cast<int>(tile[axis]);
    gather.tiles[axis] = ceil_divide<int64_t>(walk.positions[axis], tile[axis]);
    const int64_t stride = gather.source_stride[axis];
    if (walk.reach[axis] >= kMostStagePositions || (tile[axis] - 1) * stride >= kMostStagePositions) return false;
  }
  const int64_t stride = gather.source_stride[2];
  gather.planes = source_extent(gather, 0, walk.reach[0]);
  gather.rows = source_extent(gather, 1, walk.reach[1]);
  gather.residue_pitch = static_cast<int>(tile[2] + walk.reach[2] / stride);
  gather.row_pitch = static_cast<int>(gather.residue_pitch * std::min(stride, walk.reach[2] + 1));
  gather.used_pitch = gather.row_pitch;
  if (gather.boxed()) {
    if (!widen_box(spread, gather)) return false;
  } else if (spread && !is_spread(gather)) {
    gather.row_pitch += static_cast<int>(((tile[2] - gather.row_pitch) % 8 + 8) % 8);
  }
  gather.width = source_extent(gather, 2, walk.reach[2]);
  if (int64_t{gather.planes} * gather.rows > kMostStagePositions ||
      int64_t{gather.lines()} * gather.row_pitch > kMostStagePositions)
    return false;
  gather.source_positions = gather.lines() * gather.row_pitch + gather.spare_positions;
  gather.half_stride = 16 * gather.source_positions;
  if (gather.copied()) {
    // Channels so far apart that what a warp loads of them, 16 bytes of eight, meets in no bank.
    gather.channel_pitch = (ceil_divide(gather.tile_positions() * gather.element_bytes, 16) | 1) * 16;
    gather.half_stride = 16 / gather.element_bytes * gather.channel_pitch;
  } else if (gather.boxed()) {
    gather.channel_pitch = 4 * gather.planes * gather.rows * gather.row_pitch;
    gather.channel_step = gather.channel_pitch % 32 == 16 ? 2 : 1;
    gather.half_stride = gather.channel_step == 2 ? gather.channel_pitch : 4 * gather.channel_pitch;
  }
  gather.eight_stride = 0;
  for (int axis = 0; axis < 3; ++axis) {
    const int pitch = axis == 2 ? 1 : gather.row_pitch * gather.source_stride[axis] * (axis == 0 ? gather.rows : 1);
    gather.eight_stride += gather.eight_step[axis] * pitch;
  }
  gather.source_stage_bytes = int64_t{2} * gather.channel_groups * gather.half_stride;
  if (gather.boxed()) {
    constexpr int64_t kLine = 128;  // where boxes may begin
    gather.source_stage_bytes = ceil_divide<int64_t>(gather.box_bytes(), kLine) * kLine;
  }
  return true;
}

// Blocks of threads. Where they keep their weights they are whole multiples of those that differ in them.
int64_t most_blocks(const Problem& problem, const Target& target, const PipelinedGather& gather) {
  const int64_t blocks = 2 / gather.warpgroups * target.parallelism;
  return gather.keeps_weights ? blocks - blocks % (problem.groups * gather.column_blocks) : blocks;
}

// One phase of one pass, so that a stage of the source takes one piece of the weights.
bool can_keep_weights(const Problem& problem, const Target& target, const PipelinedGather& gather) {
  return gather.phase_blocks == 1 && gather.passes[0] * gather.passes[1] * gather.passes[2] == 1 &&
         gather.channel_blocks <= kMostKeptStages && most_blocks(problem, target, gather) > 0;
}

// Divides a block's shared memory among the stages. False where it is too small.
bool divide_memory(const Problem& problem, Operator op, const Target& target, const Walk& walk,
                   PipelinedGather& gather) {
  const int64_t resident = 2 / gather.warpgroups;
  int64_t table_bytes = 0;
  for (const uintptr_t address : {16, 4, 2}) {  // how the source is aligned is known only later
    const SourceLoads loads = source_loads(problem, op, gather, address);
    table_bytes = std::max(table_bytes, gather.source_table_bytes(loads));
  }
  const int64_t fixed = 256 + gather.staging_bytes + 8 * gather.positions() + table_bytes;
  const int64_t room = shared_memory_of_block(target, resident) - fixed;
  const auto share = [&](int64_t weight_stages, int64_t most_weight_stages) {
    gather.weight_stage_bytes = int64_t{gather.piece_units} * gather.unit_bytes;
    const int64_t source_stages =
        std::min<int64_t>((room - weight_stages * gather.weight_stage_bytes) / gather.source_stage_bytes, kMostStages);
    if (source_stages < 2) return false;
    gather.source_stages = static_cast<int>(source_stages);
    const int64_t left = room - source_stages * gather.source_stage_bytes;
    gather.weight_stages = static_cast<int>(std::min(left / gather.weight_stage_bytes, most_weight_stages));
    gather.shared_bytes =
        fixed + source_stages * gather.source_stage_bytes + gather.weight_stages * gather.weight_stage_bytes;
    return true;
  };
  const auto all_units = static_cast<int64_t>(std::ceil(walk.weights / walk.passes)) * gather.channel_groups;
  if (gather.keeps_weights) {
    gather.piece_units = static_cast<int>(all_units);
    return share(gather.channel_blocks, gather.channel_blocks);
  }
  // Of patterns, whole steps, and of windows more than one: of two stages with a step each the next comes too late.
  const int64_t step = gather.has_pattern() ? StepPattern(gather.configuration()).units() : 1;
  const int64_t least = gather.has_pattern() ? (gather.pattern == Pattern::windows ? 2 : 1) * step
                                             : int64_t{gather.bands()} * gather.step_units();
  for (const int64_t pieces_bytes : {32 << 10, 16 << 10, 8 << 10}) {
    const int64_t units = std::max(least, pieces_bytes / gather.unit_bytes / step * step);
    gather.piece_units = static_cast<int>(std::min(units, std::max(all_units, least)));
    if (share(2, kMostStages)) return true;
  }
  return false;
}

// Cycles of one product of 64 rows, in a stream of them: for what it reads from shared memory, and in all.
double shared_cycles(const PipelinedGather& gather) {
  return gather.columns * gather.band() / 4.0 + (gather.in_place() ? 16 : 0);
}
double product_cycles(const PipelinedGather& gather) {
  return std::max(gather.in_place() ? shared_cycles(gather) : 13.0, gather.columns * gather.band() / 2.0);
}

// Whether each row of the destination begins with a sector.
bool has_whole_sectors(const Problem& problem, Operator op) {
  return problem.layout == Layout::ndhwc || destination_row(problem, op) * gather_element_bytes(problem) % 32 == 0;
}

// What a tile makes.
double destinations_of_tile(const PipelinedGather& gather) {
  return static_cast<double>(gather.positions()) * gather.slots * gather.columns;
}

// Bytes of the destination that a tile writes and that follow each other.
double written_run(const Problem& problem, const Axes& axes, const PipelinedGather& gather) {
  auto run = static_cast<double>(gather_element_bytes(problem));
  if (problem.layout == Layout::ndhwc) {
    run *= gather.columns;
    if (gather.column_blocks > 1 || problem.groups > 1) return run;
  }
  for (int axis = 2; axis >= 0; --axis) {
    const bool has_all = gather.slot_extent[axis] == gather.destination_stride[axis];
    if (!has_all && !(axis == 1 && gather.fills_runs)) return run;
    const int64_t extent =
        std::min<int64_t>(int64_t{gather.tile[axis]} * gather.destination_stride[axis], axes[axis].destination);
    run *= static_cast<double>(extent);
    if (extent < axes[axis].destination) return run;
  }
  return run;
}

// Bytes of rows without taps that tiles' runs leave out.
double bare_bytes(const Problem& problem, const PipelinedGather& gather) {
  if (gather.bare_residues[0] == 0 && gather.bare_residues[1] == 0) return 0;
  const Extent extent = problem.output();
  const auto count = [&](int axis) {
    int64_t bare = 0;
    for (int64_t residue = 0; residue < gather.destination_stride[axis]; ++residue) {
      const int64_t left = std::max<int64_t>(extent[axis] - residue, 0);
      if (gather.is_bare(axis, residue)) bare += ceil_divide<int64_t>(left, gather.destination_stride[axis]);
    }
    return bare;
  };
  const int64_t planes = count(0);
  const int64_t rows_of_others = gather.fills_runs     ? std::max<int64_t>(extent[1] - gather.first_bare_row(), 0)
                                 : gather.fills_planes ? extent[1]
                                                       : count(1);
  const int64_t rows = planes * extent[1] + (extent[0] - planes) * rows_of_others;
  return static_cast<double>(rows * problem.batch * problem.out_channels * extent[2] * gather.element_bytes);
}

// Clock cycles in which these are filled, where that is before the gather begins: an H200 writes 3.7 TB/s of them.
double filling_cycles(const Problem& problem, const Target& target, const PipelinedGather& gather) {
  return gather.fills_runs ? 0 : bare_bytes(problem, gather) / (17.8 * static_cast<double>(target.parallelism));
}

// What a tile's way out takes, in cycles: memory's, a multiplying warp's, and those that storing warps have; and by
// what share it makes everything slower.
struct WayOut {
  double memory = 0, multiplying = 0, storing = 0, slower = 0;
};
WayOut way_out_of(const Problem& problem, Operator op, const Axes& axes, const PipelinedGather& gather) {
  const int bytes = gather.element_bytes;
  const bool by_channels = problem.layout == Layout::ncdhw, is_half = bytes == 2;
  const double destinations = destinations_of_tile(gather);
  const double of_thread = destinations / (128.0 * gather.warpgroups);
  // Where rows begin anywhere, so do the sectors of what a tile writes of them, and half types leave one by one.
  const int64_t row = destination_row(problem, op);
  const double run = written_run(problem, axes, gather);
  const bool has_sectors = has_whole_sectors(problem, op);
  // Floats of cubes leave by pairs, which such rows slow down less: of kb73, where a channel is 8 MB. Of eight times
  // its size, 66 MB, each tile takes a third longer.
  constexpr int64_t kMostOfChannel = 16 << 20;
  const bool has_pairs =
      gather.pattern == Pattern::cubes && !is_half && !has_sectors && problem.output_voxels() * bytes <= kMostOfChannel;
  const double waste =
      has_sectors || gather.stores_runs || has_pairs ? std::pow(340 / run, 0.39) : std::pow(87000 / run, 0.18);
  WayOut out;
  const int with_bare_rows = gather.fills_runs ? gather.destination_stride[1] / gather.slot_extent[1] : 1;
  const double written = destinations * bytes * with_bare_rows;
  out.memory = (1 + waste) * written / 42;
  if (gather.stores_runs) {
    // Fitted to 520 measured choices. Of channels that are handed over in turn, all but the last wait for memory.
    out.memory *= 1.2;
    const double waiting = 1 - handed_columns(gather.configuration(), bytes) / static_cast<double>(gather.columns);
    out.multiplying = of_thread * (row % 2 == 0 && gather.slot_bits[2] != 0 ? 4.3 : 12) + waiting * out.memory;
    out.storing = 90.0 * gather.runs * gather.columns / gather.storing_warps;
    out.slower = 0.07;
    if (gather.fills_runs) {  // to 14 measured choices for kb77
      const double gaps = bare_bytes(problem, gather) / static_cast<double>(gather.items);
      out.memory += gaps / 29;
      out.storing += (written / 6 + gaps / 40) / gather.storing_warps;
      out.slower = 0.02;
    }
  } else if (gather.storing_warps > 0) {
    out.multiplying = of_thread * 2.7;
    const int word = row % 8 == 0 ? 8 : row % 2 == 0 ? 2 : 1;  // of a lane
    out.storing = 48 * destinations / (32 * word) / gather.storing_warps;
  } else if (by_channels) {
    // With patterns of neighbours fitted to 40 measured choices, here and below, and those pairs' to 20.
    out.multiplying = of_thread * (has_pairs ? 45 * std::max(std::pow(512 / run, 0.7), std::pow(run / 512, 0.1))
                                   : gather.has_neighbours() ? (is_half ? 110 : 80)
                                   : !is_half                ? 35
                                   : row % 2 == 0            ? 23
                                                             : 40);
  } else {
    out.multiplying = of_thread * (gather.stores_in_bulk ? (is_half ? 30 : 50) : is_half ? 54 : 71);
  }
  return out;
}

// Cycles in which one thread loads its part of a stage, in batches of 16 words, see SourceLoader. Those of rows are
// such that what takes them is faster as a whole: they have six instructions for ten, but meet in banks when stored.
double loading_cycles(const PipelinedGather& gather, SourceLoads loads) {
  const bool is_half = gather.element_bytes == 2;
  const int batches = ceil_divide(gather.thread_units(loads), units_of_batch(loads, gather.element_bytes));
  const double batch = loads == SourceLoads::vectors ? 1636
                       : loads == SourceLoads::rows  ? (is_half ? 950 : 1500)
                       : loads == SourceLoads::pairs ? 1374
                       : is_half                     ? 1067
                                                     : 1549;
  // Beside other loading warps each is slower.
  return batches * batch * (gather.loading > gather.warpgroups ? 1.08 : 1);
}

// What one choice of kernel and tile costs, in cycles of the whole machine. The constants are fitted to 3710 measured
// choices of kernel, tile and passes for KernelBench's, common decoders' and 70 random layers, on an H200, those of
// loading anew to 2224: 8 % off on average, and what it picks takes 3 % longer than the best.
double estimate(const Problem& problem, Operator op, const Axes& axes, const Target& target, const Walk& walk,
                const PipelinedGather& gather) {
  const double bytes = static_cast<double>(gather_element_bytes(problem)), parts = gather.exact ? 3 : 1;
  const bool by_channels = problem.layout == Layout::ncdhw;
  const double row_groups = gather.positions() / 64.0, warpgroups = gather.warpgroups, resident = 2 / warpgroups;
  const double destinations = destinations_of_tile(gather);
  const WayOut out = way_out_of(problem, op, axes, gather);
  const double fragment = gather.in_place()                                            ? 0
                          : gather.boxed() && !is_spread_box(gather, gather.row_pitch) ? 42
                          : is_spread(gather) ? 21
                                              : 21 + 16 * std::min(1.0, 7.0 / gather.tile[2]);  // cycles
  const bool flows = flows_through_pieces(gather.configuration());
  const SourceLoads source = source_loads(problem, op, gather, 0);
  const double load = loading_cycles(gather, source);
  const auto place_rounds = static_cast<double>(ceil_divide<int64_t>(gather.cells(source), gather.source_threads()));
  const int run = gather.copied() ? gather.tile_positions() : gather.used_pitch;  // of the source
  // A tile with so many times the taps of the average phase.
  const auto tile_cycles = [&](double share) {
    const double passes = share > 0 ? walk.passes : 0;
    const double steps = share * walk.steps / walk.passes, units = share * walk.units / walk.passes;
    const double weights = share * walk.weights / walk.passes;
    const double sets = std::max(share * walk.sets / walk.passes, 1.0);
    const double stages = passes * gather.channel_blocks, chunks = stages * gather.channel_groups;
    const double pieces = stages * std::ceil(weights * gather.channel_groups / gather.piece_units);
    // Resources of a multiprocessor. Channels lie apart in NCDHW, so that short rows waste parts of the 32-byte sectors
    // at their ends; and short runs of what is written, those of DRAM's pages.
    const double source_bytes = chunks * 32 * gather.lines() * gather.used_pitch;
    const double weight_bytes = gather.keeps_weights ? 0 : chunks * weights * gather.unit_bytes;
    const double sector = by_channels ? 18.7 * 32.0 / bytes : 0;
    const double loads = (1 + sector / run) * source_bytes + weight_bytes;
    const double multiply =
        (gather.in_place() ? 0.67 : 0.85) * row_groups * chunks * units * parts * product_cycles(gather);
    const double shared = (gather.in_place() ? 0.68 : 0.86) *
                          (row_groups * chunks * parts * (steps * fragment + units * shared_cycles(gather)) +
                           (weight_bytes + (by_channels ? 17 * destinations : 0)) / 128);
    const double memory = loads / 178 + out.memory;
    // What a multiplying warpgroup does one after the other, and what the warps that load do.
    const double fragments = steps * chunks;
    const double dispatches = stages * std::max(sets, steps * gather.channel_groups / gather.step_units());
    const double folds = gather.exact ? 1.94 * fragments * gather.slots * gather.row_blocks * gather.columns : 0;
    const double drain = flows ? 0 : gather.keeps_weights ? 150 : 245;
    const double waits = gather.has_pattern() ? 300 + 40 * pieces
                         : gather.in_place()  ? 837 * pieces
                                              : dispatches * (gather.boxed()       ? 150
                                                              : gather.bands() > 2 ? 210
                                                                                   : 91) +
                                                    fragments * gather.row_blocks * parts * (gather.boxed() ? 40 : 17) +
                                                    folds + drain * pieces + 300;
    const double chain = waits + (gather.boxed() ? 1.15 : 1) * out.multiplying;
    const double loading = gather.copied()  ? stages * 600
                           : gather.boxed() ? stages * 400
                                            : (gather.fills_runs          ? 0.5
                                               : gather.storing_warps > 0 ? 0.83
                                                                          : 1) *
                                                  (stages * (load + 50) + passes * (place_rounds * 327 + 1486));
    // Others do something else meanwhile: the parts overlap, but not wholly.
    const double terms[] = {resident * multiply,     resident * shared, resident * memory, chain, loading,
                            chain + 0.37 * multiply, out.storing};
    double cycles = 0;
    for (const double term : terms) cycles += term * term * std::sqrt(term);  // to the power of 2.5
    return std::pow(cycles, 1 / 2.5);
  };
  const double bare = walk.busy < 1 ? (1 - walk.busy) * tile_cycles(0) : 0;  // tiles of phases without taps
  const double cycles = walk.busy * tile_cycles(1 / walk.busy) + bare;
  // Fitted to 455 measured choices: in NDHWC few channels of a voxel at a time, and few stages, cost a little more.
  // What is in place or stored by other warps, here and above, to 790 measured choices, what is boxed to 165.
  const double box = (gather.source_stages == 2 ? 0.04 : 0) +
                     (flows && gather.pattern != Pattern::points ? 0.02 * (gather.channel_groups - 1) - 0.04 : -0.08);
  const double slower = (by_channels ? 0 : 0.15 / gather.channel_groups + (gather.source_stages == 2 ? 0.04 : 0)) +
                        (gather.in_place() ? 0.07 : 0) +
                        (!gather.has_neighbours() ? 0
                         : bytes == 2             ? 0.13
                                                  : 0.07) +
                        out.slower +
                        // Of a source that is copied, to 200 choices; two blocks take turns with the way out.
                        (gather.boxed() ? box : 0) +
                        (gather.copied() ? (gather.warpgroups == 2 && gather.storing_warps == 0 ? 0.15 : 0.12) : 0);
  return std::ceil(static_cast<double>(gather.items) / static_cast<double>(most_blocks(problem, target, gather))) *
         cycles * (1 + slower);
}

// How tiles are made of blocks: in place of eight eights along one of three axes, else of single positions.
void set_blocks(int axis, PipelinedGather& gather) {
  const int eight[3] = {1, 1, 8};
  for (int i = 0; i < 3; ++i) {
    gather.eight_step[i] = gather.in_place() && i == axis ? eight[i] : 0;
    gather.block[i] = gather.in_place() ? (i == axis ? 8 : 1) * eight[i] : 1;
  }
}

// The tiles that there are to choose from, of so many blocks at most, where the destination has `extents` blocks.
std::vector<Extent> tiles_of(const PipelinedGather& gather, const Extent& extents) {
  std::vector<Extent> tiles;
  const int64_t most = gather.positions() / (gather.block[0] * gather.block[1] * gather.block[2]);
  for (const int64_t width : tile_extents(extents[2], most)) {
    for (const int64_t height : tile_extents(extents[1], most / width)) {
      const int64_t depth = std::min(extents[0], most / (width * height));
      const int64_t even = ceil_divide<int64_t>(extents[0], ceil_divide<int64_t>(extents[0], depth));
      tiles.push_back({even * gather.block[0], height * gather.block[1], width * gather.block[2]});
    }
  }
  return tiles;
}

// Whether all taps of a tile read the positions that it has, whose rows are whole vectors, so that a channel's may be
// copied in bulk, and stages have no channels but the source's.
bool can_be_copied(const Problem& problem, const Axes& axes, const Walk& walk, int64_t sources,
                   const PipelinedGather& gather) {
  if (problem.layout != Layout::ncdhw || gather.element_bytes != 2 || gather.has_gaps) return false;
  for (int axis = 0; axis < 3; ++axis) {
    for (const std::vector<Contact>& contacts : axes[axis].residues) {
      if (std::any_of(contacts.begin(), contacts.end(), [](const Contact& contact) { return contact.offset != 0; }))
        return false;
    }
    if (axes[axis].source_stride != 1 || axes[axis].source_step != 1 || axes[axis].source_origin != 0 ||
        axes[axis].source != walk.positions[axis])
      return false;
  }
  return axes[2].source * gather.element_bytes % 16 == 0 &&
         sources % (gather.channel_groups * 32 / gather.element_bytes) == 0;
}

// Whether stages may be boxes of the source, copied by a tensor map.
bool can_be_boxed(const Problem& problem, Operator op, int64_t sources, const PipelinedGather& gather) {
  if (problem.layout != Layout::ncdhw || gather.element_bytes != 4 || gather.source_stride[2] != 1) return false;
  for (int axis = 0; axis < 3; ++axis) {
    if (gather.source_step[axis] != 1) return false;
  }
  const int64_t row = op == Operator::forward ? problem.input[2] : problem.output()[2];
  return row * gather.element_bytes % 16 == 0 &&
         (problem.groups == 1 || sources % (gather.channel_groups * 32 / gather.element_bytes) == 0);
}

// Whether a tile's voxels follow each other in the source, and are whole fragments.
bool is_one_run(const Walk& walk, const PipelinedGather& gather) {
  return gather.samples == 1 && gather.tile_positions() % 16 == 0 && gather.tile[2] == walk.positions[2] &&
         (gather.tile[0] == 1 || gather.tile[1] == walk.positions[1]);
}

// The runs of a tile, and what room they take on the way out. Rows without taps belong to them where all others between
// them do, too. False where there are too many, or more warps that store than they need.
bool set_runs(const Axes& axes, PipelinedGather& gather) {
  int busy_blocks = 0;
  for (int residue = 0; residue < gather.destination_stride[1]; residue += gather.slot_extent[1]) {
    busy_blocks += gather.is_bare(1, residue) ? 0 : 1;
  }
  const bool has_blocks = gather.destination_stride[1] % gather.slot_extent[1] == 0;  // of residues that there are
  const bool has_bare_rows = gather.bare_residues[1] != 0;
  gather.whole_planes = busy_blocks == 1 && has_blocks && gather.tiles[2] == 1 &&
                        (!has_bare_rows || may_fill_runs(gather.configuration()));
  gather.fills_runs = gather.whole_planes && has_bare_rows;
  if (gather.storing_warps > 2 && !gather.fills_runs) return false;
  gather.plane_runs = gather.whole_planes ? 1 : gather.tile[1] * gather.slot_extent[1];
  gather.runs = gather.samples * gather.tile[0] * gather.slot_extent[0] * gather.plane_runs;
  const int64_t voxels = gather.whole_planes ? gather.tile[1] * gather.destination_stride[1] * axes[2].destination
                                             : int64_t{gather.tile[2]} * gather.destination_stride[2];
  // An odd number of vectors, so that neighbouring channels' places meet in few banks.
  const int vector = 16 / gather.element_bytes;
  gather.run_pitch = static_cast<int>(ceil_divide<int64_t>(voxels + vector - 1, vector) | 1) * vector;
  const int columns = handed_columns(gather.configuration(), gather.element_bytes);
  gather.staging_bytes = int64_t{gather.runs} * columns * gather.run_pitch * gather.element_bytes;
  if (gather.fills_runs) gather.staging_bytes += int64_t{gather.storing_warps} * kConstantBytes;
  // What lies behind the stages begins with a line: bulk stores read whole lines.
  constexpr int64_t kLine = 128;
  gather.source_stage_bytes = ceil_divide(gather.source_stage_bytes, kLine) * kLine;
  return gather.runs <= gather.positions();
}

// Tries every tile with the kernel that `gather` names, and keeps the cheapest that the tables have room for in `best`.
void try_tiles(const Problem& problem, Operator op, const Axes& axes, const Target& target, const Walk& walk,
               PipelinedGather gather, double& least, PipelinedGather& best) {
  const int64_t sample =
      std::max(problem.in_channels * problem.input_voxels(), problem.out_channels * problem.output_voxels());
  for (int axis = gather.in_place() ? 0 : 2; axis < 3; ++axis) {
    set_blocks(axis, gather);
    Extent extents;
    for (int i = 0; i < 3; ++i) extents[i] = ceil_divide<int64_t>(walk.positions[i], gather.block[i]);
    for (const Extent& tile : tiles_of(gather, extents)) {
      // Where a sample is smaller than a tile, several share it.
      gather.samples = 1;
      if (tile[0] >= walk.positions[0] && tile[1] >= walk.positions[1] && tile[2] >= walk.positions[2]) {
        gather.samples = static_cast<int>(std::clamp<int64_t>(gather.positions() / (tile[0] * tile[1] * tile[2]), 1,
                                                              std::max<int64_t>(problem.batch, 1)));
      }
      if (gather.samples * sample > kGatherLimit) continue;
      for (const bool spread : {false, true}) {
        if (spread && (gather.in_place() || gather.copied())) continue;
        if (!set_tile(walk, tile, spread, gather)) break;
        if (gather.copied() && !is_one_run(walk, gather)) continue;
        if (spread && !gather.boxed() && gather.row_pitch == gather.used_pitch) continue;  // the same again
        gather.items = ceil_divide<int64_t>(problem.batch, gather.samples) * problem.groups * gather.phase_blocks *
                       gather.column_blocks * gather.tiles[0] * gather.tiles[1] * gather.tiles[2];
        if (gather.items > kGatherLimit) continue;
        if (gather.pattern == Pattern::points && gather.items > most_blocks(problem, target, gather)) continue;
        // What a block stores of its last tile is beside nothing.
        if (gather.storing_warps > 0 && gather.items < 4 * most_blocks(problem, target, gather)) continue;
        if (gather.stores_runs && !set_runs(axes, gather)) continue;
        for (const bool keeps_weights : {false, true}) {
          gather.keeps_weights = keeps_weights;
          if (keeps_weights && !can_keep_weights(problem, target, gather)) continue;
          if (!divide_memory(problem, op, target, walk, gather)) continue;
          const double cost =
              estimate(problem, op, axes, target, walk, gather) + filling_cycles(problem, target, gather);
          if (cost >= least) continue;
          PipelinedGather candidate = gather;
          if (!TableMaker(problem, op, axes, candidate).make() || (gather.copied() && candidate.has_gaps)) continue;
          least = cost;
          best = candidate;
        }
      }
    }
  }
}

// What depends on neither tile nor channels. False where there are too many residues, of the destination or the source.
bool set_strides(const Problem& problem, Operator op, const Axes& axes, PipelinedGather& gather) {
  gather.phase_blocks = 1;
  for (int axis = 0; axis < 3; ++axis) {
    gather.source_stride[axis] = static_cast<int>(axes[axis].source_stride / gather.passes[axis]);
    gather.source_step[axis] = static_cast<int>(axes[axis].source_step * gather.passes[axis]);
    gather.destination_stride[axis] = static_cast<int>(axes[axis].destination_stride);
    const int extent = gather.slot_extent[axis];
    int blocks = 0;
    for (int residue = 0; residue < gather.destination_stride[axis]; residue += extent) {
      if (axis == 2 || !axes[axis].offsets(residue, extent).empty()) {
        ++blocks;
      } else {
        gather.bare_residues[axis] |= ((uint64_t{1} << extent) - 1) << residue;  // or there are none so high
      }
    }
    gather.phase_blocks *= blocks;
  }
  // Rows of fewer bytes take longer by themselves than those between them take to be written twice.
  constexpr int64_t kShortRow = 2048;
  const int64_t row = destination_row(problem, op) * (problem.layout == Layout::ncdhw ? 1 : problem.out_channels);
  gather.fills_planes = gather.bare_residues[1] != 0 && row * gather.element_bytes < kShortRow;
  const int passes = gather.passes[0] * gather.passes[1] * gather.passes[2];
  return gather.phase_blocks <= kMaximumPhases && gather.phase_blocks * passes <= kMaximumPasses;
}

// How sums leave, and what room that takes.
void set_way_out(const Problem& problem, Operator op, PipelinedGather& gather) {
  const bool forward = op == Operator::forward;
  const int64_t channels = forward ? problem.group_out_channels() : problem.group_in_channels();
  const int64_t row = destination_row(problem, op), bytes = gather.element_bytes;
  const bool has_rows = gather.slot_extent[2] == gather.destination_stride[2];
  if (gather.storing_warps > 0) {
    gather.stores_from_registers = false;
    if (gather.stores_runs) return;  // whose room depends on the tile, see set_runs
    const int bits = gather.slot_bits[2];
    const int pitch = staging_pitch(gather.positions() << bits, gather.element_bytes);
    gather.staging_bytes = bytes * (gather.slots >> bits) * gather.columns * pitch;
    return;
  }
  if (problem.layout == Layout::ncdhw) {
    // Half types, but for vectors, are written to shared memory and from there by ones and twos. Pairs of floats, of
    // which four lanes have a sector, leave a block's only tile sooner so, nnunet_deep's in 8400 cycles instead of
    // 13 700; of many tiles lines are faster.
    gather.stores_from_registers = gather.pattern == Pattern::points ||
                                   (bytes == 2 && gather.slot_extent[2] == 1 && !(has_rows && row * bytes % 16 == 0));
    const int64_t floats = gather.stores_from_registers ? 0 : staging_floats(gather.columns, gather.row_blocks);
    gather.staging_bytes = 4 * gather.warpgroups * floats;
    return;
  }
  // Copies are of 16 bytes and multiples, and slow below 128.
  gather.whole_rows = has_rows && problem.groups == 1 && gather.column_blocks == 1;
  const bool has_vectors = channels * bytes % 16 == 0 && gather.columns * bytes % 16 == 0;
  const int64_t voxel_bytes = std::min<int64_t>(channels, gather.columns) * bytes;
  gather.stores_in_bulk = has_vectors && (gather.whole_rows || voxel_bytes >= 128);
  const int round = bulk_bytes(gather.slot_extent[2], gather.columns, gather.element_bytes);
  gather.staging_bytes = gather.stores_in_bulk ? int64_t{4} * gather.warpgroups * bulk_buffers(round) * round : 0;
}

// Of the loading warps, so many that store instead; and whether they store runs.
struct Storing {
  int warps;
  bool runs;
};

// Whether some of the loading warps may store instead: runs, where all of a row's residues are there, and rows begin
// anywhere, since else words are as fast; or half types a word at a time, which are handed over, where rows have one
// slot, by pairs of matrices.
bool can_hand_over(const Problem& problem, Operator op, const PipelinedGather& gather) {
  if (problem.layout != Layout::ncdhw || !hands_over_runs(gather.configuration())) return false;
  if (gather.stores_runs) {
    if (gather.pattern == Pattern::cubes) return false;  // kb73 in TF32 0.535 ms, then 0.63
    return !has_whole_sectors(problem, op) && gather.slot_extent[2] == gather.destination_stride[2];
  }
  const bool has_pairs = gather.slot_bits[2] != 0 || gather.columns / 8 * gather.row_blocks % 2 == 0;
  return hands_over_words(gather.configuration(), gather.element_bytes) && has_pairs;
}

// Whether all slots are neighbouring planes with three taps, each slot's one plane further on.
bool has_windows(const GatherAxis& depth, const PipelinedGather& gather) {
  const int taps = StepPattern(gather.configuration()).units();
  if (depth.destination_stride != gather.slots) return false;
  const std::vector<Contact>& first = depth.residues[0];
  for (int slot = 0; slot < gather.slots; ++slot) {
    const std::vector<Contact>& own = depth.residues[slot];
    if (static_cast<int>(own.size()) != taps) return false;
    for (int i = 0; i < taps; ++i) {
      if (own[i].tap != first[i].tap || own[i].offset != first[0].offset + slot + i) return false;
    }
  }
  return true;
}

// Whether of two residues the first has one tap, and the second one there and one at the next offset.
bool has_edge_of_cubes(const GatherAxis& axis) {
  if (axis.destination_stride != 2 || axis.residues[0].size() != 1 || axis.residues[1].size() != 2) return false;
  const int64_t offset = axis.residues[0][0].offset;
  return axis.residues[1][0].offset == offset && axis.residues[1][1].offset == offset + 1;
}

// Whether each of two residues has one tap, at the same offset.
bool has_points(const GatherAxis& axis) {
  return axis.destination_stride == 2 && axis.residues[0].size() == 1 && axis.residues[1].size() == 1 &&
         axis.residues[0][0].offset == axis.residues[1][0].offset;
}

// Whether the kernel's pattern is the problem's. In NDHWC few columns leave 128 bytes at a time, which is slower than
// cubes are faster: unet3d_k3s2 0.167 and 0.191 ms in TF32.
bool suits_pattern(const Problem& problem, Operator op, const Axes& axes, const PipelinedGather& gather) {
  if (gather.pattern == Pattern::listed) return true;
  if (gather.pattern == Pattern::windows) return has_windows(axes[0], gather);
  if (gather.pattern == Pattern::points) {
    return has_whole_sectors(problem, op) && std::all_of(axes.begin(), axes.end(), has_points);
  }
  return problem.layout == Layout::ncdhw && std::all_of(axes.begin(), axes.end(), has_edge_of_cubes);
}

// Tries the kernel that `gather` names, with every way to cut the source's residues and channels into stages.
void try_kernel(const Problem& problem, Operator op, const Axes& axes, const Target& target, int64_t sources,
                const PipelinedGather& kernel, double& least, PipelinedGather& best) {
  const int64_t group_channels = 32 / gather_element_bytes(problem);
  if (!suits_pattern(problem, op, axes, kernel)) return;
  for (const int split : {0, 1, 2}) {  // axes whose residues have passes of their own
    if (split > 0 && (axes[split - 1].source_stride == 1 || kernel.has_pattern())) continue;
    PipelinedGather gather = kernel;
    for (int axis = 0; axis < split; ++axis) gather.passes[axis] = static_cast<int>(axes[axis].source_stride);
    if (!set_strides(problem, op, axes, gather)) continue;
    const Walk walk(axes, gather);
    for (const int channel_groups : {1, 2, 4}) {
      if (channel_groups > 1 && sources <= channel_groups / 2 * group_channels) continue;
      if (kernel.pattern == Pattern::points && channel_groups != StepPattern(kernel.configuration()).channel_groups())
        continue;
      if (walk.all_steps * channel_groups > kMaximumPipelinedSteps ||
          walk.all_units * gather.band() * channel_groups > kMaximumTaps)
        continue;
      gather.channel_groups = channel_groups;
      gather.channel_blocks = static_cast<int>(ceil_divide<int64_t>(sources, channel_groups * group_channels));
      if (gather.copied() && !can_be_copied(problem, axes, walk, sources, gather)) continue;
      if (gather.boxed() && !can_be_boxed(problem, op, sources, gather)) continue;
      for (const int warpgroups : {1, 2}) {
        const int loading = loading_warpgroups(gather.configuration());
        // Registers are shared out for one block on a multiprocessor where more warpgroups load than multiply.
        if (loading * warpgroups % 2 != 0) continue;
        gather.warpgroups = warpgroups;
        gather.loading = loading * warpgroups / 2;
        gather.spare_positions = problem.layout == Layout::ncdhw ? 1 : 0;
        for (const Storing& storing :
             {Storing{0, false}, {1, false}, {2, false}, {4, false}, {1, true}, {2, true}, {4, true}}) {
          // Four where the source is copied in bulk, so that the others have little to do, or where runs are filled.
          const bool has_time = gather.copied() || gather.boxed() || storing.runs;
          if (storing.warps > 2 && !(has_time && gather.loading == 2)) continue;
          gather.storing_warps = storing.warps;
          gather.stores_runs = storing.runs;
          gather.fills_runs = false;
          // One warp has boxes copied, others watch.
          if (gather.boxed() && watches_source(gather.configuration()) && gather.source_threads() < 64) continue;
          if (gather.storing_warps > 0 && !can_hand_over(problem, op, gather)) continue;
          set_way_out(problem, op, gather);
          try_tiles(problem, op, axes, target, walk, gather, least, best);
        }
      }
    }
  }
}

// Tries all kernels, for as many groups at a time as `gather` says. `problem` has as many fewer.
void try_kernels(const Problem& problem, Operator op, const Target& target, PipelinedGather gather, double& least,
                 PipelinedGather& best) {
  const bool forward = op == Operator::forward;
  const int64_t sources = forward ? problem.group_in_channels() : problem.group_out_channels();
  const int64_t destinations = forward ? problem.group_out_channels() : problem.group_in_channels();
  Extent residues{};
  for (int axis = 0; axis < 3; ++axis) residues[axis] = forward ? problem.stride[axis] : 1;
  for (const GatherConfiguration& configuration : kPipelinedGathers) {
    if (configuration.exact != gather.exact) continue;
    // No more columns than channels, but for the smallest.
    if (configuration.columns > 8 && configuration.columns >= destinations + 16) continue;
    if (gather.has_gaps && !watches_source(configuration)) continue;
    gather.slots = configuration.slots;
    gather.columns = configuration.columns;
    gather.row_blocks = configuration.row_blocks;
    gather.form = configuration.form;
    gather.pattern = configuration.pattern;
    gather.column_blocks = static_cast<int>(ceil_divide<int64_t>(destinations, gather.columns));
    gather.unit_bytes = 32 * gather.columns * gather.band() * gather.parts();
    if (place_slots(residues, gather)) {
      try_kernel(problem, op, axes_of(problem, op, gather), target, sources, gather, least, best);
    }
  }
}

// Groups whose channels share the 32 bytes of a product, where these are few: at most so many.
int64_t groups_of_product(int64_t groups, int64_t group_bytes) {
  constexpr int64_t kFewestBytes = 8;
  int64_t together = group_bytes < kFewestBytes ? 1 : std::max<int64_t>(32 / group_bytes, 1);
  while (groups % together != 0) --together;
  return together;
}

}  // namespace

std::string PipelinedGather::name() const {
  return std::to_string(slots) + 'x' + std::to_string(columns) + 'x' + std::to_string(row_blocks) +
         (exact        ? " exact"
          : in_place() ? " in place"
          : copied()   ? " copied"
          : boxed()    ? " boxed"
                       : "") +
         (pattern == Pattern::windows  ? " with windows"
          : pattern == Pattern::cubes  ? " with cubes"
          : pattern == Pattern::points ? " with points"
                                       : "");
}

SourceLoads source_loads(const Problem& problem, Operator op, const PipelinedGather& gather, uintptr_t address) {
  const bool forward = op == Operator::forward;
  const auto bytes = static_cast<uintptr_t>(gather_element_bytes(problem));
  if (problem.layout == Layout::ndhwc) {
    const int64_t channels = forward ? problem.group_in_channels() : problem.group_out_channels();
    return channels % (16 / bytes) == 0 && address % 16 == 0 ? SourceLoads::vectors : SourceLoads::elements;
  }
  const int64_t width = forward ? problem.input[2] : problem.output()[2];
  if (gather.source_step[2] != 1) return SourceLoads::elements;
  const bool has_pairs = bytes == 2 && width % 2 == 0 && address % 4 == 0;
  const SourceLoads narrow = has_pairs ? SourceLoads::pairs : SourceLoads::elements;
  // Of short lines, cells of 16 bytes are mostly what no position needs. With stride 1 shared memory bounds, where what
  // is transposed meets in banks: kb68 takes 7 % longer so. Of half types two residues do even more, which keeps wide
  // products' fragments waiting: nnunet_top's grad_input 12 %, vae_aniso's 16 %.
  const bool has_rows = width % (16 / bytes) == 0 && address % 16 == 0 && problem.stride[2] > 1 &&
                        (bytes == 4 || gather.columns * gather.source_stride[2] < 128);
  return has_rows && loading_cycles(gather, SourceLoads::rows) < loading_cycles(gather, narrow) ? SourceLoads::rows
                                                                                                : narrow;
}

std::optional<double> cut_pipelined_gather(const Problem& problem, Operator op, const Target& target,
                                           PipelinedGather& result) {
  if (target.compute_capability != 90 || !suits_tensor_gather(problem)) return std::nullopt;
  const bool forward = op == Operator::forward;
  const int64_t sources = forward ? problem.group_in_channels() : problem.group_out_channels();
  const int64_t destinations = forward ? problem.group_out_channels() : problem.group_in_channels();
  if (problem.taps() > kMaximumPipelinedSteps || sources == 0 || destinations == 0) return std::nullopt;
  PipelinedGather gather;
  gather.exact = problem.dtype == DataType::float32 && problem.precision == Precision::ieee;
  gather.element_bytes = static_cast<int>(gather_element_bytes(problem));
  if (gather.exact && most_terms(problem, op) < fewest_exact_terms(sources, destinations) * phases_of(problem, op))
    return std::nullopt;
  double least = std::numeric_limits<double>::max();
  PipelinedGather best;
  try_kernels(problem, op, target, gather, least, best);
  gather.merged_groups = static_cast<int>(groups_of_product(problem.groups, sources * gather.element_bytes));
  if (gather.merged_groups > 1) {
    gather.has_gaps = true;
    try_kernels(with_merged_groups(problem, gather.merged_groups), op, target, gather, least, best);
  }
  if (least == std::numeric_limits<double>::max()) return std::nullopt;
  result = best;
  const Problem merged = with_merged_groups(problem, result.merged_groups);
  result.packed_bytes =
      merged.groups * result.column_blocks * result.channel_blocks * int64_t{result.units} * result.unit_bytes +
      (result.has_gaps ? 16 : 0);
  // Threads that pack are counted in 32 bits.
  if (result.weight_bytes() / 32 > std::numeric_limits<int32_t>::max()) return std::nullopt;
  result.blocks = static_cast<int>(std::min(result.items, most_blocks(merged, target, result)));
  result.by_columns = Divisor<int32_t>(result.column_blocks);
  result.by_phases = Divisor<int32_t>(result.phase_blocks);
  result.by_groups = Divisor<int32_t>(merged.groups);
  for (int axis = 0; axis < 3; ++axis) {
    result.by_tiles[axis] = Divisor<int32_t>(result.tiles[axis]);
    result.by_tile[axis] = Divisor<int32_t>(result.tile[axis] / result.block[axis]);
  }
  result.by_rows = Divisor<int32_t>(result.rows);
  result.by_planes = Divisor<int32_t>(result.planes);
  result.by_source_stride = Divisor<int32_t>(result.source_stride[2]);
  return least;
}

}  // namespace convt3d::direct
