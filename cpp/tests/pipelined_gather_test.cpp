// The pipelined gather's tables against the definition: every contact is there once, in the right place, a tile's
// pieces fit the multiprocessor that they are cut for, and every kernel is chosen for some problem.
#include "direct/pipelined_gather.h"

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
std::array<int64_t, 3> offset_of(const PipelinedGather& gather, const PipelinedPhase& phase, int shift, int group) {
  const int position = (shift - 2 * group * gather.half_stride) / 16;
  const int line = position / gather.row_pitch, column = position % gather.row_pitch;
  const int residue = column / gather.residue_pitch;
  const int along[3] = {line / gather.rows, line % gather.rows,
                        (column - residue * gather.residue_pitch) * gather.source_stride[2] + residue};
  std::array<int64_t, 3> offset;
  for (int axis = 0; axis < 3; ++axis) {
    offset[axis] = (phase.origin[axis] + along[axis]) * gather.source_step[axis] + gather.source_origin[axis];
  }
  return offset;
}

void check_tables(const NamedProblem& named, Operator op, const PipelinedGather& gather) {
  const Problem& problem = named.problem;
  const int folded = gather.fold[0] * gather.fold[1] * gather.fold[2];
  std::set<std::array<int64_t, 7>> seen;  // tap, channel group, and which residue
  int units = 0, taps_so_far = 0;
  for (int block = 0; block < gather.phase_blocks; ++block) {
    const PipelinedPhase& phase = gather.tables.phases[block];
    for (int number = phase.first_piece; number < phase.first_piece + phase.pieces; ++number) {
      const WeightPiece& piece = gather.tables.pieces[number];
      CHECK(piece.first_unit == units && piece.units <= gather.piece_units) << named;
      uint32_t weights = 0;
      for (int i = piece.first_step; i < piece.first_step + piece.steps; ++i) {
        const PipelinedStep& step = gather.tables.steps[i];
        CHECK(step.weights == weights) << named;
        const int set = static_cast<int>(step.code) / gather.step_units();
        const int members = static_cast<int>(step.code) % gather.step_units() + 1;
        CHECK(step.bands == bands_of(gather, set)) << named;
        for (int product = 0; product < members * gather.bands(); ++product) {
          const int member = product / gather.bands(), band = product % gather.bands();
          if (!(step.bands >> band & 1)) continue;
          ++units;
          weights += static_cast<uint32_t>(gather.unit_bytes / 16);
          int taps_of_unit = 0;
          for (int number_in_band = 0; number_in_band < gather.band(); ++number_in_band) {
            const int slot = band * gather.band() + number_in_band, order = gather.unit_order[taps_so_far++];
            if (order == PipelinedGather::kNoTap) {
              CHECK(gather.band() > 1 && gather.has_gaps) << named << ": a gap that is not known";
              continue;
            }
            ++taps_of_unit;
            const int tap = order / gather.channel_groups, group = order % gather.channel_groups;
            const Triple taps{tap / problem.kernel[2] / problem.kernel[1], tap / problem.kernel[2] % problem.kernel[1],
                              tap % problem.kernel[2]};
            const Triple residue = residues_of(gather, phase, slot);
            check_contact(named, op, gather, offset_of(gather, phase, step.shift[member], group), taps, residue);
            CHECK(seen.insert({taps[0], taps[1], taps[2], group, residue[0], residue[1], residue[2]}).second)
                << named << ": a contact twice";
          }
          CHECK(taps_of_unit > 0) << named << ": a product without a tap";
        }
      }
    }
  }
  CHECK(units == gather.units) << named;
  CHECK(static_cast<int64_t>(seen.size()) == problem.taps() * folded * gather.channel_groups) << named;
  CHECK(gather.shared_bytes <= kTarget.shared_memory * gather.warpgroups / 2 - 1024) << named << gather.shared_bytes;
  CHECK(gather.samples * gather.tile[0] * gather.tile[1] * gather.tile[2] <= gather.positions()) << named;
  CHECK(gather.source_stages >= 2 && gather.weight_stages >= 2) << named;
}

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

// A problem of a size as networks have them.
NamedProblem draw(std::mt19937& random) {
  const auto pick = [&random](std::initializer_list<int> values) { return values.begin()[random() % values.size()]; };
  NamedProblem drawn = problems()[0];
  Problem& problem = drawn.problem;
  problem = Problem();
  problem.groups = pick({1, 1, 1, 2, 4});
  problem.batch = pick({1, 2, 4});
  problem.in_channels = problem.groups * pick({3, 8, 16, 32, 48, 64, 128, 256});
  problem.out_channels = problem.groups * pick({1, 3, 8, 16, 24, 32, 48, 64, 128});
  const bool is_cubic = random() % 2 == 0;
  for (int axis = 0; axis < 3; ++axis) {
    problem.stride[axis] = is_cubic && axis > 0 ? problem.stride[0] : pick({1, 1, 2, 2, 2, 3, 4});
    problem.kernel[axis] = is_cubic && axis > 0 ? problem.kernel[0] : pick({1, 2, 3, 3, 4, 5});
    problem.dilation[axis] = pick({1, 1, 1, 2});
    problem.padding[axis] = pick({0, 1});
    problem.input[axis] = pick({4, 7, 8, 16, 31, 32, 64});
  }
  problem.dtype = pick({0, 0, 1}) != 0 ? DataType::bfloat16 : DataType::float32;
  problem.precision = random() % 2 == 0 ? Precision::ieee : Precision::tf32;
  problem.layout = random() % 2 == 0 ? Layout::ndhwc : Layout::ncdhw;
  return drawn;
}

}  // namespace

int main() {
  check_columns();
  int taken = 0;
  const auto cut_and_check = [&taken](const NamedProblem& named, Operator op) {
    PipelinedGather gather;
    if (!cut_pipelined_gather(named.problem, op, kTarget, gather)) return std::string();
    ++taken;
    check_tables(named, op, gather);
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
  for (int i = 0; i < 6000; ++i) {
    const NamedProblem named = draw(random);
    try {
      named.problem.validate();
    } catch (const InvalidProblem&) {
      continue;
    }
    for (const Operator op : kOperators) reached.insert(cut_and_check(named, op));
  }
  reached.erase("");
  CHECK(reached.size() == std::size(kPipelinedGathers)) << reached.size() << " kernels reached";

  PipelinedGather gather;
  const NamedProblem plain = problems()[1];
  CHECK(!cut_pipelined_gather(plain.problem, Operator::forward, {Backend::cuda, 108, 80, 164 << 10}, gather));
  return finish();
}
