// Depthwise layers of every geometry, and in NDHWC: what depthwise.cu and the kernels by bands are not compiled for.
// What must move is as there; for kernels of many taps, which are given when the kernel runs, what takes time is a load
// and a multiplication for each of them.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cuda/launch.h"
#include "cuda/ptx.h"
#include "direct/cuda/contacts.h"
#include "direct/cuda/rows.h"

namespace convt3d::direct {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// How blocks share out the channels: one by one in NCDHW, else as many as keep whole warps busy.
struct ChannelBlocks {
  int width = 1;  // channels that a thread takes at once
  int size = 1;   // channels of a block
  int64_t count = 1;
  Divisor<int32_t> by_vectors;  // of a block

  // `vector` is how many elements fill 16 bytes, `aligned` tells whether the tensors are aligned to that, and a block
  // has at most `most` channels.
  ChannelBlocks(const Problem& problem, int vector, bool aligned, int64_t most) {
    const int64_t channels = problem.in_channels;
    if (problem.layout == Layout::ndhwc) {
      width = aligned && channels % vector == 0 ? vector : 1;
      size =
          static_cast<int>(std::clamp<int64_t>(most / width * width, width, std::min<int64_t>(channels, 32 * width)));
    }
    count = (channels + size - 1) / size;
    by_vectors = Divisor<int32_t>(size / width);
  }
};

template <class T>
bool is_vector_aligned(const T* a, const T* b) {
  return reinterpret_cast<uintptr_t>(a) % 16 == 0 && reinterpret_cast<uintptr_t>(b) % 16 == 0;
}

// ---- forward and grad_input ----------------------------------------------------------------------------------------

template <class T, class Index>
struct GatherArguments {
  AxisGather<Index> depth, height, width;
  Index row_groups = 1;  // of a destination plane: neighbouring rows of one residue
  Divisor<Index> by_row_groups, by_residues, by_width;
  const T* source;
  const T* weight;
  const T* bias;
  T* destination;
  VolumeSteps source_steps, destination_steps;
  ChannelBlocks channel_blocks;
  int64_t channels, taps;
  int64_t items;       // of a volume: columns of up to kRows rows, a thread's each
  int64_t chunks;      // blocks of one sample and channel block
  bool keeps_weights;  // in shared memory
  int64_t blocks;
};

// Items of a block for each that its threads take at once.
constexpr int kRounds = 8;

// Rows that a thread makes at once, where there are more than half as many: as registers hold sums and addresses for.
template <class T>
constexpr int kMostRows = sizeof(T) == 8 ? 4 : 8;

// A thread makes one destination column of kRows neighbouring rows of a residue, and of kWidth neighbouring channels,
// tap by tap: what a place costs, and a weight's load, serve all of them. Sources come through the L1 cache, coalesced
// along the width (NCDHW) or along the channels (NDHWC), weights from shared memory, laid out as channels lie in the
// volume. Bound by the instructions of these loads, some four for a tap and row.
template <class T, class Index, int kWidth, int kRows>
__global__ void __launch_bounds__(kThreads, sizeof(Index) == 8 ? 2 : 3)
    gather_any(const __grid_constant__ GatherArguments<T, Index> in) {
  using Sum = Accumulator<T>;
  CONVT3D_DYNAMIC_SHARED(16, shared);
  Sum* const weights = reinterpret_cast<Sum*>(shared);
  const int block_channels = in.channel_blocks.size, vectors = block_channels / kWidth;
  const int64_t chunk_items = static_cast<int64_t>(kThreads / vectors) * kRounds;
  for (int64_t block = blockIdx.x; block < in.blocks; block += gridDim.x) {
    int64_t rest = block / in.chunks;
    const int64_t chunk = block - rest * in.chunks;
    const int64_t sample = rest / in.channel_blocks.count;
    const int64_t first_channel = (rest - sample * in.channel_blocks.count) * block_channels;
    const int channels = static_cast<int>(smaller<int64_t>(block_channels, in.channels - first_channel));
    if (in.keeps_weights) {
      const int taps = static_cast<int>(in.taps);
      __syncthreads();
      for (int i = threadIdx.x; i < channels * taps; i += kThreads) {
        const int channel = i / taps;
        weights[(i - channel * taps) * block_channels + channel] =
            static_cast<Sum>(in.weight[first_channel * in.taps + i]);
      }
      __syncthreads();
    }
    const int item_lane = in.channel_blocks.by_vectors.quotient(static_cast<int>(threadIdx.x));
    const int channel = (static_cast<int>(threadIdx.x) - item_lane * vectors) * kWidth;
    const int item_lanes = kThreads / vectors;
    if (channel >= channels || item_lane >= item_lanes) continue;
    const T* const source =
        in.source + sample * in.source_steps.sample + (first_channel + channel) * in.source_steps.channel;
    T* const destination = in.destination + sample * in.destination_steps.sample +
                           (first_channel + channel) * in.destination_steps.channel;
    const int64_t end = smaller((chunk + 1) * chunk_items, in.items);
    for (int64_t at = chunk * chunk_items + item_lane; at < end; at += item_lanes) {
      const Index item = static_cast<Index>(at);
      const Index line = in.by_width.quotient(item), column = item - line * in.width.destination;
      const Index z = in.by_row_groups.quotient(line), group = line - z * in.row_groups;
      const Index q_group = in.by_residues.quotient(group), residue = group - q_group * in.height.residues;
      const Index first_q = q_group * kRows, last_q = smaller(first_q + kRows, in.height.positions) - 1;
      const auto walk = [](const AxisGather<Index>& axis, Index position, Index& base) {
        const Index q = axis.forward ? axis.axis.by_stride.quotient(position) : position;
        base = q * axis.source_stride;
        return axis.contacts(position - q * axis.destination_stride, q, q);
      };
      Index base_d, base_w;
      const Contacts<Index> d = walk(in.depth, z, base_d);
      const Contacts<Index> w = walk(in.width, column, base_w);
      const Contacts<Index> h = in.height.contacts(residue, first_q, last_q);
      Sum sum[kRows][kWidth];
#pragma unroll
      for (int i = 0; i < kRows * kWidth; ++i) {
        sum[i / kWidth][i % kWidth] =
            in.bias == nullptr ? Sum(0) : static_cast<Sum>(in.bias[first_channel + channel + i % kWidth]);
      }
      for (Index a = 0; a < d.count; ++a) {
        for (Index b = 0; b < h.count; ++b) {
          const Index tap_row = (d.tap + a * d.tap_step) * in.height.axis.kernel + h.tap + b * h.tap_step;
          // Of the first row; some of the others may lie outside.
          const Index source_row = first_q * in.height.source_stride + h.offset + b * h.offset_step;
          const Index source_line = (base_d + d.offset + a * d.offset_step) * in.height.source + source_row;
          bool inside[kRows], all_inside = true;
          const T* from[kRows];
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const Index row = r * in.height.source_stride;
            inside[r] = source_row + row >= 0 && source_row + row < in.height.source;
            all_inside = all_inside && inside[r];
            from[r] = source + (static_cast<int64_t>(source_line + row) * in.width.source + base_w + w.offset) *
                                   in.source_steps.voxel;
          }
          const auto add_taps = [&](auto all) {
            Index tap = tap_row * in.width.axis.kernel + w.tap;
#pragma unroll 2
            for (Index c = 0; c < w.count; ++c) {
              Sum factor[kWidth];
#pragma unroll
              for (int i = 0; i < kWidth; ++i) {
                factor[i] = in.keeps_weights
                                ? weights[tap * block_channels + channel + i]
                                : static_cast<Sum>(in.weight[(first_channel + channel + i) * in.taps + tap]);
              }
#pragma unroll
              for (int r = 0; r < kRows; ++r) {
                Elements<T, kWidth> x = {};
                if (decltype(all)::value || inside[r]) x = *reinterpret_cast<const Elements<T, kWidth>*>(from[r]);
                from[r] += w.offset_step * in.source_steps.voxel;
#pragma unroll
                for (int i = 0; i < kWidth; ++i) sum[r][i] += factor[i] * static_cast<Sum>(x.element[i]);
              }
              tap += w.tap_step;
            }
          };
          if (kRows == 1 || all_inside) {
            add_taps(std::true_type());
          } else {
            add_taps(std::false_type());
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const Index row = (first_q + r) * in.height.destination_stride + residue;
        if (first_q + r > last_q || row >= in.height.destination) break;
        Elements<T, kWidth> result;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) result.element[i] = static_cast<T>(sum[r][i]);
        const int64_t voxel = (static_cast<int64_t>(z) * in.height.destination + row) * in.width.destination + column;
        *reinterpret_cast<Elements<T, kWidth>*>(destination + voxel * in.destination_steps.voxel) = result;
      }
    }
  }
}

template <class T, class Index, int kWidth, int kRows>
void launch_gather(GatherArguments<T, Index> in, int64_t batch, size_t shared_bytes, cudaStream_t stream) {
  in.row_groups = in.height.residues * ((in.height.positions + kRows - 1) / kRows);
  in.by_row_groups = Divisor<Index>(in.row_groups);
  in.items = int64_t{in.depth.destination} * in.row_groups * in.width.destination;
  const int64_t chunk_items = static_cast<int64_t>(kThreads / (in.channel_blocks.size / kWidth)) * kRounds;
  in.chunks = (in.items + chunk_items - 1) / chunk_items;
  in.blocks = batch * in.channel_blocks.count * in.chunks;
  launch("depthwise gather", gather_any<T, Index, kWidth, kRows>, grid_of(in.blocks), kThreads, shared_bytes, stream,
         in);
}

template <class T, class Index>
void gather(const Problem& problem, Operator op, const T* source, const T* weight, const T* bias, T* destination,
            cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  constexpr int64_t kWeightBytes = 32 * 1024;
  const bool forward = op == Operator::forward;
  const int64_t weight_bytes = problem.taps() * static_cast<int64_t>(sizeof(Accumulator<T>));
  GatherArguments<T, Index> arguments{
      AxisGather<Index>(problem, op, 0),
      AxisGather<Index>(problem, op, 1),
      AxisGather<Index>(problem, op, 2),
      1,
      Divisor<Index>(),
      Divisor<Index>(),
      Divisor<Index>(),
      source,
      weight,
      bias,
      destination,
      VolumeSteps(problem.layout, problem.in_channels, forward ? problem.input_voxels() : problem.output_voxels()),
      VolumeSteps(problem.layout, problem.in_channels, forward ? problem.output_voxels() : problem.input_voxels()),
      ChannelBlocks(problem, kVector, is_vector_aligned(source, destination), kWeightBytes / weight_bytes)};
  arguments.by_residues = Divisor<Index>(arguments.height.residues);
  arguments.by_width = Divisor<Index>(arguments.width.destination);
  arguments.channels = problem.in_channels;
  arguments.taps = problem.taps();
  const ChannelBlocks& channels = arguments.channel_blocks;
  arguments.keeps_weights = channels.size * weight_bytes <= kWeightBytes;
  const size_t shared_bytes = arguments.keeps_weights ? static_cast<size_t>(channels.size * weight_bytes) : 0;
  if (channels.width > 1) {
    launch_gather<T, Index, kVector, 1>(arguments, problem.batch, shared_bytes, stream);
  } else if (arguments.height.positions > kMostRows<T> / 2) {
    launch_gather<T, Index, 1, kMostRows<T>>(arguments, problem.batch, shared_bytes, stream);
  } else {
    launch_gather<T, Index, 1, 1>(arguments, problem.batch, shared_bytes, stream);
  }
}

// ---- grad_weight ---------------------------------------------------------------------------------------------------

// Products that a thread sums before it folds them into a second sum, which bounds the error of long sums; float32 has
// its own.
constexpr int kRunLength = 64;

template <class T, class Index>
struct ReduceArguments {
  Geometry<Index> geometry;
  const T* grad_output;
  const T* input;
  Accumulator<T>* partials;
  VolumeSteps input_steps, output_steps;
  ChannelBlocks channel_blocks;
  int64_t channels, taps;
  Index group_taps, tap_groups;  // neighbours that a block sums at once: along the width (NCDHW), or of all
  Index group_rows, row_groups;  // and along the height (NCDHW)
  int64_t parts, used_parts;     // of the partial sums, and those that are not zero
  int64_t items, share;          // rows (NCDHW) or voxels of all samples, and those of a part
  Index columns, lane_rows;      // of a row, one for each lane, and rows of a warp
  int64_t blocks;
  int run_length;
};

// Sums of which long runs are folded into a second one.
template <class Sum, int kCount>
struct FoldedSums {
  Sum folded[kCount] = {}, run[kCount] = {};
  int length = 0;

  __device__ void end_step(int run_length) {
    if (++length != run_length) return;
    length = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      folded[i] += run[i];
      run[i] = 0;
    }
  }
};

// Taps that a thread sums at once of a row and of a column of them (NCDHW), or of all (NDHWC).
constexpr int kMostTaps = 4;

// Blocks of a multiprocessor that the compiler is to leave registers for, or 0 where it may choose. Boxes of 12 and 16
// taps would take registers that are worth more as warps: 1.26 ms instead of 0.79 on an H200 for 64 channels, batch 2,
// 48^3, kernel 3 x 4 x 4.
template <class T, class Index>
constexpr int resident_blocks(int box) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  constexpr int kMost = 4;  // of so many threads
#else
  constexpr int kMost = 5;
#endif
  return box > 9 && sizeof(T) < 8 && sizeof(Index) < 8 ? kMost : 0;
}

// NCDHW: a block takes one part's rows of a channel and a box of taps of one plane, kTapRows x kTaps of them at most.
// Its warps take rows in turn, of which a lane has the same column each time, so that where its outputs lie, and
// whether they do, is found once. The lanes' and warps' sums are added up by a tree. Bound by the instructions of the
// loads, some four for a tap, and of a row; from the caches, as each box of taps reads both tensors anew.
template <class T, class Index, int kTapRows, int kTaps>
__global__ void __launch_bounds__(kThreads, resident_blocks<T, Index>(kTapRows* kTaps))
    reduce_rows(const __grid_constant__ ReduceArguments<T, Index> in) {
  using Sum = Accumulator<T>;
  constexpr int kBox = kTapRows * kTaps;
  __shared__ Sum sums[kWarps][kBox];
  const Geometry<Index>& g = in.geometry;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const Index lane_row = lane / in.columns, lane_column = lane - lane_row * in.columns;
  const Index plane_rows = g.height.input, sample_rows = g.depth.input * g.height.input;
  for (int64_t block = blockIdx.x; block < in.blocks; block += gridDim.x) {
    int64_t rest = block / in.tap_groups;
    const Index first_tap = static_cast<Index>(block - rest * in.tap_groups) * in.group_taps;
    const int64_t plane_groups = int64_t{g.depth.kernel} * in.row_groups, part_channel = rest / plane_groups;
    const Index plane_group = static_cast<Index>(rest - part_channel * plane_groups);
    const int64_t part = part_channel / in.channels, channel = part_channel - part * in.channels;
    const Index j_d = plane_group / in.row_groups, first_j_h = (plane_group - j_d * in.row_groups) * in.group_rows;
    const Index tap_d = g.depth.output_at(0, j_d), tap_h = g.height.output_at(0, first_j_h);
    const Index row_step = g.height.dilation * g.width.output;
    const T* const input = in.input + channel * in.input_steps.channel;
    const T* const output = in.grad_output + channel * in.output_steps.channel;
    const int64_t begin = smaller(part * in.share, in.items), end = smaller(begin + in.share, in.items);
    FoldedSums<Sum, kBox> sum;
    for (Index first_column = 0; first_column < g.width.input; first_column += in.columns) {
      const Index w = first_column + lane_column;
      const bool lives = lane_row < in.lane_rows && w < g.width.input;
      bool inside[kTaps];
      Index o_w[kTaps];
#pragma unroll
      for (int t = 0; t < kTaps; ++t) {
        o_w[t] = g.width.output_at(w, smaller(first_tap + t, g.width.kernel - 1));
        inside[t] = lives && o_w[t] >= 0 && o_w[t] < g.width.output;
      }
      const int64_t first_row = begin + warp * in.lane_rows + lane_row;
      int64_t sample = first_row / sample_rows;
      Index of_sample = static_cast<Index>(first_row - sample * sample_rows);
      for (int64_t row = first_row; row < end; row += kWarps * in.lane_rows) {
        const Index plane = g.by_input_height.quotient(of_sample), h = of_sample - plane * plane_rows;
        const Index o_d = plane * g.depth.stride + tap_d, o_h = h * g.height.stride + tap_h;
        if (o_d >= 0 && o_d < g.depth.output) {
          const T* const x_row =
              input + sample * in.input_steps.sample + static_cast<int64_t>(of_sample) * g.width.input;
          const T* y_row = output + sample * in.output_steps.sample +
                           (static_cast<int64_t>(o_d) * g.height.output + o_h) * g.width.output;
          const Sum x = lives ? static_cast<Sum>(x_row[w]) : Sum(0);
#pragma unroll
          for (int r = 0; r < kTapRows; ++r, y_row += row_step) {
            const Index o_row = o_h + r * g.height.dilation;
            if (o_row < 0 || o_row >= g.height.output) continue;
#pragma unroll
            for (int t = 0; t < kTaps; ++t) {
              if (inside[t]) sum.run[r * kTaps + t] += x * static_cast<Sum>(y_row[o_w[t]]);
            }
          }
        }
        sum.end_step(in.run_length);
        for (of_sample += kWarps * in.lane_rows; of_sample >= sample_rows; of_sample -= sample_rows) ++sample;
      }
    }
    __syncthreads();  // The sums before have been read.
#pragma unroll
    for (int i = 0; i < kBox; ++i) {
      Sum value = sum.folded[i] + sum.run[i];
#pragma unroll
      for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
      if (lane == 0) sums[warp][i] = value;
    }
    __syncthreads();
    const Index r = static_cast<Index>(threadIdx.x) / kTaps, t = static_cast<Index>(threadIdx.x) % kTaps;
    if (r < in.group_rows && t < in.group_taps && first_j_h + r < g.height.kernel && first_tap + t < g.width.kernel) {
      Sum total = 0;
      for (int i = 0; i < kWarps; ++i) total += sums[i][threadIdx.x];
      const Index tap = (j_d * g.height.kernel + first_j_h + r) * g.width.kernel + first_tap + t;
      for (int64_t to = part; to < in.parts; to += in.used_parts) {
        in.partials[(to * in.channels + channel) * in.taps + tap] = total;
        total = 0;
      }
    }
  }
}

// The kernel with room for a box. Offsets of 64 bits have the largest one alone, as tensors that need them are rare.
template <class T, class Index, int kTapRows = 1, int kTaps = 1>
auto reduction_of_box(Index rows, Index taps) {
  if constexpr (sizeof(Index) == 8) {
    return reduce_rows<T, Index, kMostTaps, kMostTaps>;
  } else {
    if constexpr (kTapRows < kMostTaps) {
      if (rows > kTapRows) return reduction_of_box<T, Index, kTapRows + 1, kTaps>(rows, taps);
    }
    if constexpr (kTaps < kMostTaps) {
      if (taps > kTaps) return reduction_of_box<T, Index, kTapRows, kTaps + 1>(rows, taps);
    }
    return reduce_rows<T, Index, kTapRows, kTaps>;
  }
}

// NDHWC, and few or very long rows: a block takes one part's voxels, a block of channels and kMostTaps taps; a thread
// every so-many-th of these voxels and kWidth neighbouring channels. The threads' sums are added up by a tree. Bound by
// the gathering of the outputs, one load for each voxel and tap.
template <class T, class Index, int kWidth>
__global__ void __launch_bounds__(kThreads) reduce_any(const __grid_constant__ ReduceArguments<T, Index> in) {
  using Sum = Accumulator<T>;
  __shared__ Sum sums[kThreads];
  const Geometry<Index>& g = in.geometry;
  const int block_channels = in.channel_blocks.size, vectors = block_channels / kWidth;
  const int voxel_lanes = kThreads / vectors;
  const int voxel_lane = in.channel_blocks.by_vectors.quotient(static_cast<int>(threadIdx.x));
  const int channel = (static_cast<int>(threadIdx.x) - voxel_lane * vectors) * kWidth;
  int first_half = 1;  // of the tree
  while (2 * first_half < voxel_lanes) first_half *= 2;
  for (int64_t block = blockIdx.x; block < in.blocks; block += gridDim.x) {
    int64_t rest = block / in.tap_groups;
    const int64_t first_tap = (block - rest * in.tap_groups) * kMostTaps;
    const int64_t part = rest / in.channel_blocks.count;
    const int64_t first_channel = (rest - part * in.channel_blocks.count) * block_channels;
    const bool works = voxel_lane < voxel_lanes && first_channel + channel < in.channels;
    // The output position that input 0 and each tap meet.
    Index tap_d[kMostTaps], tap_h[kMostTaps], tap_w[kMostTaps];
#pragma unroll
    for (int t = 0; t < kMostTaps; ++t) {
      const Index tap = static_cast<Index>(smaller(first_tap + t, in.taps - 1));
      const Index line = g.by_kernel_width.quotient(tap), plane = g.by_kernel_height.quotient(line);
      tap_d[t] = g.depth.output_at(0, plane);
      tap_h[t] = g.height.output_at(0, line - plane * g.height.kernel);
      tap_w[t] = g.width.output_at(0, tap - line * g.width.kernel);
    }
    const T* const input = in.input + (first_channel + channel) * in.input_steps.channel;
    const T* const output = in.grad_output + (first_channel + channel) * in.output_steps.channel;
    const int64_t begin = smaller(part * in.share, in.items), end = smaller(begin + in.share, in.items);
    FoldedSums<Sum, kMostTaps * kWidth> sum;
    for (int64_t item = works ? begin + voxel_lane : end; item < end; item += voxel_lanes) {
      const int64_t sample = item / g.input_voxels;
      const Index voxel = static_cast<Index>(item - sample * g.input_voxels);
      const Index line = g.by_input_width.quotient(voxel), plane = g.by_input_height.quotient(line);
      const Index d = plane * g.depth.stride, h = (line - plane * g.height.input) * g.height.stride,
                  w = (voxel - line * g.width.input) * g.width.stride;
      const auto x = *reinterpret_cast<const Elements<T, kWidth>*>(input + sample * in.input_steps.sample +
                                                                   voxel * in.input_steps.voxel);
      const T* const volume = output + sample * in.output_steps.sample;
#pragma unroll
      for (int t = 0; t < kMostTaps; ++t) {
        const Index o_d = d + tap_d[t], o_h = h + tap_h[t], o_w = w + tap_w[t];
        if (o_d < 0 || o_d >= g.depth.output || o_h < 0 || o_h >= g.height.output || o_w < 0 || o_w >= g.width.output) {
          continue;
        }
        const int64_t at = (static_cast<int64_t>(o_d) * g.height.output + o_h) * g.width.output + o_w;
        const auto y = *reinterpret_cast<const Elements<T, kWidth>*>(volume + at * in.output_steps.voxel);
#pragma unroll
        for (int i = 0; i < kWidth; ++i)
          sum.run[t * kWidth + i] += static_cast<Sum>(x.element[i]) * static_cast<Sum>(y.element[i]);
      }
      sum.end_step(in.run_length);
    }
#pragma unroll
    for (int t = 0; t < kMostTaps; ++t) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        __syncthreads();
        sums[threadIdx.x] = sum.folded[t * kWidth + i] + sum.run[t * kWidth + i];
        __syncthreads();
        for (int half = first_half; half > 0; half /= 2) {
          if (voxel_lane < half && voxel_lane + half < voxel_lanes) {
            sums[threadIdx.x] += sums[threadIdx.x + half * vectors];
          }
          __syncthreads();
        }
        if (works && voxel_lane == 0 && first_tap + t < in.taps) {
          in.partials[(part * in.channels + first_channel + channel + i) * in.taps + first_tap + t] = sums[threadIdx.x];
        }
      }
    }
  }
}

template <class T, class Index>
void reduce(const Problem& problem, int64_t parts, const T* grad_output, const T* input, Accumulator<T>* partials,
            cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  ReduceArguments<T, Index> arguments{
      Geometry<Index>(problem),
      grad_output,
      input,
      partials,
      VolumeSteps(problem.layout, problem.in_channels, problem.input_voxels()),
      VolumeSteps(problem.layout, problem.out_channels, problem.output_voxels()),
      ChannelBlocks(problem, kVector, is_vector_aligned(grad_output, input), problem.in_channels)};
  arguments.channels = problem.in_channels;
  arguments.taps = problem.taps();
  arguments.parts = arguments.used_parts = parts;
  // Lanes keep their column and rows are counted one sample after the other, which suits neither very long rows nor
  // samples of a few.
  const bool by_rows =
      problem.layout == Layout::ncdhw && problem.input[0] * problem.input[1] >= 16 && problem.input[2] <= 4096;
  if (by_rows) {
    const auto& width = arguments.geometry.width;
    arguments.group_taps = equal_share<Index>(width.kernel, kMostTaps);
    arguments.tap_groups = (width.kernel + arguments.group_taps - 1) / arguments.group_taps;
    const auto& height = arguments.geometry.height;
    arguments.group_rows = equal_share<Index>(height.kernel, kMostTaps);
    arguments.row_groups = (height.kernel + arguments.group_rows - 1) / arguments.group_rows;
    const int64_t part_blocks =
        problem.in_channels * problem.kernel[0] * int64_t{arguments.row_groups} * arguments.tap_groups;
    // As many blocks as keep a GPU busy, but no more, as each ends with a tree.
    constexpr int64_t kBusyBlocks = 8192;
    arguments.used_parts = std::clamp<int64_t>(kBusyBlocks / part_blocks, 1, parts);
    arguments.blocks = arguments.used_parts * part_blocks;
    arguments.items = problem.batch * problem.input[0] * problem.input[1];
    arguments.columns = equal_share<Index>(width.input, 32);
    arguments.lane_rows = 32 / arguments.columns;
    arguments.share = (arguments.items + arguments.used_parts - 1) / arguments.used_parts;
    const int64_t products = arguments.share / (kWarps * arguments.lane_rows) * (width.input / arguments.columns);
    arguments.run_length = run_length<T>(products, kRunLength);
    const auto kernel = reduction_of_box<T>(arguments.group_rows, arguments.group_taps);
    return launch("depthwise reduction", kernel, grid_of(arguments.blocks), kThreads, 0, stream, arguments);
  }
  arguments.tap_groups = static_cast<Index>((arguments.taps + kMostTaps - 1) / kMostTaps);
  arguments.items = problem.batch * problem.input_voxels();
  arguments.share = (arguments.items + parts - 1) / parts;
  arguments.blocks = parts * arguments.channel_blocks.count * arguments.tap_groups;
  const int item_lanes = kThreads / (arguments.channel_blocks.size / arguments.channel_blocks.width);
  arguments.run_length = run_length<T>(arguments.share / item_lanes, kRunLength);
  const auto kernel = arguments.channel_blocks.width > 1 ? reduce_any<T, Index, kVector> : reduce_any<T, Index, 1>;
  launch("depthwise reduction", kernel, grid_of(arguments.blocks), kThreads, 0, stream, arguments);
}

}  // namespace

template <class T>
void gather_depthwise_any(const Problem& problem, Operator op, const T* source, const T* weight, const T* bias,
                          T* destination, cudaStream_t stream) {
  if (volumes_fit_32_bits(problem)) {
    gather<T, int32_t>(problem, op, source, weight, bias, destination, stream);
  } else {
    gather<T, int64_t>(problem, op, source, weight, bias, destination, stream);
  }
}

template <class T>
void reduce_depthwise_any(const Problem& problem, int64_t parts, const T* grad_output, const T* input,
                          Accumulator<T>* partials, cudaStream_t stream) {
  // So do the steps from tap to tap, which may be longer than a volume.
  const int64_t row_step = problem.dilation[1] * problem.output()[2];
  if (volumes_fit_32_bits(problem) && row_step < (int64_t{1} << 30)) {
    reduce<T, int32_t>(problem, parts, grad_output, input, partials, stream);
  } else {
    reduce<T, int64_t>(problem, parts, grad_output, input, partials, stream);
  }
}

#define CONVT3D_INSTANTIATE(T)                                                                                  \
  template void gather_depthwise_any(const Problem&, Operator, const T*, const T*, const T*, T*, cudaStream_t); \
  template void reduce_depthwise_any(const Problem&, int64_t, const T*, const T*, Accumulator<T>*, cudaStream_t);
CONVT3D_INSTANTIATE(double)
CONVT3D_INSTANTIATE(float)
CONVT3D_INSTANTIATE(__half)
CONVT3D_INSTANTIATE(__nv_bfloat16)
#undef CONVT3D_INSTANTIATE

}  // namespace convt3d::direct
