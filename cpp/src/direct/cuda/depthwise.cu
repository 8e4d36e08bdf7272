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
#include "direct/cuda/contacts.h"
#include "direct/cuda/kernels.h"

namespace convt3d::direct {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// More blocks than these go round in a loop.
constexpr int64_t kMostBlocks = int64_t{1} << 30;

unsigned grid_of(int64_t blocks) { return static_cast<unsigned>(std::min(blocks, kMostBlocks)); }

// Blocks of a multiprocessor that the compiler is to leave registers for; double takes twice as many.
template <class T>
constexpr int resident_blocks(int blocks) {
  return sizeof(T) == 8 ? 1 : blocks;
}

// How the kernels for narrow groups share out the channels: a block makes at most C destination channels of one group
// from all of its source channels.
struct GroupChannels {
  int groups = 1, sources = 1, destinations = 1;                        // the latter two of one group
  int blocks = 1;                                                       // that make a group's destinations
  int64_t weight_group = 1, weight_source = 1, weight_destination = 1;  // steps

  GroupChannels(const Problem& problem, Operator op, int block) {
    const bool forward = op == Operator::forward;
    const WeightSteps steps(problem);
    groups = static_cast<int>(problem.groups);
    sources = static_cast<int>(forward ? problem.group_in_channels() : problem.group_out_channels());
    destinations = static_cast<int>(forward ? problem.group_out_channels() : problem.group_in_channels());
    blocks = (destinations + block - 1) / block;
    weight_group = steps.group;
    weight_source = forward ? steps.input_channel : steps.output_channel;
    weight_destination = forward ? steps.output_channel : steps.input_channel;
  }
};

// A block's share of them: channels are counted through all samples.
struct ChannelShare {
  int64_t source, destination;  // the first of each
  int64_t weight;               // where theirs begin
  int bias;                     // the first destination channel of its sample
  int live;                     // destination channels

  // `which` counts samples, groups and the group's blocks.
  __device__ ChannelShare(const GroupChannels& in, int64_t which, int block) {
    const int64_t group_of_all = which / in.blocks;
    const int first = static_cast<int>(which - group_of_all * in.blocks) * block;
    const int group = static_cast<int>(group_of_all % in.groups);
    source = group_of_all * in.sources;
    destination = group_of_all * in.destinations + first;
    weight = group * in.weight_group + first * in.weight_destination;
    bias = group * in.destinations + first;
    live = smaller(block, in.destinations - first);
  }
};

// 16 bytes, which a thread stores at once.
template <class T>
struct alignas(16) Vector {
  T element[16 / sizeof(T)];
};

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
  int first_h, first_w;    // the first quotients of position + padding by the stride
  int groups, columns;     // groups of quotients along height, and quotients along width
  int tile_groups, tiles;  // groups of a block, and blocks of an output plane
  size_t weight_bytes;     // of shared memory
  int tile_pitch;          // elements that one channel has in shared memory
  int64_t blocks;
  Divisor<int32_t> by_columns;
};

// With position + padding = S * q + r, tap j of residue r = j % S reads source q - j / S, so that one pattern serves
// every padding. A thread takes kGroup values of q along height and one along width: from (kGroup + M - 1) * M sources
// of a plane it makes kGroup * S * S outputs. A block makes whole rows of one output plane, in shared memory, and
// stores them as the one run of memory that they are, for each of C channels: rows of odd length would else begin and
// end between vectors, and what the stores reach decides this kernel's speed. Sources, an eighth of the traffic, come
// through the L1 cache.
template <class T, int S, int K, int C>
__global__ void __launch_bounds__(kThreads, resident_blocks<T>(K <= 3 && C == 1 ? 4
                                                               : C == 1         ? 3
                                                                                : 2))
    upsample(const __grid_constant__ UpsamplingArguments<T> in) {
  using Sum = Accumulator<T>;
  constexpr int M = (K + S - 1) / S;  // taps of one residue, at most
  constexpr int kGroup = 2, kRows = kGroup + M - 1;
  constexpr int kWeights = (K * K + 3) / 4 * 4;  // of one depth contact, padded to whole vectors
  constexpr int kVector = 16 / sizeof(T);
  extern __shared__ __align__(16) unsigned char shared[];
  Sum* const weights = reinterpret_cast<Sum*>(shared);
  T* const tile = reinterpret_cast<T*>(shared + in.weight_bytes);
  const int64_t source_plane = static_cast<int64_t>(in.source_h) * in.source_w;
  const int64_t destination_plane = static_cast<int64_t>(in.destination_h) * in.destination_w;

  for (int64_t block = blockIdx.x; block < in.blocks; block += gridDim.x) {
    int64_t rest = block / in.tiles;
    const int first_group = static_cast<int>(block - rest * in.tiles) * in.tile_groups;
    const int groups = smaller(in.tile_groups, in.groups - first_group);
    const int64_t which = rest / in.depth.destination;
    const int z = static_cast<int>(rest - which * in.depth.destination);
    const ChannelShare channels(in.channels, which, C);
    const int q_d = in.depth.axis.by_stride.quotient(z);
    const Contacts<int32_t> contacts = in.depth.contacts(z - q_d * in.depth.destination_stride, q_d, q_d);
    // In the order of the sums: source channel, contact, destination channel.
    for (int i = threadIdx.x; i < in.channels.sources * contacts.count * C * kWeights; i += blockDim.x) {
      const int tap = i % kWeights, c = i / kWeights % C, pair = i / kWeights / C;
      const int source = pair / contacts.count, contact = pair - source * contacts.count;
      Sum w = 0;
      if (tap < K * K && c < channels.live) {
        w = static_cast<Sum>(
            in.weight[channels.weight + source * in.channels.weight_source + c * in.channels.weight_destination +
                      (contacts.tap + contact * contacts.tap_step) * (K * K) + tap]);
      }
      weights[i] = w;
    }

    const int first_q = in.first_h + first_group * kGroup;
    const int row_begin = larger(S * first_q - in.padding_h, 0);
    const int row_end = smaller(S * (first_q + groups * kGroup) - in.padding_h, in.destination_h);
    const int length = (row_end - row_begin) * in.destination_w;
    const auto run_of = [&](int c) {
      return in.destination + ((channels.destination + c) * in.depth.destination + z) * destination_plane +
             static_cast<int64_t>(row_begin) * in.destination_w;
    };
    // A run lies in shared memory as it lies between vectors in global memory.
    const auto shift_of = [&](const T* run) {
      return static_cast<int>(reinterpret_cast<uintptr_t>(run) / sizeof(T) % kVector);
    };
    const T* const source = in.source + (channels.source * in.depth.source + q_d + contacts.offset) * source_plane;
    __syncthreads();

    for (int item = threadIdx.x; item < groups * in.columns; item += blockDim.x) {
      const int group = in.by_columns.quotient(item);
      const int q_w = in.first_w + item - group * in.columns, q_h = first_q + group * kGroup;
      Sum sum[C][kGroup * S][S] = {};
      const Sum* w = weights;
      for (int channel = 0; channel < in.channels.sources; ++channel) {
        const T* const volume = source + static_cast<int64_t>(channel) * in.depth.source * source_plane;
#pragma unroll 2
        for (int contact = 0; contact < contacts.count; ++contact) {
          const T* plane = volume + static_cast<int64_t>(contact) * contacts.offset_step * source_plane;
          Sum x[kRows][M];
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
            const int row = q_h - (M - 1) + i;
#pragma unroll
            for (int m = 0; m < M; ++m) {
              const bool inside = static_cast<unsigned>(row) < static_cast<unsigned>(in.source_h) &&
                                  static_cast<unsigned>(q_w - m) < static_cast<unsigned>(in.source_w);
              x[i][m] = inside ? static_cast<Sum>(plane[row * in.source_w + q_w - m]) : Sum(0);
            }
          }
#pragma unroll
          for (int c = 0; c < C; ++c) {
#pragma unroll
            for (int j_h = 0; j_h < K; ++j_h) {
#pragma unroll
              for (int j_w = 0; j_w < K; ++j_w) {
#pragma unroll
                for (int g = 0; g < kGroup; ++g) {
                  sum[c][g * S + j_h % S][j_w % S] += w[j_h * K + j_w] * x[g + M - 1 - j_h / S][j_w / S];
                }
              }
            }
            w += kWeights;
          }
        }
      }
      const int column = S * q_w - in.padding_w;
#pragma unroll
      for (int c = 0; c < C; ++c) {
        if (c >= channels.live) break;
        const Sum bias = in.bias == nullptr ? Sum(0) : static_cast<Sum>(in.bias[channels.bias + c]);
        T* const channel_tile = tile + c * in.tile_pitch + shift_of(run_of(c));
#pragma unroll
        for (int i = 0; i < kGroup * S; ++i) {
          const int row = S * q_h - in.padding_h + i;
          if (row < row_begin || row >= row_end) continue;
          T* const to = channel_tile + (row - row_begin) * in.destination_w;
          // Half of the warp begins with the other residue, so that the two halves meet different banks.
#pragma unroll
          for (int j = 0; j < S; ++j) {
            const bool other = S == 2 && threadIdx.x % 32 >= 16;
            const int at = column + (other ? S - 1 - j : j);
            const Sum value = (other ? sum[c][i][S - 1 - j] : sum[c][i][j]) + bias;
            if (static_cast<unsigned>(at) < static_cast<unsigned>(in.destination_w)) to[at] = static_cast<T>(value);
          }
        }
      }
    }
    __syncthreads();

    for (int c = 0; c < channels.live; ++c) {
      T* const run = run_of(c);
      const T* const channel_tile = tile + c * in.tile_pitch;
      const int shift = shift_of(run);
      for (int begin = static_cast<int>(threadIdx.x) * kVector; begin < shift + length; begin += blockDim.x * kVector) {
        if (begin >= shift && begin + kVector <= shift + length) {
          *reinterpret_cast<Vector<T>*>(run - shift + begin) =
              *reinterpret_cast<const Vector<T>*>(channel_tile + begin);
        } else {
          for (int i = larger(begin, shift); i < smaller(begin + kVector, shift + length); ++i) {
            run[i - shift] = channel_tile[i];
          }
        }
      }
    }
    __syncthreads();
  }
}

// A block's shared memory for its outputs, and at most for its weights.
constexpr int64_t kTileBytes = 36 * 1024, kWeightBytes = 12 * 1024;

// Whether the kernel takes the problem; its rows and weights must fit in shared memory.
template <class T, int S, int K, int C>
bool launch_upsample(const Problem& problem, UpsamplingArguments<T> arguments, cudaStream_t stream) {
  constexpr int kGroup = 2, kWeights = (K * K + 3) / 4 * 4, kVector = 16 / sizeof(T);
  arguments.channels = GroupChannels(problem, Operator::forward, C);
  const int64_t weights = arguments.channels.sources * arguments.depth.axis.most_taps() * int64_t{C} * kWeights;
  const int64_t group_bytes = int64_t{C} * kGroup * S * arguments.destination_w * static_cast<int64_t>(sizeof(T));
  if (weights * static_cast<int64_t>(sizeof(Accumulator<T>)) > kWeightBytes || group_bytes > kTileBytes) return false;
  arguments.weight_bytes = static_cast<size_t>(weights) * sizeof(Accumulator<T>);
  arguments.first_h = arguments.padding_h / S;
  arguments.first_w = arguments.padding_w / S;
  arguments.groups = ((arguments.destination_h - 1 + arguments.padding_h) / S - arguments.first_h) / kGroup + 1;
  arguments.columns = (arguments.destination_w - 1 + arguments.padding_w) / S - arguments.first_w + 1;
  arguments.by_columns = Divisor<int32_t>(arguments.columns);
  // Blocks of one size, of as many whole rows as may be.
  const int most_groups = static_cast<int>(kTileBytes / group_bytes);
  arguments.tiles = (arguments.groups + most_groups - 1) / most_groups;
  arguments.tile_groups = (arguments.groups + arguments.tiles - 1) / arguments.tiles;
  arguments.tiles = (arguments.groups + arguments.tile_groups - 1) / arguments.tile_groups;
  arguments.tile_pitch =
      (arguments.tile_groups * kGroup * S * arguments.destination_w + 2 * kVector - 2) / kVector * kVector;
  arguments.blocks = problem.batch * arguments.channels.groups * arguments.channels.blocks *
                     arguments.depth.destination * arguments.tiles;
  const size_t shared_bytes = arguments.weight_bytes + C * arguments.tile_pitch * sizeof(T);
  const int items = arguments.tile_groups * arguments.columns;
  const int threads = std::clamp((items + 31) / 32 * 32, 32, kThreads);
  launch("depthwise upsampling", upsample<T, S, K, C>, grid_of(arguments.blocks), threads, shared_bytes, stream,
         arguments);
  return true;
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

  // Cuts the narrow volume into tiles of `rows` x `columns`, and its depth into chunks.
  void cut(int rows, int columns) {
    constexpr int kPlanes = 16;
    width_tiles = (narrow_w + columns - 1) / columns;
    tiles = width_tiles * ((narrow_h + rows - 1) / rows);
    tile_blocks = (tiles + kWarps - 1) / kWarps;
    chunks = (narrow_d + kPlanes - 1) / kPlanes;
    planes = (narrow_d + chunks - 1) / chunks;
    chunks = (narrow_d + planes - 1) / planes;
    by_width_tiles = Divisor<int32_t>(width_tiles);
  }
};

// How a warp walks through the volumes. Its lanes hold neighbouring segments of S wide columns: lane l those from
// S * (first + l) - padding on. Narrow column q takes tap j from element j % S of segment q + j / S, so a warp holds
// all that 33 - M narrow columns meet, and each of its lanes reads its own segment alone. Along height a lane has
// kGroup narrow rows and the wide rows that they meet, and it goes down through the planes, from which it reads every
// wide element once, for the M_D narrow planes that meet it.
template <int S_D, int K_D, int S, int K, int C = 1>
struct Walk {
  static constexpr int M_D = (K_D + S_D - 1) / S_D, M = (K + S - 1) / S;
  static constexpr int kGroup = C > 1 ? 2 : 4;        // as registers allow
  static constexpr int kRows = S * (kGroup - 1) + K;  // wide rows
  static constexpr int kColumns = 33 - M;             // narrow columns of a warp
  static constexpr int kPitch = K <= 2 ? K : (K + 3) / 4 * 4;
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
  int64_t blocks;
};

// The narrow volume from the wide one. A lane adds up what its own segment gives to narrow columns q, q - 1, ...; the
// lanes exchange these sums in the end. A block's 8 warps take neighbouring tiles of the same planes, so that the rows
// they share come from the L1 cache, and every wide element from memory hardly more than once for each C channels.
template <class T, int S_D, int K_D, int S, int K, int C>
__global__ void __launch_bounds__(kThreads, resident_blocks<T>(S == 1                     ? (C == 1 ? 2 : 1)
                                                               : C == 1 && sizeof(T) == 4 ? 3
                                                                                          : 2))
    correlate(const __grid_constant__ CorrelatingArguments<T> in) {
  using Sum = Accumulator<T>;
  using Shape = Walk<S_D, K_D, S, K, C>;
  constexpr int M_D = Shape::M_D, M = Shape::M, kGroup = Shape::kGroup;
  constexpr int kTaps = K_D * K * K, kWeights = K_D * K * Shape::kPitch;  // of a pair of channels
  extern __shared__ __align__(16) unsigned char shared[];
  Sum* const weights = reinterpret_cast<Sum*>(shared);  // source channel, then destination channel
  const Correlation& shape = in.shape;
  const int64_t wide_plane = static_cast<int64_t>(shape.wide_h) * shape.wide_w;
  const int64_t narrow_plane = static_cast<int64_t>(shape.narrow_h) * shape.narrow_w;
  for (int64_t block = blockIdx.x; block < in.blocks; block += gridDim.x) {
    int64_t rest = block / shape.tile_blocks;
    const int tile = static_cast<int>(block - rest * shape.tile_blocks) * kWarps + static_cast<int>(threadIdx.x / 32);
    const int64_t which = rest / shape.chunks;
    const int begin = static_cast<int>(rest - which * shape.chunks) * shape.planes;
    const int end = smaller(begin + shape.planes, shape.narrow_d);
    const ChannelShare channels(in.channels, which, C);
    __syncthreads();
    for (int i = threadIdx.x; i < in.channels.sources * C * kTaps; i += kThreads) {
      const int tap = i % kTaps, c = i / kTaps % C, source = i / kTaps / C;
      Sum w = 0;
      if (c < channels.live) {
        w = static_cast<Sum>(in.weight[channels.weight + source * in.channels.weight_source +
                                       c * in.channels.weight_destination + (in.reversed ? kTaps - 1 - tap : tap)]);
      }
      weights[i / kTaps * kWeights + tap / K * Shape::kPitch + tap % K] = w;
    }
    __syncthreads();
    if (tile >= shape.tiles) continue;
    const TilePosition at = tile_position<Shape, S>(shape, tile);
    const int64_t wide_volume = shape.wide_d * wide_plane, narrow_volume = shape.narrow_d * narrow_plane;
    const T* const source = in.source + channels.source * wide_volume;
    T* const destination = in.destination + channels.destination * narrow_volume;
    const bool stores = threadIdx.x % 32 < Shape::kColumns && at.column < shape.narrow_w;

    Sum sum[C][M_D][kGroup][M] = {};  // of narrow plane m - a, row b and column `at.column` - s
    for (int m = begin; m < end + M_D - 1; ++m) {
#pragma unroll 1
      for (int e_d = 0; e_d < S_D; ++e_d) {
        const int plane = S_D * m - shape.padding_d + e_d;
        if (static_cast<unsigned>(plane) >= static_cast<unsigned>(shape.wide_d)) continue;
        const Sum* w = weights;
#pragma unroll 1
        for (int channel = 0; channel < in.channels.sources; ++channel) {
          Sum wide[Shape::kRows][S];
          load_wide<T, Shape, S>(shape, at, source + channel * wide_volume + plane * wide_plane, wide);
#pragma unroll
          for (int c = 0; c < C; ++c, w += kWeights) {
#pragma unroll
            for (int a = 0; a < M_D; ++a) {
              if (e_d + S_D * a >= K_D) continue;
#pragma unroll
              for (int j_h = 0; j_h < K; ++j_h) {
#pragma unroll
                for (int j_w = 0; j_w < K; ++j_w) {
                  const Sum factor = w[((e_d + S_D * a) * K + j_h) * Shape::kPitch + j_w];
#pragma unroll
                  for (int b = 0; b < kGroup; ++b) sum[c][a][b][j_w / S] += factor * wide[S * b + j_h][j_w % S];
                }
              }
            }
          }
        }
      }
      // Narrow plane m - (M_D - 1) is complete.
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const bool live = m - (M_D - 1) >= begin && stores && c < channels.live;
        const Sum bias =
            in.bias == nullptr || c >= channels.live ? Sum(0) : static_cast<Sum>(in.bias[channels.bias + c]);
        T* const row = destination + c * narrow_volume + (m - (M_D - 1)) * narrow_plane +
                       static_cast<int64_t>(at.row) * shape.narrow_w + at.column;
#pragma unroll
        for (int b = 0; b < kGroup; ++b) {
          Sum result = sum[c][M_D - 1][b][0] + bias;
#pragma unroll
          for (int s = 1; s < M; ++s) result += __shfl_down_sync(0xffffffffu, sum[c][M_D - 1][b][s], s);
          if (live && at.row + b < shape.narrow_h) row[b * shape.narrow_w] = static_cast<T>(result);
#pragma unroll
          for (int s = 0; s < M; ++s) {
#pragma unroll
            for (int a = M_D - 1; a > 0; --a) sum[c][a][b][s] = sum[c][a - 1][b][s];
            sum[c][0][b][s] = 0;
          }
        }
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

// Calls use(Walk) for the geometries that the walk is compiled for; false for
// others.
template <int C, class Use>
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
  if (is(2, 2)) return use(Walk<2, 2, 2, 2, C>());
  if (is(2, 3)) return use(Walk<2, 3, 2, 3, C>());
  if (is(2, 4)) return use(Walk<2, 4, 2, 4, C>());
  if (is(1, 3)) return use(Walk<1, 3, 1, 3, C>());
  return false;
}

// Products that one sum may add up, which bounds its error.
constexpr int kMostProducts = 1024;

// Whether the kernel takes the problem; its weights must fit in shared memory.
template <class T, int S_D, int K_D, int S, int K, int C>
bool launch_correlate(Walk<S_D, K_D, S, K, C>, CorrelatingArguments<T> arguments, int64_t batch, cudaStream_t stream) {
  using Shape = Walk<S_D, K_D, S, K, C>;
  const int64_t weight_bytes =
      int64_t{arguments.channels.sources} * C * K_D * K * Shape::kPitch * static_cast<int64_t>(sizeof(Accumulator<T>));
  if (weight_bytes > kWeightBytes || arguments.channels.sources * K_D * K * K > kMostProducts) return false;
  arguments.shape.cut(Shape::kGroup, Shape::kColumns);
  arguments.blocks = batch * arguments.channels.groups * arguments.channels.blocks * arguments.shape.chunks *
                     arguments.shape.tile_blocks;
  launch("depthwise correlation", correlate<T, S_D, K_D, S, K, C>, grid_of(arguments.blocks), kThreads,
         static_cast<size_t>(weight_bytes), stream, arguments);
  return true;
}

template <class T, int C>
bool correlate(const Problem& problem, Operator op, const T* source, const T* weight, const T* bias, T* destination,
               cudaStream_t stream) {
  const bool reversed = op == Operator::forward;
  if (reversed && problem.stride[0] != 1) return false;
  CorrelatingArguments<T> arguments{
      Correlation(problem, reversed), GroupChannels(problem, op, C), source, weight, bias, destination, reversed, 0};
  return with_walk<C>(problem, [&](auto walk) { return launch_correlate<T>(walk, arguments, problem.batch, stream); });
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
  return with_walk<1>(
      problem, [&](auto walk) { return launch_correlate_reduce<T>(walk, arguments, problem.batch, parts, stream); });
}

// ---- every other geometry, and NDHWC -------------------------------------------------------------------------------

// Neighbouring elements that a thread loads or stores at once.
template <class T, int Width>
struct alignas(sizeof(T) * Width) Elements {
  T element[Width];
};

// How blocks share out the channels: one by one in NCDHW, else as many as keep whole warps busy.
struct ChannelBlocks {
  int width = 1;  // channels that a thread takes at once
  int size = 1;   // channels of a block
  int64_t count = 1;
  Divisor<int32_t> by_vectors;  // of a block

  // `vector` is how many elements fill 16 bytes, and `pointers` tells whether the tensors are aligned to that.
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

template <class T, class Index>
struct GatherArguments {
  AxisGather<Index> depth, height, width;
  Divisor<Index> by_height, by_width;  // of the destination
  const T* source;
  const T* weight;
  const T* bias;
  T* destination;
  VolumeSteps source_steps, destination_steps;
  ChannelBlocks channel_blocks;
  int64_t channels, taps, voxels;  // of the destination
  int64_t chunks;                  // blocks of one sample and channel block
  bool keeps_weights;              // in shared memory
  int64_t blocks;
};

// Voxels of a block for each that its threads take at once.
constexpr int kRounds = 8;

// A thread makes one destination voxel of `Width` neighbouring channels, tap by tap: the fallback for every geometry.
// Sources come through the L1 cache, coalesced along the width (NCDHW) or along the channels (NDHWC), weights from
// shared memory, laid out as channels lie in the volume. Bound by these loads, two for each tap.
template <class T, class Index, int Width>
__global__ void __launch_bounds__(kThreads, sizeof(Index) == 8 ? 2 : 3)
    gather_any(const __grid_constant__ GatherArguments<T, Index> in) {
  using Sum = Accumulator<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  Sum* const weights = reinterpret_cast<Sum*>(shared);
  const int block_channels = in.channel_blocks.size, vectors = block_channels / Width;
  const int64_t chunk_voxels = static_cast<int64_t>(kThreads / vectors) * kRounds;
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
    const int voxel_lane = in.channel_blocks.by_vectors.quotient(static_cast<int>(threadIdx.x));
    const int channel = (static_cast<int>(threadIdx.x) - voxel_lane * vectors) * Width;
    const int voxel_lanes = kThreads / vectors;
    if (channel >= channels || voxel_lane >= voxel_lanes) continue;
    const T* const source =
        in.source + sample * in.source_steps.sample + (first_channel + channel) * in.source_steps.channel;
    T* const destination = in.destination + sample * in.destination_steps.sample +
                           (first_channel + channel) * in.destination_steps.channel;
    const int64_t end = smaller((chunk + 1) * chunk_voxels, in.voxels);
    for (int64_t at = chunk * chunk_voxels + voxel_lane; at < end; at += voxel_lanes) {
      const Index voxel = static_cast<Index>(at);
      const Index line = in.by_width.quotient(voxel), z = in.by_height.quotient(line);
      const auto walk = [](const AxisGather<Index>& axis, Index position, Index& base) {
        const Index q = axis.forward ? axis.axis.by_stride.quotient(position) : position;
        base = q * axis.source_stride;
        return axis.contacts(position - q * axis.destination_stride, q, q);
      };
      Index base_d, base_h, base_w;
      const Contacts<Index> d = walk(in.depth, z, base_d);
      const Contacts<Index> h = walk(in.height, line - z * in.height.destination, base_h);
      const Contacts<Index> w = walk(in.width, voxel - line * in.width.destination, base_w);
      Sum sum[Width];
#pragma unroll
      for (int i = 0; i < Width; ++i) {
        sum[i] = in.bias == nullptr ? Sum(0) : static_cast<Sum>(in.bias[first_channel + channel + i]);
      }
      for (Index a = 0; a < d.count; ++a) {
        for (Index b = 0; b < h.count; ++b) {
          const Index tap_row = (d.tap + a * d.tap_step) * in.height.axis.kernel + h.tap + b * h.tap_step;
          const Index source_row =
              (base_d + d.offset + a * d.offset_step) * in.height.source + base_h + h.offset + b * h.offset_step;
          const T* from =
              source + (static_cast<int64_t>(source_row) * in.width.source + base_w + w.offset) * in.source_steps.voxel;
          Index tap = tap_row * in.width.axis.kernel + w.tap;
#pragma unroll 2
          for (Index c = 0; c < w.count; ++c) {
            const auto x = *reinterpret_cast<const Elements<T, Width>*>(from);
#pragma unroll
            for (int i = 0; i < Width; ++i) {
              const Sum factor = in.keeps_weights
                                     ? weights[tap * block_channels + channel + i]
                                     : static_cast<Sum>(in.weight[(first_channel + channel + i) * in.taps + tap]);
              sum[i] += factor * static_cast<Sum>(x.element[i]);
            }
            from += w.offset_step * in.source_steps.voxel;
            tap += w.tap_step;
          }
        }
      }
      Elements<T, Width> result;
#pragma unroll
      for (int i = 0; i < Width; ++i) result.element[i] = static_cast<T>(sum[i]);
      *reinterpret_cast<Elements<T, Width>*>(destination + at * in.destination_steps.voxel) = result;
    }
  }
}

template <class T, class Index>
struct ReduceArguments {
  Geometry<Index> geometry;
  const T* grad_output;
  const T* input;
  Accumulator<T>* partials;
  VolumeSteps input_steps, output_steps;
  ChannelBlocks channel_blocks;
  int64_t channels, taps, tap_groups, parts;
  int64_t items, share;  // voxels of all samples, and those of a part
  int64_t blocks;
  int run_length;
};

// Products that a thread sums before it folds them into a second sum, which bounds the error of long sums; float32 has
// its own.
constexpr int kRunLength = 64;

// Taps that a thread sums at once.
constexpr int kTapGroup = 4;

// A block takes one part's voxels, a block of channels and kTapGroup taps; a thread every so-many-th of these voxels
// and `Width` neighbouring channels. The threads' sums are added up by a tree. Bound by the gathering of the outputs,
// one load for each voxel and tap.
template <class T, class Index, int Width>
__global__ void __launch_bounds__(kThreads) reduce_any(const __grid_constant__ ReduceArguments<T, Index> in) {
  using Sum = Accumulator<T>;
  __shared__ Sum sums[kThreads];
  const Geometry<Index>& g = in.geometry;
  const int block_channels = in.channel_blocks.size, vectors = block_channels / Width;
  const int voxel_lanes = kThreads / vectors;
  const int voxel_lane = in.channel_blocks.by_vectors.quotient(static_cast<int>(threadIdx.x));
  const int channel = (static_cast<int>(threadIdx.x) - voxel_lane * vectors) * Width;
  int first_half = 1;  // of the tree
  while (2 * first_half < voxel_lanes) first_half *= 2;
  for (int64_t block = blockIdx.x; block < in.blocks; block += gridDim.x) {
    int64_t rest = block / in.tap_groups;
    const int64_t first_tap = (block - rest * in.tap_groups) * kTapGroup;
    const int64_t part = rest / in.channel_blocks.count;
    const int64_t first_channel = (rest - part * in.channel_blocks.count) * block_channels;
    const bool works = voxel_lane < voxel_lanes && first_channel + channel < in.channels;
    // The output position that input 0 and each tap meet.
    Index tap_d[kTapGroup], tap_h[kTapGroup], tap_w[kTapGroup];
#pragma unroll
    for (int t = 0; t < kTapGroup; ++t) {
      const Index tap = static_cast<Index>(smaller(first_tap + t, in.taps - 1));
      const Index line = g.by_kernel_width.quotient(tap), plane = g.by_kernel_height.quotient(line);
      tap_d[t] = g.depth.output_at(0, plane);
      tap_h[t] = g.height.output_at(0, line - plane * g.height.kernel);
      tap_w[t] = g.width.output_at(0, tap - line * g.width.kernel);
    }
    const T* const input = in.input + (first_channel + channel) * in.input_steps.channel;
    const T* const output = in.grad_output + (first_channel + channel) * in.output_steps.channel;
    const int64_t begin = smaller(part * in.share, in.items), end = smaller(begin + in.share, in.items);
    Sum sum[kTapGroup][Width] = {}, run[kTapGroup][Width] = {};
    int length = 0;
    for (int64_t item = works ? begin + voxel_lane : end; item < end; item += voxel_lanes) {
      const int64_t sample = item / g.input_voxels;
      const Index voxel = static_cast<Index>(item - sample * g.input_voxels);
      const Index line = g.by_input_width.quotient(voxel), plane = g.by_input_height.quotient(line);
      const Index d = plane * g.depth.stride, h = (line - plane * g.height.input) * g.height.stride,
                  w = (voxel - line * g.width.input) * g.width.stride;
      const auto x = *reinterpret_cast<const Elements<T, Width>*>(input + sample * in.input_steps.sample +
                                                                  voxel * in.input_steps.voxel);
      const T* const volume = output + sample * in.output_steps.sample;
#pragma unroll
      for (int t = 0; t < kTapGroup; ++t) {
        const Index o_d = d + tap_d[t], o_h = h + tap_h[t], o_w = w + tap_w[t];
        if (o_d < 0 || o_d >= g.depth.output || o_h < 0 || o_h >= g.height.output || o_w < 0 || o_w >= g.width.output) {
          continue;
        }
        const int64_t at = (static_cast<int64_t>(o_d) * g.height.output + o_h) * g.width.output + o_w;
        const auto y = *reinterpret_cast<const Elements<T, Width>*>(volume + at * in.output_steps.voxel);
#pragma unroll
        for (int i = 0; i < Width; ++i) run[t][i] += static_cast<Sum>(x.element[i]) * static_cast<Sum>(y.element[i]);
      }
      if (++length == in.run_length) {
        length = 0;
#pragma unroll
        for (int t = 0; t < kTapGroup; ++t) {
#pragma unroll
          for (int i = 0; i < Width; ++i) {
            sum[t][i] += run[t][i];
            run[t][i] = 0;
          }
        }
      }
    }
#pragma unroll
    for (int t = 0; t < kTapGroup; ++t) {
#pragma unroll
      for (int i = 0; i < Width; ++i) {
        __syncthreads();
        sums[threadIdx.x] = sum[t][i] + run[t][i];
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
void gather_depthwise(const Problem& problem, Operator op, const T* source, const T* weight, const T* bias,
                      T* destination, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  constexpr int64_t kWeightBytes = 32 * 1024;
  const bool forward = op == Operator::forward;
  const int64_t weight_bytes = problem.taps() * static_cast<int64_t>(sizeof(Accumulator<T>));
  GatherArguments<T, Index> arguments{
      AxisGather<Index>(problem, op, 0),
      AxisGather<Index>(problem, op, 1),
      AxisGather<Index>(problem, op, 2),
      Divisor<Index>(),
      Divisor<Index>(),
      source,
      weight,
      bias,
      destination,
      VolumeSteps(),
      VolumeSteps(),
      ChannelBlocks(problem, kVector, is_vector_aligned(source, destination), kWeightBytes / weight_bytes)};
  arguments.by_height = Divisor<Index>(arguments.height.destination);
  arguments.by_width = Divisor<Index>(arguments.width.destination);
  arguments.channels = problem.in_channels;
  arguments.taps = problem.taps();
  arguments.voxels = forward ? problem.output_voxels() : problem.input_voxels();
  arguments.source_steps =
      VolumeSteps(problem.layout, problem.in_channels, forward ? problem.input_voxels() : problem.output_voxels());
  arguments.destination_steps = VolumeSteps(problem.layout, problem.in_channels, arguments.voxels);
  const ChannelBlocks& channels = arguments.channel_blocks;
  arguments.keeps_weights = channels.size * weight_bytes <= kWeightBytes;
  const int64_t chunk_voxels = static_cast<int64_t>(kThreads / (channels.size / channels.width)) * kRounds;
  arguments.chunks = (arguments.voxels + chunk_voxels - 1) / chunk_voxels;
  arguments.blocks = problem.batch * channels.count * arguments.chunks;
  const size_t shared_bytes = arguments.keeps_weights ? static_cast<size_t>(channels.size * weight_bytes) : 0;
  const auto kernel = channels.width > 1 ? gather_any<T, Index, kVector> : gather_any<T, Index, 1>;
  launch("depthwise gather", kernel, grid_of(arguments.blocks), kThreads, shared_bytes, stream, arguments);
}

template <class T, class Index>
void reduce_depthwise(const Problem& problem, int64_t parts, const T* grad_output, const T* input,
                      Accumulator<T>* partials, cudaStream_t stream) {
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
  arguments.tap_groups = (arguments.taps + kTapGroup - 1) / kTapGroup;
  arguments.parts = parts;
  arguments.items = problem.batch * problem.input_voxels();
  arguments.share = (arguments.items + parts - 1) / parts;
  arguments.blocks = parts * arguments.channel_blocks.count * arguments.tap_groups;
  const int voxel_lanes = kThreads / (arguments.channel_blocks.size / arguments.channel_blocks.width);
  arguments.run_length = run_length<T>(arguments.share / voxel_lanes, kRunLength);
  const auto kernel = arguments.channel_blocks.width > 1 ? reduce_any<T, Index, kVector> : reduce_any<T, Index, 1>;
  launch("depthwise reduction", kernel, grid_of(arguments.blocks), kThreads, 0, stream, arguments);
}

// Whether 32-bit indices reach every voxel of a volume, times the channels where those lie between voxels.
bool fits_32_bits(const Problem& problem) {
  const int64_t between = problem.layout == Layout::ncdhw ? 1 : std::max(problem.in_channels, problem.out_channels);
  return Geometry<int32_t>::fits(problem) && std::max(problem.in_channels, problem.out_channels) < (int64_t{1} << 30) &&
         std::max(problem.input_voxels(), problem.output_voxels()) * between < (int64_t{1} << 30);
}

}  // namespace

template <class T>
bool gather_narrow_groups(const Problem& problem, Operator op, const T* source, const T* weight, const T* bias,
                          T* destination, cudaStream_t stream) {
  const bool forward = op == Operator::forward;
  const int64_t destinations = forward ? problem.group_out_channels() : problem.group_in_channels();
  if (destinations > 4 || !fits_32_bits(problem)) return false;
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
void gather_depthwise(const Problem& problem, Operator op, const T* source, const T* weight, const T* bias,
                      T* destination, cudaStream_t stream) {
  if (!fits_32_bits(problem)) {
    return gather_depthwise<T, int64_t>(problem, op, source, weight, bias, destination, stream);
  }
  if (gather_narrow_groups<T>(problem, op, source, weight, bias, destination, stream)) return;
  gather_depthwise<T, int32_t>(problem, op, source, weight, bias, destination, stream);
}

template <class T>
void reduce_depthwise(const Problem& problem, int64_t parts, const T* grad_output, const T* input,
                      Accumulator<T>* partials, cudaStream_t stream) {
  if (!fits_32_bits(problem)) {
    return reduce_depthwise<T, int64_t>(problem, parts, grad_output, input, partials, stream);
  }
  if (correlate_reduce<T>(problem, parts, grad_output, input, partials, stream)) return;
  reduce_depthwise<T, int32_t>(problem, parts, grad_output, input, partials, stream);
}

#define CONVT3D_INSTANTIATE(T)                                                                                  \
  template bool gather_narrow_groups(const Problem&, Operator, const T*, const T*, const T*, T*, cudaStream_t); \
  template void gather_depthwise(const Problem&, Operator, const T*, const T*, const T*, T*, cudaStream_t);     \
  template void reduce_depthwise(const Problem&, int64_t, const T*, const T*, Accumulator<T>*, cudaStream_t);
CONVT3D_INSTANTIATE(double)
CONVT3D_INSTANTIATE(float)
CONVT3D_INSTANTIATE(__half)
CONVT3D_INSTANTIATE(__nv_bfloat16)
#undef CONVT3D_INSTANTIATE

}  // namespace convt3d::direct
