// The pipelined gather's tables against the definition: every contact is there once, in the right place, a tile's
// pieces fit the multiprocessor that they are cut for, and every kernel is chosen for some problem.
#include "direct/pipelined_gather.h"

#include <algorithm>
#include <array>
#include <random>
#include <set>
#include <string>

#include "check.h"
#include "contacts.h"
#include "problems.h"

namespace {

using namespace convt3d;
using namespace convt3d::direct;
using namespace convt3d::test;

constexpr Operator kOperators[] = {Operator::forward, Operator::grad_input};
const Target kTarget{Backend::cuda, 132, 90, 228 << 10};

uint32_t bands_of(const PipelinedGather& gather, int set) {
  return gather.bands() == 1   ? kSetsOf1[set]
         : gather.bands() == 2 ? kSetsOf2[set]
         : gather.bands() == 4 ? kSetsOf4[set]
                               : kSetsOf8[set];
}

// An offset along each axis, from a step's shift.
std::array<int64_t, 3> offset_of(const PipelinedGather& gather, const PipelinedPass& pass, int shift, int group) {
  const int position =
      gather.boxed() ? (shift - 8 * group * gather.channel_pitch) / 4 : (shift - 2 * group * gather.half_stride) / 16;
  const int line = position / gather.row_pitch, column = position % gather.row_pitch;
  const int residue = column / gather.residue_pitch;
  const int along[3] = {line / gather.rows, line % gather.rows,
                        (column - residue * gather.residue_pitch) * gather.source_stride[2] + residue};
  std::array<int64_t, 3> offset;
  for (int axis = 0; axis < 3; ++axis) {
    offset[axis] = pass.origin[axis] + along[axis] * gather.source_step[axis];
  }
  return offset;
}

// Goes through all tables, and keeps what it has seen.
class TableChecker {
 public:
  TableChecker(const NamedProblem& named, Operator op, const PipelinedGather& gather)
      : named_(named), op_(op), gather_(gather) {}

  void check() {
    const Problem& problem = named_.problem;
    std::set<Triple> residues;
    for (int block = 0; block < gather_.phase_blocks; ++block) {
      const PipelinedPhase& phase = gather_.tables.phases[block];
      CHECK(residues.insert({phase.residue[0], phase.residue[1], phase.residue[2]}).second) << named_;
      for (int i = phase.first_pass; i < phase.first_pass + phase.passes; ++i) {
        check_pass(phase, gather_.tables.passes[i]);
      }
    }
    check_bare_residues();
    check_written_positions();
    check_source_tables();
    check_blocks();
    check_copied();
    check_boxed();
    check_way_out();
    const int folded = gather_.fold[0] * gather_.fold[1] * gather_.fold[2];
    CHECK(units_ == gather_.units) << named_;
    CHECK(static_cast<int64_t>(seen_.size()) == problem.taps() * folded * gather_.channel_groups) << named_;
    CHECK(gather_.shared_bytes <= kTarget.shared_memory * gather_.warpgroups / 2 - 1024)
        << named_ << gather_.shared_bytes;
    CHECK(gather_.samples * gather_.tile[0] * gather_.tile[1] * gather_.tile[2] <= gather_.positions()) << named_;
    CHECK(gather_.source_stages >= 2 && gather_.weight_stages >= (gather_.keeps_weights ? 1 : 2)) << named_;
    if (gather_.keeps_weights) check_kept_weights();
    CHECK(problem.groups % gather_.merged_groups == 0) << named_ << gather_.merged_groups;
  }

 private:
  void check_pass(const PipelinedPhase& phase, const PipelinedPass& pass) {
    CHECK(pass.pieces > 0 && pass.planes <= gather_.planes && pass.rows <= gather_.rows) << named_;
    for (int number = pass.first_piece; number < pass.first_piece + pass.pieces; ++number) {
      const WeightPiece& piece = gather_.tables.pieces[number];
      CHECK(piece.first_unit == units_ && piece.units <= gather_.piece_units) << named_;
      uint32_t weights = 0;
      for (int i = piece.first_step; i < piece.first_step + piece.steps; ++i) {
        const PipelinedStep& step = gather_.tables.steps[i];
        CHECK(step.weights == weights) << named_;
        if (gather_.has_pattern()) {
          check_pattern(phase, pass, step);
          weights += static_cast<uint32_t>(StepPattern(gather_.configuration()).units() * (gather_.unit_bytes / 16));
          continue;
        }
        const int set = static_cast<int>(step.code) / gather_.step_units();
        const int members = static_cast<int>(step.code) % gather_.step_units() + 1;
        CHECK(step.bands == bands_of(gather_, set)) << named_;
        for (int product = 0; product < members * gather_.bands(); ++product) {
          const int band = product % gather_.bands();
          if (!(step.bands >> band & 1)) continue;
          ++units_;
          weights += static_cast<uint32_t>(gather_.unit_bytes / 16);
          check_unit(phase, pass, step.shift[product / gather_.bands()], band);
        }
      }
    }
  }

  // Every slot has the taps that a pattern's parts have for it, there.
  void check_pattern(const PipelinedPhase& phase, const PipelinedPass& pass, const PipelinedStep& step) {
    const StepPattern pattern(gather_.configuration());
    const int voxel = gather_.boxed() ? 4 : 16, row = voxel * gather_.row_pitch, plane = row * gather_.rows;
    CHECK(pattern.is_points() ? gather_.channel_groups == pattern.channel_groups() : step.code == 0) << named_;
    for (int part = 0; part < pattern.parts(); ++part) {
      for (int slot = 0; slot < gather_.slots; ++slot) {
        if (!pattern.has(part, slot)) continue;
        const int order = gather_.unit_order[taps_ + pattern.unit(part, slot)];
        CHECK(order != PipelinedGather::kNoTap) << named_ << ": a product without a tap";
        const int shift = pattern.shift(part, plane, row, voxel, gather_.group_bytes());
        check_tap(phase, pass, step.shift[0] + shift, order, slot);
      }
    }
    taps_ += pattern.units();
    units_ += pattern.units();
  }

  void check_unit(const PipelinedPhase& phase, const PipelinedPass& pass, int shift, int band) {
    int taps_of_unit = 0;
    for (int slot = band * gather_.band(); slot < (band + 1) * gather_.band(); ++slot) {
      const int order = gather_.unit_order[taps_++];
      if (order == PipelinedGather::kNoTap) {
        CHECK(gather_.band() > 1 && gather_.has_gaps) << named_ << ": a gap that is not known";
        continue;
      }
      ++taps_of_unit;
      check_tap(phase, pass, shift, order, slot);
    }
    CHECK(taps_of_unit > 0) << named_ << ": a product without a tap";
  }

  void check_tap(const PipelinedPhase& phase, const PipelinedPass& pass, int shift, int order, int slot) {
    const Problem& problem = named_.problem;
    const int tap = order / gather_.channel_groups, group = order % gather_.channel_groups;
    const Triple taps{tap / problem.kernel[2] / problem.kernel[1], tap / problem.kernel[2] % problem.kernel[1],
                      tap % problem.kernel[2]};
    const Triple residue = residues_of(gather_, phase, slot);
    check_contact(named_, op_, gather_, offset_of(gather_, pass, shift, group), taps, residue);
    CHECK(seen_.insert({taps[0], taps[1], taps[2], group, residue[0], residue[1], residue[2]}).second)
        << named_ << ": a contact twice";
  }

  // A block's tiles are all of one group and block of columns, and each piece that they take has a stage of its own.
  void check_kept_weights() {
    CHECK(gather_.phase_blocks == 1) << named_;
    const int64_t groups = named_.problem.groups / gather_.merged_groups;
    CHECK(gather_.blocks % (groups * gather_.column_blocks) == 0) << named_ << gather_.blocks;
    const PipelinedPhase& phase = gather_.tables.phases[0];
    int pieces = 0;
    for (int i = phase.first_pass; i < phase.first_pass + phase.passes; ++i) pieces += gather_.tables.passes[i].pieces;
    CHECK(pieces * gather_.channel_blocks <= gather_.weight_stages && gather_.weight_stages <= 8) << named_ << pieces;
  }

  // Rows that are in no tile have no tap.
  void check_bare_residues() {
    const Problem& problem = named_.problem;
    for (int axis = 0; axis < 2; ++axis) {
      for (int64_t residue = 0; residue < gather_.destination_stride[axis]; ++residue) {
        if ((gather_.bare_residues[axis] >> residue & 1) == 0) continue;
        CHECK(op_ == Operator::forward) << named_;
        for (int64_t tap = 0; tap < problem.kernel[axis]; ++tap) {
          const int64_t distance = residue + problem.padding[axis] - tap * problem.dilation[axis];
          CHECK(distance % problem.stride[axis] != 0) << named_ << ": a row without its tap " << tap;
        }
      }
    }
  }

  // What no tile reaches has no tap along some axis, and is filled: rows and planes by themselves, or planes as a
  // whole.
  void check_written_positions() {
    const Extent sizes = op_ == Operator::forward ? named_.problem.output() : named_.problem.input;
    for (int axis = 0; axis < 3; ++axis) {
      const GatherAxis all(named_.problem, op_, axis, gather_.fold[axis]);
      for (int64_t place = gather_.tiles[axis] * gather_.tile[axis] * all.destination_stride; place < sizes[axis];
           ++place) {
        const int64_t residue = place % all.destination_stride;
        CHECK(axis < 2 ? gather_.is_bare(axis, residue) : gather_.fills_planes) << named_ << axis << ", " << place;
        CHECK(all.residues[residue].empty()) << named_ << ": axis " << axis << ", " << place;
      }
    }
    if (gather_.fills_planes) CHECK(gather_.bare_residues[1] != 0) << named_;
  }

  // However the source is aligned, there is room for the tables of how it is then loaded.
  void check_source_tables() {
    const int64_t others = 256 + gather_.source_stages * gather_.source_stage_bytes +
                           gather_.weight_stages * gather_.weight_stage_bytes + gather_.staging_bytes +
                           8 * gather_.positions();
    for (const uintptr_t address : {16, 8, 4, 2}) {
      const SourceLoads loads = source_loads(named_.problem, op_, gather_, address);
      CHECK(others + gather_.source_table_bytes(loads) <= gather_.shared_bytes) << named_ << " at " << address;
      CHECK(gather_.cells(loads) >= gather_.lines() * gather_.line_cells(loads)) << named_ << " at " << address;
    }
  }

  // Where the source is copied, a tile's voxels are one run of each channel, of whole vectors, that all taps read; all
  // of a stage's channels are there, and lie so far apart that they have room and that four or eight meet in no bank.
  void check_copied() {
    if (!gather_.copied()) return;
    const Problem& problem = named_.problem;
    const Extent source = op_ == Operator::forward ? problem.input : problem.output();
    const int64_t channels = op_ == Operator::forward ? problem.group_in_channels() : problem.group_out_channels();
    const int bytes = gather_.element_bytes;
    CHECK(problem.layout == Layout::ncdhw && gather_.samples == 1 && !gather_.has_gaps && bytes == 2) << named_;
    CHECK(gather_.tile[2] == source[2] && (gather_.tile[0] == 1 || gather_.tile[1] == source[1])) << named_;
    CHECK(source[2] * bytes % 16 == 0 && channels % (32 / bytes * gather_.channel_groups) == 0) << named_;
    for (int i = 0; gather_.tables.passes[i].pieces > 0; ++i) {
      const int32_t* origin = gather_.tables.passes[i].origin;
      CHECK(origin[0] == 0 && origin[1] == 0 && origin[2] == 0) << named_ << i;
    }
    CHECK(gather_.tile_positions() % 16 == 0) << named_ << gather_.tile_positions();
    CHECK(gather_.channel_pitch >= gather_.tile_positions() * bytes) << named_ << gather_.channel_pitch;
    CHECK(gather_.channel_pitch % 32 == 16) << named_ << gather_.channel_pitch;
    CHECK(gather_.half_stride * bytes == 16 * gather_.channel_pitch) << named_ << gather_.half_stride;
  }

  // Where boxes of the source are copied, their rows are whole vectors, wherever the first begins, of a tensor whose
  // rows are that, too; no group's last stage has another one's channels.
  void check_boxed() {
    if (!gather_.boxed()) return;
    const Problem problem = with_merged_groups(named_.problem, gather_.merged_groups);
    const Extent source = op_ == Operator::forward ? problem.input : problem.output();
    const int64_t channels = op_ == Operator::forward ? problem.group_in_channels() : problem.group_out_channels();
    CHECK(problem.layout == Layout::ncdhw && gather_.element_bytes == 4 && !gather_.exact) << named_;
    CHECK(source[2] % 4 == 0 && (problem.groups == 1 || channels % gather_.stage_channels() == 0)) << named_;
    CHECK(gather_.source_stride[2] == 1) << named_;
    for (const int step : gather_.source_step) CHECK(step == 1) << named_;
    CHECK(gather_.row_pitch % 4 == 0 && gather_.row_pitch >= gather_.width + 3) << named_ << gather_.row_pitch;
    CHECK(gather_.channel_pitch == 4 * gather_.planes * gather_.rows * gather_.row_pitch) << named_;
    for (const int extent : {gather_.row_pitch, gather_.rows, gather_.planes, gather_.samples}) {
      CHECK(extent <= 256) << named_ << extent;
    }
    CHECK(gather_.half_stride == (gather_.channel_step == 2 ? 1 : 4) * gather_.channel_pitch) << named_;
    CHECK(gather_.box_bytes() == gather_.samples * gather_.stage_channels() * gather_.channel_pitch) << named_;
    CHECK(gather_.source_stage_bytes % 128 == 0 && gather_.source_stage_bytes >= gather_.box_bytes()) << named_;
    CHECK(gather_.source_threads() >= (gather_.has_gaps ? 64 : 32)) << named_ << gather_.source_threads();
  }

  // In place the tile is made of blocks of eight eights, which lie equally far apart in the source, too.
  void check_blocks() {
    const int* step = gather_.eight_step;
    if (!gather_.in_place()) {
      CHECK(step[0] + step[1] + step[2] == 0) << named_;
      return;
    }
    const int64_t row = step[0] * gather_.source_stride[0] * gather_.rows + step[1] * gather_.source_stride[1];
    CHECK(row * gather_.row_pitch + step[2] == gather_.eight_stride) << named_ << gather_.eight_stride;
    CHECK((step[0] > 0) + (step[1] > 0) + (step[2] > 0) == 1) << named_;
    for (int axis = 0; axis < 3; ++axis) {
      CHECK(gather_.block[axis] == (axis == 2 ? 8 : 1) + 7 * step[axis]) << named_ << " axis " << axis;
      CHECK(gather_.tile[axis] % gather_.block[axis] == 0) << named_ << " axis " << axis;
    }
  }

  // What leaves in bulk is whole multiples of 16 bytes and has room in shared memory; what leaves from registers needs
  // none; what is handed over to warps that store has room for a whole tile, or runs of some channels.
  void check_way_out() {
    const Problem problem = with_merged_groups(named_.problem, gather_.merged_groups);
    const bool channels_first = problem.layout == Layout::ncdhw, forward = op_ == Operator::forward;
    const int64_t channels = forward ? problem.group_out_channels() : problem.group_in_channels();
    const int64_t bytes = gather_.element_bytes, row_slots = gather_.slot_extent[2];
    if (gather_.whole_rows) {
      CHECK(!channels_first && problem.groups == 1 && gather_.column_blocks == 1) << named_;
      CHECK(row_slots == gather_.destination_stride[2]) << named_;
    }
    if (gather_.stores_in_bulk) {
      CHECK(!channels_first && channels * bytes % 16 == 0 && gather_.columns * bytes % 16 == 0) << named_;
      CHECK(gather_.whole_rows || std::min<int64_t>(channels, gather_.columns) * bytes >= 128) << named_;
      const int round = bulk_bytes(gather_.slot_extent[2], gather_.columns, gather_.element_bytes);
      CHECK(gather_.staging_bytes >= int64_t{8} * gather_.warpgroups * round) << named_;
    } else if (gather_.stores_runs) {
      check_runs();
    } else if (gather_.storing_warps > 0) {
      CHECK(channels_first && bytes == 2 && !gather_.exact && !gather_.in_place()) << named_;
      CHECK(gather_.staging_bytes >= bytes * gather_.slots * gather_.columns * gather_.positions()) << named_;
      CHECK(gather_.source_threads() >= 32 && gather_.items >= 4 * gather_.blocks) << named_;
    } else if (!channels_first || gather_.stores_from_registers) {
      CHECK(gather_.staging_bytes == 0) << named_;
    }
    if (gather_.stores_from_registers) {
      CHECK(channels_first && row_slots == (bytes == 2 ? 1 : 2)) << named_;
      if (bytes == 4) CHECK(gather_.destination_stride[2] == 2 && gather_.items <= gather_.blocks) << named_;
    }
  }

  // Runs hold all that a tile writes of a channel, begin with 16 bytes in shared memory, and have room there wherever
  // in the destination's they begin.
  void check_runs() {
    const int64_t bytes = gather_.element_bytes, vector = 16 / bytes;
    const int columns = handed_columns(gather_.configuration(), gather_.element_bytes);
    CHECK(named_.problem.layout == Layout::ncdhw && !gather_.exact && !gather_.in_place()) << named_;
    CHECK(gather_.slot_extent[2] == gather_.destination_stride[2]) << named_;
    int64_t row = gather_.tile[2] * gather_.slot_extent[2];
    int64_t lines = 1;
    if (gather_.whole_planes) {
      row = op_ == Operator::forward ? named_.problem.output()[2] : named_.problem.input[2];
      lines = int64_t{gather_.tile[1]} * gather_.destination_stride[1];
      CHECK(gather_.tiles[2] == 1) << named_;
      CHECK(gather_.slot_extent[1] == gather_.destination_stride[1] || gather_.fills_runs) << named_;
    }
    CHECK(gather_.plane_runs == (gather_.whole_planes ? 1 : gather_.tile[1] * gather_.slot_extent[1])) << named_;
    if (gather_.fills_runs) check_filled_runs();
    CHECK(gather_.runs == gather_.samples * gather_.tile[0] * gather_.slot_extent[0] * gather_.plane_runs) << named_;
    CHECK(gather_.runs <= gather_.positions()) << named_ << ", " << gather_.runs << " runs";
    CHECK(gather_.run_pitch % vector == 0 && gather_.run_pitch >= lines * row + vector - 1) << named_;
    CHECK(columns % 8 == 0 && columns <= gather_.columns) << named_ << ", " << columns << " columns";
    const int64_t constants = gather_.fills_runs ? int64_t{gather_.storing_warps} * kConstantBytes : 0;
    CHECK(gather_.staging_bytes == bytes * gather_.runs * columns * gather_.run_pitch + constants) << named_;
    CHECK(gather_.source_threads() >= 32 && gather_.items >= 4 * gather_.blocks) << named_;
  }

  // Runs that are filled before have one block of residues along the height that tiles write, and all others between.
  void check_filled_runs() {
    const int stride = gather_.destination_stride[1], extent = gather_.slot_extent[1];
    CHECK(gather_.whole_planes && gather_.bare_residues[1] != 0 && stride % extent == 0) << named_;
    const int first = gather_.tables.phases[0].residue[1];
    for (int block = 0; block < gather_.phase_blocks; ++block) {
      CHECK(gather_.tables.phases[block].residue[1] == first) << named_;
    }
    for (int residue = 0; residue < stride; ++residue) {
      CHECK(gather_.is_bare(1, residue) == (residue < first || residue >= first + extent)) << named_ << residue;
    }
  }

  const NamedProblem& named_;
  const Operator op_;
  const PipelinedGather& gather_;
  std::set<std::array<int64_t, 7>> seen_;  // tap, channel group, and which residue
  int units_ = 0, taps_ = 0;
};

// In NDHWC every channel has a column, and what a thread of four sums at once are neighbours, in the threads' order.
void check_columns() {
  for (const GatherConfiguration& configuration : kPipelinedGathers) {
    const int columns = configuration.columns;
    for (const int bytes : {2, 4}) {
      std::set<int> seen;
      for (int column = 0; column < columns; ++column) seen.insert(channel_of_column(column, columns, bytes));
      CHECK(static_cast<int>(seen.size()) == columns && *seen.begin() == 0 && *seen.rbegin() == columns - 1) << columns;
      for (int block = 0; block < columns / 8;) {
        const int together = blocks_together(block, columns / 8, bytes);
        for (int i = 0; i < 8 * together; ++i) {
          const int thread = i / (2 * together), sum = i % (2 * together);
          const int column = 8 * (block + sum / 2) + 2 * thread + sum % 2;
          CHECK(channel_of_column(column, columns, bytes) == 8 * block + i) << columns << " columns, " << bytes;
        }
        block += together;
      }
    }
  }
}

// Rows of whole vectors are loaded as such where the tensor is aligned, else as wide as it is.
void check_source_loads() {
  const Extent none{0, 0, 0}, one{1, 1, 1}, two{2, 2, 2};
  const auto loads_of = [&](int64_t width, DataType dtype, Layout layout, uintptr_t address) {
    Problem problem = problem_of(2, 64, 64, 1, {16, 16, width}, two, two, none, none, one);
    problem.dtype = dtype;
    problem.precision = Precision::tf32;
    problem.layout = layout;
    PipelinedGather gather;
    CHECK(cut_pipelined_gather(problem, Operator::forward, kTarget, gather).has_value()) << width << " columns";
    return source_loads(problem, Operator::forward, gather, address);
  };
  CHECK(loads_of(64, DataType::bfloat16, Layout::ncdhw, 16) == SourceLoads::rows);
  CHECK(loads_of(64, DataType::bfloat16, Layout::ncdhw, 8) == SourceLoads::pairs);
  CHECK(loads_of(64, DataType::bfloat16, Layout::ncdhw, 2) == SourceLoads::elements);
  CHECK(loads_of(68, DataType::bfloat16, Layout::ncdhw, 16) == SourceLoads::pairs);
  CHECK(loads_of(65, DataType::bfloat16, Layout::ncdhw, 16) == SourceLoads::elements);
  CHECK(loads_of(64, DataType::float32, Layout::ncdhw, 16) == SourceLoads::rows);
  CHECK(loads_of(64, DataType::float32, Layout::ncdhw, 8) == SourceLoads::elements);
  CHECK(loads_of(66, DataType::float32, Layout::ncdhw, 16) == SourceLoads::elements);
  CHECK(loads_of(64, DataType::bfloat16, Layout::ndhwc, 16) == SourceLoads::vectors);
  CHECK(loads_of(64, DataType::bfloat16, Layout::ndhwc, 8) == SourceLoads::elements);
}

}  // namespace

int main() {
  check_columns();
  check_source_loads();
  int taken = 0, with_passes = 0, with_bare_rows = 0, with_kept_weights = 0, with_merged_groups = 0;
  int in_bulk = 0, from_registers = 0, by_others = 0, by_runs = 0, by_filled_runs = 0;
  int in_place = 0, copied = 0, boxed = 0, with_windows = 0, with_cubes = 0, with_points = 0;
  const auto cut_and_check = [&](const NamedProblem& named, Operator op) {
    PipelinedGather gather;
    if (!cut_pipelined_gather(named.problem, op, kTarget, gather)) return std::string();
    ++taken;
    with_passes += gather.passes[0] * gather.passes[1] > 1 ? 1 : 0;
    with_kept_weights += gather.keeps_weights ? 1 : 0;
    with_merged_groups += gather.merged_groups > 1 ? 1 : 0;
    in_bulk += gather.stores_in_bulk ? 1 : 0;
    from_registers += gather.stores_from_registers ? 1 : 0;
    by_others += gather.storing_warps > 0 && !gather.stores_runs ? 1 : 0;
    by_runs += gather.stores_runs ? 1 : 0;
    by_filled_runs += gather.fills_runs ? 1 : 0;
    in_place += gather.in_place() ? 1 : 0;
    copied += gather.copied() ? 1 : 0;
    boxed += gather.boxed() ? 1 : 0;
    with_windows += gather.pattern == Pattern::windows ? 1 : 0;
    with_cubes += gather.pattern == Pattern::cubes ? 1 : 0;
    with_points += gather.pattern == Pattern::points ? 1 : 0;
    with_bare_rows += gather.bare_residues[0] != 0 || gather.bare_residues[1] != 0 ? 1 : 0;
    TableChecker(named, op, gather).check();
    return gather.name();
  };
  for (NamedProblem named : problems()) {
    for (const Operator op : kOperators) {
      for (const DataType dtype : {DataType::float64, DataType::float32, DataType::float16, DataType::bfloat16}) {
        for (const Layout layout : {Layout::ncdhw, Layout::ndhwc}) {
          named.problem.dtype = dtype;
          named.problem.layout = layout;
          named.problem.precision = Precision::tf32;
          const std::string name = cut_and_check(named, op);
          CHECK(name.empty() == (dtype == DataType::float64)) << named;
        }
      }
    }
  }
  CHECK(taken > 200) << taken << " problems cut";

  std::set<std::string> reached;
  std::mt19937 random(1);
  for (int i = 0; i < 4000; ++i) {
    const NamedProblem named = draw(random);
    for (const Operator op : kOperators) reached.insert(cut_and_check(named, op));
  }
  const Extent none{0, 0, 0}, one{1, 1, 1};
  for (const Extent& kernel : {Extent{1, 2, 2}, Extent{2, 2, 2}, Extent{3, 2, 2}}) {  // that equal strides, or nearly
    const Extent stride{std::min<int64_t>(kernel[0], 2), 2, 2};
    Problem apart = problem_of(2, 64, 64, 1, {32, 32, 32}, kernel, stride, none, none, one);
    for (const DataType dtype : {DataType::float32, DataType::float16, DataType::bfloat16}) {
      for (const int64_t channels : {16, 32, 64}) {
        apart.dtype = dtype;
        apart.precision = Precision::tf32;
        apart.out_channels = channels;
        reached.insert(cut_and_check({"kernel = stride", apart}, Operator::forward));
      }
    }
  }
  for (const int64_t size : {4, 8, 12}) {  // of a few tiles
    for (const int64_t channels : {240, 256, 320}) {
      Problem deep = problem_of(2, 320, channels, 1, {size, 8, 8}, {2, 2, 2}, {2, 2, 2}, none, none, one);
      deep.precision = Precision::tf32;
      reached.insert(cut_and_check({"deep, kernel = stride", deep}, Operator::forward));
    }
  }
  for (const DataType dtype : {DataType::float32, DataType::float16, DataType::bfloat16}) {
    for (const int64_t width : {16, 32, 33}) {
      for (const Extent& beyond : {none, one}) {
        Problem up = problem_of(2, 128, 64, 1, {16, 16, width}, {3, 3, 3}, {2, 2, 2}, one, beyond, one);
        up.dtype = dtype;
        up.precision = Precision::tf32;
        reached.insert(cut_and_check({"up by two", up}, Operator::forward));
      }
    }
  }
  reached.erase("");
  CHECK(with_passes > 100 && with_bare_rows > 100 && with_kept_weights > 100)
      << with_passes << " with passes, " << with_bare_rows << " with bare rows, " << with_kept_weights
      << " with weights";
  CHECK(with_merged_groups > 20) << with_merged_groups << " with merged groups";
  CHECK(in_bulk > 100 && from_registers > 100) << in_bulk << " leave in bulk, " << from_registers << " from registers";
  CHECK(by_others > 10 && by_runs > 10) << by_others << " leave by other warps, " << by_runs << " in runs";
  CHECK(by_filled_runs > 0) << by_filled_runs << " in runs that are filled before";
  CHECK(in_place > 100 && copied > 10 && boxed > 50)
      << in_place << " are in place, " << copied << " copied, " << boxed << " boxed";
  CHECK(with_windows > 20 && with_cubes > 5 && with_points > 5)
      << with_windows << " with windows, " << with_cubes << " with cubes, " << with_points << " with points";
  CHECK(reached.size() == std::size(kPipelinedGathers)) << reached.size() << " kernels reached";

  const auto is_taken = [&](const std::string& name, Problem problem, Operator op) {
    problem.dtype = DataType::bfloat16;
    return !cut_and_check({name, problem}, op).empty();
  };
  const Problem far = problem_of(2, 64, 64, 1, {16, 16, 64}, {10, 10, 1}, {10, 10, 1}, none, none, one);
  CHECK(is_taken("more residues of the source than there can be passes", far, Operator::grad_input));
  const Problem uneven = problem_of(8, 256, 32, 1, {16, 32, 8}, {7, 4, 5}, {4, 1, 2}, {3, 3, 0}, none, {1, 2, 1});
  CHECK(is_taken("the cheapest kernel lacks a set of bands", uneven, Operator::forward));
  const Problem apart = problem_of(2, 64, 64, 1, {1, 1, 8}, {2, 2, 1}, one, {32767, 32767, 0}, none, {65535, 65535, 1});
  CHECK(!is_taken("no stage holds what one position reads", apart, Operator::forward));

  PipelinedGather gather;
  const NamedProblem plain = problems()[1];
  CHECK(!cut_pipelined_gather(plain.problem, Operator::forward, {Backend::cuda, 108, 80, 164 << 10}, gather));
  return finish();
}
