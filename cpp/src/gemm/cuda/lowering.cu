// col2vol and vol2col on a GPU. Both move memory and hardly compute: what bounds them is the columns' traffic.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "gemm/cuda/backend.h"

namespace convt3d::gemm {
namespace {

constexpr int kThreads = 256;

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

// The columns that meet one output voxel, as offsets: from `start`, `count` steps of `step` along each axis.
template <class Index>
struct ColumnWalk {
  Index start = 0;
  Index count_d = 0, count_h = 0, count_w = 0;
  Index step_d = 0, step_h = 0, step_w = 0;

  // `tap_stride` and `voxel_stride` are what neighbouring taps and voxels lie apart in the columns.
  __device__ ColumnWalk(const Geometry<Index>& geometry, Position<Index> output, Index voxel_begin, Index tap_stride,
                        Index voxel_stride) {
    const TapWalk<Index> d = geometry.depth.taps_at(output.depth);
    const TapWalk<Index> h = geometry.height.taps_at(output.height);
    const TapWalk<Index> w = geometry.width.taps_at(output.width);
    if (d.count == 0 || h.count == 0 || w.count == 0) return;
    const Index tap_h = geometry.width.kernel, tap_d = geometry.height.kernel * tap_h;
    const Index line = geometry.width.input, plane = geometry.height.input * line;
    count_d = d.count;
    count_h = h.count;
    count_w = w.count;
    step_d = geometry.depth.tap_step * tap_d * tap_stride - geometry.depth.index_step * plane * voxel_stride;
    step_h = geometry.height.tap_step * tap_h * tap_stride - geometry.height.index_step * line * voxel_stride;
    step_w = geometry.width.tap_step * tap_stride - geometry.width.index_step * voxel_stride;
    start = (d.tap * tap_d + h.tap * tap_h + w.tap) * tap_stride +
            (d.index * plane + h.index * line + w.index - voxel_begin) * voxel_stride;
  }

  template <class Visit>
  __device__ void visit(const Visit& visit) const {
    Index plane = start;
    for (Index a = 0; a < count_d; ++a, plane += step_d) {
      Index line = plane;
      for (Index b = 0; b < count_h; ++b, line += step_h) {
        Index offset = line;
        for (Index c = 0; c < count_w; ++c, offset += step_w) visit(offset);
      }
    }
  }
};

template <class T, class Column, class Index>
struct Col2VolArguments {
  Geometry<Index> geometry;
  const Column* columns;
  const T* bias;        // of the block's first channel, or null
  T* output;            // of the block's first sample and channel
  Index first_voxel;    // of the output planes, and how many follow
  Index voxels;
  Index voxel_begin;    // of the block's input voxels, and how many there are
  Index block_voxels;
  int64_t channels;     // of the block
  int64_t group_channels;
  int64_t output_sample_stride, output_channels;
  ColumnStrides strides;
  unsigned voxel_blocks;  // thread blocks that cover one sample's voxels (times channel vectors)
  unsigned channel_blocks;
  Divisor<Index> by_vectors, by_group_channels;
};

// NCDHW. One thread computes one output voxel of `Channels` neighbouring channels: the walk's arithmetic is shared, and
// the loads of one step are independent. Neighbouring threads hold neighbouring voxels, so every store of a warp is one
// line, and every load one line per residue of the width's stride. Each column is read once, each output written once;
// bound by that traffic.
template <class T, class Column, class Index, int Channels>
__global__ void __launch_bounds__(kThreads) col2vol_ncdhw(const __grid_constant__ Col2VolArguments<T, Column, Index> in) {
  const unsigned volume = blockIdx.x / in.voxel_blocks;
  const unsigned voxel_block = blockIdx.x - volume * in.voxel_blocks;
  const Index local = static_cast<Index>(voxel_block) * kThreads + threadIdx.x;
  if (local >= in.voxels) return;
  const unsigned sample = volume / in.channel_blocks;
  const int64_t channel = static_cast<int64_t>(volume - sample * in.channel_blocks) * Channels;

  const Geometry<Index>& geometry = in.geometry;
  const Index voxel = in.first_voxel + local;
  const Position<Index> position = position_of(voxel, geometry.by_output_width, geometry.by_output_height);
  const ColumnWalk<Index> walk(geometry, position, in.voxel_begin, in.block_voxels, Index{1});

  // The last channels of a block that is no multiple of `Channels` are read again rather than read past.
  const int64_t channel_stride = static_cast<int64_t>(geometry.taps) * in.block_voxels;
  const Column* source[Channels];
  Accumulator<T> sum[Channels];
#pragma unroll
  for (int c = 0; c < Channels; ++c) {
    const int64_t own = smaller(channel + c, in.channels - 1);
    source[c] = in.columns + sample * in.strides.sample + own * channel_stride;
    sum[c] = in.bias == nullptr ? Accumulator<T>(0) : static_cast<Accumulator<T>>(in.bias[own]);
  }
  walk.visit([&](Index offset) {
#pragma unroll
    for (int c = 0; c < Channels; ++c) sum[c] += static_cast<Accumulator<T>>(source[c][offset]);
  });
  T* target = in.output + sample * in.output_sample_stride + channel * geometry.output_voxels + voxel;
#pragma unroll
  for (int c = 0; c < Channels; ++c) {
    if (channel + c < in.channels) target[c * static_cast<int64_t>(geometry.output_voxels)] = static_cast<T>(sum[c]);
  }
}

// NDHWC. One thread computes `Width` neighbouring channels of one output voxel, which lie in one group; neighbouring
// threads hold neighbouring channels. Loads and stores are vectors of up to 16 bytes. Bound by the columns' traffic.
template <class T, class Column, class Index, int Width>
__global__ void __launch_bounds__(kThreads) col2vol_ndhwc(const __grid_constant__ Col2VolArguments<T, Column, Index> in) {
  const unsigned sample = blockIdx.x / in.voxel_blocks;
  const Index local = static_cast<Index>(blockIdx.x - sample * in.voxel_blocks) * kThreads + threadIdx.x;
  const Index local_voxel = in.by_vectors.quotient(local);
  if (local_voxel >= in.voxels) return;
  const Index channel = (local - local_voxel * in.by_vectors.value) * Width;
  const Index group = in.by_group_channels.quotient(channel);

  const Geometry<Index>& geometry = in.geometry;
  const Index voxel = in.first_voxel + local_voxel;
  const Position<Index> position = position_of(voxel, geometry.by_output_width, geometry.by_output_height);
  const ColumnWalk<Index> walk(geometry, position, in.voxel_begin, static_cast<Index>(in.group_channels),
                               static_cast<Index>(in.strides.row));

  const Column* source = in.columns + sample * in.strides.sample + group * in.strides.group + channel -
                         group * in.by_group_channels.value;
  Accumulator<T> sum[Width];
#pragma unroll
  for (int c = 0; c < Width; ++c) {
    sum[c] = in.bias == nullptr ? Accumulator<T>(0) : static_cast<Accumulator<T>>(in.bias[channel + c]);
  }
  walk.visit([&](Index offset) {
    const Vector<Column, Width> loaded = *reinterpret_cast<const Vector<Column, Width>*>(source + offset);
#pragma unroll
    for (int c = 0; c < Width; ++c) sum[c] += static_cast<Accumulator<T>>(loaded.element[c]);
  });
  Vector<T, Width> result;
#pragma unroll
  for (int c = 0; c < Width; ++c) result.element[c] = static_cast<T>(sum[c]);
  T* target = in.output + sample * in.output_sample_stride + static_cast<int64_t>(voxel) * in.output_channels + channel;
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
  unsigned voxel_blocks, channel_blocks;
  Divisor<Index> by_vectors, by_group_channels, by_taps;
};

// NCDHW. One thread copies all taps of one input voxel for `Channels` neighbouring channels. Neighbouring threads hold
// neighbouring voxels: every store of a warp is one line, and the loads of neighbouring taps hit the same lines in cache.
// Each column is written once, the volume read from memory once where its rows stay in cache; bound by the stores.
template <class Bits, class Index, int Channels>
__global__ void __launch_bounds__(kThreads) vol2col_ncdhw(const __grid_constant__ Vol2ColArguments<Bits, Index> in) {
  const unsigned volume = blockIdx.x / in.voxel_blocks;
  const Index local = static_cast<Index>(blockIdx.x - volume * in.voxel_blocks) * kThreads + threadIdx.x;
  if (local >= in.voxels) return;
  const unsigned sample = volume / in.channel_blocks;
  const int64_t channel = static_cast<int64_t>(volume - sample * in.channel_blocks) * Channels;

  const Geometry<Index>& geometry = in.geometry;
  const Position<Index> position =
      position_of(in.voxel_begin + local, geometry.by_input_width, geometry.by_input_height);
  const int64_t volume_stride = geometry.output_voxels;
  const int64_t column_stride = static_cast<int64_t>(geometry.taps) * in.voxels;
  const Bits* source = in.volume + sample * in.volume_sample_stride + channel * volume_stride;
  Bits* target = in.columns + sample * in.strides.sample + channel * column_stride + local;
  const int active = static_cast<int>(smaller(in.channels - channel, static_cast<int64_t>(Channels)));

  Index d = geometry.depth.output_at(position.depth, 0);
  for (Index tap_d = 0; tap_d < geometry.depth.kernel; ++tap_d, d += geometry.depth.dilation) {
    Index h = geometry.height.output_at(position.height, 0);
    for (Index tap_h = 0; tap_h < geometry.height.kernel; ++tap_h, h += geometry.height.dilation) {
      const bool line_inside = d >= 0 && d < geometry.depth.output && h >= 0 && h < geometry.height.output;
      const Index line = (d * geometry.height.output + h) * geometry.width.output;
      Index w = geometry.width.output_at(position.width, 0);
      for (Index tap_w = 0; tap_w < geometry.width.kernel; ++tap_w, w += geometry.width.dilation) {
        const bool inside = line_inside && w >= 0 && w < geometry.width.output;
        Bits loaded[Channels];
#pragma unroll
        for (int c = 0; c < Channels; ++c) {
          loaded[c] = inside && c < active ? source[c * volume_stride + line + w] : Bits{0};
        }
#pragma unroll
        for (int c = 0; c < Channels; ++c) {
          if (c < active) target[c * column_stride] = loaded[c];
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
  const unsigned sample = blockIdx.x / in.voxel_blocks;
  const Index local = static_cast<Index>(blockIdx.x - sample * in.voxel_blocks) * kThreads + threadIdx.x;
  const Index row = in.by_vectors.quotient(local);
  const Index local_voxel = in.by_taps.quotient(row);
  if (local_voxel >= in.voxels) return;
  const Index channel = (local - row * in.by_vectors.value) * Width;
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

// Channels per thread in NCDHW: enough independent loads to hide memory's latency, unless that leaves too few threads.
int channels_per_thread(int64_t voxels, int64_t volumes, int64_t channels) {
  constexpr int64_t kEnoughThreads = 132 * 2048;
  for (const int width : {8, 4}) {
    if (channels >= width && voxels * volumes / width >= kEnoughThreads) return width;
  }
  return 1;
}

template <class T, class Column, class Index>
void launch_col2vol(const Problem& problem, const ColumnBlock& block, Range<int64_t> planes, const Column* columns,
                    const T* bias, T* output, cudaStream_t stream) {
  const VolumeStrides volume(problem.layout, problem.out_channels, problem.output_voxels());
  const int64_t plane = problem.output_voxels() / problem.output()[0];
  const int64_t voxels = (planes.end - planes.begin) * plane;
  Col2VolArguments<T, Column, Index> arguments{Geometry<Index>(problem)};
  arguments.columns = columns;
  arguments.bias = bias == nullptr ? nullptr : bias + block.channel_begin;
  arguments.output = output + volume.offset(block.sample_begin, block.channel_begin, 0);
  arguments.first_voxel = static_cast<Index>(planes.begin * plane);
  arguments.voxels = static_cast<Index>(voxels);
  arguments.voxel_begin = static_cast<Index>(block.voxel_begin);
  arguments.block_voxels = static_cast<Index>(block.voxels);
  arguments.channels = block.channels;
  arguments.group_channels = block.group_channels;
  arguments.output_sample_stride = volume.sample;
  arguments.output_channels = problem.out_channels;
  arguments.strides = ColumnStrides::of(block);
  if (problem.layout == Layout::ncdhw) {
    const auto launch = [&](auto kernel, int channels) {
      arguments.voxel_blocks = blocks_for(voxels);
      arguments.channel_blocks = static_cast<unsigned>((block.channels + channels - 1) / channels);
      const unsigned volumes = static_cast<unsigned>(block.samples) * arguments.channel_blocks;
      kernel<<<arguments.voxel_blocks * volumes, kThreads, 0, stream>>>(arguments);
    };
    switch (channels_per_thread(voxels, block.samples * block.channels, block.channels)) {
      case 8:
        return launch(col2vol_ncdhw<T, Column, Index, 8>, 8);
      case 4:
        return launch(col2vol_ncdhw<T, Column, Index, 4>, 4);
      default:
        return launch(col2vol_ncdhw<T, Column, Index, 1>, 1);
    }
  }
  constexpr int kWidth = 16 / sizeof(T);
  const auto launch = [&](auto kernel, int width) {
    const int64_t vectors = block.channels / width;
    arguments.by_vectors = Divisor<Index>(vectors);
    arguments.by_group_channels = Divisor<Index>(block.group_channels);
    arguments.voxel_blocks = blocks_for(voxels * vectors);
    kernel<<<arguments.voxel_blocks * static_cast<unsigned>(block.samples), kThreads, 0, stream>>>(arguments);
  };
  if (block.group_channels % kWidth == 0 && problem.out_channels % kWidth == 0 && is_aligned(arguments.output, 16)) {
    launch(col2vol_ndhwc<T, Column, Index, kWidth>, kWidth);
  } else {
    launch(col2vol_ndhwc<T, Column, Index, 1>, 1);
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
    const auto launch = [&](auto kernel, int channels) {
      arguments.voxel_blocks = blocks_for(block.voxels);
      arguments.channel_blocks = static_cast<unsigned>((block.channels + channels - 1) / channels);
      const unsigned volumes = static_cast<unsigned>(block.samples) * arguments.channel_blocks;
      kernel<<<arguments.voxel_blocks * volumes, kThreads, 0, stream>>>(arguments);
    };
    switch (channels_per_thread(block.voxels, block.samples * block.channels, block.channels)) {
      case 8:
        return launch(vol2col_ncdhw<Bits, Index, 8>, 8);
      case 4:
        return launch(vol2col_ncdhw<Bits, Index, 4>, 4);
      default:
        return launch(vol2col_ncdhw<Bits, Index, 1>, 1);
    }
  }
  constexpr int kWidth = 16 / sizeof(Bits);
  const auto launch = [&](auto kernel, int width) {
    const int64_t vectors = block.channels / width;
    arguments.by_vectors = Divisor<Index>(vectors);
    arguments.by_group_channels = Divisor<Index>(block.group_channels);
    arguments.by_taps = Divisor<Index>(block.taps);
    arguments.voxel_blocks = blocks_for(block.voxels * block.taps * vectors);
    kernel<<<arguments.voxel_blocks * static_cast<unsigned>(block.samples), kThreads, 0, stream>>>(arguments);
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
