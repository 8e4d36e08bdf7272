// grad_weight's cuts: what a block holds in shared memory fits there and has each tap's positions in their places, what
// is loaded together lies together, and every kernel is chosen for some problem.
#include "direct/reduction.h"

#include <limits>
#include <random>
#include <set>

#include "check.h"
#include "direct/shared_memory.h"
#include "problems.h"

namespace {

using namespace convt3d;
using namespace convt3d::direct;
using namespace convt3d::test;

constexpr int kInput = 0, kGradOutput = 1;
const Target kTargets[] = {{Backend::cuda, 132, 90, 228 << 10}, {Backend::cuda, 108, 80, 164 << 10}};

bool is_ieee(const Problem& problem) {
  return problem.dtype == DataType::float32 && problem.precision == Precision::ieee;
}

class CutChecker {
 public:
  CutChecker(const NamedProblem& named, const Target& target, const TensorReduction& cut)
      : named_(named), problem_(named.problem), target_(target), cut_(cut) {}

  void check() const {
    const int64_t stages = int64_t{cut_.stages} * cut_.stage_bytes;
    CHECK(cut_.stages >= 2 && cut_.table_bytes + stages <= shared_memory_of_block(target_, 1)) << named_;
    const SumPitches sums(cut_, problem_.layout == Layout::ndhwc);
    CHECK(int64_t{4} * sums.in_channel * cut_.columns_per_tile <= stages) << named_;
    check_sums(sums);
    if (element_size(problem_.dtype) == 2) check_fragments();
    CHECK(cut_.input_warps >= 1 && cut_.input_warps < cut_.loading_threads / 32) << named_;
    CHECK(cut_.column_tiles * cut_.columns_per_tile >= cut_.in_channels) << named_;
    CHECK(cut_.channel_tiles * cut_.channel_bands * 8 >= cut_.out_channels) << named_;
    for (int axis = 0; axis < 3; ++axis) {
      const ReductionAxis& along = cut_.axis[axis];
      CHECK(taps(axis) * along.tap_tiles >= problem_.kernel[axis]) << named_ << ", axis " << axis;
      CHECK(int64_t{along.voxels} * along.voxel_boxes >= problem_.input[axis]) << named_ << ", axis " << axis;
      check_places(axis);
    }
    for (const int side : {kInput, kGradOutput}) {
      for (int axis = 0; axis < 3; ++axis) check_loaded(side, axis);
      check_span(side);
    }
  }

 private:
  int64_t taps(int axis) const { return cut_.axis[axis].taps; }

  // The sums that a warp writes at once, of eight output channels and every other one of eight input channels, meet in
  // no bank, and all sums of an input channel lie before the next one's.
  void check_sums(const SumPitches& sums) const {
    std::set<int32_t> banks;
    for (int lane = 0; lane < 32; ++lane) {
      banks.insert((lane / 4 * sums.channel + lane % 4 * 2 * sums.in_channel) % 32);
    }
    CHECK(banks.size() == 32) << named_;
    const int64_t last_tap = taps(0) * taps(1) * taps(2) - 1, last_channel = 8 * cut_.channel_bands - 1;
    CHECK(last_tap * sums.tap + last_channel * sums.channel < sums.in_channel) << named_;
  }

  // Eight voxels of a step, which one matrix of a fragment is loaded from, lie in all banks.
  void check_fragments() const {
    const Region& region = cut_.region[kGradOutput];
    const int width = cut_.axis[2].step;
    if (width * cut_.axis[1].step < 8) return;  // they lie in several planes
    std::set<int32_t> banks;
    for (int voxel = 0; voxel < 8; ++voxel) {
      banks.insert((voxel / width * region.axis[1].slot_pitch + voxel % width * region.axis[2].slot_pitch) % 8);
    }
    CHECK(banks.size() == 8) << named_ << ", " << width << " voxels of a row";
  }

  // Each tap finds a box's voxels where the loading threads have put them, and no two positions share a slot.
  void check_places(int axis) const {
    const RegionAxis& region = cut_.region[kGradOutput].axis[axis];
    const ReductionAxis& along = cut_.axis[axis];
    std::set<int32_t> shifts, slots;
    for (int tap = 0; tap < along.taps; ++tap) {
      for (int voxel = 0; voxel < along.voxels; ++voxel) {
        const int32_t shift = tap * along.dilation + voxel * along.stride, slot = region.slot_at(shift);
        CHECK(slot == region.tap_slot[tap] + voxel * region.slot_pitch)
            << named_ << ", axis " << axis << ", tap " << tap << ", voxel " << voxel;
        shifts.insert(shift);
        slots.insert(slot);
      }
    }
    CHECK(shifts.size() == slots.size() && static_cast<int32_t>(slots.size()) <= region.entries) << named_;
    CHECK(region.slot_at(-1) < 0) << named_;
  }

  // What is not loaded lies outside of the volume, in every box and for all taps.
  void check_loaded(int side, int axis) const {
    const Region& region = cut_.region[side];
    const RegionAxis& held = region.axis[axis];
    const ReductionAxis& along = cut_.axis[axis];
    CHECK(held.loaded >= 1 && held.loaded <= held.entries) << named_ << ", axis " << axis;
    if (along.voxel_boxes > 1) {
      CHECK(held.loaded == held.entries && (axis < 2 || region.loaded_spans == region.spans)) << named_;
      return;
    }
    for (int tile = 0; tile < (side == kInput ? 1 : along.tap_tiles); ++tile) {
      const int origin = side == kInput ? 0 : tile * along.taps * along.dilation - along.padding;
      std::set<int> positions, spans;
      for (int shift = 0; shift <= RegionAxis::kMostShift[axis]; ++shift) {
        if (held.slot_at(shift) < 0 || origin + shift < 0 || origin + shift >= held.extent) continue;
        positions.insert(origin + shift);
        spans.insert((origin + shift) / region.span);
      }
      CHECK(static_cast<int32_t>(positions.size()) <= held.loaded) << named_ << ", axis " << axis;
      if (axis < 2 || region.span == 1 || spans.empty()) continue;
      CHECK(*spans.rbegin() - *spans.begin() < region.loaded_spans) << named_;
    }
  }

  // Neighbours that are loaded together begin where rows of the volume do, in every box.
  void check_span(int side) const {
    const Region& region = cut_.region[side];
    const ReductionAxis& width = cut_.axis[2];
    if (region.span == 1) return;
    const int64_t extent = side == kInput ? problem_.input[2] : problem_.output()[2];
    const int64_t box_step = side == kInput ? width.voxels : int64_t{width.voxels} * width.stride;
    CHECK(problem_.layout == Layout::ncdhw && extent % region.span == 0) << named_;
    CHECK(width.voxel_boxes == 1 || box_step % region.span == 0) << named_;
    CHECK(region.copied == (side == kInput && region.span == 8)) << named_;
    if (side == kInput) CHECK(width.step % region.span == 0 && region.spans * region.span == width.voxels) << named_;
    if (region.copied) CHECK(element_size(problem_.dtype) == 2) << named_;
  }

  const NamedProblem& named_;
  const Problem& problem_;
  const Target& target_;
  const TensorReduction& cut_;
};

}  // namespace

int main() {
  std::set<int32_t> reached[2];  // the kernels of most types, and of IEEE float32
  int copied = 0, with_spans = 0, leaving_out = 0;
  const auto cut_and_check = [&](const NamedProblem& named, const Target& target) {
    TensorReduction cut;
    const auto cycles = cut_tensor_reduction(named.problem, target, std::numeric_limits<int64_t>::max(), cut);
    if (!cycles) return false;
    CHECK(*cycles > 0) << named;
    if (target.compute_capability == 90) reached[is_ieee(named.problem) ? 1 : 0].insert(cut.warp_tile);
    copied += cut.region[kInput].copied ? 1 : 0;
    with_spans += cut.region[kGradOutput].span > 1 ? 1 : 0;
    leaving_out += cut.region[kGradOutput].leaves_out() ? 1 : 0;
    CutChecker(named, target, cut).check();
    return true;
  };
  for (NamedProblem named : problems()) {
    for (const DataType dtype : {DataType::float64, DataType::float32, DataType::float16, DataType::bfloat16}) {
      for (const Layout layout : {Layout::ncdhw, Layout::ndhwc}) {
        named.problem.dtype = dtype;
        named.problem.layout = layout;
        named.problem.precision = Precision::tf32;
        const bool wanted = dtype != DataType::float64 && named.problem.batch > 0;
        for (const Target& target : kTargets) CHECK(cut_and_check(named, target) == wanted) << named;
      }
    }
  }
  std::mt19937 random(3);
  for (int i = 0; i < 600; ++i) {
    const NamedProblem named = draw(random);
    for (const Target& target : kTargets) cut_and_check(named, target);
  }
  CHECK(copied > 20 && with_spans > 100) << copied << " copied, " << with_spans << " with spans";
  CHECK(leaving_out > 100) << leaving_out << " leave positions out";
  CHECK(reached[0].size() == kWarpTiles.size()) << reached[0].size() << " kernels reached";
  CHECK(reached[1].size() == kIeeeWarpTiles.size()) << reached[1].size() << " IEEE kernels reached";
  return finish();
}
