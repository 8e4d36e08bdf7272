// The tensor-core gather's tables against the definition: every contact is there once, in the right place, and a tile's
// pieces fit the multiprocessor that they are cut for.
#include "direct/gather.h"

#include <array>
#include <set>

#include "check.h"
#include "contacts.h"
#include "problems.h"

namespace {

using namespace convt3d;
using namespace convt3d::direct;
using namespace convt3d::test;

constexpr Operator kOperators[] = {Operator::forward, Operator::grad_input};
constexpr int64_t kSharedMemory[] = {228 << 10, 164 << 10, 100 << 10};

void check_axes(const NamedProblem& named, Operator op) {
  for (int axis = 0; axis < 3; ++axis) {
    const GatherAxis gather(named.problem, op, axis);
    int64_t contacts = 0;
    for (int64_t residue = 0; residue < gather.destination_stride; ++residue) {
      for (const Contact& contact : gather.residues[residue]) {
        ++contacts;
        CHECK(is_contact(named.problem, op, axis, contact.offset, contact.tap, residue))
            << named << " axis " << axis << " residue " << residue << " tap " << contact.tap;
      }
    }
    CHECK(contacts == named.problem.kernel[axis]) << named << " axis " << axis;
  }
}

// The tap that a step's slot takes, as three indices.
std::array<int64_t, 3> taps_of(const Problem& problem, const TensorGather& gather, const GatherStage& stage,
                               const GatherStep& step, int slot, int group) {
  const int tap_units = 2 * gather.stage_k_steps() * gather.columns, group_units = 2 * gather.k_steps * gather.columns;
  const int number = (step.weights[slot] - group * group_units) / tap_units;
  CHECK(number * tap_units + group * group_units == step.weights[slot] && number < stage.taps) << "weights";
  const int64_t tap = gather.tap_order[stage.first_tap + number];
  return {tap / problem.kernel[2] / problem.kernel[1], tap / problem.kernel[2] % problem.kernel[1],
          tap % problem.kernel[2]};
}

void check_tables(const NamedProblem& named, Operator op, const TensorGather& gather, int64_t shared_memory) {
  const Problem& problem = named.problem;
  std::set<std::array<int64_t, 3>> seen;
  for (int block = 0; block < gather.phase_blocks; ++block) {
    const PhaseBlock& phase = gather.tables.phases[block];
    for (int s = phase.first_stage; s < phase.first_stage + phase.stages; ++s) {
      const GatherStage& stage = gather.tables.stages[s];
      CHECK(stage.steps % gather.channel_groups == 0) << named;
      for (int number = 0; number < stage.steps; ++number) {
        const GatherStep& step = gather.tables.steps[stage.first_step + number];
        const int group = number % gather.channel_groups;
        // From the shift, in 16-byte units, back to offsets along height and width.
        const int unit = step.shift / 16 - group * 2 * gather.k_steps * gather.source_positions;
        const int column = unit % gather.row_pitch, stride = gather.source_stride[2];
        const Triple offset{stage.depth_offset, phase.origin[0] + unit / gather.row_pitch,
                            phase.origin[1] + column % gather.residue_pitch * stride + column / gather.residue_pitch};
        CHECK(step.slots != 0) << named << ": a step without products";
        for (int slot = 0; slot < gather.slots; ++slot) {
          if (!(step.slots >> slot & 1)) continue;
          const Triple taps = taps_of(problem, gather, stage, step, slot, group);
          check_contact(named, op, gather, offset, taps, residues_of(gather, phase, slot));
          if (group == 0) CHECK(seen.insert(taps).second) << named << ": a tap twice";
        }
      }
    }
  }
  CHECK(static_cast<int64_t>(seen.size()) == problem.taps()) << named << ": " << seen.size() << " taps";
  const int64_t blocks = 4 / gather.warpgroups;
  CHECK(gather.shared_bytes <= shared_memory / blocks - 1024) << named << ": " << gather.shared_bytes << " bytes";
  CHECK(gather.samples * gather.tile[0] * gather.tile[1] * gather.tile[2] <= gather.positions()) << named;
}

}  // namespace

int main() {
  int taken = 0;
  for (NamedProblem named : problems()) {
    for (const Operator op : kOperators) {
      check_axes(named, op);
      for (const DataType dtype : {DataType::float64, DataType::float32, DataType::float16, DataType::bfloat16}) {
        for (const Precision precision : {Precision::tf32, Precision::ieee}) {
          for (const int64_t shared_memory : kSharedMemory) {
            named.problem.dtype = dtype;
            named.problem.precision = precision;
            TensorGather gather;
            const Target target{Backend::cuda, 132, 90, shared_memory};
            const bool takes = cut_tensor_gather(named.problem, op, target, gather).has_value();
            CHECK(!takes || dtype != DataType::float64) << named;
            CHECK(takes || dtype == DataType::float64 || precision == Precision::ieee) << named;
            if (!takes) continue;
            ++taken;
            CHECK(gather.exact == (dtype == DataType::float32 && precision == Precision::ieee)) << named;
            check_tables(named, op, gather, shared_memory);
          }
        }
      }
    }
  }
  CHECK(taken > 500) << taken << " problems cut";
  // Padded as dilated layers are that keep their size, most of whose taps lie far outside.
  int far_apart = 0;
  for (const int64_t dilation : {2, 30, 1024, 2900, 32764, 65536, 1 << 22}) {
    for (const Extent& extent : {Extent{512, 8, 8}, Extent{64, 8, 8}, Extent{1, 64, 64}}) {
      const Extent padding{0, dilation, dilation};
      Problem problem =
          problem_of(2, 8, 8, 1, extent, {1, 3, 3}, {1, 1, 1}, padding, {0, 0, 0}, {1, dilation, dilation});
      problem.dtype = DataType::float16;
      for (const Operator op : kOperators) {
        TensorGather gather;
        if (!cut_tensor_gather(problem, op, {Backend::cuda, 132, 90, 228 << 10}, gather)) continue;
        ++far_apart;
        check_tables({"far apart", problem}, op, gather, 228 << 10);
        CHECK(gather.source_positions > 0 && gather.shared_bytes > 0) << dilation << ": " << gather.shared_bytes;
      }
    }
  }
  CHECK(far_apart >= 6) << far_apart << " problems of taps that lie apart";
  TensorGather gather;
  const NamedProblem plain = problems()[1];
  CHECK(!cut_tensor_gather(plain.problem, Operator::forward, {Backend::cuda, 40, 75, 64 << 10}, gather));
  return finish();
}
