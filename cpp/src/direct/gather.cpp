#include "direct/gather.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <set>

#include "direct/shared_memory.h"

namespace convt3d::direct {
namespace {

// Whether float32 arithmetic is nearer to the truth than three products of TF32 as mma.sync's gather adds them up,
// which are 1.6 times as far off on sums of few terms; at stride 1, where what they are held against is better as well,
// of a few more.
bool is_short_exact_sum(const Problem& problem, Operator op) {
  const int64_t phases = phases_of(problem, op);
  return most_terms(problem, op) < (op == Operator::forward && phases == 1 ? 448 : 192 * phases);
}

// Residues share a block of threads from the width outwards, since those along the width make whole rows.
void place_slots(const std::array<GatherAxis, 3>& axes, TensorGather& gather) {
  int left = gather.slots;
  gather.phase_blocks = 1;
  for (int axis = 2; axis >= 0; --axis) {
    int extent = 1, bits = 0;
    for (; extent < left && extent < axes[axis].destination_stride; ++bits) extent *= 2;
    gather.slot_bits[axis] = bits;
    gather.slot_extent[axis] = extent;
    left /= extent;
    gather.phase_blocks *= static_cast<int>(ceil_divide<int64_t>(axes[axis].destination_stride, extent));
  }
}

// What blocks of threads walk through, whatever their tiles.
struct Walk {
  double stages = 1, steps = 1, taps = 1;  // of an average block
  int64_t all_steps = 1;                   // of all blocks of residues, before channel groups repeat them, at most
  int64_t most_stage_taps = 1;             // of one depth offset, for all slots
  int64_t reach[3] = {0, 0, 0};            // how far the offsets of one block of residues lie apart, at most

  Walk(const std::array<GatherAxis, 3>& axes, const TensorGather& gather) {
    for (int axis = 0; axis < 3; ++axis) {
      const int64_t extent = gather.slot_extent[axis], residues = axes[axis].destination_stride;
      int64_t all_offsets = 0, all_contacts = 0, most_taps = 0;
      for (int64_t first = 0; first < residues; first += extent) {
        const std::vector<int64_t> offsets = axes[axis].offsets(first, extent);
        all_offsets += static_cast<int64_t>(offsets.size());
        if (!offsets.empty()) reach[axis] = std::max(reach[axis], offsets.back() - offsets.front());
        int64_t block_taps = 0;
        for (int64_t residue = first; residue < std::min(first + extent, residues); ++residue) {
          const auto contacts = static_cast<int64_t>(axes[axis].residues[residue].size());
          all_contacts += contacts;
          block_taps += axis == 0 ? std::min<int64_t>(contacts, 1) : contacts;
        }
        most_taps = std::max(most_taps, block_taps);
      }
      const double blocks = static_cast<double>(ceil_divide<int64_t>(residues, extent));
      if (axis == 0) stages = static_cast<double>(all_offsets) / blocks;
      steps *= static_cast<double>(all_offsets) / blocks;
      taps *= static_cast<double>(all_contacts) / blocks;
      all_steps *= all_offsets;
      most_stage_taps *= most_taps;
    }
  }
};

// The lists that the kernel walks through. False where they do not fit.
bool make_tables(const Problem& problem, const std::array<GatherAxis, 3>& axes, TensorGather& gather) {
  GatherTables& tables = gather.tables;
  int64_t blocks[3];
  for (int axis = 0; axis < 3; ++axis) {
    blocks[axis] = ceil_divide<int64_t>(axes[axis].destination_stride, gather.slot_extent[axis]);
  }
  int stage_count = 0, step_count = 0, tap_count = 0, phase_count = 0;
  for (int64_t block = 0; block < gather.phase_blocks; ++block) {
    const int64_t along[3] = {block / blocks[2] / blocks[1], block / blocks[2] % blocks[1], block % blocks[2]};
    PhaseBlock& phase = tables.phases[phase_count++];
    std::vector<int64_t> offsets[3];
    for (int axis = 0; axis < 3; ++axis) {
      const int64_t first = along[axis] * gather.slot_extent[axis];
      phase.residue[axis] = static_cast<int16_t>(first);
      offsets[axis] = axes[axis].offsets(first, gather.slot_extent[axis]);
    }
    phase.first_stage = static_cast<uint16_t>(stage_count);
    phase.stages = 0;
    if (offsets[0].empty() || offsets[1].empty() || offsets[2].empty()) continue;  // no tap: the bias alone
    phase.origin[0] = static_cast<int32_t>(offsets[1].front());
    phase.origin[1] = static_cast<int32_t>(offsets[2].front());
    for (const int64_t depth : offsets[0]) {
      if (stage_count == kMaximumStages) return false;
      GatherStage& stage = tables.stages[stage_count];
      stage.depth_offset = static_cast<int32_t>(depth);
      stage.first_step = static_cast<uint16_t>(step_count);
      stage.first_tap = static_cast<uint16_t>(tap_count);
      for (const int64_t height : offsets[1]) {
        for (const int64_t width : offsets[2]) {
          const int64_t row = height - offsets[1].front(), column = width - offsets[2].front();
          const int64_t stride = gather.source_stride[2];
          GatherStep step;
          step.shift = static_cast<int32_t>(
              16 * (row * gather.row_pitch + column % stride * gather.residue_pitch + column / stride));
          for (int slot = 0; slot < gather.slots; ++slot) {
            const int extent_w = gather.slot_extent[2], extent_h = gather.slot_extent[1];
            const int64_t taps[3] = {axes[0].tap_at(phase.residue[0] + slot / extent_w / extent_h, depth),
                                     axes[1].tap_at(phase.residue[1] + slot / extent_w % extent_h, height),
                                     axes[2].tap_at(phase.residue[2] + slot % extent_w, width)};
            if (taps[0] < 0 || taps[1] < 0 || taps[2] < 0) continue;
            if (tap_count == kMaximumSteps) return false;
            step.slots |= 1u << slot;
            step.weights[slot] =
                static_cast<uint16_t>((tap_count - stage.first_tap) * 2 * gather.stage_k_steps() * gather.columns);
            gather.tap_order[tap_count++] =
                static_cast<uint16_t>((taps[0] * problem.kernel[1] + taps[1]) * problem.kernel[2] + taps[2]);
          }
          if (step.slots == 0) continue;
          for (int group = 0; group < gather.channel_groups; ++group) {
            if (step_count == kMaximumSteps) return false;
            tables.steps[step_count++] = step;
            step.shift += 32 * gather.k_steps * gather.source_positions;
            for (uint16_t& weights : step.weights)
              weights += static_cast<uint16_t>(2 * gather.k_steps * gather.columns);
          }
        }
      }
      stage.steps = static_cast<uint16_t>(step_count - stage.first_step);
      stage.taps = static_cast<uint16_t>(tap_count - stage.first_tap);
      if (stage.steps > 0) {
        ++stage_count;
        ++phase.stages;
      }
    }
  }
  gather.taps = tap_count;
  return true;
}

// False where a stage holds more than any shared memory, as where taps are far apart.
bool set_tile(const std::array<GatherAxis, 3>& axes, const Walk& walk, const int64_t (&tile)[3], TensorGather& gather) {
  for (int axis = 0; axis < 3; ++axis) {
    gather.tile[axis] = static_cast<int>(tile[axis]);
    gather.tiles[axis] = ceil_divide<int64_t>(axes[axis].positions(), tile[axis]);
  }
  const int64_t rows = (tile[1] - 1) * axes[1].source_stride + walk.reach[1] + 1;
  const int64_t residue_pitch = tile[2] + walk.reach[2] / axes[2].source_stride;
  if (rows > kMostStagePositions || residue_pitch > kMostStagePositions) return false;
  const int64_t row_pitch = residue_pitch * std::min(axes[2].source_stride, walk.reach[2] + 1);
  if (row_pitch > kMostStagePositions || rows * row_pitch > kMostStagePositions) return false;
  const int64_t planes = int64_t{gather.samples} * tile[0];
  if (planes > kMostStagePositions || planes * rows * row_pitch > kMostStagePositions) return false;
  gather.rows = static_cast<int>(rows);
  gather.residue_pitch = static_cast<int>(residue_pitch);
  gather.row_pitch = static_cast<int>(row_pitch);
  gather.source_positions = static_cast<int>(planes * rows * row_pitch);
  gather.source_stage_bytes = int64_t{gather.stage_k_steps()} * 32 * gather.source_positions;
  gather.units = static_cast<int>(ceil_divide<int64_t>(gather.source_stage_bytes / 16, 128 * gather.warpgroups));
  return true;
}

// What one choice of kernel and tile costs, in cycles of the whole machine. Rates are those of an H200.
double estimate(const Problem& problem, const Target& target, const Walk& walk, const TensorGather& gather) {
  const double stages = walk.stages, steps = walk.steps, taps = walk.taps;
  const double parts = gather.parts(), row_groups = gather.positions() / 64.0;
  const double k_steps = 1.0 * gather.channel_blocks * gather.stage_k_steps() * parts;
  // One product of 64 rows by so many columns, when others run beside it.
  const int columns = gather.columns;
  const double product = columns == 24 ? 26 : columns == 48 ? 29 : std::max(13.0, columns / 2.0);
  const double multiply = row_groups * k_steps * taps * product;
  const double shared = row_groups * k_steps * (steps * 16 + taps * columns / 4);
  // Channels lie apart in NCDHW, so that short rows waste parts of the 32-byte sectors at their ends.
  const double sector = problem.layout == Layout::ncdhw ? 32.0 / static_cast<double>(gather_element_bytes(problem)) : 0;
  const double row = static_cast<double>(gather.tile[2]) * gather.slot_extent[2];
  const double read_waste = 1 + sector / gather.row_pitch;
  const double write_waste =
      (1 + 2.5 * sector / row) * (sector > 0 ? gather.destination_stride[2] / gather.slot_extent[2] : 1);
  const double loads =
      read_waste * stages * gather.channel_blocks * parts * static_cast<double>(gather.source_stage_bytes) +
      taps * k_steps * 32 * columns;
  const double destinations = static_cast<double>(gather.positions()) * gather.slots * columns;
  const double memory =
      loads / 24 + write_waste * destinations * static_cast<double>(gather_element_bytes(problem)) / 18;
  // Of a warp: the beginning, each stage, its units and copies, each step, each 8 channels by a row of slots on the way
  // out.
  const double threads = 128.0 * gather.warpgroups, stage_count = stages * gather.channel_blocks * parts;
  const double copies = static_cast<double>(gather.weight_stage_bytes) / (16 * threads);
  const double instructions_of_warp =
      900 + stage_count * (250 + 45 * gather.units + 15 * copies) +
      steps * gather.channel_blocks * gather.channel_groups * parts * (20 + gather.row_blocks * gather.k_steps * 6) +
      columns / 8.0 * gather.slots * gather.row_blocks * 100;
  const double instructions = instructions_of_warp * threads / 32 / 2.8;
  const double compute = std::max(multiply, shared);
  const double issue = instructions * (read_waste + write_waste) / 2;
  const double slowest = std::max({compute, memory, issue});
  // What one block does one after the other, others do meanwhile, if there are any.
  const double resident = 4.0 / gather.warpgroups;
  const double alone = compute + issue + 0.5 * memory + stage_count * 700 + 4000;
  const double block = std::max(1.15 * slowest, alone / resident);
  const double blocks = static_cast<double>(gather.blocks);
  const double machine = resident * static_cast<double>(target.parallelism);
  return std::ceil(blocks / machine) * resident * block;
}

// Tries every tile with the kernel that `gather` names, and keeps the cheapest in `best`.
void try_tiles(const Problem& problem, const std::array<GatherAxis, 3>& axes, const Target& target, const Walk& walk,
               TensorGather gather, double& least, TensorGather& best) {
  const int64_t positions = gather.positions();
  const int64_t threads = 128 * gather.warpgroups;
  for (const int64_t width : tile_extents(axes[2].positions(), positions)) {
    for (const int64_t height : tile_extents(axes[1].positions(), positions / width)) {
      int64_t depth = std::min(axes[0].positions(), positions / (width * height));
      depth = ceil_divide<int64_t>(axes[0].positions(), ceil_divide<int64_t>(axes[0].positions(), depth));
      // Where a sample is smaller than a tile, several share it.
      gather.samples = 1;
      if (width == axes[2].positions() && height == axes[1].positions() && depth == axes[0].positions()) {
        gather.samples = static_cast<int>(
            std::clamp<int64_t>(positions / (width * height * depth), 1, std::max<int64_t>(problem.batch, 1)));
      }
      const int64_t sample =
          std::max(problem.in_channels * problem.input_voxels(), problem.out_channels * problem.output_voxels());
      if (gather.samples * sample > kGatherLimit) continue;
      if (!set_tile(axes, walk, {depth, height, width}, gather)) continue;
      gather.blocks = ceil_divide<int64_t>(problem.batch, gather.samples) * problem.groups * gather.phase_blocks *
                      gather.column_blocks * gather.tiles[0] * gather.tiles[1] * gather.tiles[2];
      if (gather.blocks > kGatherLimit || gather.units > most_units(gather_element_bytes(problem))) continue;
      const int64_t stages = 2 * (gather.source_stage_bytes + gather.weight_stage_bytes);
      // The sums of one row of slots pass through it on their way out.
      const int64_t output = 4 * gather.columns * (positions * gather.slot_extent[2] + 4);
      gather.shared_bytes = std::max(stages, output) + 8 * (gather.units * threads + positions);
      const int64_t blocks = 4 / gather.warpgroups;
      if (gather.shared_bytes > shared_memory_of_block(target, blocks)) continue;
      const double cost = estimate(problem, target, walk, gather);
      if (cost < least) {
        least = cost;
        best = gather;
      }
    }
  }
}

}  // namespace

GatherAxis::GatherAxis(const Problem& problem, Operator op, int axis, int64_t fold) {
  const int64_t kernel = problem.kernel[axis], stride = problem.stride[axis], padding = problem.padding[axis],
                dilation = problem.dilation[axis];
  const bool forward = op == Operator::forward;
  destination = forward ? problem.output()[axis] : problem.input[axis];
  source = forward ? problem.input[axis] : problem.output()[axis];
  destination_stride = fold * (forward ? stride : 1);
  source_stride = fold * (forward ? 1 : stride);
  residues.resize(destination_stride);
  for (int64_t residue = 0; residue < destination_stride; ++residue) {
    for (int64_t tap = 0; tap < kernel; ++tap) {
      if (!forward) {
        residues[residue].push_back({tap, residue * stride + tap * dilation - padding});
      } else if ((residue + padding - tap * dilation) % stride == 0) {
        residues[residue].push_back({tap, (residue + padding - tap * dilation) / stride});
      }
    }
    std::sort(residues[residue].begin(), residues[residue].end(),
              [](const Contact& a, const Contact& b) { return a.offset < b.offset; });
  }
}

std::vector<int64_t> GatherAxis::offsets(int64_t first, int64_t count) const {
  std::set<int64_t> distinct;
  for (int64_t residue = first; residue < std::min(first + count, destination_stride); ++residue) {
    for (const Contact& contact : residues[residue]) distinct.insert(contact.offset);
  }
  return {distinct.begin(), distinct.end()};
}

int64_t GatherAxis::tap_at(int64_t residue, int64_t offset) const {
  if (residue >= destination_stride) return -1;
  for (const Contact& contact : residues[residue]) {
    if (contact.offset == offset) return contact.tap;
  }
  return -1;
}

void GatherAxis::thin() {
  int64_t step = source_stride, origin = std::numeric_limits<int64_t>::max();
  for (const std::vector<Contact>& contacts : residues) {
    for (const Contact& contact : contacts) origin = std::min(origin, contact.offset);
  }
  for (const std::vector<Contact>& contacts : residues) {
    for (const Contact& contact : contacts) step = std::gcd(step, contact.offset - origin);
  }
  if (step == 1) return;
  source_step = step;
  source_origin = origin;
  source_stride /= step;
  for (std::vector<Contact>& contacts : residues) {
    for (Contact& contact : contacts) contact.offset = (contact.offset - origin) / step;
  }
}

bool suits_tensor_gather(const Problem& problem) {
  if (problem.dtype == DataType::float64) return false;
  for (int axis = 0; axis < 3; ++axis) {
    if (std::max(problem.input[axis], problem.output()[axis]) > (1 << 26) || problem.stride[axis] > 64 ||
        problem.kernel[axis] > 64 || problem.padding[axis] > kGatherLimit || problem.dilation[axis] > kGatherLimit / 64)
      return false;
  }
  return problem.in_channels * problem.input_voxels() <= kGatherLimit &&
         problem.out_channels * problem.output_voxels() <= kGatherLimit;
}

std::vector<int64_t> tile_extents(int64_t extent, int64_t most) {
  std::set<int64_t> pieces;
  for (int64_t count = 1; count <= 8; ++count) pieces.insert(ceil_divide<int64_t>(extent, count));
  for (int64_t power = 1; power < extent; power *= 2) pieces.insert(power);
  std::vector<int64_t> fitting;
  for (const int64_t piece : pieces) {
    if (piece <= most) fitting.push_back(piece);
  }
  if (extent > most) fitting.push_back(most);
  return fitting;
}

std::optional<double> cut_tensor_gather(const Problem& problem, Operator op, const Target& target,
                                        TensorGather& gather) {
  if (target.compute_capability < 80 || !suits_tensor_gather(problem)) return std::nullopt;
  const std::array<GatherAxis, 3> axes{GatherAxis(problem, op, 0), GatherAxis(problem, op, 1),
                                       GatherAxis(problem, op, 2)};
  const bool forward = op == Operator::forward;
  const int64_t sources = forward ? problem.group_in_channels() : problem.group_out_channels();
  const int64_t destinations = forward ? problem.group_out_channels() : problem.group_in_channels();
  if (problem.taps() > kMaximumSteps || sources == 0 || destinations == 0) return std::nullopt;

  gather = TensorGather();
  for (int axis = 0; axis < 3; ++axis) {
    gather.source_stride[axis] = static_cast<int>(axes[axis].source_stride);
    gather.destination_stride[axis] = static_cast<int>(axes[axis].destination_stride);
  }
  gather.exact = problem.dtype == DataType::float32 && problem.precision == Precision::ieee;
  const int64_t residues = axes[0].destination_stride * axes[1].destination_stride * axes[2].destination_stride;
  if (gather.exact && is_short_exact_sum(problem, op)) return std::nullopt;
  const int64_t step_channels = 32 / gather_element_bytes(problem);
  double least = std::numeric_limits<double>::max();
  TensorGather best;
  for (const GatherConfiguration& configuration : kTensorGathers) {
    if (configuration.exact != gather.exact) continue;
    // No more slots than residues, nor more columns than channels, but for the smallest.
    if (configuration.slots / 2 >= residues ||
        (configuration.columns > 8 && configuration.columns >= destinations + 16))
      continue;
    for (const int stage_k_steps : {1, 2, 4, 8}) {
      if (stage_k_steps > 1 && sources <= stage_k_steps / 2 * step_channels) continue;
      for (const int warpgroups : {1, 2, 4}) {
        TensorGather candidate = gather;
        candidate.slots = configuration.slots;
        candidate.columns = configuration.columns;
        candidate.row_blocks = configuration.row_blocks;
        candidate.k_steps = std::min(stage_k_steps, 2);
        candidate.channel_groups = stage_k_steps / candidate.k_steps;
        candidate.warpgroups = warpgroups;
        candidate.column_blocks = static_cast<int>(ceil_divide<int64_t>(destinations, candidate.columns));
        candidate.channel_blocks = static_cast<int>(ceil_divide<int64_t>(sources, stage_k_steps * step_channels));
        place_slots(axes, candidate);
        if (candidate.phase_blocks > kMaximumPhaseBlocks) continue;
        const Walk walk(axes, candidate);
        candidate.weight_stage_bytes = walk.most_stage_taps * stage_k_steps * 32 * candidate.columns;
        if (walk.all_steps * candidate.channel_groups > kMaximumSteps) continue;
        try_tiles(problem, axes, target, walk, candidate, least, best);
      }
    }
  }
  if (least == std::numeric_limits<double>::max() || !make_tables(problem, axes, best)) return std::nullopt;
  gather = best;
  gather.packed_bytes = problem.groups * gather.column_blocks * gather.channel_blocks * gather.taps *
                        gather.stage_k_steps() * 32 * gather.columns * (gather.exact ? 2 : 1);
  gather.by_columns = Divisor<int32_t>(gather.column_blocks);
  gather.by_phases = Divisor<int32_t>(gather.phase_blocks);
  gather.by_groups = Divisor<int32_t>(problem.groups);
  for (int axis = 0; axis < 3; ++axis) {
    gather.by_tiles[axis] = Divisor<int32_t>(gather.tiles[axis]);
    gather.by_tile[axis] = Divisor<int32_t>(gather.tile[axis]);
  }
  gather.by_source_positions = Divisor<int32_t>(gather.source_positions);
  gather.by_row_pitch = Divisor<int32_t>(gather.row_pitch);
  gather.by_rows = Divisor<int32_t>(gather.rows);
  gather.by_sample_planes = Divisor<int32_t>(gather.tile[0]);
  gather.by_residue_pitch = Divisor<int32_t>(gather.residue_pitch);
  return least;
}

}  // namespace convt3d::direct
