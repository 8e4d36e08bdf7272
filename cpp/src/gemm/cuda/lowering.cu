// col2vol and vol2col on a GPU. Both move memory and hardly compute: what bounds them is the columns' traffic.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "gemm/cuda/backend.h"

namespace convt3d::gemm {
namespace {

constexpr int kThreads = 256;

// Blocks per multiprocessor that the compiler is to leave registers for. Left to itself it aims for more of them, and
// saves registers by adding up each load before the next one is under way.
template <int Taps>
constexpr int kBlocks = Taps == 1 ? 3 : 4;

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
  const T* bias;           // of the block's first channel, or null
  T* output;               // of the block's first sample and channel
  Index first_plane;       // of the output
  Index items;             // of work per volume: see the kernels
  Index voxel_begin;       // of the block's input voxels, and how many there are
  Index block_voxels;
  int64_t channels;        // of the block
  int64_t group_channels;
  int64_t output_sample_stride, output_channels;
  ColumnStrides strides;
  unsigned item_blocks;    // thread blocks that cover one volume's items
  unsigned channel_blocks;
  Divisor<Index> by_width_items, by_vectors, by_group_channels;
};

// NCDHW. One thread computes the outputs [stride * m, stride * (m + 1)) of a row, `Residues` at a time, for `Channels`
// neighbouring channels. Every output of a thread has another residue of the stride, so in a warp, whose threads hold
// neighbouring m, each load reads one run of one tap; and the loads of `Residues` outputs, `Taps` width taps and
// `Channels` channels are all under way at once, which is what hides memory's latency. Where a thread's outputs fill an
// aligned vector they are stored as one. Each column is read once, each output written once; bound by that traffic.
template <class T, class Column, class Index, int Residues, int Taps, int Channels>
__global__ void __launch_bounds__(kThreads, kBlocks<Taps>) col2vol_ncdhw(const __grid_constant__ Col2VolArguments<T, Column, Index> in) {
  using Sum = Accumulator<T>;
  const unsigned block = last_written_first();
  const unsigned volume = block / in.item_blocks;
  const Index item = static_cast<Index>(block - volume * in.item_blocks) * kThreads + threadIdx.x;
  if (item >= in.items) return;
  const unsigned sample = volume / in.channel_blocks;
  const int64_t channel = static_cast<int64_t>(volume - sample * in.channel_blocks) * Channels;

  const Geometry<Index>& geometry = in.geometry;
  const Axis<Index>& width = geometry.width;
  const Position<Index> position = position_of(item, in.by_width_items, geometry.by_output_height);
  const Index plane = in.first_plane + position.depth;
  const Index tap_stride = in.block_voxels;
  const RowWalk<Index> rows(geometry, plane, position.height, in.voxel_begin, tap_stride, Index{1});
  const Index step = width.tap_step * tap_stride - width.index_step;

  // The last channels of a block that is no multiple of `Channels` are read again rather than read past.
  const int64_t channel_stride = static_cast<int64_t>(geometry.taps) * in.block_voxels;
  const Column* source[Channels];
  Sum bias[Channels];
#pragma unroll
  for (int c = 0; c < Channels; ++c) {
    const int64_t own = smaller(channel + c, in.channels - 1);
    source[c] = in.columns + sample * in.strides.sample + own * channel_stride;
    bias[c] = in.bias == nullptr ? Sum(0) : static_cast<Sum>(in.bias[own]);
  }
  T* row = in.output + sample * in.output_sample_stride + channel * geometry.output_voxels +
           (static_cast<int64_t>(plane) * geometry.height.output + position.height) * width.output;

  for (Index first = 0; first < width.stride; first += Residues) {
    const Index column = position.width * width.stride + first;
    Index start[Residues], count[Residues], longest = 0;
    Sum sum[Residues][Channels];
#pragma unroll
    for (int r = 0; r < Residues; ++r) {
      const TapWalk<Index> taps = column + r < width.output ? width.taps_at(column + r) : TapWalk<Index>{};
      start[r] = taps.tap * tap_stride + taps.index;
      count[r] = taps.count;
      longest = larger(longest, taps.count);
#pragma unroll
      for (int c = 0; c < Channels; ++c) sum[r][c] = bias[c];
    }
    rows.visit([&](Index offset) {
      for (Index done = 0; done < longest; done += Taps) {
        Column loaded[Residues][Taps][Channels];
#pragma unroll
        for (int r = 0; r < Residues; ++r) {
#pragma unroll
          for (int t = 0; t < Taps; ++t) {
            const bool present = done + t < count[r];
            const Index at = offset + start[r] + (done + t) * step;
#pragma unroll
            for (int c = 0; c < Channels; ++c) loaded[r][t][c] = present ? __ldcs(source[c] + at) : Column(0.0f);
          }
        }
#pragma unroll
        for (int r = 0; r < Residues; ++r) {
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
      if (channel + c >= in.channels) break;
      T* target = row + c * static_cast<int64_t>(geometry.output_voxels) + column;
      Vector<T, Residues> result;
#pragma unroll
      for (int r = 0; r < Residues; ++r) result.element[r] = static_cast<T>(sum[r][c]);
      if (column + Residues <= width.output && reinterpret_cast<uintptr_t>(target) % sizeof(result) == 0) {
        *reinterpret_cast<Vector<T, Residues>*>(target) = result;
      } else {
#pragma unroll
        for (int r = 0; r < Residues; ++r) {
          if (column + r < width.output) target[r] = result.element[r];
        }
      }
    }
  }
}

// NDHWC. One thread computes `Width` neighbouring channels, which lie in one group, of one output voxel; neighbouring
// threads hold neighbouring channels. Loads and stores are vectors of up to 16 bytes, and `Taps` loads are under way at
// once. Bound by the columns' traffic.
template <class T, class Column, class Index, int Taps, int Width>
__global__ void __launch_bounds__(kThreads, 4) col2vol_ndhwc(const __grid_constant__ Col2VolArguments<T, Column, Index> in) {
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

  const Column* source = in.columns + sample * in.strides.sample + group * in.strides.group + channel -
                         group * in.by_group_channels.value;
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
  T* target = in.output + sample * in.output_sample_stride + channel +
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

// NCDHW. One thread copies all taps of one input voxel for `Channels` neighbouring channels, `Taps` width taps at a time
// so that their loads are all under way at once. Neighbouring threads hold neighbouring voxels: every store of a warp is one
// line, and the loads of neighbouring taps hit the same lines in cache. Each column is written once, and the volume read
// from memory once where its rows stay in cache; bound by the stores.
template <class Bits, class Index, int Taps, int Channels>
__global__ void __launch_bounds__(kThreads) vol2col_ncdhw(const __grid_constant__ Vol2ColArguments<Bits, Index> in) {
  const unsigned volume = blockIdx.x / in.item_blocks;
  const Index item = static_cast<Index>(blockIdx.x - volume * in.item_blocks) * kThreads + threadIdx.x;
  if (item >= in.voxels) return;
  const unsigned sample = volume / in.channel_blocks;
  const int64_t channel = static_cast<int64_t>(volume - sample * in.channel_blocks) * Channels;

  const Geometry<Index>& geometry = in.geometry;
  const Position<Index> position =
      position_of(in.voxel_begin + item, geometry.by_input_width, geometry.by_input_height);
  const int64_t volume_stride = geometry.output_voxels;
  const int64_t column_stride = static_cast<int64_t>(geometry.taps) * in.voxels;
  const Bits* source = in.volume + sample * in.volume_sample_stride + channel * volume_stride;
  Bits* target = in.columns + sample * in.strides.sample + channel * column_stride + item;
  const int active = static_cast<int>(smaller(in.channels - channel, static_cast<int64_t>(Channels)));
  const Index first_w = geometry.width.output_at(position.width, 0);

  Index d = geometry.depth.output_at(position.depth, 0);
  for (Index tap_d = 0; tap_d < geometry.depth.kernel; ++tap_d, d += geometry.depth.dilation) {
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

// Whether a launch of one thread per `width` channels still fills a large GPU.
bool fills_gpu(int64_t items, int64_t volumes, int64_t channels, int width) {
  constexpr int64_t kEnoughThreads = 132 * 1024;
  return channels >= width && items * volumes * ((channels + width - 1) / width) >= kEnoughThreads;
}

// About this many loads of one thread are to be under way at once.
constexpr int kLoadsInFlight = 16;

template <class T, class Column, class Index, int Residues, int Taps>
void launch_col2vol_ncdhw(Col2VolArguments<T, Column, Index>& arguments, const ColumnBlock& block, cudaStream_t stream) {
  constexpr int kChannels = kLoadsInFlight / (Residues * Taps) < 8 ? kLoadsInFlight / (Residues * Taps) : 8;
  const auto launch = [&](auto kernel, int channels) {
    arguments.channel_blocks = static_cast<unsigned>((block.channels + channels - 1) / channels);
    const unsigned volumes = static_cast<unsigned>(block.samples) * arguments.channel_blocks;
    kernel<<<arguments.item_blocks * volumes, kThreads, 0, stream>>>(arguments);
  };
  if (fills_gpu(arguments.items, block.samples, block.channels, kChannels)) {
    launch(col2vol_ncdhw<T, Column, Index, Residues, Taps, kChannels>, kChannels);
  } else {
    launch(col2vol_ncdhw<T, Column, Index, Residues, Taps, 1>, 1);
  }
}

// Picks how many residues and width taps a thread takes at a time.
template <class T, class Column, class Index>
void launch_col2vol_ncdhw(const Problem& problem, Col2VolArguments<T, Column, Index>& arguments,
                          const ColumnBlock& block, cudaStream_t stream) {
  if constexpr (sizeof(Index) == 8) {
    return launch_col2vol_ncdhw<T, Column, Index, 1, 1>(arguments, block, stream);
  } else {
    const Axis<Index>& width = arguments.geometry.width;
    const Index taps = (width.kernel + width.tap_step - 1) / width.tap_step;  // the most that meet one output
    const bool pairs = width.stride % 2 == 0;
    if constexpr (std::is_same_v<T, Column> && sizeof(T) == 2) {
      // Half-precision columns are made only where one tap meets each output.
      return pairs ? launch_col2vol_ncdhw<T, Column, Index, 2, 1>(arguments, block, stream)
                   : launch_col2vol_ncdhw<T, Column, Index, 1, 1>(arguments, block, stream);
    } else {
      switch (smaller<Index>(taps, 3)) {
        case 1:
          return pairs ? launch_col2vol_ncdhw<T, Column, Index, 2, 1>(arguments, block, stream)
                       : launch_col2vol_ncdhw<T, Column, Index, 1, 1>(arguments, block, stream);
        case 2:
          return pairs ? launch_col2vol_ncdhw<T, Column, Index, 2, 2>(arguments, block, stream)
                       : launch_col2vol_ncdhw<T, Column, Index, 1, 2>(arguments, block, stream);
        default:
          return pairs ? launch_col2vol_ncdhw<T, Column, Index, 2, 4>(arguments, block, stream)
                       : launch_col2vol_ncdhw<T, Column, Index, 1, 4>(arguments, block, stream);
      }
    }
  }
}

template <class T, class Column, class Index>
void launch_col2vol(const Problem& problem, const ColumnBlock& block, Range<int64_t> planes, const Column* columns,
                    const T* bias, T* output, cudaStream_t stream) {
  const VolumeStrides volume(problem.layout, problem.out_channels, problem.output_voxels());
  const Extent output_size = problem.output();
  const int64_t lines = (planes.end - planes.begin) * output_size[1];
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
  if (problem.layout == Layout::ncdhw) {
    const int64_t width_items = (output_size[2] + problem.stride[2] - 1) / problem.stride[2];
    arguments.items = static_cast<Index>(lines * width_items);
    arguments.item_blocks = blocks_for(lines * width_items);
    arguments.by_width_items = Divisor<Index>(width_items);
    return launch_col2vol_ncdhw<T, Column, Index>(problem, arguments, block, stream);
  }
  constexpr int kWidth = 16 / sizeof(T);
  const auto launch = [&](auto kernel, int width) {
    const int64_t vectors = block.channels / width;
    arguments.items = static_cast<Index>(lines * output_size[2] * vectors);
    arguments.item_blocks = blocks_for(arguments.items);
    arguments.by_vectors = Divisor<Index>(vectors);
    arguments.by_group_channels = Divisor<Index>(block.group_channels);
    kernel<<<arguments.item_blocks * static_cast<unsigned>(block.samples), kThreads, 0, stream>>>(arguments);
  };
  if (block.group_channels % kWidth == 0 && problem.out_channels % kWidth == 0 && is_aligned(arguments.output, 16)) {
    launch(col2vol_ndhwc<T, Column, Index, 2, kWidth>, kWidth);
  } else {
    launch(col2vol_ndhwc<T, Column, Index, 2, 1>, 1);
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
    const auto launch = [&](auto kernel, int channels) {
      arguments.item_blocks = blocks_for(block.voxels);
      arguments.channel_blocks = static_cast<unsigned>((block.channels + channels - 1) / channels);
      const unsigned volumes = static_cast<unsigned>(block.samples) * arguments.channel_blocks;
      kernel<<<arguments.item_blocks * volumes, kThreads, 0, stream>>>(arguments);
    };
    if (fills_gpu(block.voxels, block.samples, block.channels, kChannels)) {
      launch(vol2col_ncdhw<Bits, Index, kTaps, kChannels>, kChannels);
    } else {
      launch(vol2col_ncdhw<Bits, Index, kTaps, 1>, 1);
    }
    return;
  }
  constexpr int kWidth = 16 / sizeof(Bits);
  const auto launch = [&](auto kernel, int width) {
    const int64_t vectors = block.channels / width;
    arguments.by_vectors = Divisor<Index>(vectors);
    arguments.by_group_channels = Divisor<Index>(block.group_channels);
    arguments.by_taps = Divisor<Index>(block.taps);
    arguments.item_blocks = blocks_for(block.voxels * block.taps * vectors);
    kernel<<<arguments.item_blocks * static_cast<unsigned>(block.samples), kThreads, 0, stream>>>(arguments);
  };
  if (block.group_channels % kWidth == 0 && problem.out_channels % kWidth == 0 && is_aligned(volume, 16)) {
    launch(vol2col_ndhwc<Bits, Index, kWidth>, kWidth);
  } else {
    launch(vol2col_ndhwc<Bits, Index, 1>, 1);
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
  check_cuda(cudaGetLastError(), "launching col2vol");
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
  check_cuda(cudaGetLastError(), "launching vol2col");
}

#define CONVT3D_INSTANTIATE(T, Column)                                                                            \
  template void CudaBackend::col2vol(const Problem&, const ColumnBlock&, Range<int64_t>, const Column*, const T*, \
                                     T*) const;
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
