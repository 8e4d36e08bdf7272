#include "direct/reduction.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "direct/shared_memory.h"
#include "geometry.h"

namespace convt3d::direct {
namespace {

constexpr int64_t kMostStages = 4;
constexpr int kMostSynchronousProducts = 28;
constexpr int kInput = 0, kGradOutput = 1;

int64_t round_up(int64_t value, int64_t multiple) { return ceil_divide<int64_t>(value, multiple) * multiple; }

// The positions that `taps` taps, `dilation` apart, reach from `voxels` neighbouring voxels, `stride` apart. With
// `spread`, runs that are loaded in turn, as with stride 2, lie 64 bytes apart, where they are stored without bank
// conflicts.
RegionAxis make_region_axis(int64_t extent, int64_t taps, int64_t voxels, int64_t stride, int64_t dilation,
                            bool spread) {
  RegionAxis axis;
  axis.extent = static_cast<int32_t>(extent);
  axis.stride = static_cast<int32_t>(stride);
  axis.runs = 0;
  int32_t run_of[RegionAxis::kMostTaps];
  int64_t first[RegionAxis::kMostTaps], residue[RegionAxis::kMostTaps];  // shifts are stride * quotient + residue
  for (int64_t tap = 0; tap < taps; ++tap) {
    const int64_t quotient = tap * dilation / stride, rest = tap * dilation % stride;
    int32_t run = 0;
    while (run < axis.runs && residue[run] != rest) ++run;
    if (run == axis.runs) {
      ++axis.runs;
      first[run] = quotient;
      residue[run] = rest;
    }
    axis.run[run].length = static_cast<int32_t>(voxels + quotient - first[run]);
    run_of[tap] = run;
  }
  axis.entries = 0;
  int32_t place = 0;
  for (int32_t run = 0; run < axis.runs; ++run) {
    if (spread && run > 0) place = static_cast<int32_t>(round_up(std::max(place - 4, 0), 8) + 4);
    axis.run[run].shift = static_cast<int32_t>(stride * first[run] + residue[run]);
    axis.run[run].place = place;
    place += axis.run[run].length;
    axis.entries += axis.run[run].length;
  }
  axis.places = place;
  for (int64_t tap = 0; tap < taps; ++tap) {
    const int32_t run = run_of[tap];
    axis.tap_slot[tap] = static_cast<int32_t>(axis.run[run].place + tap * dilation / stride - first[run]);
  }
  return axis;
}

// Slots from one line of gy to the next. Odd, so that neighbouring lines are stored to banks of their own; but eight
// voxels of half types, of two lines or four where a product's are so narrow, should be read from all banks.
int64_t line_pitch(int64_t slots, int64_t step_width, int64_t element_size) {
  const bool is_narrow = element_size == 2 && (step_width == 2 || step_width == 4);
  const int64_t width = is_narrow ? step_width : 1;
  return round_up(slots + width, 2 * width) - width;
}

// Lays out gy's region, whose axes are known; returns its bytes.
int64_t finish_grad_output(Region& region, int64_t step_width, int64_t channels, int64_t element_size) {
  region.chunks = static_cast<int32_t>(channels * element_size / 16);
  int64_t slots = 1;
  for (int axis = 2; axis >= 0; --axis) {
    RegionAxis& along = region.axis[axis];
    along.slot_pitch = static_cast<int32_t>(slots);
    along.step = along.places;
    for (int32_t& slot : along.tap_slot) slot *= along.slot_pitch;
    slots *= along.places;
    if (axis == 2) slots = line_pitch(slots, step_width, element_size);
  }
  // Neighbouring chunks lie half of the 32 banks apart, so that eight float32 channels of four voxels, or two chunks of
  // four positions, meet every bank once.
  region.chunk_pitch = static_cast<int32_t>(round_up(std::max<int64_t>(16 * slots - 64, 0), 128) + 64);
  return int64_t{region.chunks} * region.chunk_pitch;
}

// Lays out x's region in the order of the steps; returns its bytes.
int64_t finish_input(Region& region, const ReductionAxis (&axis)[3], int64_t channels, int64_t element_size) {
  region.chunks = static_cast<int32_t>(channels * element_size / 16);
  int64_t slots = 1, steps = 32 / element_size;
  for (int a = 2; a >= 0; --a) {
    region.axis[a].slot_pitch = static_cast<int32_t>(slots);
    region.axis[a].step = axis[a].step;
    region.axis[a].step_pitch = static_cast<int32_t>(steps);
    slots *= axis[a].step;
    steps *= axis[a].voxels / axis[a].step;
  }
  // `steps` is now the number of voxels. Both pitches are odd multiples of 16 bytes, against bank conflicts.
  if (element_size == 4 || region.copied) {
    region.slot_bits = element_size == 4 ? 2 : 3;
    region.slot_pitch = static_cast<int32_t>(16 * channels + 16);
    region.chunk_pitch = static_cast<int32_t>(16 * 16 / element_size);
    return steps * element_size / 16 * region.slot_pitch;
  }
  region.slot_bits = 0;
  region.slot_pitch = 16;
  region.chunk_pitch = static_cast<int32_t>(16 * steps + 16);
  return int64_t{region.chunks} * region.chunk_pitch;
}

// Of so many loading warps, those that should bring x.
int32_t warps_of_input(double input_work, double grad_output_work, int32_t warps) {
  int32_t best = 1;
  double least = std::numeric_limits<double>::infinity();
  for (int32_t own = 1; own < warps; ++own) {
    const double most = std::max(input_work / own, grad_output_work / (warps - own));
    if (most < least) {
      least = most;
      best = own;
    }
  }
  return best;
}

// The search for the cheapest cut. Costs are clock cycles of one multiprocessor of an H200, by the rates below; other
// GPUs have similar proportions.
class Search {
 public:
  Search(const Problem& problem, const Target& target, int64_t budget)
      : problem_(problem),
        output_(problem.output()),
        multiprocessors_(std::max<int64_t>(target.parallelism, 1)),
        shared_(shared_memory_of_block(target, 1)),
        element_(element_size(problem.dtype)),
        step_(32 / element_),
        capability_(target.compute_capability),
        ieee_(problem.dtype == DataType::float32 && problem.precision == Precision::ieee),
        warpgroup_products_(capability_ == 90 && !ieee_),
        most_parts_(std::max<int64_t>(budget / std::max<int64_t>(4 * problem.weight_elements(), 1), 1)) {}

  std::optional<double> run(TensorReduction& best) {
    choose_step();
    TensorReduction cut;
    cut.in_channels = static_cast<int32_t>(problem_.group_in_channels());
    cut.out_channels = static_cast<int32_t>(problem_.group_out_channels());
    cut.groups = static_cast<int32_t>(problem_.groups);
    for (int axis = 0; axis < 3; ++axis) {
      ReductionAxis& along = cut.axis[axis];
      along.kernel = static_cast<int32_t>(problem_.kernel[axis]);
      along.stride = static_cast<int32_t>(problem_.stride[axis]);
      along.padding = static_cast<int32_t>(problem_.padding[axis]);
      along.dilation = static_cast<int32_t>(problem_.dilation[axis]);
      along.step = static_cast<int32_t>(step_extent_[axis]);
    }
    const size_t tiles = ieee_ ? kIeeeWarpTiles.size() : kWarpTiles.size();
    for (size_t tile = 0; tile < tiles; ++tile) {
      cut.warp_tile = static_cast<int32_t>(tile);
      // The two warpgroups share the bands, the input channels or the voxels.
      constexpr int kWarps[3][3] = {{8, 1, 1}, {4, 2, 1}, {4, 1, 2}};
      for (const auto& warps : kWarps) {
        cut.row_warps = warps[0];
        cut.column_warps = warps[1];
        cut.voxel_warps = warps[2];
        try_warps(cut);
      }
    }
    if (cost_ == std::numeric_limits<double>::infinity()) return std::nullopt;
    best = best_;
    return cost_;
  }

 private:
  WarpTile warp_tile(const TensorReduction& cut) const {
    return ieee_ ? kIeeeWarpTiles[cut.warp_tile] : kWarpTiles[cut.warp_tile];
  }

  // The voxels of a tensor-core product: as many of one row as pad it least, then rows, then planes.
  void choose_step() {
    int64_t rest = step_;
    for (int axis = 2; axis > 0; --axis) {
      int64_t extent = rest;
      for (int64_t narrower = rest / 2; narrower >= 1; narrower /= 2) {
        // It costs bank conflicts, so it has to save more than a tenth.
        if (10 * round_up(problem_.input[axis], narrower) < 9 * round_up(problem_.input[axis], extent)) {
          extent = narrower;
        }
      }
      step_extent_[axis] = extent;
      rest /= extent;
    }
    step_extent_[0] = rest;
  }

  void try_warps(TensorReduction& cut) {
    const WarpTile warp = warp_tile(cut);
    // mma.sync also holds x in registers.
    if (!warpgroup_products_ && warp.pairs * warp.columns > kMostSynchronousProducts) return;
    cut.loading_threads = loading_threads(capability_, 4 * warp.pairs * warp.columns, ieee_);
    const int64_t column_blocks = ceil_divide<int64_t>(cut.in_channels, 8), columns = cut.column_warps * warp.columns;
    if (cut.column_warps > 1 && warp.columns >= column_blocks) return;  // a warpgroup would have nothing to do
    cut.columns_per_tile = static_cast<int32_t>(8 * columns);
    cut.column_tiles = static_cast<int32_t>(ceil_divide<int64_t>(column_blocks, columns));
    const int64_t bands = 2 * warp.pairs * cut.row_warps, channel_blocks = ceil_divide<int64_t>(cut.out_channels, 8);
    for_splits(cut.axis[0], [&] {
      for_splits(cut.axis[1], [&] {
        for_splits(cut.axis[2], [&] {
          const int64_t taps = taps_of(cut);
          const int64_t most = std::min(bands / taps, channel_blocks);
          if (most == 0) return;
          cut.channel_tiles = static_cast<int32_t>(ceil_divide<int64_t>(channel_blocks, most));
          cut.channel_bands = static_cast<int32_t>(ceil_divide<int64_t>(channel_blocks, cut.channel_tiles));
          const int64_t tiles = int64_t{cut.groups} * cut.channel_tiles * cut.column_tiles * cut.axis[0].tap_tiles *
                                cut.axis[1].tap_tiles * cut.axis[2].tap_tiles;
          if (tiles > std::numeric_limits<int32_t>::max() / 4096) return;
          cut.tiles = static_cast<int32_t>(tiles);
          // What the products alone take, however the voxels are cut.
          const double voxels = static_cast<double>(problem_.batch * problem_.input_voxels());
          const double least = voxels / static_cast<double>(step_) * step_cost(cut).tensor *
                               static_cast<double>(tiles) / static_cast<double>(multiprocessors_);
          if (least < cost_) try_boxes(cut);
        });
      });
    });
  }

  // Taps of a tile.
  static int64_t taps_of(const TensorReduction& cut) {
    return int64_t{cut.axis[0].taps} * cut.axis[1].taps * cut.axis[2].taps;
  }

  // Calls `body` for each number of taps that makes another number of tiles along an axis.
  template <class Body>
  void for_splits(ReductionAxis& along, const Body& body) {
    int64_t previous = 0;
    for (int64_t tiles = 1; tiles <= along.kernel; ++tiles) {
      const int64_t taps = ceil_divide<int64_t>(along.kernel, tiles);
      if (taps == previous || taps > RegionAxis::kMostTaps) continue;
      previous = taps;
      along.taps = static_cast<int32_t>(taps);
      along.tap_tiles = static_cast<int32_t>(ceil_divide<int64_t>(along.kernel, taps));
      body();
    }
  }

  void try_boxes(TensorReduction& cut) {
    for_boxes(cut, 2, 256, [&] {
      for_boxes(cut, 1, 64, [&] {
        for_boxes(cut, 0, 8, [&] {
          const int64_t voxels = int64_t{cut.axis[0].voxels} * cut.axis[1].voxels * cut.axis[2].voxels;
          if (voxels <= 1024) try_box(cut, voxels);
        });
      });
    });
  }

  // Calls `body` for boxes of one step and more along an axis.
  template <class Body>
  void for_boxes(TensorReduction& cut, int axis, int64_t most, const Body& body) {
    ReductionAxis& along = cut.axis[axis];
    const int64_t extent = problem_.input[axis];
    for (int64_t voxels = along.step;; voxels *= 2) {
      const int64_t boxes = ceil_divide<int64_t>(extent, voxels);
      const int64_t even =
          round_up(ceil_divide<int64_t>(extent, boxes), along.step);  // the same number of smaller boxes
      if (even > most && voxels > along.step) return;
      along.voxels = static_cast<int32_t>(even);
      along.voxel_boxes = static_cast<int32_t>(ceil_divide<int64_t>(extent, even));
      cut.region[kInput].axis[axis] = make_region_axis(extent, 1, even, 1, 1, false);
      grad_output_axis_[axis] =
          make_region_axis(output_[axis], along.taps, even, along.stride, along.dilation, axis == 2);
      if (reach(grad_output_axis_[axis]) > RegionAxis::kMostShift[axis] + 1) return;
      cut.region[kInput].axis[axis].loaded = loaded_positions(cut.region[kInput].axis[axis], along, false);
      grad_output_axis_[axis].loaded = loaded_positions(grad_output_axis_[axis], along, true);
      body();
      if (boxes == 1) return;
    }
  }

  // Where the region of some taps begins, of the first box.
  static int32_t origin_of(const ReductionAxis& along, bool is_grad_output, int32_t tap_tile) {
    return is_grad_output ? tap_tile * along.taps * along.dilation - along.padding : 0;
  }
  // Positions along an axis without those that are always outside of the volume, which one box alone can know; as many
  // for all taps.
  static int32_t loaded_positions(const RegionAxis& axis, const ReductionAxis& along, bool is_grad_output) {
    if (along.voxel_boxes > 1) return axis.entries;
    int32_t most = 1;
    for (int32_t tile = 0; tile < (is_grad_output ? along.tap_tiles : 1); ++tile) {
      const int32_t origin = origin_of(along, is_grad_output, tile);
      most = std::max(most, axis.count_before(axis.extent - origin) - axis.count_before(-origin));
    }
    return most;
  }

  // Positions from the first one of an axis to the last.
  static int32_t reach(const RegionAxis& axis) {
    int32_t last = 0;
    for (int32_t run = 0; run < axis.runs; ++run) {
      last = std::max(last, axis.run[run].shift + (axis.run[run].length - 1) * axis.stride);
    }
    return last + 1;
  }

  void try_box(TensorReduction& cut, int64_t voxels) {
    cut.steps = static_cast<int32_t>(voxels / step_);
    if (cut.steps < cut.voxel_warps) return;
    Region &input = cut.region[kInput], &grad_output = cut.region[kGradOutput];
    for (int axis = 0; axis < 3; ++axis) grad_output.axis[axis] = grad_output_axis_[axis];
    // Positions are 32-bit numbers from the region's origin.
    if (reach(grad_output.axis[0]) * output_[1] * output_[2] > std::numeric_limits<int32_t>::max()) return;
    choose_span(input, cut.axis[2], false);
    choose_span(grad_output, cut.axis[2], true);
    const int64_t input_bytes = finish_input(input, cut.axis, cut.columns_per_tile, element_);
    const int64_t grad_output_bytes =
        finish_grad_output(grad_output, cut.axis[2].step, cut.channel_bands * 8, element_);
    grad_output.offset = static_cast<int32_t>(round_up(input_bytes, 128));
    const int64_t stage_bytes = grad_output.offset + round_up(grad_output_bytes, 128);
    const int64_t cells = int64_t{input.cells()} + grad_output.cells();
    const int64_t table_bytes =
        round_up(TensorReduction::kAssignmentBytes + TensorReduction::kCellBytes * cells +
                     16 * warp_tile(cut).pairs * cut.row_warps + 4 * (cut.steps + cut.voxel_warps),
                 128);
    const int64_t stages = std::min<int64_t>((shared_ - table_bytes) / stage_bytes, kMostStages);
    const SumPitches sums(cut, problem_.layout == Layout::ndhwc);
    const int64_t tile_bytes = int64_t{4} * sums.in_channel * cut.columns_per_tile;
    if (stages < 2 || stages * stage_bytes < tile_bytes) return;  // the sums leave through the stages
    cut.stages = static_cast<int32_t>(stages);
    cut.input_warps =
        warps_of_input(loading_work(cut, kInput), loading_work(cut, kGradOutput), cut.loading_threads / 32);
    cut.stage_bytes = static_cast<int32_t>(stage_bytes);
    cut.table_bytes = static_cast<int32_t>(table_bytes);
    const int64_t boxes = problem_.batch * cut.axis[0].voxel_boxes * cut.axis[1].voxel_boxes * cut.axis[2].voxel_boxes;
    if (boxes > std::numeric_limits<int32_t>::max() / 2) return;
    cut.boxes = static_cast<int32_t>(boxes);
    try_parts(cut);
  }

  // Neighbours are loaded together where rows begin at multiples of so many, and enough of them are wanted. Spans begin
  // where the volume's do, some columns before the region, in all boxes alike; in x, they are of one step.
  void choose_span(Region& region, const ReductionAxis& along, bool is_grad_output) const {
    const RegionAxis& width = region.axis[2];
    region.span = 1;
    region.copied = false;
    if (problem_.layout != Layout::ncdhw) return;
    const int32_t copied = static_cast<int32_t>(16 / element_);
    if (!is_grad_output && element_ == 2 && width.extent % copied == 0 && along.step % copied == 0) {
      use(region, copied, spans_of_line(width, along, false, copied));
      region.copied = true;
      return;
    }
    for (int32_t span = 4; span > 1; span /= 2) {
      const Spans spans = spans_of_line(width, along, is_grad_output, span);
      if (spans.all == 0 || spans.loaded > width.loaded || 5 * span * spans.loaded > 8 * width.loaded + 16) continue;
      return use(region, span, spans);
    }
  }
  struct Spans {
    int32_t all = 0, loaded = 0;
  };
  static void use(Region& region, int32_t span, Spans spans) {
    region.span = span;
    region.spans = spans.all;
    region.loaded_spans = spans.loaded;
  }
  // Spans of so many positions that hold a line's, or none where they would not begin where the volume's do.
  static Spans spans_of_line(const RegionAxis& width, const ReductionAxis& along, bool is_grad_output, int32_t span) {
    const int64_t box_step = is_grad_output ? int64_t{along.voxels} * along.stride : along.voxels;
    if (width.extent % span != 0 || (along.voxel_boxes > 1 && box_step % span != 0)) return {};
    if (!is_grad_output && along.step % span != 0) return {};
    Spans spans;
    for (int32_t tile = 0; tile < (is_grad_output ? along.tap_tiles : 1); ++tile) {
      const int32_t origin = origin_of(along, is_grad_output, tile), before = origin & (span - 1);
      const int32_t all = ceil_divide(reach(width) + before, span), first = (origin - before) / span;
      const int32_t inside = std::min(all, width.extent / span - first) - std::max(-first, 0);
      spans.all = std::max(spans.all, all);
      spans.loaded = std::max({spans.loaded, along.voxel_boxes > 1 ? all : inside, 1});
    }
    return span * (spans.all - 1) <= RegionAxis::kMostShift[2] ? spans : Spans{};
  }

  void try_parts(const TensorReduction& cut) {
    const WarpTile warp = warp_tile(cut);
    const double box = box_cost(cut);
    const double sums = 128.0 * warp.pairs * cut.row_warps * warp.columns * cut.column_warps * cut.voxel_warps;
    const int64_t most_blocks = std::numeric_limits<int32_t>::max();
    const int64_t most = std::min({most_parts_, int64_t{cut.boxes}, most_blocks / cut.tiles});
    int64_t least = 1;
    if (ieee_)
      least = std::min(most, ceil_divide<int64_t>(cut.boxes * cut.steps * step_, cut.voxel_warps * kLongestIeeeSum));
    for (int64_t waves = 1; waves <= 4; ++waves) {
      const int64_t parts = std::clamp(waves * multiprocessors_ / cut.tiles, least, most);
      const double block =
          static_cast<double>(ceil_divide<int64_t>(cut.boxes, parts)) * box + kBlockCycles + sums * kSumCycles;
      const double rounds = static_cast<double>(ceil_divide<int64_t>(parts * cut.tiles, multiprocessors_));
      const double partial_bytes = (parts == 1 ? 0 : 8.0) * static_cast<double>(parts * problem_.weight_elements());
      const double cost = rounds * block + partial_bytes / (kPartialBytes * static_cast<double>(multiprocessors_));
      if (cost < cost_) {
        cost_ = cost;
        best_ = cut;
        best_.parts = static_cast<int32_t>(parts);
      }
      if (parts == most) break;
    }
  }

  // Cycles of one step, by all warps that share it, if there were nothing but the tensor cores or shared memory, and
  // its instructions.
  struct StepCost {
    double tensor, shared, instructions;
  };
  StepCost step_cost(const TensorReduction& cut) const {
    const WarpTile warp = warp_tile(cut);
    const double warpgroups = cut.row_warps * cut.column_warps / 4.0;
    const double products = warpgroups * warp.pairs;  // of 64 rows
    if (warpgroup_products_) {
      return {products * std::max(2.0 * warp.columns, 13.0), products * (16 + 2.0 * warp.columns),
              products * 4 * (12 + warp.columns / 8.0)};
    }
    const double columns = warp.columns, factor = ieee_ ? 3 : 1;
    return {products * columns * 8.25 * factor, warpgroups * 4 * (4.0 * warp.pairs + 2 * columns),
            warpgroups * 4 * (warp.pairs * (10 + columns * factor * (ieee_ ? 2.5 : 1.1)) + 4 * columns)};
  }

  // What the products of a box take by themselves.
  double product_cost(const TensorReduction& cut) const {
    const StepCost step = step_cost(cut);
    const double issue = step.instructions / 4, sum = step.tensor + step.shared + issue;
    if (!warpgroup_products_) return cut.steps * kSynchronousStep * sum + kSynchronousBox;
    const double waits = warp_tile(cut).columns > 8 ? kWide : 1;
    return cut.steps * (kLargest * std::max({step.tensor, step.shared, issue}) + kOthers * sum) * waits + kProductBox;
  }

  // What its loads take: warps share each region's units, and take as long for each.
  double load_cost(const TensorReduction& cut) const {
    double sectors = 0, work[2];
    for (int side = 0; side < 2; ++side) {
      const Region& region = cut.region[side];
      const int32_t group_channels = side == kInput ? cut.in_channels : cut.out_channels;
      const int32_t channels = std::min<int32_t>(group_channels, region.chunks * 16 / static_cast<int32_t>(element_));
      work[side] = loading_work(cut, side);
      // Rows of a volume are fetched in sectors of 32 bytes.
      const RegionAxis& width = region.axis[2];
      const double rows = static_cast<double>(region.axis[0].loaded * region.axis[1].loaded);
      const double row_bytes = static_cast<double>(std::min(reach(width), width.extent) * element_);
      sectors += problem_.layout == Layout::ndhwc
                     ? rows * width.loaded * (static_cast<double>(channels * element_) / 32 + 0.5)
                     : rows * channels * std::min<double>(row_bytes / 32 + 0.9, width.loaded);
    }
    const double of_warp =
        std::max(work[kInput] / cut.input_warps, work[kGradOutput] / (cut.loading_threads / 32 - cut.input_warps));
    // Boxes that are narrower than rows are the slower to load, the narrower.
    const double narrow = 1.0 / cut.axis[2].voxels - 1.0 / static_cast<double>(problem_.input[2]);
    const double crowded = cut.loading_threads > 256 ? kCrowded : 1;
    return kLoadBox + of_warp * crowded * (1 + kNarrow * std::max(narrow, 0.0)) + kSector * sectors;
  }
  // Cycles of one warp, if it brought all of a region.
  double loading_work(const TensorReduction& cut, int side) const {
    const int32_t group_channels = side == kInput ? cut.in_channels : cut.out_channels;
    const bool vectors = problem_.layout == Layout::ndhwc && group_channels * element_ % 16 == 0;
    const Units units(cut.region[side], vectors, static_cast<int>(element_));
    return units.count * units.cycles / 32;
  }

  // Both run side by side, but not perfectly so.
  double box_cost(const TensorReduction& cut) const {
    const double products = product_cost(cut), loads = load_cost(cut);
    return kLonger * std::max(products, loads) + kShorter * std::min(products, loads);
  }

  // Fitted to 687 measured cuts of 16 layers on an H200, float32 as TF32 and bfloat16: off by 8 % on average, and what
  // it picks is 2.3 % slower than the fastest measured. kSynchronousStep and kSynchronousBox are older.
  static constexpr double kLargest = 0.6, kOthers = 0.455, kProductBox = 345;
  static constexpr double kWide = 1.455;  // where fragments are not loaded ahead
  static constexpr double kSynchronousStep = 0.7, kSynchronousBox = 630;
  static constexpr double kSector = 0.56, kLoadBox = 387, kNarrow = 7.3;
  static constexpr double kCrowded = 1.26;  // with 384 loading threads
  static constexpr double kLonger = 0.89, kShorter = 0.544;
  static constexpr double kBlockCycles = 21000, kSumCycles = 0.53;
  static constexpr double kPartialBytes = 12;       // a cycle and multiprocessor
  static constexpr int64_t kLongestIeeeSum = 2048;  // voxels added up in one float32

  const Problem& problem_;
  const Extent output_;
  const int64_t multiprocessors_, shared_, element_, step_, capability_;
  const bool ieee_, warpgroup_products_;
  const int64_t most_parts_;
  Extent step_extent_{1, 1, 1};
  RegionAxis grad_output_axis_[3];
  double cost_ = std::numeric_limits<double>::infinity();
  TensorReduction best_;
};

// Whether positions, and strides and offsets within the weights, fit in 32 bits.
bool fits(const Problem& problem) {
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max() / 8;
  return Geometry<int32_t>::fits(problem) && problem.input_voxels() <= kLimit && problem.output_voxels() <= kLimit &&
         std::max(problem.in_channels, problem.out_channels) <= kLimit && problem.weight_elements() <= kLimit;
}

}  // namespace

Units::Units(const Region& region, bool vectors, int element_size) : together(region.cells()) {
  if (region.copied) {
    count = together * ceil_divide(region.chunks * 16 / element_size, kCopiedChannels);
    cycles = 260;
    return;
  }
  int32_t chunks = chunks_of_unit(region.span, element_size);
  const bool stays_together = region.slot_bits > 0 && region.span == 4;  // in shared memory, too
  cycles = element_size == 2 ? 750 : stays_together ? 500 : 650;
  if (vectors) {
    sharers = region.chunks > 2 ? 2 : 1;
    together = ceil_divide(together, 2) * sharers;
    chunks = 2 * sharers;
    cycles = 790;
  }
  count = together * ceil_divide(region.chunks, chunks);
}

std::optional<double> cut_tensor_reduction(const Problem& problem, const Target& target, int64_t budget,
                                           TensorReduction& reduction) {
  if (target.compute_capability < 80 || problem.dtype == DataType::float64 || problem.batch == 0 || !fits(problem)) {
    return std::nullopt;
  }
  return Search(problem, target, budget).run(reduction);
}

}  // namespace convt3d::direct
