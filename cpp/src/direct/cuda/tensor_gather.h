// The gather on tensor cores with mma.sync, for GPUs from compute capability 8.0 on (see direct/gather.h): forward and
// grad_input as an implicit matrix product. On 9.0, direct/cuda/pipelined_gather.h does this faster.
//
// Thread mapping: a block of `warpgroups` times 128 threads makes the tile's 64 * warpgroups * kRowBlocks positions,
// for kSlots residues and kColumns channels. A warp holds kRowBlocks times 16 positions, all slots and all columns, in
// registers. Source and weights of a stage lie in shared memory as [16 bytes of channels][position or column][16
// bytes], so that any shifted window of positions is a set of 16-byte rows: one ldmatrix loads a fragment, whatever the
// step. Stages are double-buffered: the next one's source is on its way to registers, and its weights to shared memory,
// while the present one is multiplied.
//
// Traffic: the source once for every depth offset and block of columns or residues, plus its halo; the weights once for
// every tile (from L2); the destination once. Floor: 2 * taps * channels multiplications and additions a destination,
// or its bytes. Counters (H200, with wgmma in mma.sync's place) said that it is bound by taking turns: the warps of a
// block load and store a stage together, then multiply together.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <iterator>
#include <utility>

#include "cuda/launch.h"
#include "cuda/ptx.h"
#include "direct/cuda/gather_source.h"
#include "direct/cuda/kernels.h"

namespace convt3d::direct {

template <class T>
struct GatherArguments : GatherOperands<T> {
  bool channels_first;
  bool vector_loads;  // NDHWC: 16 bytes of channels are adjacent and aligned
  bool pair_stores;   // NDHWC: so are pairs of the destination's channels
  TensorGather gather;
};

// d += a @ b with 32 bytes of b's rows; its columns lie 16 bytes apart, halves of its rows kColumns * 16. `b` is its
// address in 16 bytes.
template <class T, int kColumns>
__device__ __forceinline__ void multiply(float (&d)[kColumns / 2], const uint32_t (&a)[4], uint32_t b) {
  const int lane = threadIdx.x % 32;
  const uint32_t row = (b + (lane / 8 % 2) * kColumns + lane % 8) * 16;
#pragma unroll
  for (int column = 0; column < kColumns; column += 8) {
    uint32_t fragment[2];
    ptx::load_matrices(fragment, row + column * 16);
    float sums[4] = {d[column / 2], d[column / 2 + 1], d[column / 2 + 2], d[column / 2 + 3]};
    ptx::mma<T>(sums, a, fragment);
#pragma unroll
    for (int i = 0; i < 4; ++i) d[column / 2 + i] = sums[i];
  }
}

// Which stage, channels and part a block is at.
struct GatherCursor {
  int part = 0, stage = 0, channels = 0;

  __device__ __forceinline__ void advance(int parts, int stages) {
    if (++part < parts) return;
    part = 0;
    if (++stage < stages) return;
    stage = 0;
    ++channels;
  }
};

template <class T>
constexpr int kMostUnits = most_units(sizeof(T));
constexpr int kNowhere = -(1 << 29);

template <class T, int kSlots, int kColumns, int kRowBlocks, int kSteps, bool kExact>
__global__ void __launch_bounds__(512, 1) gather_tensor_kernel(const __grid_constant__ GatherArguments<T> arguments) {
  constexpr int kChunkChannels = 16 / int{sizeof(T)};
  CONVT3D_DYNAMIC_SHARED(128, shared);
  const TensorGather& gather = arguments.gather;
  const GatherVolume &from = arguments.from, &to = arguments.to;
  const int chunks = 2 * kSteps * gather.channel_groups;  // of 16 bytes of channels, in a stage
  const int tap_bytes = 16 * kColumns * chunks;
  const int threads = blockDim.x, thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int positions = threads / 2 * kRowBlocks;

  // Blocks that read the same source are neighbours: columns, then residues, then groups, tiles and samples.
  int index = static_cast<int>(blockIdx.x);
  const int column_block = take_digit(index, gather.by_columns), phase_block = take_digit(index, gather.by_phases);
  const int group = take_digit(index, gather.by_groups);
  int first[3];  // position q of the tile
#pragma unroll
  for (int axis = 2; axis >= 0; --axis) first[axis] = take_digit(index, gather.by_tiles[axis]) * gather.tile[axis];
  const int64_t sample = static_cast<int64_t>(index) * gather.samples;
  const PhaseBlock& phase = gather.tables.phases[phase_block];
  const int tile_positions = gather.samples * gather.tile[0] * gather.tile[1] * gather.tile[2];
  const int64_t left_samples = arguments.batch - sample;

  // Shared memory: two stages (later the way out), where each unit comes from, where each position goes.
  const int source_positions = gather.source_positions;
  const uint32_t stage_bytes = static_cast<uint32_t>(gather.source_stage_bytes + gather.weight_stage_bytes);
  int2* unit_places = reinterpret_cast<int2*>(shared + gather.shared_bytes) - (gather.units * threads + positions);
  int2* position_places = unit_places + gather.units * threads;
  const uint32_t stages_address = ptx::shared_address(shared);

  // A unit is 16 bytes of channels at one source position: its offset in elements, and its depth and chunk.
  const int plane_stride = from.size[1] * from.size[2] * from.voxel_stride;
  for (int unit = thread; unit < gather.units * threads; unit += threads) {
    const int chunk = gather.by_source_positions.quotient(unit), place = unit - chunk * source_positions;
    const int line = gather.by_row_pitch.quotient(place), column = place - line * gather.row_pitch;
    const int planes = gather.by_rows.quotient(line), row = line - planes * gather.rows;
    const int member = gather.by_sample_planes.quotient(planes), plane = planes - member * gather.tile[0];
    const int residue = gather.by_residue_pitch.quotient(column);
    const int width =
        (first[2] + column - residue * gather.residue_pitch) * gather.source_stride[2] + residue + phase.origin[1];
    const int height = first[1] * gather.source_stride[1] + phase.origin[0] + row;
    const int depth = (first[0] + plane) * gather.source_stride[0];
    const bool inside = chunk < chunks && member < left_samples && width >= 0 && width < from.size[2] && height >= 0 &&
                        height < from.size[1];
    unit_places[unit] = make_int2(member * static_cast<int>(from.sample_stride) + depth * plane_stride +
                                      (height * from.size[2] + width) * from.voxel_stride +
                                      chunk * kChunkChannels * from.channel_stride,
                                  inside ? depth * 16 + chunk : kNowhere);
  }
  // The place of a position of the tile along each axis; returns its sample's number in the tile.
  const auto unfold = [&](int position, int (&along)[3]) {
    const int row = gather.by_tile[2].quotient(position), plane = gather.by_tile[1].quotient(row);
    const int member = gather.by_sample_planes.quotient(plane);
    along[0] = plane - member * gather.tile[0];
    along[1] = row - plane * gather.tile[1];
    along[2] = position - row * gather.tile[2];
    return member;
  };
  // A position's first destination voxel, and how many residues along each axis lie inside the volume.
  for (int position = thread; position < positions; position += threads) {
    int along[3], voxel = 0, inside = 0;
    const int member = unfold(position, along);
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) {
      const int begin = (first[axis] + along[axis]) * gather.destination_stride[axis];
      voxel = voxel * to.size[axis] + begin;
      inside = inside << 8 | max(0, min(gather.destination_stride[axis], to.size[axis] - begin));
    }
    voxel += member * to.sample_voxels;
    position_places[position] = make_int2(voxel, position < tile_positions && member < left_samples ? inside : 0);
  }
  __syncthreads();

  using Sums = float[kRowBlocks][kSlots][kColumns / 2];
  const auto for_each_sum = [](const auto& body) {
#pragma unroll
    for (int block = 0; block < kRowBlocks; ++block) {
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
#pragma unroll
        for (int i = 0; i < kColumns / 2; ++i) body(block, slot, i);
      }
    }
  };
  Sums sums;
  const int first_channel = column_block * kColumns;
  const int channels = min(kColumns, to.group_channels - first_channel);
  // Sums begin with the bias of their channel.
  const auto bias_of = [&](int i) {
    const int channel = i / 4 * 8 + lane % 4 * 2 + i % 2;
    return arguments.bias == nullptr || channel >= channels
               ? 0.0f
               : static_cast<float>(arguments.bias[group * to.group_channels + first_channel + channel]);
  };
  for_each_sum([&](int block, int slot, int i) { sums[block][slot][i] = kExact ? 0.0f : bias_of(i); });
  // Tensor cores cut off what their sums cannot hold. Where that matters, each stage is added up by itself, then
  // rounded.
  float totals[kExact ? kRowBlocks : 1][kExact ? kSlots : 1][kExact ? kColumns / 2 : 1];
  if constexpr (kExact) for_each_sum([&](int block, int slot, int i) { totals[block][slot][i] = bias_of(i); });

  // Where this lane's rows of the fragments begin, at shift 0.
  uint32_t rows[kRowBlocks];
#pragma unroll
  for (int block = 0; block < kRowBlocks; ++block) {
    int position = (block * (threads / 32) + warp) * 16 + lane % 16;
    if (position >= tile_positions) position = 0;
    int along[3];
    const int member = unfold(position, along);
    rows[block] = 16 * (((member * gather.tile[0] + along[0]) * gather.rows + along[1] * gather.source_stride[1]) *
                            gather.row_pitch +
                        along[2] + lane / 16 * source_positions);
  }

  const T* source = arguments.source + sample * from.sample_stride +
                    static_cast<int64_t>(group) * from.group_channels * from.channel_stride;
  const int64_t group_taps =
      (static_cast<int64_t>(group) * gather.column_blocks + column_block) * gather.channel_blocks * gather.taps;
  const int64_t low_bytes = gather.packed_bytes / 2;  // where the weights' low parts begin, if there are any

  Unit<T> units[kMostUnits<T>];
  const auto fetch_source = [&](const GatherCursor& cursor) {
    const GatherStage& stage = gather.tables.stages[phase.first_stage + cursor.stage];
    const int channel = cursor.channels * (chunks * kChunkChannels);
    const int left = from.group_channels - channel;
    const T* base = source + static_cast<int64_t>(channel) * from.channel_stride +
                    static_cast<int64_t>(stage.depth_offset) * plane_stride;
#pragma unroll
    for (int unit = 0; unit < kMostUnits<T>; ++unit) {
      if (unit >= gather.units) break;
      const int2 place = unit_places[unit * threads + thread];
      const int depth = (place.y >> 4) + stage.depth_offset, chunk_channel = (place.y & 15) * kChunkChannels;
      units[unit].clear();
      if (depth >= 0 && depth < from.size[0] && chunk_channel < left && place.y != kNowhere) {
        units[unit].load(base + place.x, from.channel_stride, left - chunk_channel, arguments.vector_loads);
      }
    }
  };
  const auto store_source = [&](const GatherCursor& cursor, int buffer) {
    uint4* pieces = reinterpret_cast<uint4*>(shared + buffer * stage_bytes);
#pragma unroll
    for (int unit = 0; unit < kMostUnits<T>; ++unit) {
      const int piece = unit * threads + thread;
      if (unit < gather.units && piece < chunks * source_positions) {
        pieces[piece] = units[unit].template finish<kExact>(arguments.vector_loads, cursor.part == 2);
      }
    }
  };
  const auto fetch_weights = [&](const GatherCursor& cursor, int buffer) {
    const GatherStage& stage = gather.tables.stages[phase.first_stage + cursor.stage];
    const unsigned char* from_packed = arguments.packed + (cursor.part == 1 ? low_bytes : 0) +
                                       (group_taps + cursor.channels * gather.taps + stage.first_tap) * tap_bytes;
    const uint32_t address = stages_address + buffer * stage_bytes + static_cast<uint32_t>(gather.source_stage_bytes);
    for (int byte = thread * 16; byte < stage.taps * tap_bytes; byte += threads * 16) {
      ptx::copy_async(address + byte, from_packed + byte, true);
    }
    ptx::commit_copies();
  };

  // The fragments of one step are loaded while the products of the step before are under way.
  using Fragments = uint32_t[kRowBlocks][kSteps][4];
  const auto load_step = [&](Fragments& fragments, const GatherStep& step, uint32_t source_address) {
#pragma unroll
    for (int block = 0; block < kRowBlocks; ++block) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        ptx::load_matrices(fragments[block][k], source_address + rows[block] + step.shift + k * 32 * source_positions);
      }
    }
  };
  const auto multiply_slot = [&](const Fragments& fragments, int slot, uint32_t weights) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int block = 0; block < kRowBlocks; ++block) {
        multiply<T, kColumns>(sums[block][slot], fragments[block][k], weights + k * 2 * kColumns);
      }
    }
  };
  const auto multiply_step = [&](const Fragments& fragments, const GatherStep& step, uint32_t base) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      if (step.slots >> slot & 1) multiply_slot(fragments, slot, base + step.weights[slot]);
    }
  };
  // Adds the sums to their totals, and begins new ones. Too seldom, and what the tensor cores cut off shows; too often,
  // and the rounding of so many additions does: four products of 32 bytes lie in between.
  constexpr int kFoldedSteps = 4 / kSteps;
  const auto fold = [&]() {
    if constexpr (kExact) {
      for_each_sum([&](int block, int slot, int i) {
        totals[block][slot][i] += sums[block][slot][i];
        sums[block][slot][i] = 0.0f;
      });
    }
  };
  const auto finish_step = [&](int number) {
    if (kExact && number % kFoldedSteps == kFoldedSteps - 1) fold();
  };
  // While the products of one step are under way, the fragments of the next are loaded.
  const auto multiply_stage = [&](const GatherCursor& cursor, int buffer) {
    const GatherStage& stage = gather.tables.stages[phase.first_stage + cursor.stage];
    const uint32_t source_address = stages_address + buffer * stage_bytes;
    const uint32_t base = (source_address + static_cast<uint32_t>(gather.source_stage_bytes)) / 16;
    const GatherStep* steps = gather.tables.steps + stage.first_step;
    const int count = stage.steps;
    Fragments even, odd;
    GatherStep present_step = steps[0], next_step = steps[count > 1 ? 1 : 0];
    load_step(even, present_step, source_address);
    for (int number = 0; number < count; number += 2) {
      multiply_step(even, present_step, base);
      finish_step(number);
      if (number + 1 >= count) break;
      load_step(odd, next_step, source_address);
      present_step = steps[min(number + 2, count - 1)];
      multiply_step(odd, next_step, base);
      finish_step(number + 1);
      if (number + 2 < count) load_step(even, present_step, source_address);
      next_step = steps[min(number + 3, count - 1)];
    }
    fold();
  };

  constexpr int kParts = kExact ? 3 : 1;
  const int stages = phase.stages * gather.channel_blocks * kParts;
  GatherCursor present, next;
  for (int number = -1; number < stages; ++number) {
    const bool more = number + 1 < stages;
    if (more) {
      fetch_source(next);
      fetch_weights(next, (number + 1) & 1);
    }
    if (number >= 0) multiply_stage(present, number & 1);
    if (more) store_source(next, (number + 1) & 1);
    ptx::wait_for_copies<0>();
    __syncthreads();
    present = next;
    next.advance(kParts, phase.stages);
  }

  // The way out.
  if constexpr (kExact)
    for_each_sum([&](int block, int slot, int i) { sums[block][slot][i] = totals[block][slot][i]; });
  T* destination = arguments.destination + sample * to.sample_stride +
                   (static_cast<int64_t>(group) * to.group_channels + first_channel) * to.channel_stride;
  const int bits_w = gather.slot_bits[2], bits_h = gather.slot_bits[1];
  // The residues of a slot, and whether a position has a voxel there.
  const auto residue_of = [&](int slot, int axis) {
    const int number = axis == 2 ? slot : axis == 1 ? slot >> bits_w : slot >> (bits_w + bits_h);
    return phase.residue[axis] + (number & ((1 << gather.slot_bits[axis]) - 1));
  };
  const auto is_inside = [](int2 place, int depth, int height, int width) {
    return depth < (place.y >> 16) && height < (place.y >> 8 & 255) && width < (place.y & 255);
  };

  if (arguments.channels_first) {
    // Through shared memory, one row of slots after the other, so that a warp writes neighbouring voxels of a row.
    float* staging = reinterpret_cast<float*>(shared);
    const int slots_w = 1 << bits_w;
    const int run = positions << bits_w, pitch = run + 4;  // 4 words apart modulo 16: no two lanes meet in a bank
    // A thread keeps its voxels and goes through the channels; where there are more threads than voxels, they share.
    const bool shares = run < threads;
    const int first_row = shares && thread >= run ? 8 : 0, row_step = shares ? 16 : 8;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
#pragma unroll
      for (int block = 0; block < kRowBlocks; ++block) {
        const int position = (block * (threads / 32) + warp) * 16 + lane / 4;
        float* staged = staging + lane % 4 * 2 * pitch + (position << bits_w) + (slot & (slots_w - 1));
#pragma unroll
        for (int i = 0; i < kColumns / 2; ++i) {
          staged[(i / 4 * 8 + i % 2) * pitch + (i / 2 % 2 * 8 << bits_w)] = sums[block][slot][i];
        }
      }
      if (((slot + 1) & (slots_w - 1)) != 0) continue;
      __syncthreads();
      const int depth = residue_of(slot, 0), height = residue_of(slot, 1);
      const int offset = (depth * to.size[1] + height) * to.size[2];
      for (int element = shares ? thread & (run - 1) : thread; element < run; element += threads) {
        const int2 place = position_places[element >> bits_w];
        const int width = phase.residue[2] + (element & (slots_w - 1));
        if (!is_inside(place, depth, height, width)) continue;
        T* out = destination + (place.x + offset + width) + static_cast<int64_t>(first_row) * to.channel_stride;
        const float* staged = staging + first_row * pitch + element;
        for (int row = first_row; row < channels; row += row_step) {
          if (row + 8 <= channels) {
#pragma unroll
            for (int i = 0; i < 8; ++i)
              out[static_cast<int64_t>(i) * to.channel_stride] = static_cast<T>(staged[i * pitch]);
          } else {
            for (int i = 0; row + i < channels; ++i) {
              out[static_cast<int64_t>(i) * to.channel_stride] = static_cast<T>(staged[i * pitch]);
            }
          }
          out += static_cast<int64_t>(row_step) * to.channel_stride;
          staged += row_step * pitch;
        }
      }
      if (slot + 1 < kSlots) __syncthreads();
    }
    return;
  }
#pragma unroll
  for (int block = 0; block < kRowBlocks; ++block) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int2 place = position_places[(block * (threads / 32) + warp) * 16 + lane / 4 + half * 8];
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        const int depth = residue_of(slot, 0), height = residue_of(slot, 1), width = residue_of(slot, 2);
        if (!is_inside(place, depth, height, width)) continue;
        const int voxel = place.x + (depth * to.size[1] + height) * to.size[2] + width;
        T* row = destination + static_cast<int64_t>(voxel) * to.voxel_stride + lane % 4 * 2;
#pragma unroll
        for (int column = 0; column < kColumns; column += 8) {
          const int channel = column + lane % 4 * 2;
          const T low = static_cast<T>(sums[block][slot][column / 2 + half * 2]);
          const T high = static_cast<T>(sums[block][slot][column / 2 + half * 2 + 1]);
          if (arguments.pair_stores && channel + 1 < channels) {
            store_pair(row + column, low, high);
          } else {
            if (channel < channels) row[column] = low;
            if (channel + 1 < channels) row[column + 1] = high;
          }
        }
      }
    }
  }
}

// The weights in the order in which the kernel above takes them:
// [high, low][group][block of columns][block of channels][tap][16 bytes of channels][column][16 bytes].
// One thread makes 16 bytes. Bound by L2: the weights' own order has taps innermost.
template <class T>
__global__ void __launch_bounds__(256)
    pack_weights_kernel(const T* weight, unsigned char* packed, const __grid_constant__ TensorGather gather,
                        bool is_forward, bool channels_first, int sources, int destinations, int kernel_taps) {
  constexpr int kChannels = 16 / sizeof(T);
  const int64_t pieces = gather.packed_bytes / 16, piece = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (piece >= pieces) return;
  const bool low = gather.exact && piece >= pieces / 2;
  const int columns = gather.columns, chunks = 2 * gather.k_steps * gather.channel_groups;
  const auto taps = static_cast<int>(gather.taps);
  // Neighbouring threads read neighbouring weights: taps in NCDHW, channels in NDHWC.
  int64_t index = low ? piece - pieces / 2 : piece;
  const auto digit = [&index](int radix) {
    const auto remainder = static_cast<int>(index % radix);
    index /= radix;
    return remainder;
  };
  int number = 0;
  if (channels_first) number = digit(taps);
  const int column = digit(columns), chunk = digit(chunks);
  if (!channels_first) number = digit(taps);
  const int tap = gather.tap_order[number];
  const int64_t block = index;
  const int channel_block = digit(gather.channel_blocks);
  const int destination = digit(gather.column_blocks) * columns + column;
  const int64_t group = index;
  alignas(16) T values[kChannels];
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    const int source = (channel_block * chunks + chunk) * kChannels + i;
    values[i] = T(0.0f);
    if (source < sources && destination < destinations) {
      const int64_t in = is_forward ? group * sources + source : group * destinations + destination;
      const int out = is_forward ? destination : source, outs = is_forward ? destinations : sources;
      values[i] =
          weight[channels_first ? (in * outs + out) * kernel_taps + tap : (in * kernel_taps + tap) * outs + out];
    }
    if constexpr (sizeof(T) == 4) values[i] = tf32_part(values[i], low);
  }
  const int64_t place = ((block * taps + number) * chunks + chunk) * columns + column + (low ? pieces / 2 : 0);
  *reinterpret_cast<uint4*>(packed + place * 16) = *reinterpret_cast<const uint4*>(values);
}

// Launches the kernel of kTensorGathers[Entry], if that is the one that the arguments ask for.
template <size_t Entry, class T>
bool launch_entry(const GatherArguments<T>& arguments, cudaStream_t stream) {
  constexpr GatherConfiguration kEntry = kTensorGathers[Entry];
  const TensorGather& gather = arguments.gather;
  if (gather.slots != kEntry.slots || gather.columns != kEntry.columns || gather.row_blocks != kEntry.row_blocks ||
      gather.exact != kEntry.exact)
    return false;
  if constexpr (kEntry.exact && sizeof(T) != 4) {
    return false;
  } else {
    const auto run = [&](auto kernel) {
      launch("launching gather_tensor", kernel, dim3(static_cast<unsigned>(gather.blocks)), 128 * gather.warpgroups,
             static_cast<size_t>(gather.shared_bytes), stream, arguments);
    };
    if (gather.k_steps == 2) {
      run(gather_tensor_kernel<T, kEntry.slots, kEntry.columns, kEntry.row_blocks, 2, kEntry.exact>);
    } else {
      run(gather_tensor_kernel<T, kEntry.slots, kEntry.columns, kEntry.row_blocks, 1, kEntry.exact>);
    }
    return true;
  }
}

template <class T, size_t... Entries>
bool launch_one_of(const GatherArguments<T>& arguments, cudaStream_t stream, std::index_sequence<Entries...>) {
  return (launch_entry<Entries>(arguments, stream) || ...);
}

template <class T>
void gather_tensor(const Problem& problem, Operator op, const TensorGather& gather, const T* source, const T* weight,
                   const T* bias, T* destination, void* packed, cudaStream_t stream) {
  const bool is_forward = op == Operator::forward, channels_first = problem.layout == Layout::ncdhw;
  GatherArguments<T> arguments{source,
                               static_cast<const unsigned char*>(packed),
                               bias,
                               destination,
                               GatherVolume(problem, is_forward),
                               GatherVolume(problem, !is_forward),
                               problem.batch,
                               channels_first,
                               false,
                               false,
                               gather};
  constexpr int kVector = 16 / sizeof(T);
  arguments.vector_loads =
      !channels_first && arguments.from.group_channels % kVector == 0 && reinterpret_cast<uintptr_t>(source) % 16 == 0;
  const int64_t pieces = gather.packed_bytes / 16;
  launch("launching pack_weights", pack_weights_kernel<T>, dim3(static_cast<unsigned>((pieces + 255) / 256)), 256, 0,
         stream, weight, static_cast<unsigned char*>(packed), gather, is_forward, channels_first,
         arguments.from.group_channels, arguments.to.group_channels, static_cast<int>(problem.taps()));
  const bool launched = launch_one_of(arguments, stream, std::make_index_sequence<std::size(kTensorGathers)>());
  if (!launched) throw std::logic_error("no tensor-core kernel has this configuration");
}

}  // namespace convt3d::direct
