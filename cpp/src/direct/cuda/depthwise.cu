// Narrow groups: depthwise convolutions, and the gather where a group has few destination channels. All are bound by
// memory.
//
// What a depthwise layer of C channels, N samples and S input voxels must move is N * C * (S + output voxels) elements,
// for N * C * S * T multiplications: 64 channels, batch 2, 48^3 at kernel = stride = 2 in float32 take 0.51 GB and 0.11
// GFLOP, on an H200 at least 0.12 ms and 0.005 ms.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cuda/launch.h"
#include "cuda/ptx.h"
#include "direct/cuda/contacts.h"
#include "direct/cuda/kernels.h"
#include "direct/cuda/rows.h"

namespace convt3d::direct {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// What a thread makes one after the other, as its place costs it as much each time as a few sums.
constexpr int kMostRounds = 4;

// Blocks of a multiprocessor that the compiler is to leave registers for; double takes twice as many.
template <class T>
constexpr int resident_blocks(int blocks) {
  return sizeof(T) == 8 ? 1 : blocks;
}

// How the kernels for narrow groups share out the channels: a block makes at most C destination channels of one group
// from all of its source channels.
struct GroupChannels {
  int groups = 1, sources = 1, destinations = 1;  // the latter two of one group
  int blocks = 1;                                 // of all groups
  Divisor<int32_t> by_blocks;                     // of one group
  int64_t samples = 1;
  int64_t weight_group = 1, weight_source = 1, weight_destination = 1;  // steps

  GroupChannels(const Problem& problem, Operator op, int block) {
    const bool forward = op == Operator::forward;
    const WeightSteps steps(problem);
    groups = static_cast<int>(problem.groups);
    sources = static_cast<int>(forward ? problem.group_in_channels() : problem.group_out_channels());
    destinations = static_cast<int>(forward ? problem.group_out_channels() : problem.group_in_channels());
    by_blocks = Divisor<int32_t>((destinations + block - 1) / block);
    blocks = groups * by_blocks.value;
    samples = problem.batch;
    weight_group = steps.group;
    weight_source = forward ? steps.input_channel : steps.output_channel;
    weight_destination = forward ? steps.output_channel : steps.input_channel;
  }

  // A grid of `others` blocks for each block of channels, or for a few of these, one after the other, where enough
  // blocks are left to keep the GPU busy to the end.
  dim3 grid(int64_t others) const {
    constexpr int64_t kEnough = 2048, kMost = 65535;
    const int64_t z = std::min(samples, kMost);
    const int64_t rounds = std::clamp<int64_t>(others * z * blocks / kEnough, 1, kMostRounds);
    const int64_t y = std::min((blocks + rounds - 1) / rounds, kMost);
    return dim3(static_cast<unsigned>(others), static_cast<unsigned>(y), static_cast<unsigned>(z));
  }
};

// A block's share of them: channels are counted through all samples.
struct ChannelShare {
  int64_t source, destination;  // the first of each
  int64_t weight;               // where theirs begin
  int bias;                     // the first destination channel of its sample
  int live;                     // destination channels

  __device__ ChannelShare(const GroupChannels& in, int64_t sample, int which, int block) {
    const int group = in.by_blocks.quotient(which);
    const int first = (which - group * in.by_blocks.value) * block;
    source = (sample * in.groups + group) * in.sources;
    destination = (sample * in.groups + group) * in.destinations + first;
    weight = group * in.weight_group + first * in.weight_destination;
    bias = group * in.destinations + first;
    live = smaller(block, in.destinations - first);
  }
};

// Calls keep(source channel, destination channel, tap, weight) for the weights of a block's share, of `taps` taps for
// each pair of channels; zero for channels beyond the group's last.
template <int C, class T, class Keep>
__device__ __forceinline__ void for_weights(const GroupChannels& in, const ChannelShare& share, const T* weight,
                                            int taps, const Keep& keep) {
  for (int pair = 0; pair < in.sources * C; ++pair) {
    const int source = pair / C, c = pair % C;
    const T* const from = weight + (share.weight + source * in.weight_source + c * in.weight_destination);
    for (int tap = static_cast<int>(threadIdx.x); tap < taps; tap += static_cast<int>(blockDim.x)) {
      keep(source, c, tap, c < share.live ? static_cast<Accumulator<T>>(from[tap]) : Accumulator<T>(0));
    }
  }
}

// Two neighbouring elements of a half type.
template <class T>
__device__ __forceinline__ void widen(uint32_t pair, float& first, float& second) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    first = __uint_as_float(pair << 16);  // float32's upper halves
    second = __uint_as_float(pair & 0xffff0000u);
  } else {
    const auto elements = *reinterpret_cast<const Elements<T, 2>*>(&pair);
    first = static_cast<float>(elements.element[0]);
    second = static_cast<float>(elements.element[1]);
  }
}

// Elements `first` and following of a row, of which `from` points to `first`; zero outside the row's `length`. kBefore
// of them come one by one, then a vector, which lies within the row or outside as a whole, then kAfter.
template <int kBefore, int kVector, int kAfter, class T>
__device__ __forceinline__ void load_row(const T* from, int first, int length,
                                         Accumulator<T> (&x)[kBefore + kVector + kAfter]) {
  using Sum = Accumulator<T>;
  using Word = std::conditional_t<sizeof(T) * kVector % 4 == 0, uint32_t, uint16_t>;
  using Words = Elements<Word, sizeof(T) * kVector / sizeof(Word)>;
  const auto inside = [&](int i) { return static_cast<unsigned>(first + i) < static_cast<unsigned>(length); };
  Words words{};
  if (inside(kBefore)) words = *reinterpret_cast<const Words*>(from + kBefore);
  if constexpr (sizeof(T) == 2 && sizeof(Word) == 4) {
#pragma unroll
    for (int i = 0; i < kVector; i += 2) widen<T>(words.element[i / 2], x[kBefore + i], x[kBefore + i + 1]);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) x[kBefore + i] = static_cast<Sum>(reinterpret_cast<const T*>(words.element)[i]);
  }
#pragma unroll
  for (int i = 0; i < kBefore + kAfter; ++i) {
    const int at = i < kBefore ? i : i + kVector;
    x[at] = inside(at) ? static_cast<Sum>(from[at]) : Sum(0);
  }
}

// The same of kRows rows from `row` on, of which none lies outside for most threads. Addresses follow one another, two
// instructions each; the compiler would compute each from the first one.
template <int kBefore, int kVector, int kAfter, int kRows, class T>
__device__ __forceinline__ void load_rows(const T* from, int row, int rows, int64_t row_bytes, int first, int length,
                                          Accumulator<T> (&x)[kRows][kBefore + kVector + kAfter]) {
  const auto load = [&](auto all_inside) {
    const T* row_from = from;
#pragma unroll
    for (int i = 0; i < kRows; ++i, row_from = ptx::opaque_global(advanced(row_from, row_bytes))) {
      const bool inside = decltype(all_inside)::value || static_cast<unsigned>(row + i) < static_cast<unsigned>(rows);
      load_row<kBefore, kVector, kAfter>(row_from, first, inside ? length : 0, x[i]);
    }
  };
  if (row >= 0 && row + kRows <= rows) {
    load(std::true_type());
  } else {
    load(std::false_type());
  }
}

// ---- forward, NCDHW, stride 2 along height and width ---------------------------------------------------------------

template <class T>
struct UpsamplingArguments {
  AxisGather<int32_t> depth;
  GroupChannels channels;
  const T* source;
  const T* weight;
  const T* bias;
  T* destination;
  int source_h, source_w, destination_h, destination_w, padding_h, padding_w;
  int first_h, first_w;                                    // the first quotients of position + padding by the stride
  int plane_groups;                                        // groups of output planes,
  int groups, columns;                                     // of rows and of columns that threads make
  int tile_groups, tile_columns;                           // of a block
  int column_tiles, tiles;                                 // blocks along the width, and those of a group of planes
  Divisor<int32_t> by_column_tiles, by_tiles, by_columns;  // the last by tile_columns
  int row_pitch, lead, run_pitch;  // of shared memory: of rows, elements before the first, and of whole runs
  size_t weight_bytes;
  int64_t source_row_bytes, source_plane_bytes, destination_plane_bytes, destination_row_bytes;
};

// What a thread makes at once. With position + padding = S * q + r, tap j of residue r = j % S reads source q - j / S,
// so that one pattern serves every padding; along the width the pattern begins at residue kPhase.
template <class T, int S, int K, int C, bool kVectors>
struct UpsamplingTile {
  static constexpr int kStride = S, kKernel = K;
  static constexpr int kSums = C > 1 ? 32 : 128 / sizeof(T);  // as registers allow
  static constexpr int kBlocks = C > 1 || kSums > 32 ? 2 : K <= 2 ? 4 : 3;
  static constexpr int kPlanes = C == 1 ? 2 : 1;  // output planes, which share their sources
  static constexpr int kColumns = kVectors ? 16 / sizeof(T) : S;
  static constexpr int kPhase = kVectors ? (K - 1) / 2 % S : 0;
  static constexpr int kGroup = kSums / (C * kPlanes * S * kColumns);  // values of q along height
  static constexpr int kRows = kGroup * S;
  static constexpr int kFirstRow = -((K - 1) / S), kSourceRows = kGroup - kFirstRow;  // of the sources, from q on
  static constexpr int kFirstColumn = -((K - 1 - kPhase) / S);
  static constexpr int kSourceColumns = (kColumns - 1 + kPhase) / S - kFirstColumn + 1;
  static constexpr int kWeights = (K * K + 3) / 4 * 4;  // of one tap along depth, padded to whole vectors
};

// What the sources of one plane give to a tile of one output plane.
template <class Tile, class Sum>
__device__ __forceinline__ void add_taps(const Sum* weights, const Sum (&x)[Tile::kSourceRows][Tile::kSourceColumns],
                                         Sum (&sum)[Tile::kRows][Tile::kColumns]) {
  constexpr int S = Tile::kStride, K = Tile::kKernel, kPhase = Tile::kPhase;
#pragma unroll
  for (int j_h = 0; j_h < K; ++j_h) {
#pragma unroll
    for (int j_w = 0; j_w < K; ++j_w) {
#pragma unroll
      for (int i = j_h % S; i < Tile::kRows; i += S) {
#pragma unroll
        for (int o = (j_w + kPhase) % S; o < Tile::kColumns; o += S) {
          const int row = (i - j_h) / S - Tile::kFirstRow, column = (o + kPhase - j_w) / S - Tile::kFirstColumn;
          sum[i][o] += weights[j_h * K + j_w] * x[row][column];
        }
      }
    }
  }
}

// A block makes rows of kPlanes neighbouring output planes, for each of C channels; its threads tiles of these, the
// ones of a warp side by side. Each source is loaded and converted once for all outputs of a tile that it reaches;
// sources, an eighth of the traffic, come through the L1 cache. With kVectors, rows of either volume are whole vectors,
// and threads store 16 bytes at once. Else tiles are of S columns and rows of any length, which would begin and end
// between vectors: the block puts them together in shared memory and stores them as the one run of memory that they
// are. Bound by memory where there are few taps, else by the instructions, which multiply for the most part.
template <class T, int S, int K, int C, bool kVectors>
__global__ void __launch_bounds__(kThreads, resident_blocks<T>(UpsamplingTile<T, S, K, C, kVectors>::kBlocks))
    upsample(const __grid_constant__ UpsamplingArguments<T> in) {
  using Sum = Accumulator<T>;
  using Tile = UpsamplingTile<T, S, K, C, kVectors>;
  constexpr int kPlanes = Tile::kPlanes, kColumns = Tile::kColumns, kPhase = Tile::kPhase, kRows = Tile::kRows;
  constexpr int kVector = kVectors ? kColumns / S : 1, kBefore = kVectors ? -Tile::kFirstColumn : 0;  // of the sources
  CONVT3D_DYNAMIC_SHARED(16, shared);
  Sum* const weights = reinterpret_cast<Sum*>(shared);  // source channel, tap along depth, destination channel
  T* const runs = reinterpret_cast<T*>(shared + in.weight_bytes);
  const Axis<int32_t>& depth = in.depth.axis;

  const int plane_group = in.by_tiles.quotient(static_cast<int>(blockIdx.x));
  const int tile = static_cast<int>(blockIdx.x) - plane_group * in.tiles;
  const int row_tile = in.by_column_tiles.quotient(tile);
  const int first_group = row_tile * in.tile_groups;
  const int first_column = (tile - row_tile * in.column_tiles) * in.tile_columns;
  const int groups = smaller(in.tile_groups, in.groups - first_group);
  // The output planes from z on, which may be -1, and the source planes that meet any of them, at least one: a loop
  // that may end before it begins costs a copy of all sums.
  const int z = plane_group * kPlanes - depth.padding % kPlanes;
  const auto exists = [&](int p) { return static_cast<unsigned>(z + p) < static_cast<unsigned>(depth.output); };
  TapWalk<int32_t> walks[kPlanes];
  int first_plane = 0, last_plane = depth.input - 1;
#pragma unroll
  for (int p = 0; p < kPlanes; ++p) {
    if (exists(p)) walks[p] = depth.taps_at(z + p);
    if (walks[p].count == 0) {
      walks[p].index = -1;
      continue;
    }
    first_plane = larger(first_plane, walks[p].index);
    last_plane = smaller(last_plane, walks[p].index - (walks[p].count - 1) * depth.index_step);
  }
  last_plane = smaller(last_plane, first_plane);
  // The rows and columns that the block makes.
  const int first_q = in.first_h + first_group * Tile::kGroup;
  const int row_begin = larger(S * first_q - in.padding_h, 0);
  const int row_end = smaller(S * (first_q + groups * Tile::kGroup) - in.padding_h, in.destination_h);
  const int edge = kPhase - in.padding_w % S;  // the first column that a thread makes, which may be -1
  const int column_begin = larger(first_column * kColumns + edge, 0);
  const int column_end = smaller((first_column + in.tile_columns) * kColumns + edge, in.destination_w);

  for (int64_t sample = blockIdx.z; sample < in.channels.samples; sample += gridDim.z) {
    for (int which = blockIdx.y; which < in.channels.blocks; which += gridDim.y) {
      const ChannelShare channels(in.channels, sample, which, C);
      for_weights<C>(in.channels, channels, in.weight, depth.kernel * K * K, [&](int source, int c, int tap, Sum w) {
        weights[((source * depth.kernel + tap / (K * K)) * C + c) * Tile::kWeights + tap % (K * K)] = w;
      });
      const T* const source =
          advanced(in.source, (channels.source * in.depth.source + first_plane) * in.source_plane_bytes);
      T* const destination =
          advanced(in.destination, (channels.destination * depth.output + z) * in.destination_plane_bytes);
      const auto plane_of = [&](int c, int p) {
        return advanced(destination, (static_cast<int64_t>(c) * depth.output + p) * in.destination_plane_bytes);
      };
      // A run of memory, and where it is made: between vectors as in the volume.
      const int begin = row_begin * in.destination_w + column_begin;
      const auto made_at = [&](int c, int p) {
        return runs + (c * kPlanes + p) * in.run_pitch + in.lead + elements_past_vector(plane_of(c, p) + begin);
      };
      ptx::wait_for_bulk_stores<0>();
      __syncthreads();

      for (int item = threadIdx.x; item < groups * in.tile_columns; item += blockDim.x) {
        const int group = in.by_columns.quotient(item);
        const int q_h = first_q + group * Tile::kGroup;
        const int q_w = in.first_w + (first_column + item - group * in.tile_columns) * (kColumns / S);
        const int source_row = q_h + Tile::kFirstRow, source_column = q_w + Tile::kFirstColumn;
        const T* volume = source + (source_row * in.source_w + source_column);
        Sum sum[C][kPlanes][kRows][kColumns] = {};
        const Sum* channel_weights = weights;
        int channel = 0;
        do {
          const T* plane = volume;
          TapWalk<int32_t> taps[kPlanes];
#pragma unroll
          for (int p = 0; p < kPlanes; ++p) taps[p] = walks[p];
          int d = first_plane;
#pragma unroll 1
          do {
            Sum x[Tile::kSourceRows][Tile::kSourceColumns];
            load_rows<kBefore, kVector, Tile::kSourceColumns - kBefore - kVector>(
                plane, source_row, in.source_h, in.source_row_bytes, source_column, in.source_w, x);
#pragma unroll
            for (int p = 0; p < kPlanes; ++p) {
              if (d != taps[p].index) continue;
              const Sum* w = channel_weights + taps[p].tap * (C * Tile::kWeights);
              taps[p].index = --taps[p].count > 0 ? taps[p].index - depth.index_step : -1;
              taps[p].tap += depth.tap_step;
#pragma unroll
              for (int c = 0; c < C; ++c) add_taps<Tile>(w + c * Tile::kWeights, x, sum[c][p]);
            }
            plane = advanced(plane, -in.source_plane_bytes);
          } while (--d >= last_plane);
          volume = advanced(volume, in.depth.source * in.source_plane_bytes);
          channel_weights += depth.kernel * (C * Tile::kWeights);
        } while (++channel < in.channels.sources);
        if (in.bias != nullptr) {
#pragma unroll
          for (int c = 0; c < C; ++c) {
            const Sum bias = c < channels.live ? static_cast<Sum>(in.bias[channels.bias + c]) : Sum(0);
#pragma unroll
            for (int i = 0; i < kPlanes * kRows; ++i) {
#pragma unroll
              for (int o = 0; o < kColumns; ++o) sum[c][i / kRows][i % kRows][o] += bias;
            }
          }
        }
        const int row = S * q_h - in.padding_h, column = S * q_w - in.padding_w + kPhase;
#pragma unroll
        for (int c = 0; c < C; ++c) {
#pragma unroll
          for (int p = 0; p < kPlanes; ++p) {
            if constexpr (kVectors) {
              T* to = plane_of(c, p) + (row * in.destination_w + column);
#pragma unroll
              for (int i = 0; i < kRows; ++i, to = advanced(to, in.destination_row_bytes)) {
                const auto result = rounded<T>(sum[c][p][i]);
                if (exists(p) && static_cast<unsigned>(row + i) < static_cast<unsigned>(in.destination_h)) {
                  *reinterpret_cast<Elements<T, kColumns>*>(to) = result;
                }
              }
            } else {
              // The rows' ends alone are looked at: there is room for the rows outside.
              T* const to = made_at(c, p) + ((row - row_begin) * in.row_pitch + column - column_begin);
              Elements<T, kColumns> results[kRows];
#pragma unroll
              for (int i = 0; i < kRows; ++i) results[i] = rounded<T>(sum[c][p][i]);
#pragma unroll
              for (int o = 0; o < kColumns; ++o) {
                if (column + o < column_begin || column + o >= column_end) continue;
#pragma unroll
                for (int i = 0; i < kRows; ++i) to[i * in.row_pitch + o] = results[i].element[o];
              }
            }
          }
        }
      }
      ptx::fence_shared_for_wgmma();
      __syncthreads();

      if constexpr (!kVectors) {
        const int warps = static_cast<int>(blockDim.x) / 32;
#pragma unroll
        for (int p = 0; p < kPlanes; ++p) {
          for (int c = 0; exists(p) && c < channels.live; ++c) {
            T* const to = plane_of(c, p) + begin;
            if (in.column_tiles == 1) {
              const int length = (row_end - row_begin) * in.destination_w;
              store_run_in_bulk(to, made_at(c, p), length, (c * kPlanes + p) % warps);
              continue;
            }
            for (int row = 0; row < row_end - row_begin; ++row) {
              store_run(to + row * in.destination_w, made_at(c, p) + row * in.row_pitch, column_end - column_begin);
            }
          }
        }
      }
    }
  }
  ptx::wait_for_bulk_stores<0>();  // Shared memory is to last that long.
}

// A block's shared memory for its outputs, and at most for its weights.
constexpr int64_t kRunBytes = 40 * 1024, kWeightBytes = 24 * 1024;

// Whether the kernel takes the problem; its weights must fit in shared memory.
template <class T, int S, int K, int C, bool kVectors>
bool launch_upsample(const Problem& problem, UpsamplingArguments<T> in, cudaStream_t stream) {
  using Tile = UpsamplingTile<T, S, K, C, kVectors>;
  constexpr int kVector = 16 / sizeof(T);
  const int64_t weights = in.channels.sources * int64_t{in.depth.axis.kernel} * C * Tile::kWeights;
  if (weights * static_cast<int64_t>(sizeof(Accumulator<T>)) > kWeightBytes) return false;
  in.weight_bytes = static_cast<size_t>(weights) * sizeof(Accumulator<T>);
  in.source_row_bytes = in.source_w * static_cast<int64_t>(sizeof(T));
  in.source_plane_bytes = in.source_h * in.source_row_bytes;
  in.destination_row_bytes = in.destination_w * static_cast<int64_t>(sizeof(T));
  in.destination_plane_bytes = in.destination_h * in.destination_row_bytes;
  in.first_h = in.padding_h / S;
  in.first_w = in.padding_w / S;
  in.plane_groups = ceil_divide(in.depth.destination + in.depth.axis.padding % Tile::kPlanes, Tile::kPlanes);
  in.groups = ceil_divide(in.destination_h + in.padding_h % S, Tile::kRows);
  in.columns = ceil_divide(in.destination_w + in.padding_w % S - Tile::kPhase, Tile::kColumns);
  in.tile_columns = in.columns;
  in.tile_groups = equal_share(in.groups, std::max(kMostRounds * kThreads / in.columns, 1));
  if constexpr (!kVectors) {
    // As many whole rows as may be, or pieces of rows that are too long. The first run begins with a row outside.
    const int most = static_cast<int>(kRunBytes / (C * Tile::kPlanes * static_cast<int64_t>(sizeof(T)))) - 3 * kVector;
    in.tile_columns = equal_share(in.columns, (most / (Tile::kRows + 1) - kVector) / Tile::kColumns);
    in.row_pitch = in.destination_w;
    if (in.tile_columns < in.columns) {
      // Rows lie between vectors as in the volume.
      const int pitch = in.tile_columns * Tile::kColumns;
      in.row_pitch = pitch + (in.destination_w % kVector + kVector - pitch % kVector) % kVector;
    }
    in.tile_groups = equal_share(in.groups, (most / in.row_pitch - 1) / Tile::kRows);
    in.lead = ceil_divide(in.row_pitch, kVector) * kVector;
    in.run_pitch = in.lead + ceil_divide(in.tile_groups * Tile::kRows * in.row_pitch + kVector, kVector) * kVector;
  }
  in.column_tiles = ceil_divide(in.columns, in.tile_columns);
  in.tiles = in.column_tiles * ceil_divide(in.groups, in.tile_groups);
  in.by_column_tiles = Divisor<int32_t>(in.column_tiles);
  in.by_tiles = Divisor<int32_t>(in.tiles);
  in.by_columns = Divisor<int32_t>(in.tile_columns);
  const size_t run_bytes = kVectors ? 0 : static_cast<size_t>(C) * Tile::kPlanes * in.run_pitch * sizeof(T);
  const int items = in.tile_groups * in.tile_columns;
  const int threads = ceil_divide(ceil_divide(items, ceil_divide(items, kThreads)), 32) * 32;
  launch("depthwise upsampling", upsample<T, S, K, C, kVectors>, in.channels.grid(in.plane_groups * in.tiles), threads,
         in.weight_bytes + run_bytes, stream, in);
  return true;
}

template <class T, int S, int K, int C>
bool launch_upsample(const Problem& problem, const UpsamplingArguments<T>& arguments, cudaStream_t stream) {
  if constexpr (C == 1) {
    using Tile = UpsamplingTile<T, S, K, C, true>;
    constexpr int kSources = Tile::kColumns / S;
    if (arguments.padding_w == Tile::kPhase && arguments.source_w % kSources == 0 &&
        arguments.destination_w % Tile::kColumns == 0 && elements_past_vector(arguments.source) % kSources == 0 &&
        elements_past_vector(arguments.destination) == 0) {
      return launch_upsample<T, S, K, C, true>(problem, arguments, stream);
    }
  }
  return launch_upsample<T, S, K, C, false>(problem, arguments, stream);
}

template <class T, int C>
bool upsample(const Problem& problem, const T* source, const T* weight, const T* bias, T* destination,
              cudaStream_t stream) {
  if (problem.layout != Layout::ncdhw || problem.stride[1] != 2 || problem.stride[2] != 2 ||
      problem.kernel[1] != problem.kernel[2] || problem.dilation[1] != 1 || problem.dilation[2] != 1) {
    return false;
  }
  const Extent output = problem.output();
  UpsamplingArguments<T> arguments{AxisGather<int32_t>(problem, Operator::forward, 0),
                                   GroupChannels(problem, Operator::forward, C),
                                   source,
                                   weight,
                                   bias,
                                   destination};
  arguments.source_h = static_cast<int>(problem.input[1]);
  arguments.source_w = static_cast<int>(problem.input[2]);
  arguments.destination_h = static_cast<int>(output[1]);
  arguments.destination_w = static_cast<int>(output[2]);
  arguments.padding_h = static_cast<int>(problem.padding[1]);
  arguments.padding_w = static_cast<int>(problem.padding[2]);
  switch (problem.kernel[1]) {
    case 2:
      return launch_upsample<T, 2, 2, C>(problem, arguments, stream);
    case 3:
      return launch_upsample<T, 2, 3, C>(problem, arguments, stream);
    case 4:
      return launch_upsample<T, 2, 4, C>(problem, arguments, stream);
    default:
      return false;
  }
}

// ---- grad_input, grad_weight, and forward of stride 1: correlations, NCDHW -----------------------------------------

// A correlation of a wide volume with a narrow one: narrow position q and tap j meet wide position
// stride * q - padding + j. Of grad_input and grad_weight the wide volume is grad_output; forward of stride 1 is one
// with the taps in reverse.
struct Correlation {
  int channels = 1;
  int wide_d = 1, wide_h = 1, wide_w = 1, narrow_d = 1, narrow_h = 1, narrow_w = 1;
  int padding_d = 0, padding_h = 0, padding_w = 0;
  int width_tiles = 1, tiles = 1, tile_blocks = 1;  // tiles of one warp, and blocks that hold all of a plane's
  int planes = 1, chunks = 1;                       // narrow planes that a block goes through, and such chunks
  Divisor<int32_t> by_width_tiles;

  Correlation(const Problem& problem, bool reversed) {
    const Extent output = problem.output();
    const Extent& wide = reversed ? problem.input : output;
    const Extent& narrow = reversed ? output : problem.input;
    const auto padding = [&](int axis) {
      return static_cast<int>(reversed ? problem.kernel[axis] - 1 - problem.padding[axis] : problem.padding[axis]);
    };
    channels = static_cast<int>(problem.in_channels);
    wide_d = static_cast<int>(wide[0]);
    wide_h = static_cast<int>(wide[1]);
    wide_w = static_cast<int>(wide[2]);
    narrow_d = static_cast<int>(narrow[0]);
    narrow_h = static_cast<int>(narrow[1]);
    narrow_w = static_cast<int>(narrow[2]);
    padding_d = padding(0);
    padding_h = padding(1);
    padding_w = padding(2);
  }

  // Cuts the narrow volume's depth into chunks.
  void cut_depth() {
    constexpr int kPlanes = 16;
    chunks = (narrow_d + kPlanes - 1) / kPlanes;
    planes = (narrow_d + chunks - 1) / chunks;
    chunks = (narrow_d + planes - 1) / planes;
  }

  // Cuts its planes into tiles of `rows` x `columns` as well.
  void cut(int rows, int columns) {
    cut_depth();
    width_tiles = (narrow_w + columns - 1) / columns;
    tiles = width_tiles * ((narrow_h + rows - 1) / rows);
    tile_blocks = (tiles + kWarps - 1) / kWarps;
    by_width_tiles = Divisor<int32_t>(width_tiles);
  }
};

// A geometry that the kernels below are compiled for, with the taps of one residue, and how a warp walks through the
// volumes for grad_weight. Its lanes hold neighbouring segments of S wide columns: lane l those from S * (first + l) -
// padding on. Narrow column q takes tap j from element j % S of segment q + j / S, so a warp holds all that 33 - M
// narrow columns meet, and each of its lanes reads its own segment alone. Along height a lane has kGroup narrow rows
// and the wide rows that they meet, and it goes down through the planes, from which it reads every wide element once,
// for the M_D narrow planes that meet it.
template <int kDepthStride, int kDepthKernel, int kStride, int kKernel>
struct Walk {
  static constexpr int S_D = kDepthStride, K_D = kDepthKernel, S = kStride, K = kKernel;
  static constexpr int M_D = (K_D + S_D - 1) / S_D, M = (K + S - 1) / S;
  static constexpr int kGroup = 4;                    // as registers allow
  static constexpr int kRows = S * (kGroup - 1) + K;  // wide rows
  static constexpr int kColumns = 33 - M;             // narrow columns of a warp
};

// Where a warp's tile lies.
struct TilePosition {
  int row, column;            // the first narrow row, and the lane's segment, which is a narrow column as well
  int wide_row, wide_column;  // the first of each
};

template <class Shape, int S>
__device__ __forceinline__ TilePosition tile_position(const Correlation& in, int tile) {
  TilePosition at;
  const int line = in.by_width_tiles.quotient(tile);
  at.row = line * Shape::kGroup;
  at.column = (tile - line * in.width_tiles) * Shape::kColumns + static_cast<int>(threadIdx.x % 32);
  at.wide_row = S * at.row - in.padding_h;
  at.wide_column = S * at.column - in.padding_w;
  return at;
}

// The wide elements of a lane in one plane, zero outside the volume.
template <class T, class Shape, int S>
__device__ __forceinline__ void load_wide(const Correlation& in, const TilePosition& at, const T* plane,
                                          Accumulator<T> (&wide)[Shape::kRows][S]) {
  using Sum = Accumulator<T>;
  const T* from = plane + at.wide_row * in.wide_w + at.wide_column;
#pragma unroll
  for (int i = 0; i < Shape::kRows; ++i) {
    const bool row_inside = static_cast<unsigned>(at.wide_row + i) < static_cast<unsigned>(in.wide_h);
#pragma unroll
    for (int e = 0; e < S; ++e) {
      const bool inside = row_inside && static_cast<unsigned>(at.wide_column + e) < static_cast<unsigned>(in.wide_w);
      wide[i][e] = inside ? static_cast<Sum>(from[e]) : Sum(0);
    }
    from += in.wide_w;
  }
}

template <class T>
struct CorrelatingArguments {
  Correlation shape;
  GroupChannels channels;
  const T* source;  // the wide volume
  const T* weight;
  const T* bias;
  T* destination;  // the narrow volume
  bool reversed;
  const T* source_end = nullptr;
  int segments = 1, items = 1;  // those along the width, and for all groups of narrow rows
  int block_items = 1;          // of a block
  int tile_blocks = 1;          // blocks of a plane
  int stage_pitch = 0;          // elements from stage to stage
  Divisor<int32_t> by_segments, by_tile_blocks;
  size_t weight_bytes = 0;
  int64_t wide_row_bytes = 0, wide_plane_bytes = 0, narrow_row_bytes = 0, narrow_plane_bytes = 0;
};

// What a lane makes of each plane: kGroup narrow rows, and of the width the sums that its own segment of kWide wide
// columns gives to narrow columns kFirst to kLast, counted from its kColumns own ones. Segment u begins at wide column
// kWide * u - padding, or, where kVectors tells that rows are vectors of segments, at kWide * u with a padding of
// kPhase.
template <class T, class Walk, int C, bool kVectors>
struct CorrelatingTile {
  static constexpr int kStride = Walk::S, kKernel = Walk::K;
  // Whether rows pass through shared memory: float32's that are whole vectors are as well loaded as such (kernel 2
  // takes 1.05 times the copy's time so, and 1.26 through shared memory), of half types those of few taps.
  static constexpr bool kStaged = !kVectors || (sizeof(T) == 2 && kKernel > 2);
  static constexpr int kColumns = kVectors ? 8 / sizeof(T) : 1, kWide = kStride * kColumns;
  static constexpr int kPhase = kVectors ? (kKernel - 1) / 2 : 0;
  static constexpr int kFirst = -((kKernel - 1 - kPhase) / kStride), kLast = (kWide - 1 + kPhase) / kStride;
  static constexpr int kSums = kLast - kFirst + 1;
  // As registers allow, and as much for each lane to load at once.
  static constexpr int kGroup =
      std::max(2, std::min((sizeof(T) == 8 ? 16 : 40) / (C * Walk::M_D * kSums), kVectors ? 16 / kWide : 8));
  static constexpr int kRows = kStride * (kGroup - 1) + kKernel;  // wide rows
  // Lanes that only give to those behind or before them, and the others.
  static constexpr int kBefore = kLast / kColumns, kAfter = (kColumns - 1 - kFirst) / kColumns;
  static constexpr int kLanes = 32 - kBefore - kAfter;
  static constexpr int kPitch = kKernel <= 2 ? kKernel : (kKernel + 3) / 4 * 4;  // of a row of weights
  static constexpr int kWeights = Walk::K_D * kKernel * kPitch;                  // of a pair of channels
};

// What a segment's rows give to the sums of one narrow plane.
template <class Tile, class Sum>
__device__ __forceinline__ void give_taps(const Sum* weights, const Sum (&wide)[Tile::kRows][Tile::kWide],
                                          Sum (&sum)[Tile::kGroup][Tile::kSums]) {
  constexpr int S = Tile::kStride, K = Tile::kKernel, kPhase = Tile::kPhase;
#pragma unroll
  for (int j_h = 0; j_h < K; ++j_h) {
#pragma unroll
    for (int j_w = 0; j_w < K; ++j_w) {
#pragma unroll
      for (int b = 0; b < Tile::kGroup; ++b) {
#pragma unroll
        for (int e = (j_w + S * K - kPhase) % S; e < Tile::kWide; e += S) {
          sum[b][(e + kPhase - j_w) / S - Tile::kFirst] += weights[j_h * Tile::kPitch + j_w] * wide[S * b + j_h][e];
        }
      }
    }
  }
}

// Stages of shared memory, of which one is read while the others are filled.
constexpr int kStages = 3;

// Copies the `length` elements from `from` on behind the threads' backs to where `stage` has them: between multiples of
// 16 bytes as in memory, kVector elements after its begin and on. What shares 16 bytes with them comes along, unless it
// is no element of the tensor from `tensor` to `tensor_end`.
template <class T>
__device__ __forceinline__ void copy_run(T* stage, const T* from, int length, const T* tensor, const T* tensor_end) {
  constexpr int kVector = 16 / sizeof(T);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int past = elements_past_vector(from);
  const int elements = (past + length + kVector - 1) / kVector * kVector;
  from -= past;
  stage += kVector;
  if (from >= tensor && from + elements <= tensor_end) {
#pragma unroll 4
    for (int i = thread * kVector; i < elements; i += threads * kVector) ptx::copy_vector(stage + i, from + i, true);
  } else {
    for (int i = past + thread; i < past + length; i += threads) stage[i] = from[i];
  }
}

// The wide elements of a lane from a stage, in which rows are `pitch` elements apart; zero outside the volume.
template <class Tile, class T>
__device__ __forceinline__ void read_rows(const T* from, int pitch, int row, int rows, int column, int columns,
                                          Accumulator<T> (&wide)[Tile::kRows][Tile::kWide]) {
  const auto read = [&](auto all_inside) {
    const auto inside = [&](int i) {
      return decltype(all_inside)::value || static_cast<unsigned>(row + i) < static_cast<unsigned>(rows);
    };
    if constexpr (sizeof(T) == 2 && Tile::kWide == 2) {
      // Pairs of elements lie within or across words, a row and the next but one in the same way.
      const uint32_t kept = (static_cast<unsigned>(column) < static_cast<unsigned>(columns) ? 0xffffu : 0) |
                            (static_cast<unsigned>(column + 1) < static_cast<unsigned>(columns) ? 0xffff0000u : 0);
      const uint32_t* words[2];
      unsigned shift[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const T* const pair = from + i * pitch;
        const int past = static_cast<int>(reinterpret_cast<uintptr_t>(pair) / sizeof(T) % 2);
        words[i] = reinterpret_cast<const uint32_t*>(pair - past);
        shift[i] = 16 * past;
      }
#pragma unroll
      for (int i = 0; i < Tile::kRows; ++i) {
        const uint32_t* const word = words[i % 2] + i / 2 * pitch;
        const uint32_t pair = inside(i) ? __funnelshift_r(word[0], word[1], shift[i % 2]) & kept : 0;
        widen<T>(pair, wide[i][0], wide[i][1]);
      }
    } else {
      constexpr bool kWhole = Tile::kColumns > 1;  // segments lie inside
#pragma unroll
      for (int i = 0; i < Tile::kRows; ++i) {
        constexpr int kVector = kWhole ? Tile::kWide : 1;
        const int length = kWhole ? Tile::kWide : columns;
        load_row<0, kVector, Tile::kWide - kVector>(from + i * pitch, kWhole ? 0 : column, inside(i) ? length : 0,
                                                    wide[i]);
      }
    }
  };
  if (row >= 0 && row + Tile::kRows <= rows) {
    read(std::true_type());
  } else {
    read(std::false_type());
  }
}

// The narrow volume from the wide one. The segments of all rows follow one another, and neighbouring lanes have
// neighbouring ones, 16 bytes each if kVectors: a lane adds up what its own segment gives to the narrow columns around
// it, and the lanes exchange these sums in the end. A block goes down through the planes, each of which gives to M_D
// narrow planes. The rows that it meets are one run of memory, whatever the length of a row, which it has copied into
// shared memory two planes ahead, or where that is slower loads as vectors, see CorrelatingTile::kStaged. The rows that
// groups share come from there, or from the L1 cache, and so every wide element from memory hardly more than once for
// each C channels. Bound by memory where there are few taps, else by the instructions, which multiply for the most
// part.
template <class T, class Walk, int C, bool kVectors>
__global__ void __launch_bounds__(kThreads, resident_blocks<T>(Walk::S == 1 && C > 1 ? 1 : 2))
    correlate(const __grid_constant__ CorrelatingArguments<T> in) {
  using Sum = Accumulator<T>;
  using Tile = CorrelatingTile<T, Walk, C, kVectors>;
  constexpr int S_D = Walk::S_D, K_D = Walk::K_D, M_D = Walk::M_D, S = Walk::S, K = Walk::K;
  constexpr int kGroup = Tile::kGroup, kColumns = Tile::kColumns, kWide = Tile::kWide, kTaps = K_D * K * K;
  constexpr int kFirst = Tile::kFirst;
  CONVT3D_DYNAMIC_SHARED(16, shared);
  Sum* const weights = reinterpret_cast<Sum*>(shared);  // source channel, then destination channel
  T* const stages = reinterpret_cast<T*>(shared + in.weight_bytes);
  const Correlation& shape = in.shape;
  const int chunk = in.by_tile_blocks.quotient(static_cast<int>(blockIdx.x));
  const int begin = chunk * shape.planes, end = smaller(begin + shape.planes, shape.narrow_d);
  const int first_item = (static_cast<int>(blockIdx.x) - chunk * in.tile_blocks) * in.block_items;
  const int last_item = smaller(first_item + in.block_items, in.items) - 1;
  const int first_group = in.by_segments.quotient(first_item), last_group = in.by_segments.quotient(last_item);
  // The wide planes and rows that the block meets.
  const int first_plane = larger(S_D * begin - shape.padding_d, 0);
  const int end_plane = smaller(S_D * (end - 1) + K_D - shape.padding_d, shape.wide_d);
  const auto clamped = [&](int row) { return larger(smaller(row, shape.wide_h), 0); };
  const int first_row = clamped(S * kGroup * first_group - shape.padding_h);
  const int end_row = clamped(S * kGroup * last_group + Tile::kRows - shape.padding_h);
  const int run_length = (end_row - first_row) * shape.wide_w;

  const int lane = static_cast<int>(threadIdx.x % 32);
  const int tile_item = first_item + static_cast<int>(threadIdx.x / 32) * Tile::kLanes;
  const bool idle = tile_item > last_item;  // the whole warp
  const int own_item = tile_item - Tile::kBefore + lane;
  // Lanes before and behind the block's rows have nothing to give.
  const bool lives = own_item >= first_group * in.segments && own_item < (last_group + 1) * in.segments;
  const int item = lives ? own_item : first_item;
  const int group = in.by_segments.quotient(item), segment = item - group * in.segments;
  const int row = group * kGroup, column = segment * kColumns;
  const int wide_row = S * row - shape.padding_h, wide_column = kWide * segment - (kVectors ? 0 : shape.padding_w);
  // Segments that lie outside as a whole read nothing, but not from beyond the stage.
  const int run_offset =
      (wide_row - first_row) * shape.wide_w + larger(smaller(wide_column, shape.wide_w - 1), 1 - kWide);
  const bool stores = lives && own_item <= last_item && lane >= Tile::kBefore && lane < Tile::kBefore + Tile::kLanes &&
                      column < shape.narrow_w;

  for (int64_t sample = blockIdx.z; sample < in.channels.samples; sample += gridDim.z) {
    for (int which = blockIdx.y; which < in.channels.blocks; which += gridDim.y) {
      const ChannelShare channels(in.channels, sample, which, C);
      const int64_t channel_bytes = shape.wide_d * in.wide_plane_bytes;
      const T* const volume = advanced(in.source, channels.source * channel_bytes + first_row * in.wide_row_bytes);
      int copied_plane = first_plane, copied_channel = 0;
      const auto copy_next = [&](int stage) {
        if (copied_plane < end_plane) {
          copy_run(stages + stage * in.stage_pitch,
                   advanced(volume, copied_channel * channel_bytes + copied_plane * in.wide_plane_bytes), run_length,
                   in.source, in.source_end);
        }
        ptx::commit_copies();
        if (++copied_channel == in.channels.sources) copied_channel = 0, ++copied_plane;
      };
      __syncthreads();
      if constexpr (Tile::kStaged) {
#pragma unroll 1
        for (int i = 0; i < kStages - 1; ++i) copy_next(i);
      }
      for_weights<C>(in.channels, channels, in.weight, kTaps, [&](int source, int c, int tap, Sum w) {
        const int at = in.reversed ? kTaps - 1 - tap : tap;
        weights[(source * C + c) * Tile::kWeights + at / K * Tile::kPitch + at % K] = w;
      });
      if constexpr (!Tile::kStaged) __syncthreads();
      T* to = advanced(in.destination, (channels.destination * shape.narrow_d + begin) * in.narrow_plane_bytes +
                                           row * in.narrow_row_bytes) +
              column;

      Sum sum[C][M_D][kGroup][Tile::kSums] = {};  // of narrow plane m - a
      int stage = 0;
      for (int m = begin; m < end + M_D - 1; ++m) {
#pragma unroll 1
        for (int e_d = 0; e_d < S_D; ++e_d) {
          const int plane = S_D * m - shape.padding_d + e_d;
          if (plane < 0 || plane >= end_plane) continue;
          const Sum* w = weights + e_d * K * Tile::kPitch;
          const T* from = advanced(volume, plane * in.wide_plane_bytes);
#pragma unroll 1
          for (int channel = 0; channel < in.channels.sources; ++channel) {
            const T* rows = from;
            if constexpr (Tile::kStaged) {
              ptx::wait_for_copies<kStages - 2>();
              __syncthreads();  // The stage has arrived, and the one before it has been read.
              copy_next((stage + kStages - 1) % kStages);
              rows = stages + (stage * in.stage_pitch + 16 / static_cast<int>(sizeof(T))) + elements_past_vector(from);
            }
            from = advanced(from, channel_bytes);
            if (Tile::kStaged && ++stage == kStages) stage = 0;
            if (idle) continue;
            Sum wide[Tile::kRows][kWide];
            rows += run_offset;
            if constexpr (Tile::kStaged) {
              read_rows<Tile>(rows, shape.wide_w, wide_row, shape.wide_h, wide_column, shape.wide_w, wide);
            } else {
              // Vectors lie inside.
              load_rows<0, kWide, 0>(rows, wide_row, shape.wide_h, in.wide_row_bytes, 0, kWide, wide);
            }
#pragma unroll
            for (int c = 0; c < C; ++c, w += Tile::kWeights) {
#pragma unroll
              for (int a = 0; a < M_D; ++a) {
                if (e_d + S_D * a < K_D) give_taps<Tile>(w + S_D * a * K * Tile::kPitch, wide, sum[c][a]);
              }
            }
          }
        }
        // Narrow plane m - (M_D - 1) is complete.
        const bool complete = m - (M_D - 1) >= begin;
#pragma unroll
        for (int c = 0; c < C; ++c) {
          const bool live = complete && stores && c < channels.live;
          const Sum bias =
              in.bias == nullptr || c >= channels.live ? Sum(0) : static_cast<Sum>(in.bias[channels.bias + c]);
          T* row_to = advanced(to, int64_t{c} * shape.narrow_d * in.narrow_plane_bytes);
#pragma unroll
          for (int b = 0; b < kGroup; ++b, row_to = advanced(row_to, in.narrow_row_bytes)) {
            Sum result[kColumns];
#pragma unroll
            for (int i = 0; i < kColumns; ++i) result[i] = sum[c][M_D - 1][b][i - kFirst] + bias;
#pragma unroll
            for (int i = kFirst; i <= Tile::kLast; ++i) {
              if (i >= 0 && i < kColumns) continue;
              const int step = i < 0 ? -((kColumns - 1 - i) / kColumns) : i / kColumns;  // from lane to lane
              const Sum given = __shfl_sync(0xffffffffu, sum[c][M_D - 1][b][i - kFirst], (lane - step) & 31);
              // Without vectors there are segments beyond the last column, so that no row meets the next one.
              const bool same_row =
                  !kVectors || static_cast<unsigned>(segment - step) < static_cast<unsigned>(in.segments);
              result[i - step * kColumns] += same_row ? given : Sum(0);
            }
            if (live && row + b < shape.narrow_h) {
              *reinterpret_cast<Elements<T, kColumns>*>(row_to) = rounded<T>(result);
            }
#pragma unroll
            for (int i = 0; i < Tile::kSums; ++i) {
#pragma unroll
              for (int a = M_D - 1; a > 0; --a) sum[c][a][b][i] = sum[c][a - 1][b][i];
              sum[c][0][b][i] = 0;
            }
          }
        }
        if (complete) to = advanced(to, in.narrow_plane_bytes);
      }
    }
  }
}

template <class T>
struct CorrelationReduceArguments {
  Correlation shape;
  const T* wide;
  const T* narrow;
  Accumulator<T>* partials;
  int64_t units, share, blocks;  // units of work of one channel, and those of a part
  int64_t elements;              // of the weight
};

// grad_weight on the same walk: a lane multiplies its segments with the narrow columns that meet them, the other lanes'
// by exchange, into one sum for each tap. A unit of work is a sample, a chunk of planes and a block of tiles: at most
// 16 * kGroup products for each lane and tap, added up by a tree; a block takes one part's share of a channel's units,
// which it adds up in float64. In float32 the rows of a plane have a sum of their own, as shorter sums err less.
template <class T, int S_D, int K_D, int S, int K>
__global__ void __launch_bounds__(kThreads, resident_blocks<T>(K_D * K * K > 32 ? 1 : 2))
    correlate_reduce(const __grid_constant__ CorrelationReduceArguments<T> in) {
  using Sum = Accumulator<T>;
  using Shape = Walk<S_D, K_D, S, K>;
  constexpr int M_D = Shape::M_D, M = Shape::M, kGroup = Shape::kGroup, kTaps = K_D * K * K;
  constexpr bool kSumsRows = std::is_same_v<T, float>;
  __shared__ Sum sums[kWarps][kTaps];
  const Correlation& shape = in.shape;
  const int64_t wide_plane = static_cast<int64_t>(shape.wide_h) * shape.wide_w;
  const int64_t narrow_plane = static_cast<int64_t>(shape.narrow_h) * shape.narrow_w;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t block = blockIdx.x; block < in.blocks; block += gridDim.x) {
    const int64_t part = block / shape.channels;
    const int channel = static_cast<int>(block - part * shape.channels);
    double total = 0;  // of tap `threadIdx.x`
    for (int64_t unit = part * in.share; unit < smaller((part + 1) * in.share, in.units); ++unit) {
      int64_t rest = unit / shape.tile_blocks;
      const int tile = static_cast<int>(unit - rest * shape.tile_blocks) * kWarps + warp;
      const int64_t sample = rest / shape.chunks;
      const int begin = static_cast<int>(rest - sample * shape.chunks) * shape.planes;
      const int end = smaller(begin + shape.planes, shape.narrow_d);
      const int64_t volume = sample * shape.channels + channel;
      Sum sum[K_D][K][K] = {};
      if (tile < shape.tiles) {
        const TilePosition at = tile_position<Shape, S>(shape, tile);
        const T* const wide_volume = in.wide + volume * shape.wide_d * wide_plane;
        const T* const narrow_volume = in.narrow + volume * shape.narrow_d * narrow_plane;
        Sum narrow[M_D][kGroup][M] = {};  // of plane m - a, row b and column `at.column` - c
        for (int m = begin; m < end + M_D - 1; ++m) {
#pragma unroll
          for (int b = 0; b < kGroup; ++b) {
#pragma unroll
            for (int c = 0; c < M; ++c) {
#pragma unroll
              for (int a = M_D - 1; a > 0; --a) narrow[a][b][c] = narrow[a - 1][b][c];
            }
            const bool inside =
                m < end && lane < Shape::kColumns && at.column < shape.narrow_w && at.row + b < shape.narrow_h;
            narrow[0][b][0] =
                inside ? static_cast<Sum>(narrow_volume[m * narrow_plane +
                                                        static_cast<int64_t>(at.row + b) * shape.narrow_w + at.column])
                       : Sum(0);
          }
#pragma unroll
          for (int b = 0; b < kGroup; ++b) {
#pragma unroll
            for (int c = 1; c < M; ++c) {
              const Sum other = __shfl_up_sync(0xffffffffu, narrow[0][b][0], c);
              narrow[0][b][c] = lane >= c ? other : Sum(0);
            }
          }
#pragma unroll
          for (int e_d = 0; e_d < S_D; ++e_d) {
            const int plane = S_D * m - shape.padding_d + e_d;
            if (static_cast<unsigned>(plane) >= static_cast<unsigned>(shape.wide_d)) continue;
            Sum wide[Shape::kRows][S];
            load_wide<T, Shape, S>(shape, at, wide_volume + plane * wide_plane, wide);
#pragma unroll
            for (int a = 0; a < M_D; ++a) {
              if (e_d + S_D * a >= K_D) continue;
#pragma unroll
              for (int j_h = 0; j_h < K; ++j_h) {
#pragma unroll
                for (int j_w = 0; j_w < K; ++j_w) {
                  Sum& of_tap = sum[e_d + S_D * a][j_h][j_w];
                  Sum rows = kSumsRows ? Sum(0) : of_tap;
#pragma unroll
                  for (int b = 0; b < kGroup; ++b) rows += narrow[a][b][j_w / S] * wide[S * b + j_h][j_w % S];
                  of_tap = kSumsRows ? of_tap + rows : rows;
                }
              }
            }
          }
        }
      }
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        Sum value = sum[tap / (K * K)][tap / K % K][tap % K];
#pragma unroll
        for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
        if (lane == 0) sums[warp][tap] = value;
      }
      __syncthreads();
      if (threadIdx.x < kTaps) {
        for (int i = 0; i < kWarps; ++i) total += sums[i][threadIdx.x];
      }
      __syncthreads();
    }
    if (threadIdx.x < kTaps) in.partials[part * in.elements + channel * kTaps + threadIdx.x] = static_cast<Sum>(total);
  }
}

// Calls use(Walk) for the geometries that the walk is compiled for; false for others.
template <class Use>
bool with_walk(const Problem& problem, const Use& use) {
  if (problem.layout != Layout::ncdhw) return false;
  for (int axis = 0; axis < 3; ++axis) {
    if (problem.stride[axis] != problem.stride[0] || problem.kernel[axis] != problem.kernel[0] ||
        problem.dilation[axis] != 1) {
      return false;
    }
  }
  const auto is = [&](int64_t stride, int64_t kernel) {
    return problem.stride[0] == stride && problem.kernel[0] == kernel;
  };
  if (is(2, 2)) return use(Walk<2, 2, 2, 2>());
  if (is(2, 3)) return use(Walk<2, 3, 2, 3>());
  if (is(2, 4)) return use(Walk<2, 4, 2, 4>());
  if (is(1, 3)) return use(Walk<1, 3, 1, 3>());
  return false;
}

// Products that one sum may add up, which bounds its error.
constexpr int kMostProducts = 1024;

// A block's shared memory, which every GPU has; only where one group's rows need more, a block may take all there is.
constexpr int64_t kSharedBytes = 64 * 1024;

int64_t most_shared_bytes() {
  int device = 0, bytes = 0;
  check_cuda(cudaGetDevice(&device), "finding the current device");
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
             "reading the device's shared memory");
  return bytes;
}

// Whether the kernel takes the problem; its weights and rows must fit in shared memory.
template <class T, class Walk, int C, bool kVectors>
bool launch_correlate(CorrelatingArguments<T> in, cudaStream_t stream) {
  using Tile = CorrelatingTile<T, Walk, C, kVectors>;
  constexpr int kVector = 16 / sizeof(T);
  const int64_t weights = int64_t{in.channels.sources} * C * Tile::kWeights;
  const int64_t weight_bytes = weights * static_cast<int64_t>(sizeof(Accumulator<T>));
  if (weight_bytes > kWeightBytes || in.channels.sources * Walk::K_D * Walk::K * Walk::K > kMostProducts) return false;
  in.weight_bytes = static_cast<size_t>((weight_bytes + 15) / 16 * 16);
  in.shape.cut_depth();
  const Correlation& shape = in.shape;
  in.segments = kVectors ? shape.narrow_w / Tile::kColumns : shape.narrow_w + Tile::kAfter;
  // Of a row that is too long for a block; segments beyond the last column make them equal.
  constexpr int kMostItems = kWarps * Tile::kLanes;
  const int pieces = ceil_divide(in.segments, kMostItems);
  if (!kVectors) in.segments = ceil_divide(in.segments, pieces) * pieces;
  in.by_segments = Divisor<int32_t>(in.segments);
  const int groups = ceil_divide(shape.narrow_h, Tile::kGroup);
  in.items = groups * in.segments;
  const auto stage_elements = [&](int block_groups) {
    const int rows = smaller((block_groups - 1) * Tile::kGroup * Tile::kStride + Tile::kRows, shape.wide_h);
    return (static_cast<int64_t>(rows) * shape.wide_w / kVector + 4) * kVector;  // and a vector around each end
  };
  const auto shared_bytes = [&](int block_groups) {
    const int64_t stage_bytes = Tile::kStaged ? stage_elements(block_groups) * static_cast<int64_t>(sizeof(T)) : 0;
    return static_cast<int64_t>(in.weight_bytes) + kStages * stage_bytes;
  };
  int block_groups = pieces > 1 ? 1 : equal_share(groups, kMostItems / in.segments);
  while (block_groups > 1 && shared_bytes(block_groups) > kSharedBytes) {
    block_groups = equal_share(groups, block_groups - 1);
  }
  in.block_items = ceil_divide(block_groups * in.segments, pieces);
  if (in.segments % pieces != 0) block_groups = 2;  // pieces of vectors may reach from group to group
  if (shared_bytes(block_groups) > kSharedBytes && shared_bytes(block_groups) > most_shared_bytes()) return false;
  in.stage_pitch = static_cast<int>(stage_elements(block_groups));
  in.tile_blocks = ceil_divide(in.items, in.block_items);
  in.by_tile_blocks = Divisor<int32_t>(in.tile_blocks);
  const int warps = ceil_divide(in.block_items, Tile::kLanes);
  in.wide_row_bytes = shape.wide_w * static_cast<int64_t>(sizeof(T));
  in.wide_plane_bytes = shape.wide_h * in.wide_row_bytes;
  in.narrow_row_bytes = shape.narrow_w * static_cast<int64_t>(sizeof(T));
  in.narrow_plane_bytes = shape.narrow_h * in.narrow_row_bytes;
  in.source_end = in.source + in.channels.samples * in.channels.groups * in.channels.sources * int64_t{shape.wide_d} *
                                  shape.wide_h * shape.wide_w;
  launch("depthwise correlation", correlate<T, Walk, C, kVectors>,
         in.channels.grid(static_cast<int64_t>(shape.chunks) * in.tile_blocks), warps * 32,
         static_cast<size_t>(shared_bytes(block_groups)), stream, in);
  return true;
}

template <class T, int C>
bool correlate(const Problem& problem, Operator op, const T* source, const T* weight, const T* bias, T* destination,
               cudaStream_t stream) {
  const bool reversed = op == Operator::forward;
  if (reversed && problem.stride[0] != 1) return false;
  const CorrelatingArguments<T> arguments{
      Correlation(problem, reversed), GroupChannels(problem, op, C), source, weight, bias, destination, reversed};
  return with_walk(problem, [&](auto walk) {
    using Shape = decltype(walk);
    if constexpr (C == 1) {
      using Tile = CorrelatingTile<T, Shape, C, true>;
      const Correlation& shape = arguments.shape;
      if (shape.padding_w == Tile::kPhase && shape.wide_w == Shape::S * shape.narrow_w &&
          shape.narrow_w % Tile::kColumns == 0 &&
          reinterpret_cast<uintptr_t>(source) % (Tile::kWide * sizeof(T)) == 0 &&
          reinterpret_cast<uintptr_t>(destination) % (Tile::kColumns * sizeof(T)) == 0) {
        return launch_correlate<T, Shape, C, true>(arguments, stream);
      }
    }
    return launch_correlate<T, Shape, C, false>(arguments, stream);
  });
}

template <class T, int S_D, int K_D, int S, int K>
bool launch_correlate_reduce(Walk<S_D, K_D, S, K>, CorrelationReduceArguments<T> arguments, int64_t batch,
                             int64_t parts, cudaStream_t stream) {
  using Shape = Walk<S_D, K_D, S, K>;
  arguments.shape.cut(Shape::kGroup, Shape::kColumns);
  arguments.units = batch * arguments.shape.chunks * arguments.shape.tile_blocks;
  arguments.share = (arguments.units + parts - 1) / parts;
  arguments.blocks = parts * arguments.shape.channels;
  launch("depthwise reduction", correlate_reduce<T, S_D, K_D, S, K>, grid_of(arguments.blocks), kThreads, 0, stream,
         arguments);
  return true;
}

template <class T>
bool correlate_reduce(const Problem& problem, int64_t parts, const T* grad_output, const T* input,
                      Accumulator<T>* partials, cudaStream_t stream) {
  CorrelationReduceArguments<T> arguments{Correlation(problem, false), grad_output, input, partials, 0, 0, 0,
                                          problem.weight_elements()};
  return with_walk(
      problem, [&](auto walk) { return launch_correlate_reduce<T>(walk, arguments, problem.batch, parts, stream); });
}

}  // namespace

template <class T>
bool gather_narrow_groups(const Problem& problem, Operator op, const T* source, const T* weight, const T* bias,
                          T* destination, cudaStream_t stream) {
  const bool forward = op == Operator::forward;
  const int64_t destinations = forward ? problem.group_out_channels() : problem.group_in_channels();
  if (destinations > 4 || !volumes_fit_32_bits(problem)) return false;
  const auto gather = [&](auto block) {
    constexpr int kBlock = decltype(block)::value;
    return correlate<T, kBlock>(problem, op, source, weight, bias, destination, stream) ||
           (forward && upsample<T, kBlock>(problem, source, weight, bias, destination, stream));
  };
  if (destinations == 1) return gather(std::integral_constant<int, 1>());
  if constexpr (sizeof(T) == 8) {
    return false;  // The sums would not fit in the registers.
  } else {
    return gather(std::integral_constant<int, 4>());
  }
}

template <class T>
void gather_depthwise(const Problem& problem, Operator op, const Target& target, const T* source, const T* weight,
                      const T* bias, T* destination, cudaStream_t stream) {
  if constexpr (sizeof(T) == 2) {
    const auto by_bands = [&] {
      return op == Operator::forward ? forward_by_bands<T>(problem, target, source, weight, bias, destination, stream)
                                     : grad_input_by_bands<T>(problem, target, source, weight, destination, stream);
    };
    if (volumes_fit_32_bits(problem) && by_bands()) return;
  }
  if (gather_narrow_groups<T>(problem, op, source, weight, bias, destination, stream)) return;
  gather_depthwise_any<T>(problem, op, source, weight, bias, destination, stream);
}

template <class T>
void reduce_depthwise(const Problem& problem, int64_t parts, const T* grad_output, const T* input,
                      Accumulator<T>* partials, cudaStream_t stream) {
  if (volumes_fit_32_bits(problem) && correlate_reduce<T>(problem, parts, grad_output, input, partials, stream)) return;
  reduce_depthwise_any<T>(problem, parts, grad_output, input, partials, stream);
}

#define CONVT3D_INSTANTIATE(T)                                                                                  \
  template bool gather_narrow_groups(const Problem&, Operator, const T*, const T*, const T*, T*, cudaStream_t); \
  template void gather_depthwise(const Problem&, Operator, const Target&, const T*, const T*, const T*, T*,     \
                                 cudaStream_t);                                                                 \
  template void reduce_depthwise(const Problem&, int64_t, const T*, const T*, Accumulator<T>*, cudaStream_t);
CONVT3D_INSTANTIATE(double)
CONVT3D_INSTANTIATE(float)
CONVT3D_INSTANTIATE(__half)
CONVT3D_INSTANTIATE(__nv_bfloat16)
#undef CONVT3D_INSTANTIATE

}  // namespace convt3d::direct
