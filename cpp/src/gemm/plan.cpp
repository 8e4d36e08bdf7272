#include "gemm/plan.h"

#include <algorithm>
#include <limits>

#include "cpu/widened.h"
#include "geometry.h"
#include "workspace.h"

namespace convt3d::gemm {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;

// What NVIDIA recommends for cuBLAS on Hopper; split reductions are the only GEMMs here that use it.
constexpr int64_t kCublasWorkspace = 32 * kMiB;

// Columns beyond this many bytes at a time gain nothing: on a CPU they should stay in cache between GEMM and col2vol.
int64_t preferred_column_bytes(const Target& target) {
  if (target.backend == Backend::cpu) return 8 * kMiB * target.parallelism;
  return std::numeric_limits<int64_t>::max();
}

// Pieces that stay in cache may cost this many times the work of the whole.
constexpr double kWorthwhileCost = 1.25;

// Reductions shorter than this are not worth splitting further. (At 1024 cuBLAS 13 takes some skinny products, such as
// 8 x 1024 by 1024 x 216, for matrix-vector ones, and is twice as slow.)
constexpr int64_t kMinimumReduction = 2048;

// cuBLAS adds up IEEE float32 products one after the other, and rounding grows with the square root of their number. So
// long sums are made of shorter ones; at 2048 and more the error was over twice cuDNN's, at 512 up to 1.9 times (H200).
// OpenBLAS works in blocks of a few hundred, but for products of one row and column, which it takes for dot products:
// over 262144 terms the error was 3.6e-6. Rounding to TF32 or half types outweighs this, float64 has digits to spare.
constexpr int64_t kLongestCublasSum = 256, kLongestOpenblasSum = 4096;

// The tile of the result that one worker of a GEMM takes, for estimates of how many workers a product keeps busy.
constexpr int64_t kTileRows = 64, kTileColumns = 128;

// `total` in the fewest pieces of at most `largest`, all about equally long and multiples of `multiple` where possible.
int64_t even_piece(int64_t total, int64_t largest, int64_t multiple = 1) {
  if (largest >= total) return total;
  const int64_t piece = ceil_divide<int64_t>(total, ceil_divide<int64_t>(total, largest));
  const int64_t rounded = ceil_divide<int64_t>(piece, multiple) * multiple;
  return rounded <= largest ? rounded : std::max<int64_t>(largest / multiple * multiple, piece);
}

// Half types make their columns in float32 where several are summed, so that the sum is not of rounded terms.
DataType forward_column_dtype(const Problem& problem) {
  const bool half = problem.dtype == DataType::float16 || problem.dtype == DataType::bfloat16;
  return half && !problem.has_single_contributions() ? DataType::float32 : problem.dtype;
}

// The most input planes that any `output_planes` neighbouring output planes read.
int64_t input_planes_reached(const Axis<int64_t>& depth, int64_t output_planes) {
  return std::min(depth.input, (output_planes - 1 + (depth.kernel - 1) * depth.dilation) / depth.stride + 1);
}

// What it costs to make one sample's columns in blocks of so many channels and output planes, up to a factor: the rows
// that small products waste, the input planes that neighbouring slabs both make, and reading the input once a block.
double forward_cost(const Problem& problem, const Axis<int64_t>& depth, int64_t channels, int64_t output_planes) {
  const int64_t group = problem.group_out_channels();
  const bool partial = channels < group;
  const int64_t blocks = partial ? problem.groups * ceil_divide<int64_t>(group, channels)
                                 : ceil_divide<int64_t>(problem.out_channels, channels);
  const int64_t slabs = ceil_divide<int64_t>(depth.output, output_planes);
  const int64_t planes = slabs == 1 ? depth.input : slabs * input_planes_reached(depth, output_planes);
  // Part of a group in NDHWC is one product per tap, each with a tile of its own.
  const int64_t rows = partial && problem.layout == Layout::ndhwc
                           ? problem.taps() * ceil_divide<int64_t>(channels, kTileRows) * kTileRows
                           : ceil_divide<int64_t>(std::min(channels, group) * problem.taps(), kTileRows) * kTileRows;
  const int64_t groups = partial ? 1 : channels / group;
  return static_cast<double>(blocks) * static_cast<double>(planes) *
         static_cast<double>(groups * (rows + problem.group_in_channels()));
}

// Cuts forward over samples; then, one sample at a time, over output channels and depth slabs, as costs least. Answers
// that cost in multiples of the uncut one's; infinite where nothing fits, and the plan is for the smallest pieces.
double cut_forward(Plan& plan, int64_t budget) {
  const Problem& problem = plan.problem;
  const Axis<int64_t> depth(problem, 0);
  const int64_t plane = problem.input[1] * problem.input[2];
  const int64_t plane_bytes = problem.taps() * plane * element_size(plan.column_dtype);  // one channel, one plane
  const int64_t sample_bytes = problem.out_channels * depth.input * plane_bytes;
  plan.channels = problem.out_channels;
  plan.output_planes = depth.output;
  plan.voxels = problem.input_voxels();
  if (sample_bytes <= budget) {
    plan.samples = even_piece(problem.batch, budget / sample_bytes);
    return 1;
  }
  plan.samples = std::min<int64_t>(problem.batch, 1);

  constexpr double kImpossible = std::numeric_limits<double>::infinity();
  double least = kImpossible;
  const auto consider = [&](int64_t channels) {
    const int64_t planes = std::min(budget / (channels * plane_bytes), depth.input);
    int64_t output_planes = depth.output;
    if (planes < depth.input) output_planes = planes * depth.stride - (depth.kernel - 1) * depth.dilation;
    output_planes = std::min(output_planes, depth.output);
    if (output_planes < 1) return;
    const double cost = forward_cost(problem, depth, channels, output_planes);
    if (cost < least) {
      least = cost;
      plan.channels = channels;
      // Neighbouring output planes within one stride share their inputs, hence the multiple.
      plan.output_planes = even_piece(depth.output, output_planes, depth.stride);
    }
  };
  for (int64_t groups = problem.groups; groups >= 1; groups = groups / 2)
    consider(groups * problem.group_out_channels());
  const int64_t group = problem.group_out_channels();
  for (int64_t pieces = 2; pieces < 2 * group; pieces = pieces < 64 ? pieces + 1 : pieces * 2) {
    const int64_t channels = ceil_divide<int64_t>(group, std::min(pieces, group));
    // Multiples of 8 keep channel vectors 16 bytes wide.
    consider(channels < 8 ? channels : std::min(ceil_divide<int64_t>(channels, 8) * 8, group));
  }
  if (least == kImpossible) plan.channels = plan.output_planes = 1;
  plan.voxels = input_planes_reached(depth, plan.output_planes) * plane;
  return least / forward_cost(problem, depth, problem.out_channels, depth.output);
}

// Cuts a gradient over samples, then over runs of input voxels: every column belongs to one voxel, so runs share none.
void cut_gradient(Plan& plan, int64_t budget) {
  const Problem& problem = plan.problem;
  const int64_t voxel_bytes = problem.out_channels * problem.taps() * element_size(plan.column_dtype);
  const int64_t sample_bytes = problem.input_voxels() * voxel_bytes;
  plan.channels = problem.out_channels;
  plan.voxels = problem.input_voxels();
  plan.samples = std::min<int64_t>(problem.batch, 1);
  if (sample_bytes <= budget) {
    plan.samples = even_piece(problem.batch, budget / sample_bytes);
  } else {
    // Multiples of 64 voxels keep every run aligned for the widest loads.
    plan.voxels = even_piece(plan.voxels, std::max<int64_t>(budget / voxel_bytes, 1), 64);
  }
}

// How many partial sums of the weight gradient to hold, and how they share the reduction: by samples, or by splitting
// each run of voxels, so that a small result with a long reduction still fills the machine.
void cut_reduction(Plan& plan, int64_t budget) {
  const Problem& problem = plan.problem;
  const int64_t rows = problem.group_in_channels(), columns = problem.group_out_channels() * problem.taps();
  const int64_t workers = plan.target.backend == Backend::cpu ? plan.target.parallelism : 2 * plan.target.parallelism;
  const int64_t tiles = plan.target.backend == Backend::cpu
                            ? std::min(problem.groups, plan.target.parallelism)
                            : ceil_divide<int64_t>(rows, kTileRows) * ceil_divide<int64_t>(columns, kTileColumns);
  const int64_t accumulator_size = problem.dtype == DataType::float64 ? 8 : 4;
  const int64_t partial = problem.weight_elements() * accumulator_size;
  const int64_t affordable = std::max<int64_t>(budget / partial, 1);
  const int64_t wanted = std::min(ceil_divide<int64_t>(workers, tiles), affordable);
  const bool channels_first = problem.layout == Layout::ncdhw;
  const int64_t reduction = channels_first ? plan.voxels : plan.samples * plan.voxels;
  const bool on_cuda = plan.target.backend == Backend::cuda;
  const bool sums_floats = problem.dtype == DataType::float32 && (!on_cuda || problem.precision == Precision::ieee);
  const int64_t longest = on_cuda ? kLongestCublasSum : kLongestOpenblasSum;
  plan.reduction = sums_floats ? std::min(longest, reduction) : reduction;
  const int64_t worthwhile = sums_floats && on_cuda ? longest : kMinimumReduction;
  const int64_t splits = std::clamp<int64_t>(reduction / worthwhile, 1, wanted);
  const int64_t samples = channels_first ? std::min(plan.samples, wanted) : 0;
  plan.splits = samples >= splits ? 1 : splits;
  plan.partials = std::max({samples, splits, int64_t{1}});
  plan.partial_bytes = plan.partials * partial;
  // A single sum in the result's own type is made in place.
  if (plan.partials == 1 && accumulator_size == element_size(problem.dtype)) plan.partial_bytes = 0;
}

// The bias gradient is one sum per channel, in as many partial sums as keep the machine busy.
void cut_bias(Plan& plan) {
  const Problem& problem = plan.problem;
  const int64_t voxels = problem.batch * problem.output_voxels();
  plan.partials = std::clamp<int64_t>(voxels / kMinimumReduction, 1,
                                      ceil_divide<int64_t>(8 * plan.target.parallelism, problem.out_channels));
  plan.partial_bytes = plan.partials * problem.out_channels * (problem.dtype == DataType::float64 ? 8 : 4);
}

// CBLAS takes 32-bit sizes and leading dimensions. Without columns, all samples' voxels are one matrix in NDHWC.
bool addressable(const Problem& problem, const Target& target) {
  constexpr int64_t kLargest = std::numeric_limits<int32_t>::max();
  const bool at_once = problem.layout == Layout::ndhwc && problem.is_pointwise();
  const int64_t voxels = (at_once ? problem.batch : 1) * problem.input_voxels();
  return target.backend == Backend::cuda || std::max({voxels, problem.in_channels, problem.out_channels,
                                                      problem.group_out_channels() * problem.taps()}) <= kLargest;
}

bool is_half(DataType dtype) { return element_size(dtype) == 2; }

}  // namespace

Plan plan_columns(const Problem& problem, Operator op, const Target& target, int64_t workspace_limit) {
  problem.validate();
  if (target.backend == Backend::cpu && is_half(problem.dtype)) {
    // CBLAS has no half types: the operands are widened, and the whole computation runs in float32.
    Problem widened = problem;
    widened.dtype = DataType::float32;
    Plan plan = plan_columns(widened, op, target, workspace_limit);
    plan.conversion_bytes = widened_bytes(problem, op);
    plan.workspace_bytes += plan.conversion_bytes;
    plan.problem = problem;
    return plan;
  }

  Plan plan;
  plan.problem = problem;
  plan.op = op;
  plan.target = target;
  plan.column_dtype = op == Operator::forward ? forward_column_dtype(problem) : problem.dtype;
  plan.channels = problem.out_channels;
  plan.output_planes = problem.output()[0];
  plan.voxels = problem.input_voxels();
  plan.samples = problem.batch;

  const bool reduces = op == Operator::grad_weight || op == Operator::grad_input_weight;
  if (op == Operator::grad_bias) {
    cut_bias(plan);
  } else if (!problem.is_pointwise()) {
    // A quarter is kept for partial sums where there are any.
    // A grid of blocks has at most 2^31, each of one column or more; two bytes is the smallest.
    constexpr int64_t kMostColumnBytes = int64_t{1} << 31;
    const int64_t limit = std::min(reduces ? workspace_limit / 4 * 3 : workspace_limit, kMostColumnBytes) / 256 * 256;
    int64_t budget = std::min(limit, preferred_column_bytes(target));
    if (op == Operator::forward) {
      // Better columns that leave the cache than columns made twice.
      while (cut_forward(plan, budget) > kWorthwhileCost && budget < limit) {
        budget = budget > limit / 4 ? limit : 4 * budget;
      }
    } else {
      cut_gradient(plan, budget);
    }
    plan.column_bytes =
        align(plan.samples * plan.channels * problem.taps() * plan.voxels * element_size(plan.column_dtype));
  }
  if (reduces) cut_reduction(plan, workspace_limit / 4);
  plan.partial_bytes = align(plan.partial_bytes);
  plan.library_bytes = target.backend == Backend::cuda && op != Operator::grad_bias ? kCublasWorkspace : 0;
  plan.workspace_bytes = plan.column_bytes + plan.partial_bytes + plan.library_bytes;
  plan.fits = plan.column_bytes + plan.partial_bytes <= workspace_limit && addressable(problem, target);
  return plan;
}

}  // namespace convt3d::gemm
