// col2vol and vol2col on a GPU. Both move memory and hardly compute: what bounds them is the columns' traffic.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/launch.h"
#include "gemm/cuda/backend.h"

namespace convt3d::gemm {
namespace {

constexpr int kThreads = 256;

// What a launch that fails was for.
constexpr const char *kCol2Vol = "launching col2vol", *kVol2Col = "launching vol2col";

// Blocks per multiprocessor that the compiler is to leave registers for. Left to itself it aims for more of them, and
// saves registers by adding up each load before the next one is under way.
constexpr int resident_blocks(int taps, int loads) { return taps == 1 || loads > 16 ? 3 : 4; }

// Columns of one tap that one thread of col2vol_interleave loads at once.
constexpr int kInterleavedColumns = 4;

// Neighbouring elements that one thread loads or stores at once.
template <class T, int Width>
struct alignas(sizeof(T) * Width) Vector {
  T element[Width];
};

// A position in a volume.
template <class Index>
struct Position {
  Index depth, height, width;
};

template <class Index>
CONVT3D_HOST_DEVICE Position<Index> position_of(Index voxel, const Divisor<Index>& by_width,
                                                const Divisor<Index>& by_height) {
  const Index line = by_width.quotient(voxel);
  const Index plane = by_height.quotient(line);
  return {plane, line - plane * by_height.value, voxel - line * by_width.value};
}

// The product wrote the columns from first to last, so the last ones are still in the L2 cache: they are read first.
__device__ unsigned last_written_first() { return gridDim.x - 1 - blockIdx.x; }

// The columns along depth and height that meet one output row: `count` steps of `step` along each axis, from `start`.
template <class Index>
struct RowWalk {
  Index start = 0;
  Index count_d = 0, count_h = 0;
  Index step_d = 0, step_h = 0;

  // `tap_stride` and `voxel_stride` are what neighbouring taps and voxels lie apart in the columns.
  __device__ RowWalk(const Geometry<Index>& geometry, Index plane, Index line, Index voxel_begin, Index tap_stride,
                     Index voxel_stride) {
    const TapWalk<Index> d = geometry.depth.taps_at(plane);
    const TapWalk<Index> h = geometry.height.taps_at(line);
    const Index tap_h = geometry.width.kernel, tap_d = geometry.height.kernel * tap_h;
    const Index input_line = geometry.width.input, input_plane = geometry.height.input * input_line;
    count_d = d.count;
    count_h = h.count;
    step_d = geometry.depth.tap_step * tap_d * tap_stride - geometry.depth.index_step * input_plane * voxel_stride;
    step_h = geometry.height.tap_step * tap_h * tap_stride - geometry.height.index_step * input_line * voxel_stride;
    start = (d.tap * tap_d + h.tap * tap_h) * tap_stride +
            (d.index * input_plane + h.index * input_line - voxel_begin) * voxel_stride;
  }

  // Calls visit(offset) for every pair of a depth and a height tap.
  template <class Visit>
  __device__ void visit(const Visit& visit) const {
    Index plane = start;
    for (Index a = 0; a < count_d; ++a, plane += step_d) {
      Index line = plane;
      for (Index b = 0; b < count_h; ++b, line += step_h) visit(line);
    }
  }
};

template <class T, class Column, class Index>
struct Col2VolArguments {
  Geometry<Index> geometry;
  const Column* columns;
  const T* bias;      // of the block's first channel, or null
  T* output;          // of the block's first sample and channel
  Index first_plane;  // of the output
  Index items;        // of work per volume: see the kernels
  Index voxel_begin;  // of the block's input voxels, and how many there are
  Index block_voxels;
  int64_t channels;  // of the block
  int64_t group_channels;
  int64_t output_sample_stride, output_channels;
  ColumnStrides strides;
  unsigned item_blocks;  // thread blocks that cover one volume's items
  unsigned channel_blocks;
  int64_t channel_span;  // channels of one thread
  Divisor<Index> by_width_items, by_height_items, by_vectors, by_group_channels;
};

// Stores the outputs `column` and `column + 1` of a row, of which the first `outputs` exist. In a row that begins
// between two aligned pairs, as every other row of odd length does, a thread stores its second output with its
// neighbour's first. All threads of the warp take part.
template <class T, class Index>
__device__ void store_pair(T* target, const T (&result)[2], Index column, Index outputs) {
  constexpr unsigned kWholeWarp = 0xffffffffu;
  const unsigned lane = threadIdx.x % 32;
  const T next = __shfl_down_sync(kWholeWarp, result[0], 1);
  const Index next_column = __shfl_down_sync(kWholeWarp, column, 1);
  const Index previous_column = __shfl_up_sync(kWholeWarp, column, 1);
  if (column >= outputs) return;
  Vector<T, 2> pair;
  if (reinterpret_cast<uintptr_t>(target) % sizeof(pair) == 0) {
    pair.element[0] = result[0];
    pair.element[1] = result[1];
    if (column + 1 < outputs) {
      *reinterpret_cast<Vector<T, 2>*>(target) = pair;
    } else {
      target[0] = result[0];
    }
    return;
  }
  // The neighbour holds the row's next pair unless the row or the warp ends here.
  if (lane == 0 || previous_column + 2 != column) target[0] = result[0];
  pair.element[0] = result[1];
  pair.element[1] = next;
  if (lane < 31 && next_column == column + 2 && column + 2 < outputs) {
    *reinterpret_cast<Vector<T, 2>*>(target + 1) = pair;
  } else if (column + 1 < outputs) {
    target[1] = result[1];
  }
}

// NCDHW. One thread computes the outputs [stride * m, stride * (m + 1)) of a row, `Residues` at a time, for a span of
// channels, `Channels` at a time. Every output of a thread has another residue of the width's stride, so in a warp,
// whose threads hold neighbouring m, each load reads one run of one tap. Rows of one residue of the height's stride
// follow each other: they have the same taps, so warps don't diverge, and their runs adjoin. The loads of `Residues`
// outputs, `Taps` width taps and `Channels` channels are all under way at once, which is what hides memory's latency.
// Where a thread's outputs fill an aligned vector they are stored as one. Each column is read once, each output written
// once; bound by that traffic.
//
// `Loading` is how many of the `Residues` outputs can have taps: one of two where stride and dilation are both even.
template <class T, class Column, class Index, int Residues, int Loading, int Taps, int Channels>
__global__ void __launch_bounds__(kThreads, resident_blocks(Taps, Loading * Taps * Channels))
    col2vol_ncdhw(const __grid_constant__ Col2VolArguments<T, Column, Index> in) {
  using Sum = Accumulator<T>;
  const unsigned block = last_written_first();
  const unsigned volume = block / in.item_blocks;
  const Index item = static_cast<Index>(block - volume * in.item_blocks) * kThreads + threadIdx.x;
  const unsigned sample = volume / in.channel_blocks;
  const int64_t first_channel = static_cast<int64_t>(volume - sample * in.channel_blocks) * in.channel_span;
  const int64_t last_channel = smaller(first_channel + in.channel_span, in.channels);

  // item = ((plane * stride + residue) * lines + line) * columns + column
  const Geometry<Index>& geometry = in.geometry;
  const Axis<Index>& width = geometry.width;
  const Position<Index> position = position_of(item, in.by_width_items, in.by_height_items);
  const Index local_plane = geometry.height.by_stride.quotient(position.depth);
  const Index plane = in.first_plane + local_plane;
  const Index line = position.height * geometry.height.stride + position.depth - local_plane * geometry.height.stride;
  // Threads without a row stay: their warp exchanges results below.
  const Index outputs = item < in.items && line < geometry.height.output ? width.output : 0;
  const Index tap_stride = in.block_voxels;
  const RowWalk<Index> rows(geometry, plane, line, in.voxel_begin, tap_stride, Index{1});
  const Index step = width.tap_step * tap_stride - width.index_step;

  const int64_t channel_stride = static_cast<int64_t>(geometry.taps) * in.block_voxels;
  const Column* columns = in.columns + sample * in.strides.sample;
  T* row = in.output + sample * in.output_sample_stride +
           (static_cast<int64_t>(plane) * geometry.height.output + line) * width.output;

  for (Index first = 0; first < width.stride; first += Residues) {
    const Index column = position.width * width.stride + first;
    Index start[Loading], count[Loading], longest = 0;
    int loading = 0;  // the first residue that loads
#pragma unroll
    for (int r = 0; r < Residues; ++r) {
      const bool reached = column + r < outputs && rows.count_d > 0 && rows.count_h > 0;
      const TapWalk<Index> taps = reached ? width.taps_at(column + r) : TapWalk<Index>{};
      if (Loading < Residues && r > 0 && taps.count == 0) continue;
      if (Loading < Residues) loading = r;
      start[Loading < Residues ? 0 : r] = taps.tap * tap_stride + taps.index;
      count[Loading < Residues ? 0 : r] = taps.count;
      longest = larger(longest, taps.count);
    }
    for (int64_t channel = first_channel; channel < last_channel; channel += Channels) {
      // The last channels of a span that is no multiple of `Channels` are read again rather than read past.
      const Column* source[Channels];
      Sum bias[Channels], sum[Loading][Channels];
#pragma unroll
      for (int c = 0; c < Channels; ++c) {
        const int64_t own = smaller(channel + c, last_channel - 1);
        source[c] = columns + own * channel_stride;
        bias[c] = in.bias == nullptr ? Sum(0) : static_cast<Sum>(in.bias[own]);
#pragma unroll
        for (int r = 0; r < Loading; ++r) sum[r][c] = bias[c];
      }
      rows.visit([&](Index offset) {
        for (Index done = 0; done < longest; done += Taps) {
          Column loaded[Loading][Taps][Channels];
#pragma unroll
          for (int r = 0; r < Loading; ++r) {
#pragma unroll
            for (int t = 0; t < Taps; ++t) {
              const bool meets = done + t < count[r];
              const Index at = offset + start[r] + (done + t) * step;
#pragma unroll
              for (int c = 0; c < Channels; ++c) loaded[r][t][c] = meets ? __ldg(source[c] + at) : Column(0.0f);
            }
          }
#pragma unroll
          for (int r = 0; r < Loading; ++r) {
#pragma unroll
            for (int t = 0; t < Taps; ++t) {
#pragma unroll
              for (int c = 0; c < Channels; ++c) sum[r][c] += static_cast<Sum>(loaded[r][t][c]);
            }
          }
        }
      });
#pragma unroll
      for (int c = 0; c < Channels; ++c) {
        if (channel + c >= last_channel) break;
        T* target = row + (channel + c) * static_cast<int64_t>(geometry.output_voxels) + column;
        T result[Residues];
#pragma unroll
        for (int r = 0; r < Residues; ++r) {
          if constexpr (Loading == Residues) {
            result[r] = static_cast<T>(sum[r][c]);
          } else {
            result[r] = static_cast<T>(r == loading ? sum[0][c] : bias[c]);
          }
        }
        if constexpr (Residues == 2) {
          store_pair(target, result, column, outputs);
        } else if (column < outputs) {
          *target = result[0];
        }
      }
    }
  }
}

// NCDHW where kernel = stride = 2 along the width and nothing is padded there: the rows of the two width taps
// interleave. One thread makes 8 outputs of a row from 4 columns of either tap, with 16-byte loads and stores
// (float32), for a span of channels, `Channels` at a time. Depth and height are as above. Bound by the traffic of
// columns and outputs.
template <class T, class Column, class Index, int Channels>
__global__ void __launch_bounds__(kThreads, 4)
    col2vol_interleave(const __grid_constant__ Col2VolArguments<T, Column, Index> in) {
  using Sum = Accumulator<T>;
  constexpr int kColumns = kInterleavedColumns;
  const unsigned block = last_written_first();
  const unsigned volume = block / in.item_blocks;
  const Index item = static_cast<Index>(block - volume * in.item_blocks) * kThreads + threadIdx.x;
  if (item >= in.items) return;
  const unsigned sample = volume / in.channel_blocks;
  const int64_t first_channel = static_cast<int64_t>(volume - sample * in.channel_blocks) * in.channel_span;
  const int64_t last_channel = smaller(first_channel + in.channel_span, in.channels);

  const Geometry<Index>& geometry = in.geometry;
  const Position<Index> position = position_of(item, in.by_width_items, geometry.by_output_height);
  const Index plane = in.first_plane + position.depth;
  const RowWalk<Index> rows(geometry, plane, position.height, in.voxel_begin, in.block_voxels, Index{1});
  const int64_t channel_stride = static_cast<int64_t>(geometry.taps) * in.block_voxels;
  const Column* columns = in.columns + sample * in.strides.sample + position.width * kColumns;
  T* row = in.output + sample * in.output_sample_stride + position.width * (2 * kColumns) +
           (static_cast<int64_t>(plane) * geometry.height.output + position.height) * geometry.width.output;

  for (int64_t channel = first_channel; channel < last_channel; channel += Channels) {
    Sum sum[Channels][2][kColumns];
#pragma unroll
    for (int c = 0; c < Channels; ++c) {
      const int64_t own = smaller(channel + c, last_channel - 1);
      const Sum bias = in.bias == nullptr ? Sum(0) : static_cast<Sum>(in.bias[own]);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) sum[c][0][i] = sum[c][1][i] = bias;
    }
    rows.visit([&](Index offset) {
      Vector<Column, kColumns> loaded[Channels][2];
#pragma unroll
      for (int c = 0; c < Channels; ++c) {
        const Column* source = columns + smaller(channel + c, last_channel - 1) * channel_stride + offset;
        loaded[c][0] = *reinterpret_cast<const Vector<Column, kColumns>*>(source);
        loaded[c][1] = *reinterpret_cast<const Vector<Column, kColumns>*>(source + in.block_voxels);
      }
#pragma unroll
      for (int c = 0; c < Channels; ++c) {
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          sum[c][0][i] += static_cast<Sum>(loaded[c][0].element[i]);
          sum[c][1][i] += static_cast<Sum>(loaded[c][1].element[i]);
        }
      }
    });
#pragma unroll
    for (int c = 0; c < Channels; ++c) {
      if (channel + c >= last_channel) break;
      Vector<T, kColumns> result[2];
#pragma unroll
      for (int i = 0; i < 2 * kColumns; ++i) {
        result[i / kColumns].element[i % kColumns] = static_cast<T>(sum[c][i % 2][i / 2]);
      }
      Vector<T, kColumns>* target =
          reinterpret_cast<Vector<T, kColumns>*>(row + (channel + c) * static_cast<int64_t>(geometry.output_voxels));
      target[0] = result[0];
      target[1] = result[1];
    }
  }
}

// NDHWC. One thread computes `Width` neighbouring channels, which lie in one group, of one output voxel; neighbouring
// threads hold neighbouring channels. Loads and stores are vectors of up to 16 bytes, and `Taps` loads are under way at
// once. Bound by the columns' traffic.
template <class T, class Column, class Index, int Taps, int Width>
__global__ void __launch_bounds__(kThreads, 4)
    col2vol_ndhwc(const __grid_constant__ Col2VolArguments<T, Column, Index> in) {
  using Sum = Accumulator<T>;
  const unsigned block = last_written_first();
  const unsigned sample = block / in.item_blocks;
  const Index item = static_cast<Index>(block - sample * in.item_blocks) * kThreads + threadIdx.x;
  if (item >= in.items) return;
  const Index voxel = in.by_vectors.quotient(item);
  const Index channel = (item - voxel * in.by_vectors.value) * Width;
  const Index group = in.by_group_channels.quotient(channel);

  const Geometry<Index>& geometry = in.geometry;
  const Axis<Index>& width = geometry.width;
  const Position<Index> position = position_of(voxel, geometry.by_output_width, geometry.by_output_height);
  const Index plane = in.first_plane + position.depth;
  const Index tap_stride = static_cast<Index>(in.group_channels), voxel_stride = static_cast<Index>(in.strides.row);
  const RowWalk<Index> rows(geometry, plane, position.height, in.voxel_begin, tap_stride, voxel_stride);
  const TapWalk<Index> taps = width.taps_at(position.width);
  const Index start = taps.tap * tap_stride + taps.index * voxel_stride;
  const Index step = width.tap_step * tap_stride - width.index_step * voxel_stride;

  const Column* source =
      in.columns + sample * in.strides.sample + group * in.strides.group + channel - group * in.by_group_channels.value;
  Sum sum[Width];
#pragma unroll
  for (int c = 0; c < Width; ++c) sum[c] = in.bias == nullptr ? Sum(0) : static_cast<Sum>(in.bias[channel + c]);
  rows.visit([&](Index offset) {
    for (Index done = 0; done < taps.count; done += Taps) {
      Vector<Column, Width> loaded[Taps];
#pragma unroll
      for (int t = 0; t < Taps; ++t) {
        loaded[t] = {};
        if (done + t < taps.count) {
          loaded[t] = *reinterpret_cast<const Vector<Column, Width>*>(source + offset + start + (done + t) * step);
        }
      }
#pragma unroll
      for (int t = 0; t < Taps; ++t) {
#pragma unroll
        for (int c = 0; c < Width; ++c) sum[c] += static_cast<Sum>(loaded[t].element[c]);
      }
    }
  });
  Vector<T, Width> result;
#pragma unroll
  for (int c = 0; c < Width; ++c) result.element[c] = static_cast<T>(sum[c]);
  T* target =
      in.output + sample * in.output_sample_stride + channel +
      ((static_cast<int64_t>(plane) * geometry.height.output + position.height) * width.output + position.width) *
          in.output_channels;
  *reinterpret_cast<Vector<T, Width>*>(target) = result;
}

template <class Bits, class Index>
struct Vol2ColArguments {
  Geometry<Index> geometry;
  const Bits* volume;  // of the block's first sample
  Bits* columns;
  Index voxel_begin, voxels;  // the block's input voxels
  int64_t channels, group_channels;
  int64_t volume_sample_stride;
  ColumnStrides strides;
  unsigned item_blocks;  // thread blocks that cover one volume's items
  unsigned channel_blocks;
  Divisor<Index> by_vectors, by_group_channels, by_taps;
};

// NCDHW. One thread copies one depth tap's taps of one input voxel for `Channels` neighbouring channels, `Taps` width
// taps at a time so that their loads are all under way at once. Neighbouring threads hold neighbouring voxels: every
// store of a warp is one line, and the loads of neighbouring taps hit the same lines in cache. Each column is written
// once, and the volume read from memory once where its rows stay in cache; bound by the stores.
template <class Bits, class Index, int Taps, int Channels>
__global__ void __launch_bounds__(kThreads) vol2col_ncdhw(const __grid_constant__ Vol2ColArguments<Bits, Index> in) {
  const unsigned slice = blockIdx.x / in.item_blocks;
  const Index item = static_cast<Index>(blockIdx.x - slice * in.item_blocks) * kThreads + threadIdx.x;
  if (item >= in.voxels) return;
  const Geometry<Index>& geometry = in.geometry;
  const unsigned volume = slice / static_cast<unsigned>(geometry.depth.kernel);
  const Index tap_d = static_cast<Index>(slice - volume * static_cast<unsigned>(geometry.depth.kernel));
  const unsigned sample = volume / in.channel_blocks;
  const int64_t channel = static_cast<int64_t>(volume - sample * in.channel_blocks) * Channels;

  const Position<Index> position =
      position_of(in.voxel_begin + item, geometry.by_input_width, geometry.by_input_height);
  const int64_t volume_stride = geometry.output_voxels;
  const int64_t column_stride = static_cast<int64_t>(geometry.taps) * in.voxels;
  const int64_t first_tap = static_cast<int64_t>(tap_d) * geometry.height.kernel * geometry.width.kernel;
  const Bits* source = in.volume + sample * in.volume_sample_stride + channel * volume_stride;
  Bits* target = in.columns + sample * in.strides.sample + channel * column_stride + first_tap * in.voxels + item;
  const int active = static_cast<int>(smaller(in.channels - channel, static_cast<int64_t>(Channels)));
  const Index first_w = geometry.width.output_at(position.width, 0);
  const Index d = geometry.depth.output_at(position.depth, tap_d);

  Index h = geometry.height.output_at(position.height, 0);
  for (Index tap_h = 0; tap_h < geometry.height.kernel; ++tap_h, h += geometry.height.dilation) {
    const bool line_inside = d >= 0 && d < geometry.depth.output && h >= 0 && h < geometry.height.output;
    const Index line = (d * geometry.height.output + h) * geometry.width.output;
    for (Index tap_w = 0; tap_w < geometry.width.kernel; tap_w += Taps) {
      Bits loaded[Taps][Channels];
#pragma unroll
      for (int t = 0; t < Taps; ++t) {
        const Index w = first_w + (tap_w + t) * geometry.width.dilation;
        const bool inside = line_inside && w >= 0 && w < geometry.width.output && tap_w + t < geometry.width.kernel;
#pragma unroll
        for (int c = 0; c < Channels; ++c) {
          loaded[t][c] = inside && c < active ? __ldg(source + c * volume_stride + line + w) : Bits{0};
        }
      }
#pragma unroll
      for (int t = 0; t < Taps; ++t) {
        if (tap_w + t >= geometry.width.kernel) break;
#pragma unroll
        for (int c = 0; c < Channels; ++c) {
          if (c < active) target[c * column_stride] = loaded[t][c];
        }
        target += in.voxels;
      }
    }
  }
}

// NDHWC. One thread copies `Width` neighbouring channels of one tap of one input voxel; neighbouring threads hold
// neighbouring channels, then taps, so the stores are linear. Bound by the stores.
template <class Bits, class Index, int Width>
__global__ void __launch_bounds__(kThreads) vol2col_ndhwc(const __grid_constant__ Vol2ColArguments<Bits, Index> in) {
  const unsigned sample = blockIdx.x / in.item_blocks;
  const Index item = static_cast<Index>(blockIdx.x - sample * in.item_blocks) * kThreads + threadIdx.x;
  const Index row = in.by_vectors.quotient(item);
  const Index local_voxel = in.by_taps.quotient(row);
  if (local_voxel >= in.voxels) return;
  const Index channel = (item - row * in.by_vectors.value) * Width;
  const Index group = in.by_group_channels.quotient(channel);
  const Index tap = row - local_voxel * in.by_taps.value;

  const Geometry<Index>& geometry = in.geometry;
  const Position<Index> input =
      position_of(in.voxel_begin + local_voxel, geometry.by_input_width, geometry.by_input_height);
  const Position<Index> taps = position_of(tap, geometry.by_kernel_width, geometry.by_kernel_height);
  const Index d = geometry.depth.output_at(input.depth, taps.depth);
  const Index h = geometry.height.output_at(input.height, taps.height);
  const Index w = geometry.width.output_at(input.width, taps.width);
  Vector<Bits, Width> value{};
  if (d >= 0 && d < geometry.depth.output && h >= 0 && h < geometry.height.output && w >= 0 &&
      w < geometry.width.output) {
    const int64_t voxel = (static_cast<int64_t>(d) * geometry.height.output + h) * geometry.width.output + w;
    value = *reinterpret_cast<const Vector<Bits, Width>*>(in.volume + sample * in.volume_sample_stride +
                                                          voxel * in.channels + channel);
  }
  Bits* target = in.columns + sample * in.strides.sample + group * in.strides.group +
                 static_cast<int64_t>(local_voxel) * in.strides.row + tap * in.group_channels + channel -
                 group * in.by_group_channels.value;
  *reinterpret_cast<Vector<Bits, Width>*>(target) = value;
}

unsigned blocks_for(int64_t threads) { return static_cast<unsigned>((threads + kThreads - 1) / kThreads); }

bool is_aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// Threads that fill a large GPU some times over, so that its last ones to finish don't matter.
constexpr int64_t kEnoughThreads = 4 * 132 * 1024;

// Loads of one thread that make up for finding out where its taps lie. More of them would only make threads uneven.
constexpr int64_t kEnoughLoads = 128;

// The channels for one thread that loads `loads` columns for each: a power of two times `width`, which it takes at a
// time; or 1 where not even `width` channels leave enough threads.
int64_t channels_per_thread(int64_t items, int64_t loads, const ColumnBlock& block, int64_t width) {
  const auto threads = [&](int64_t span) { return items * block.samples * ((block.channels + span - 1) / span); };
  if (block.channels < width || 4 * threads(width) < kEnoughThreads) return 1;
  int64_t span = width;
  while (span * loads < kEnoughLoads && 2 * span <= block.channels && threads(2 * span) >= kEnoughThreads) span *= 2;
  return span;
}

// About this many loads of one thread are to be under way at once.
constexpr int kLoadsInFlight = 16;

template <class T, class Column, class Index, int Residues, int Loading, int Taps, int Channels>
void launch_col2vol_ncdhw(Col2VolArguments<T, Column, Index>& arguments, const ColumnBlock& block,
                          cudaStream_t stream) {
  const Geometry<Index>& geometry = arguments.geometry;
  const int64_t loads =
      static_cast<int64_t>(geometry.depth.most_taps()) * geometry.height.most_taps() * geometry.width.kernel;
  arguments.channel_span = channels_per_thread(arguments.items, loads, block, Channels);
  arguments.channel_blocks =
      static_cast<unsigned>((block.channels + arguments.channel_span - 1) / arguments.channel_span);
  const unsigned blocks = arguments.item_blocks * static_cast<unsigned>(block.samples) * arguments.channel_blocks;
  if (arguments.channel_span >= Channels) {
    launch(kCol2Vol, col2vol_ncdhw<T, Column, Index, Residues, Loading, Taps, Channels>, blocks, kThreads, 0, stream,
           arguments);
  } else {
    launch(kCol2Vol, col2vol_ncdhw<T, Column, Index, Residues, Loading, Taps, 1>, blocks, kThreads, 0, stream,
           arguments);
  }
}

// Picks how many residues and channels a thread takes at a time, for `Taps` width taps at a time.
template <class T, class Column, class Index, int Taps>
void launch_col2vol_ncdhw(Col2VolArguments<T, Column, Index>& arguments, const ColumnBlock& block,
                          cudaStream_t stream) {
  const Axis<Index>& width = arguments.geometry.width;
  constexpr auto channels = [](int loads) { return loads >= 8 ? 8 : loads >= 4 ? 4 : 2; };
  if (width.stride % 2 != 0) {
    launch_col2vol_ncdhw<T, Column, Index, 1, 1, Taps, channels(kLoadsInFlight / Taps)>(arguments, block, stream);
  } else if (width.dilation % 2 != 0 || Taps == 1) {
    launch_col2vol_ncdhw<T, Column, Index, 2, 2, Taps, channels(kLoadsInFlight / (2 * Taps))>(arguments, block, stream);
  } else {
    launch_col2vol_ncdhw<T, Column, Index, 2, 1, Taps, channels(2 * kLoadsInFlight / Taps)>(arguments, block, stream);
  }
}

// Whether col2vol_interleave takes the problem: its rows must begin and end with whole vectors.
bool interleaves(const Problem& problem, const ColumnBlock& block, const void* output) {
  return problem.kernel[2] == 2 && problem.stride[2] == 2 && problem.padding[2] == 0 &&
         problem.output_padding[2] == 0 && problem.dilation[2] == 1 && problem.input[2] % kInterleavedColumns == 0 &&
         block.voxels % kInterleavedColumns == 0 && is_aligned(output, 8 * kInterleavedColumns);
}

// Picks how many width taps a thread takes at a time.
template <class T, class Column, class Index>
void launch_col2vol_ncdhw(Col2VolArguments<T, Column, Index>& arguments, const ColumnBlock& block,
                          cudaStream_t stream) {
  if constexpr (sizeof(Index) == 8) {
    return launch_col2vol_ncdhw<T, Column, Index, 1, 1, 1, 8>(arguments, block, stream);
  } else if constexpr (std::is_same_v<T, Column> && sizeof(T) == 2) {
    // Half-precision columns are made only where at most one tap meets each output.
    return launch_col2vol_ncdhw<T, Column, Index, 1>(arguments, block, stream);
  } else {
    switch (arguments.geometry.width.most_taps()) {
      case 1:
        return launch_col2vol_ncdhw<T, Column, Index, 1>(arguments, block, stream);
      case 2:
        return launch_col2vol_ncdhw<T, Column, Index, 2>(arguments, block, stream);
      case 3:
        return launch_col2vol_ncdhw<T, Column, Index, 3>(arguments, block, stream);
      default:
        return launch_col2vol_ncdhw<T, Column, Index, 4>(arguments, block, stream);
    }
  }
}

template <class T, class Column, class Index>
void launch_col2vol(const Problem& problem, const ColumnBlock& block, Range<int64_t> planes, const Column* columns,
                    const T* bias, T* output, cudaStream_t stream) {
  const VolumeStrides volume(problem.layout, problem.out_channels, problem.output_voxels());
  const Extent output_size = problem.output();
  Col2VolArguments<T, Column, Index> arguments{Geometry<Index>(problem)};
  arguments.columns = columns;
  arguments.bias = bias == nullptr ? nullptr : bias + block.channel_begin;
  arguments.output = output + volume.offset(block.sample_begin, block.channel_begin, 0);
  arguments.first_plane = static_cast<Index>(planes.begin);
  arguments.voxel_begin = static_cast<Index>(block.voxel_begin);
  arguments.block_voxels = static_cast<Index>(block.voxels);
  arguments.channels = block.channels;
  arguments.group_channels = block.group_channels;
  arguments.output_sample_stride = volume.sample;
  arguments.output_channels = problem.out_channels;
  arguments.strides = ColumnStrides::of(block);
  if constexpr (sizeof(Index) == 4) {
    if (problem.layout == Layout::ncdhw && interleaves(problem, block, arguments.output)) {
      constexpr int kChannels = sizeof(Column) == 8 ? 1 : 2;
      const int64_t width_items = problem.input[2] / kInterleavedColumns;
      const int64_t items = (planes.end - planes.begin) * output_size[1] * width_items;
      const int64_t loads = 2 * arguments.geometry.depth.most_taps() * arguments.geometry.height.most_taps();
      arguments.items = static_cast<Index>(items);
      arguments.item_blocks = blocks_for(items);
      arguments.by_width_items = Divisor<Index>(width_items);
      arguments.channel_span = channels_per_thread(items, kInterleavedColumns * loads, block, kChannels);
      arguments.channel_blocks =
          static_cast<unsigned>((block.channels + arguments.channel_span - 1) / arguments.channel_span);
      const unsigned blocks = arguments.item_blocks * static_cast<unsigned>(block.samples) * arguments.channel_blocks;
      return launch(kCol2Vol, col2vol_interleave<T, Column, Index, kChannels>, blocks, kThreads, 0, stream, arguments);
    }
  }
  if (problem.layout == Layout::ncdhw) {
    const int64_t width_items = (output_size[2] + problem.stride[2] - 1) / problem.stride[2];
    const int64_t height_items = (output_size[1] + problem.stride[1] - 1) / problem.stride[1];
    const int64_t items = (planes.end - planes.begin) * problem.stride[1] * height_items * width_items;
    arguments.items = static_cast<Index>(items);
    arguments.item_blocks = blocks_for(items);
    arguments.by_width_items = Divisor<Index>(width_items);
    arguments.by_height_items = Divisor<Index>(height_items);
    return launch_col2vol_ncdhw<T, Column, Index>(arguments, block, stream);
  }
  constexpr int kWidth = 16 / sizeof(T);
  const auto run = [&](auto kernel, int width) {
    const int64_t vectors = block.channels / width;
    arguments.items = static_cast<Index>((planes.end - planes.begin) * output_size[1] * output_size[2] * vectors);
    arguments.item_blocks = blocks_for(arguments.items);
    arguments.by_vectors = Divisor<Index>(vectors);
    arguments.by_group_channels = Divisor<Index>(block.group_channels);
    launch(kCol2Vol, kernel, arguments.item_blocks * static_cast<unsigned>(block.samples), kThreads, 0, stream,
           arguments);
  };
  if (block.group_channels % kWidth == 0 && problem.out_channels % kWidth == 0 && is_aligned(arguments.output, 16)) {
    run(col2vol_ndhwc<T, Column, Index, 2, kWidth>, kWidth);
  } else {
    run(col2vol_ndhwc<T, Column, Index, 2, 1>, 1);
  }
}

template <class Bits, class Index>
void launch_vol2col(const Problem& problem, const ColumnBlock& block, const Bits* volume, Bits* columns,
                    cudaStream_t stream) {
  const VolumeStrides strides(problem.layout, problem.out_channels, problem.output_voxels());
  Vol2ColArguments<Bits, Index> arguments{Geometry<Index>(problem)};
  arguments.volume = volume + strides.offset(block.sample_begin, 0, 0);
  arguments.columns = columns;
  arguments.voxel_begin = static_cast<Index>(block.voxel_begin);
  arguments.voxels = static_cast<Index>(block.voxels);
  arguments.channels = block.channels;
  arguments.group_channels = block.group_channels;
  arguments.volume_sample_stride = strides.sample;
  arguments.strides = ColumnStrides::of(block);
  if (problem.layout == Layout::ncdhw) {
    constexpr int kTaps = 4, kChannels = kLoadsInFlight / kTaps;
    const auto run = [&](auto kernel, int channels) {
      arguments.item_blocks = blocks_for(block.voxels);
      arguments.channel_blocks = static_cast<unsigned>((block.channels + channels - 1) / channels);
      const unsigned slices = static_cast<unsigned>(block.samples * problem.kernel[0]) * arguments.channel_blocks;
      launch(kVol2Col, kernel, arguments.item_blocks * slices, kThreads, 0, stream, arguments);
    };
    if (channels_per_thread(block.voxels, block.taps, block, kChannels) >= kChannels) {
      run(vol2col_ncdhw<Bits, Index, kTaps, kChannels>, kChannels);
    } else {
      run(vol2col_ncdhw<Bits, Index, kTaps, 1>, 1);
    }
    return;
  }
  constexpr int kWidth = 16 / sizeof(Bits);
  const auto run = [&](auto kernel, int width) {
    const int64_t vectors = block.channels / width;
    arguments.by_vectors = Divisor<Index>(vectors);
    arguments.by_group_channels = Divisor<Index>(block.group_channels);
    arguments.by_taps = Divisor<Index>(block.taps);
    arguments.item_blocks = blocks_for(block.voxels * block.taps * vectors);
    launch(kVol2Col, kernel, arguments.item_blocks * static_cast<unsigned>(block.samples), kThreads, 0, stream,
           arguments);
  };
  if (block.group_channels % kWidth == 0 && problem.out_channels % kWidth == 0 && is_aligned(volume, 16)) {
    run(vol2col_ndhwc<Bits, Index, kWidth>, kWidth);
  } else {
    run(vol2col_ndhwc<Bits, Index, 1>, 1);
  }
}

// Whether 32-bit indices reach every element of one sample's block and of its output.
bool fits_32_bits(const Problem& problem, const ColumnBlock& block) {
  constexpr int64_t kLimit = int64_t{1} << 30;
  return Geometry<int32_t>::fits(problem) && block.taps * block.voxels * block.channels <= kLimit &&
         problem.output_voxels() * problem.out_channels <= kLimit;
}

// vol2col moves elements without looking at them, so one kernel serves every type of a size.
template <size_t Size>
struct BitsOfSize;
template <>
struct BitsOfSize<2> {
  using type = uint16_t;
};
template <>
struct BitsOfSize<4> {
  using type = uint32_t;
};
template <>
struct BitsOfSize<8> {
  using type = uint64_t;
};

}  // namespace

template <class T, class Column>
void CudaBackend::col2vol(const Problem& problem, const ColumnBlock& block, Range<int64_t> planes,
                          const Column* columns, const T* bias, T* output) const {
  if (fits_32_bits(problem, block)) {
    launch_col2vol<T, Column, int32_t>(problem, block, planes, columns, bias, output, stream_);
  } else {
    launch_col2vol<T, Column, int64_t>(problem, block, planes, columns, bias, output, stream_);
  }
}

template <class T>
void CudaBackend::vol2col(const Problem& problem, const ColumnBlock& block, const T* volume, T* columns) const {
  using Bits = typename BitsOfSize<sizeof(T)>::type;
  const Bits* source = reinterpret_cast<const Bits*>(volume);
  Bits* target = reinterpret_cast<Bits*>(columns);
  if (fits_32_bits(problem, block)) {
    launch_vol2col<Bits, int32_t>(problem, block, source, target, stream_);
  } else {
    launch_vol2col<Bits, int64_t>(problem, block, source, target, stream_);
  }
}

#define CONVT3D_INSTANTIATE(T, Column)                                                                                \
  template void CudaBackend::col2vol(const Problem&, const ColumnBlock&, Range<int64_t>, const Column*, const T*, T*) \
      const;
CONVT3D_INSTANTIATE(double, double)
CONVT3D_INSTANTIATE(float, float)
CONVT3D_INSTANTIATE(__half, __half)
CONVT3D_INSTANTIATE(__half, float)
CONVT3D_INSTANTIATE(__nv_bfloat16, __nv_bfloat16)
CONVT3D_INSTANTIATE(__nv_bfloat16, float)
#undef CONVT3D_INSTANTIATE

template void CudaBackend::vol2col(const Problem&, const ColumnBlock&, const double*, double*) const;
template void CudaBackend::vol2col(const Problem&, const ColumnBlock&, const float*, float*) const;
template void CudaBackend::vol2col(const Problem&, const ColumnBlock&, const __half*, __half*) const;
template void CudaBackend::vol2col(const Problem&, const ColumnBlock&, const __nv_bfloat16*, __nv_bfloat16*) const;

}  // namespace convt3d::gemm
