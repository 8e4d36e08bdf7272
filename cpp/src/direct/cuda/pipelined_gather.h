// The gather with wgmma, in a pipeline (see direct/pipelined_gather.h): forward and grad_input on GPUs of compute
// capability 9.0.
//
// Thread mapping: `warpgroups` warpgroups multiply, as many load. A multiplying warpgroup makes 64 * kRowBlocks
// positions for kSlots residues and kColumns channels in registers. Any shifted window of positions is one of rows in
// shared memory, where the source lies as [channel][position] (float32 in NCDHW) or as [16 bytes of
// channels][position][16 bytes], so that fragments load alike whatever the step; weights lie as [16 bytes of
// channels][column][16 bytes], which wgmma reads where they are. Of the loading warps one has the weights copied in
// bulk, in pieces; the others copy the source behind their own backs, and round it to TF32 where it has arrived. Both
// fill rings of stages; a barrier for each stage says that it is full, another that it is free again. A block goes from
// tile to tile, so that the next one is loaded while the sums of the last leave. They leave through shared memory, so
// that a warp writes neighbours.
//
// Traffic: the source once for every block of columns and residues, with its halo; the weights once for every tile,
// from L2; the destination once. Floor: 2 * taps * channels operations a destination at the tensor cores' rate, or its
// bytes. Samples (H200) say that it is bound by what a warp does between two steps' products, in order: kb61 has its
// tensor cores about half busy; and, where writing should bound it, by taking turns: on kb73 a multiplying warp is on
// the way out for 37 % of its time, and multiplies nothing meanwhile.
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
struct PipelinedArguments {
  const T* source;
  const unsigned char* packed;
  const T* bias;
  T* destination;
  GatherVolume from, to;
  int64_t batch;
  bool channels_first;
  bool vector_loads;   // 16 bytes of channels are neighbours, and aligned
  bool vector_stores;  // so they are in the destination
  PipelinedGather gather;
};

// Registers of a thread that multiplies, and of one that loads: together twice the 128 of the launch.
constexpr int kMultiplyingRegisters = 200, kLoadingRegisters = 56;

// Named barriers: one for each multiplying warpgroup, one for the warps that load the source.
constexpr int kWarpgroupBarrier = 1, kSourceBarrier = 3;

// Where a block is in its ring of stages.
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance(int stages) {
    if (++stage < stages) return;
    stage = 0;
    parity ^= 1;
  }
};

// Where things lie in a block's shared memory, as addresses in its window.
struct PipelinedMemory {
  unsigned char* source;
  uint32_t weights, barriers;
  float* staging;
  int2* destination_places;
  int* source_places;
  int* source_targets;

  __device__ __forceinline__ PipelinedMemory(unsigned char* shared, const PipelinedGather& gather) {
    barriers = ptx::shared_address(shared);
    unsigned char* next = shared + 256;
    source = next;
    next += gather.source_stages * gather.source_stage_bytes;
    weights = ptx::shared_address(next);
    next += gather.weight_stages * gather.weight_stage_bytes;
    staging = reinterpret_cast<float*>(next);
    next += gather.staging_bytes;
    destination_places = reinterpret_cast<int2*>(next);
    next += 8 * gather.positions();
    source_targets = reinterpret_cast<int*>(next);
    source_places = source_targets + gather.samples * gather.planes * gather.rows * gather.width;
  }
  __device__ __forceinline__ uint32_t source_full(int stage) const { return barriers + 8 * stage; }
  __device__ __forceinline__ uint32_t source_free(int stage) const { return barriers + 64 + 8 * stage; }
  __device__ __forceinline__ uint32_t weights_full(int stage) const { return barriers + 128 + 8 * stage; }
  __device__ __forceinline__ uint32_t weights_free(int stage) const { return barriers + 192 + 8 * stage; }
};

// A tile with its residues, columns and group. Those that read the same source are neighbours.
struct PipelinedItem {
  int column_block, phase_block, group;
  int first[3];  // position q
  int64_t sample;

  __device__ __forceinline__ PipelinedItem(const PipelinedGather& gather, int index) {
    const auto digit = [&index](const Divisor<int32_t>& by) {
      const int quotient = by.quotient(index), remainder = index - quotient * by.value;
      index = quotient;
      return remainder;
    };
    column_block = digit(gather.by_columns);
    phase_block = digit(gather.by_phases);
    // Some residues have more taps than others: which of them a block gets changes from tile to tile.
    phase_block += static_cast<int>(static_cast<uint32_t>(index) * 0x9e3779b1u >> 20);
    phase_block -= gather.by_phases.quotient(phase_block) * gather.by_phases.value;
    group = digit(gather.by_groups);
#pragma unroll
    for (int axis = 2; axis >= 0; --axis) first[axis] = digit(gather.by_tiles[axis]) * gather.tile[axis];
    sample = static_cast<int64_t>(index) * gather.samples;
  }
};

// A position of the tile along each axis; returns its sample's number in the tile.
__device__ __forceinline__ int unfold(const PipelinedGather& gather, int position, int (&along)[3]) {
  const int row = gather.by_tile[2].quotient(position), planes = gather.by_tile[1].quotient(row);
  const int member = gather.by_tile[0].quotient(planes);
  along[0] = planes - member * gather.tile[0];
  along[1] = row - planes * gather.tile[1];
  along[2] = position - row * gather.tile[2];
  return member;
}

// The warps that load the source; `thread` of `threads`. Copies run behind their backs, as many as the ring has room
// for; what a thread copied it rounds once it has arrived, if the tensor cores want TF32. Only the channels of half
// types, if they are not neighbours, go through registers.
template <class T, bool kRounds>
class SourceLoader {
 public:
  __device__ __forceinline__ SourceLoader(const PipelinedArguments<T>& arguments, const PipelinedMemory& memory,
                                          int thread, int threads)
      : arguments_(arguments),
        gather_(arguments.gather),
        memory_(memory),
        thread_(thread),
        threads_(threads),
        positions_(gather_.samples * gather_.planes * gather_.rows * gather_.width),
        // Rounding stays behind copying by what lets two stages be with the multiplying warps, or full.
        behind_(min(max(gather_.source_stages - 2, 0), 2)) {}

  __device__ __forceinline__ void run() {
    const GatherVolume& from = arguments_.from;
    const int stage_channels = 2 * gather_.channel_groups * kChunkChannels;
    for (int position = thread_; position < positions_; position += threads_) {
      memory_.source_targets[position] = target_of(position);
    }
    bool odd = false;
    for (int64_t index = blockIdx.x; index < gather_.items; index += gridDim.x) {
      const PipelinedItem item(gather_, static_cast<int>(index));
      const PipelinedPhase& phase = gather_.tables.phases[item.phase_block];
      if (phase.pieces == 0) continue;
      // Two tiles' places alternate, since warps may be one apart.
      places_ = memory_.source_places + (odd ? positions_ : 0);
      odd = !odd;
      for (int position = thread_; position < positions_; position += threads_) {
        places_[position] = place_of(item, phase, position);
      }
      ptx::barrier_sync(kSourceBarrier, threads_);
      const T* base = arguments_.source + item.sample * from.sample_stride +
                      static_cast<int64_t>(item.group) * from.group_channels * from.channel_stride;
      for (int left = from.group_channels; left > 0; left -= stage_channels) {
        ptx::wait(memory_.source_free(newest_.stage), newest_.parity ^ 1);
        unsigned char* stage = memory_.source + newest_.stage * gather_.source_stage_bytes;
        if (arguments_.vector_loads) {
          copy_vectors(base, left, stage);
        } else if constexpr (sizeof(T) == 4) {
          copy_elements(base, left, stage);
        } else {
          move_units(base, left, stage);
        }
        begun();
        base += static_cast<int64_t>(stage_channels) * from.channel_stride;
      }
    }
    if constexpr (kRounds) {
      ptx::wait_for_copies<0>();
      for (; under_way_ > 0; --under_way_) round_oldest();
    }
  }

 private:
  static constexpr int kChunkChannels = 16 / int{sizeof(T)};

  // The newest stage's copies are under way. Says so, or rounds an older one's.
  __device__ __forceinline__ void begun() {
    if constexpr (kRounds) {
      ptx::commit_copies();
      if (++under_way_ > behind_) {
        behind_ == 0 ? ptx::wait_for_copies<0>() : behind_ == 1 ? ptx::wait_for_copies<1>() : ptx::wait_for_copies<2>();
        round_oldest();
        --under_way_;
      }
    } else {
      ptx::arrive_after_copies(memory_.source_full(newest_.stage));
    }
    newest_.advance(gather_.source_stages);
  }

  // What this thread copied, in the order in which it did.
  __device__ __forceinline__ void round_oldest() {
    unsigned char* stage = memory_.source + oldest_.stage * gather_.source_stage_bytes;
    const auto round_vector = [stage](int piece) {
      uint4* place = reinterpret_cast<uint4*>(stage) + piece;
      const uint4 raw = *place;
      *place = make_uint4(ptx::rounded_for_tf32(raw.x), ptx::rounded_for_tf32(raw.y), ptx::rounded_for_tf32(raw.z),
                          ptx::rounded_for_tf32(raw.w));
    };
    if (arguments_.vector_loads) {
      const int bits = chunk_bits();
      for (int piece = thread_; piece < positions_ << bits; piece += threads_) {
        const int target = memory_.source_targets[piece >> bits], chunk = piece & ((1 << bits) - 1);
        if (target >= 0) round_vector(chunk * gather_.source_positions + target);
      }
    } else {
      for (int position = thread_; position < positions_; position += threads_) {
        const int target = memory_.source_targets[position];
        if (target < 0) continue;
        if (gather_.channel_pitch > 0) {
          uint32_t* word = reinterpret_cast<uint32_t*>(stage) + target;
          for (int channel = 0; channel < 8 * gather_.channel_groups; channel += 8) {
            uint32_t raw[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) raw[i] = word[i * gather_.channel_pitch];
#pragma unroll
            for (int i = 0; i < 8; ++i) word[i * gather_.channel_pitch] = ptx::rounded_for_tf32(raw[i]);
            word += 8 * gather_.channel_pitch;
          }
        } else {
          for (int chunk = 0; chunk < 2 * gather_.channel_groups; ++chunk) {
            round_vector(chunk * gather_.source_positions + target);
          }
        }
      }
    }
    ptx::arrive(memory_.source_full(oldest_.stage));
    oldest_.advance(gather_.source_stages);
  }

  // Where in a stage a position belongs, or -1 if no step reads it.
  __device__ __forceinline__ int target_of(int position) const {
    const int line = gather_.by_width.quotient(position), column = position - line * gather_.width;
    const int along = gather_.by_source_stride.quotient(column), residue = column - along * gather_.source_stride[2];
    const int in_row = residue * gather_.residue_pitch + along;
    return in_row < gather_.row_pitch ? line * gather_.row_pitch + in_row : -1;
  }
  // Where it comes from, in elements, or -1 outside the volume.
  __device__ __forceinline__ int place_of(const PipelinedItem& item, const PipelinedPhase& phase, int position) const {
    const GatherVolume& from = arguments_.from;
    const int line = gather_.by_width.quotient(position), column = position - line * gather_.width;
    const int planes = gather_.by_rows.quotient(line), row = line - planes * gather_.rows;
    const int member = gather_.by_planes.quotient(planes), plane = planes - member * gather_.planes;
    const int along[3] = {plane, row, column};
    int at[3];
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) {
      at[axis] = (item.first[axis] * gather_.source_stride[axis] + phase.origin[axis] + along[axis]) *
                     gather_.source_step[axis] +
                 gather_.source_origin[axis];
    }
    const int depth = at[0], height = at[1], width = at[2];
    const bool inside = member < arguments_.batch - item.sample && width >= 0 && width < from.size[2] && height >= 0 &&
                        height < from.size[1] && depth >= 0 && depth < from.size[0];
    return inside ? member * static_cast<int>(from.sample_stride) +
                        ((depth * from.size[1] + height) * from.size[2] + width) * from.voxel_stride
                  : -1;
  }
  __device__ __forceinline__ int chunk_bits() const { return 31 - __clz(2 * gather_.channel_groups); }

  // 16 bytes of channels at a time, which are neighbours: neighbouring threads take those of one position.
  __device__ __forceinline__ void copy_vectors(const T* base, int left, unsigned char* stage) const {
    const int bits = chunk_bits();
    for (int piece = thread_; piece < positions_ << bits; piece += threads_) {
      const int place = places_[piece >> bits], target = memory_.source_targets[piece >> bits];
      const int chunk = piece & ((1 << bits) - 1), channel = chunk * kChunkChannels;
      if (target < 0) continue;
      const bool valid = place >= 0 && channel < left;
      ptx::copy_vector(reinterpret_cast<T*>(stage + 16 * (chunk * gather_.source_positions + target)),
                       base + (valid ? place + channel : 0), valid);
    }
  }

  // One by one; in NCDHW neighbouring threads take neighbouring positions of one channel.
  __device__ __forceinline__ void copy_elements(const T* base, int left, unsigned char* stage) const {
    const bool by_channel = gather_.channel_pitch > 0;
    const int64_t stride = arguments_.from.channel_stride;
    const int channels = 8 * gather_.channel_groups;
    const int step = by_channel ? gather_.channel_pitch : 1, half = by_channel ? 0 : 4 * gather_.source_positions - 4;
    for (int position = thread_; position < positions_; position += threads_) {
      const int place = places_[position], target = memory_.source_targets[position];
      if (target < 0) continue;
      const T* from = base + max(place, 0);
      T* to = reinterpret_cast<T*>(stage) + (by_channel ? target : 4 * target);
      const int valid = place >= 0 ? min(left, channels) : 0;
      for (int channel = 0; channel < channels; channel += 8) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          // Nothing is read where a zero is wanted.
          ptx::copy_element(to, from, channel + i < valid);
          from += stride;
          to += i == 3 ? step + half : step;
        }
        to += half;
      }
    }
  }

  // Through registers, 16 bytes of channels of a position at a time.
  __device__ __forceinline__ void move_units(const T* base, int left, unsigned char* stage) const {
    constexpr int kAhead = 3;
    for (int chunk = 0; chunk < 2 * gather_.channel_groups; ++chunk) {
      const int channel = chunk * kChunkChannels;
      uint4* pieces = reinterpret_cast<uint4*>(stage) + chunk * gather_.source_positions;
      for (int first = thread_; first < positions_; first += kAhead * threads_) {
        Unit<T> units[kAhead];
        int targets[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          const int position = first + i * threads_;
          const bool is_there = position < positions_;
          const int place = is_there ? places_[position] : -1;
          targets[i] = is_there ? memory_.source_targets[position] : -1;
          units[i].clear();
          if (place >= 0 && channel < left) {
            units[i].load(base + place + static_cast<int64_t>(channel) * arguments_.from.channel_stride,
                          arguments_.from.channel_stride, left - channel, false);
          }
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          if (targets[i] >= 0) pieces[targets[i]] = units[i].template finish<false>(false, false);
        }
      }
    }
  }

  const PipelinedArguments<T>& arguments_;
  const PipelinedGather& gather_;
  const PipelinedMemory& memory_;
  const int thread_, threads_, positions_, behind_;
  int* places_ = nullptr;  // of the present tile
  Ring newest_, oldest_;
  int under_way_ = 0;  // stages that are not rounded yet
};

// The thread that has the weights copied.
template <class T>
__device__ __forceinline__ void load_weights(const PipelinedArguments<T>& arguments, const PipelinedMemory& memory) {
  const PipelinedGather& gather = arguments.gather;
  Ring ring;
  for (int64_t index = blockIdx.x; index < gather.items; index += gridDim.x) {
    const PipelinedItem item(gather, static_cast<int>(index));
    const PipelinedPhase& phase = gather.tables.phases[item.phase_block];
    const int64_t first = (static_cast<int64_t>(item.group) * gather.column_blocks + item.column_block) *
                          gather.channel_blocks * gather.units;
    for (int block = 0; block < gather.channel_blocks; ++block) {
      for (int number = 0; number < phase.pieces; ++number) {
        const WeightPiece& piece = gather.tables.pieces[phase.first_piece + number];
        ptx::wait(memory.weights_free(ring.stage), ring.parity ^ 1);
        const uint32_t bytes = static_cast<uint32_t>(piece.units) * gather.unit_bytes;
        ptx::arrive_announcing(memory.weights_full(ring.stage), bytes);
        ptx::copy_bulk(memory.weights + ring.stage * static_cast<uint32_t>(gather.weight_stage_bytes),
                       arguments.packed +
                           (first + static_cast<int64_t>(block) * gather.units + piece.first_unit) * gather.unit_bytes,
                       bytes, memory.weights_full(ring.stage));
        ring.advance(gather.weight_stages);
      }
    }
  }
}

// The sets of slots that a kernel has code for.
template <int kSlots>
struct SlotSets {
  static constexpr const uint8_t* table() {
    return kSlots == 1 ? kSetsOf1 : kSlots == 2 ? kSetsOf2 : kSlots == 4 ? kSetsOf4 : kSetsOf8;
  }
  static constexpr size_t kCount = kSlots < 8 ? (1u << kSlots) - 1 : sizeof(kSetsOf8);
  template <size_t kNumber>
  static constexpr uint32_t kSet = table()[kNumber];
};

// A multiplying warpgroup.
template <class T, int kSlots, int kColumns, int kRowBlocks, bool kExact>
class Multiplier {
 public:
  __device__ __forceinline__ Multiplier(const PipelinedArguments<T>& arguments, const PipelinedMemory& memory)
      : arguments_(arguments),
        gather_(arguments.gather),
        memory_(memory),
        thread_(threadIdx.x % 128),
        lane_(threadIdx.x % 32),
        warpgroup_(threadIdx.x / 128) {
    tile_positions_ = gather_.samples * gather_.tile[0] * gather_.tile[1] * gather_.tile[2];
    // Where this lane's part of the fragments begins, at shift 0. Half types come by ldmatrix, which takes a row of
    // each lane, half the lanes the rows' second halves; floats one by one, from rows 8 apart.
    const uint32_t source = ptx::shared_address(memory_.source);
#pragma unroll
    for (int block = 0; block < kRowBlocks; ++block) {
#pragma unroll
      for (int half = 0; half < (kRows + 1) / 2; ++half) {
        const int row = sizeof(T) == 4 ? lane_ / 4 + half * 8 : lane_ % 16;
        int position = (warpgroup_ * kRowBlocks + block) * 64 + thread_ / 32 * 16 + row;
        if (position >= tile_positions_) position = 0;
        int along[3];
        const int member = unfold(gather_, position, along);
        const int plane = member * gather_.planes + along[0] * gather_.source_stride[0];
        const int place = (plane * gather_.rows + along[1] * gather_.source_stride[1]) * gather_.row_pitch + along[2];
        if constexpr (sizeof(T) == 2) {
          rows_[block][half] = source + 16 * place + lane_ / 16 * gather_.half_stride;
        } else {
          rows_[block][half] = source + (gather_.channel_pitch > 0 ? 4 * (place + lane_ % 4 * gather_.channel_pitch)
                                                                   : 16 * place + 4 * (lane_ % 4));
          rows_[block][half + 2] = rows_[block][half] + gather_.half_stride;
        }
      }
    }
  }

  __device__ __forceinline__ void run() {
    Ring source, weights;
    for (int64_t index = blockIdx.x; index < gather_.items; index += gridDim.x) {
      const PipelinedItem item(gather_, static_cast<int>(index));
      const PipelinedPhase& phase = gather_.tables.phases[item.phase_block];
      for_each_sum([&](int block, int slot, int i) { totals(block, slot, i) = 0.0f; });
      if (phase.pieces > 0) {
        for (int block = 0; block < gather_.channel_blocks; ++block) {
          ptx::wait(memory_.source_full(source.stage), source.parity);
          const uint32_t source_offset = source.stage * static_cast<uint32_t>(gather_.source_stage_bytes);
          for (int number = 0; number < phase.pieces; ++number) {
            ptx::wait(memory_.weights_full(weights.stage), weights.parity);
            multiply_piece(gather_.tables.pieces[phase.first_piece + number], source_offset,
                           memory_.weights + weights.stage * static_cast<uint32_t>(gather_.weight_stage_bytes));
            release(memory_.weights_free(weights.stage));
            weights.advance(gather_.weight_stages);
          }
          release(memory_.source_free(source.stage));
          source.advance(gather_.source_stages);
        }
      }
      if (arguments_.channels_first && gather_.slot_bits[2] != 0) {
        store_by_channels<1>(item, phase);
      } else if (arguments_.channels_first) {
        store_by_channels<0>(item, phase);
      } else {
        store_by_voxels(item, phase);
      }
    }
  }

 private:
  static constexpr int kParts = kExact ? 2 : 1;
  static constexpr int kRows = sizeof(T) == 4 ? 4 : 1;
  static constexpr int kUnit = 2 * kColumns;  // 16-byte rows of a unit's part
  // Where there are many sets of slots, ptxas can tell no more than two sets of fragments apart.
  static constexpr int kBuffers = kSlots <= 2 ? 3 : 2;
  static constexpr int kStaged = staged_columns(kColumns, kRowBlocks);
  static constexpr int kStagingFloats = staging_floats(kColumns, kRowBlocks);
  static constexpr int kPositions = 64 * kRowBlocks;
  using Staged = std::conditional_t<sizeof(T) == 2, T, float>;  // on the way out, in NCDHW
  using Sums = float[kRowBlocks][kSlots][kColumns / 2];
  using Fragments = uint32_t[kParts][kRowBlocks][4];

  template <class Body>
  __device__ __forceinline__ static void for_each_sum(const Body& body) {
#pragma unroll
    for (int block = 0; block < kRowBlocks; ++block) {
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
#pragma unroll
        for (int i = 0; i < kColumns / 2; ++i) body(block, slot, i);
      }
    }
  }

  __device__ __forceinline__ void release(uint32_t barrier) const {
    __syncwarp();
    if (lane_ == 0) ptx::arrive(barrier);
  }

  __device__ __forceinline__ float& totals(int block, int slot, int i) {
    if constexpr (kExact) {
      return totals_[block][slot][i];
    } else {
      return sums_[block][slot][i];
    }
  }

  __device__ __forceinline__ void load(Fragments& fragments, uint32_t shift) const {
#pragma unroll
    for (int block = 0; block < kRowBlocks; ++block) {
      uint32_t (&fragment)[4] = fragments[0][block];
      if constexpr (sizeof(T) == 2) {
        ptx::load_matrices(fragment, rows_[block][0] + shift);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t word = ptx::load_word(rows_[block][i] + shift);
          if constexpr (kExact) {
            fragment[i] = __float_as_uint(tf32_part(__uint_as_float(word), false));
            fragments[1][block][i] = __float_as_uint(tf32_part(__uint_as_float(word), true));
          } else {
            fragment[i] = word;
          }
        }
      }
    }
  }

  // The products of one step: its slots' units follow each other.
  __device__ __forceinline__ void multiply_slot(const Fragments& fragments, int slot, uint32_t unit) {
#if CONVT3D_HAS_WGMMA
    using Product = ptx::Wgmma<T, kColumns>;
#pragma unroll
    for (int block = 0; block < kRowBlocks; ++block) {
      if constexpr (kExact) {
        Product::start(sums_[block][slot], fragments[0][block], ptx::wgmma_descriptor(unit));
        Product::run(sums_[block][slot], fragments[0][block], ptx::wgmma_descriptor(unit + kUnit));
        Product::run(sums_[block][slot], fragments[1][block], ptx::wgmma_descriptor(unit));
      } else {
        Product::run(sums_[block][slot], fragments[0][block], ptx::wgmma_descriptor(unit));
      }
    }
#endif
  }
  // The products of one step begin. Each set of slots has code of its own, without branches: between these ptxas would
  // wait for products before all of a step's are begun. Tensor cores cut off what their sums cannot hold; where that
  // matters, each step is added up by itself, then rounded.
  template <uint32_t kSet>
  __device__ __forceinline__ void multiply_set(const Fragments& fragments, uint32_t unit) {
    ptx::begin_products();
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      if ((kSet >> slot & 1) == 0) continue;
      multiply_slot(fragments, slot, unit);
      unit += kUnit * kParts;
    }
    ptx::commit_products();
    if constexpr (kExact) {
      ptx::wait_for_products<0>();
      for_each_sum([&](int block, int slot, int i) {
        if ((kSet >> slot & 1) != 0) totals_[block][slot][i] += sums_[block][slot][i];
      });
    }
  }
  template <size_t kNumber>
  __device__ __forceinline__ void multiply_nth(const Fragments& fragments, uint32_t unit) {
    multiply_set<SlotSets<kSlots>::template kSet<kNumber>>(fragments, unit);
  }
  __device__ __forceinline__ void multiply(const Fragments& fragments, const PipelinedStep& step, uint32_t base) {
    const uint32_t unit = base + step.weights;
    if constexpr (kSlots == 1) {
      multiply_nth<0>(fragments, unit);
    } else if constexpr (kSlots == 2) {
      if (step.set == 2) {
        multiply_nth<2>(fragments, unit);
      } else if (step.set == 1) {
        multiply_nth<1>(fragments, unit);
      } else {
        multiply_nth<0>(fragments, unit);
      }
    } else if constexpr (kSlots == 4) {
      switch (step.set) {
        case 0:
          return multiply_nth<0>(fragments, unit);
        case 1:
          return multiply_nth<1>(fragments, unit);
        case 2:
          return multiply_nth<2>(fragments, unit);
        case 3:
          return multiply_nth<3>(fragments, unit);
        case 4:
          return multiply_nth<4>(fragments, unit);
        case 5:
          return multiply_nth<5>(fragments, unit);
        case 6:
          return multiply_nth<6>(fragments, unit);
        case 7:
          return multiply_nth<7>(fragments, unit);
        case 8:
          return multiply_nth<8>(fragments, unit);
        case 9:
          return multiply_nth<9>(fragments, unit);
        case 10:
          return multiply_nth<10>(fragments, unit);
        case 11:
          return multiply_nth<11>(fragments, unit);
        case 12:
          return multiply_nth<12>(fragments, unit);
        case 13:
          return multiply_nth<13>(fragments, unit);
        case 14:
          return multiply_nth<14>(fragments, unit);
      }
    } else {
      switch (step.set) {
        case 0:
          return multiply_nth<0>(fragments, unit);
        case 1:
          return multiply_nth<1>(fragments, unit);
        case 2:
          return multiply_nth<2>(fragments, unit);
        case 3:
          return multiply_nth<3>(fragments, unit);
        case 4:
          return multiply_nth<4>(fragments, unit);
        case 5:
          return multiply_nth<5>(fragments, unit);
        case 6:
          return multiply_nth<6>(fragments, unit);
        case 7:
          return multiply_nth<7>(fragments, unit);
        case 8:
          return multiply_nth<8>(fragments, unit);
        case 9:
          return multiply_nth<9>(fragments, unit);
        case 10:
          return multiply_nth<10>(fragments, unit);
        case 11:
          return multiply_nth<11>(fragments, unit);
        case 12:
          return multiply_nth<12>(fragments, unit);
        case 13:
          return multiply_nth<13>(fragments, unit);
        case 14:
          return multiply_nth<14>(fragments, unit);
        case 15:
          return multiply_nth<15>(fragments, unit);
        case 16:
          return multiply_nth<16>(fragments, unit);
        case 17:
          return multiply_nth<17>(fragments, unit);
        case 18:
          return multiply_nth<18>(fragments, unit);
        case 19:
          return multiply_nth<19>(fragments, unit);
        case 20:
          return multiply_nth<20>(fragments, unit);
        case 21:
          return multiply_nth<21>(fragments, unit);
        case 22:
          return multiply_nth<22>(fragments, unit);
        case 23:
          return multiply_nth<23>(fragments, unit);
        case 24:
          return multiply_nth<24>(fragments, unit);
        case 25:
          return multiply_nth<25>(fragments, unit);
        case 26:
          return multiply_nth<26>(fragments, unit);
        case 27:
          return multiply_nth<27>(fragments, unit);
        case 28:
          return multiply_nth<28>(fragments, unit);
        case 29:
          return multiply_nth<29>(fragments, unit);
        case 30:
          return multiply_nth<30>(fragments, unit);
        case 31:
          return multiply_nth<31>(fragments, unit);
        case 32:
          return multiply_nth<32>(fragments, unit);
        case 33:
          return multiply_nth<33>(fragments, unit);
        case 34:
          return multiply_nth<34>(fragments, unit);
        case 35:
          return multiply_nth<35>(fragments, unit);
      }
    }
  }

  // While the products of one step are under way, the fragments of the next are loaded, or of the next two; beyond the
  // last step, some that nobody needs.
  __device__ __forceinline__ void multiply_piece(const WeightPiece& piece, uint32_t source, uint32_t weights) {
#if CONVT3D_HAS_WGMMA
    const uint32_t base = ptx::wgmma_columns(weights, kColumns * 16);
    const PipelinedStep* steps = gather_.tables.steps + piece.first_step;
    Fragments fragments[kBuffers];
    PipelinedStep next[kBuffers];
#pragma unroll
    for (int i = 0; i < kBuffers; ++i) next[i] = steps[i];
#pragma unroll
    for (int i = 0; i + 1 < kBuffers; ++i) load(fragments[i], source + next[i].shift);
    for (int left = piece.steps;; left -= kBuffers, steps += kBuffers) {
#pragma unroll
      for (int i = 0; i < kBuffers; ++i) {
        constexpr int kBefore = kBuffers - 1;
        multiply(fragments[i], next[i], base);
        next[i] = steps[i + kBuffers];
        ptx::wait_for_products<1>();  // those of the step before have read their fragments
        if (left == i + 1) {
          ptx::wait_for_products<0>();
          return;
        }
        load(fragments[(i + kBefore) % kBuffers], source + next[(i + kBefore) % kBuffers].shift);
      }
    }
#endif
  }

  // Each position's first destination voxel, and how many residues along each axis lie inside the volume.
  __device__ __forceinline__ void place_destinations(const PipelinedItem& item) const {
    const GatherVolume& to = arguments_.to;
    if (thread_ >= kPositions) return;
    const int position = warpgroup_ * kPositions + thread_;
    int along[3], voxel = 0, inside = 0;
    const int member = unfold(gather_, position, along);
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) {
      const int begin = (item.first[axis] + along[axis]) * gather_.destination_stride[axis];
      voxel = voxel * to.size[axis] + begin;
      inside = inside << 10 | max(0, min(gather_.destination_stride[axis], to.size[axis] - begin));
    }
    voxel += member * static_cast<int>(to.sample_stride / to.voxel_stride);
    const bool is_there = position < tile_positions_ && member < arguments_.batch - item.sample;
    memory_.destination_places[position] = make_int2(voxel, is_there ? inside : 0);
  }
  __device__ __forceinline__ static bool is_inside(int2 place, const int (&residue)[3]) {
    return residue[0] < (place.y >> 20) && residue[1] < (place.y >> 10 & 1023) && residue[2] < (place.y & 1023);
  }
  // The residues of a slot.
  __device__ __forceinline__ void residues_of(const PipelinedPhase& phase, int slot, int (&residue)[3]) const {
#pragma unroll
    for (int axis = 2; axis >= 0; --axis) {
      residue[axis] = phase.residue[axis] + (slot & (gather_.slot_extent[axis] - 1));
      slot >>= gather_.slot_bits[axis];
    }
  }
  __device__ __forceinline__ T* destination_of(const PipelinedItem& item) const {
    const GatherVolume& to = arguments_.to;
    return arguments_.destination + item.sample * to.sample_stride +
           (static_cast<int64_t>(item.group) * to.group_channels + item.column_block * kColumns) * to.channel_stride;
  }
  // The biases of this lane's columns from `first` on: two neighbours of each eight.
  __device__ __forceinline__ void load_biases(const PipelinedItem& item, int first,
                                              float (&biases)[kStaged / 4]) const {
    const int channels = arguments_.to.group_channels, begin = item.column_block * kColumns + first;
#pragma unroll
    for (int i = 0; i < kStaged / 4; ++i) {
      const int channel = begin + i / 2 * 8 + lane_ % 4 * 2 + i % 2;
      biases[i] = arguments_.bias == nullptr || channel >= channels
                      ? 0.0f
                      : static_cast<float>(arguments_.bias[item.group * channels + channel]);
    }
  }
  __device__ __forceinline__ void synchronize() const { ptx::barrier_sync(kWarpgroupBarrier + warpgroup_, 128); }

  // NCDHW: some channels of a row of slots at a time, as [channel][voxel]. A row has 1 << kBits slots.
  template <int kBits>
  __device__ __forceinline__ void store_by_channels(const PipelinedItem& item, const PipelinedPhase& phase) {
    constexpr int kRow = 1 << kBits, kRun = kPositions << kBits;
    // 16 bytes more than a multiple of 64: no two lanes meet in a bank.
    constexpr int kPitch = kRun + 16 / sizeof(Staged);
    if constexpr (kRow <= kSlots) {
      Staged* staging = reinterpret_cast<Staged*>(memory_.staging + warpgroup_ * kStagingFloats);
      Staged* staged = staging + lane_ % 4 * 2 * kPitch + ((thread_ / 32 * 16 + lane_ / 4) << kBits);
#pragma unroll
      for (int first = 0; first < kColumns; first += kStaged) {
        float biases[kStaged / 4];
        load_biases(item, first, biases);
#pragma unroll
        for (int slot = 0; slot < kSlots; slot += kRow) {
          synchronize();
          if (first == 0 && slot == 0) place_destinations(item);
#pragma unroll
          for (int block = 0; block < kRowBlocks; ++block) {
#pragma unroll
            for (int i = 0; i < kStaged / 2; ++i) {
              Staged* place = staged + (i / 4 * 8 + i % 2) * kPitch + ((block * 64 + i / 2 % 2 * 8) << kBits);
              const float bias = biases[i / 4 * 2 + i % 2];
              const auto value = static_cast<Staged>(totals(block, slot, first / 2 + i) + bias);
              if constexpr (kBits == 0) {
                *place = value;
              } else {
                store_pair(place, value, static_cast<Staged>(totals(block, slot + kRow - 1, first / 2 + i) + bias));
              }
            }
          }
          synchronize();
          store_run<kBits>(item, phase, slot, first, staging);
        }
      }
    }
  }
  // Neighbouring threads write neighbouring voxels, of half types two each where they can be one write.
  template <int kBits>
  __device__ __forceinline__ void store_run(const PipelinedItem& item, const PipelinedPhase& phase, int slot, int first,
                                            const Staged* staging) const {
    constexpr int kWidth = sizeof(T) == 2 ? 2 : 1;  // voxels a thread
    constexpr int kRun = kPositions << kBits, kThreads = kRun / kWidth, kPitch = kRun + 16 / sizeof(Staged);
    constexpr int kShares = kThreads < 128 ? 128 / kThreads : 1;  // of the channels
    const GatherVolume& to = arguments_.to;
    const int channels = min(kStaged, to.group_channels - item.column_block * kColumns - first);
    const int share = kShares == 1 ? 0 : thread_ / kThreads;
    T* destination = destination_of(item) + static_cast<int64_t>(first + share) * to.channel_stride;
    int residue[3];
    residues_of(phase, slot, residue);
    const int first_width = residue[2], offset = (residue[0] * to.size[1] + residue[1]) * to.size[2];
#pragma unroll
    for (int round = 0; round < (kThreads + 127) / 128; ++round) {
      const int element = (thread_ % (kThreads < 128 ? kThreads : 128) + round * 128) * kWidth;
      int voxel[kWidth];
      bool inside[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const int2 place = memory_.destination_places[warpgroup_ * kPositions + ((element + i) >> kBits)];
        residue[2] = first_width + ((element + i) & ((1 << kBits) - 1));
        inside[i] = is_inside(place, residue);
        voxel[i] = place.x + offset + residue[2];
      }
      const Staged* in = staging + share * kPitch + element;
      T* out = destination + voxel[0];
      if constexpr (kWidth == 1) {
        if (!inside[0]) continue;
#pragma unroll
        for (int channel = 0; channel < kStaged; ++channel) {
          if (channel < channels) *out = static_cast<T>(in[channel * kPitch]);
          out += to.channel_stride;
        }
      } else {
        const bool pair = inside[0] && inside[1] && voxel[1] == voxel[0] + 1;
        const int64_t apart = voxel[1] - voxel[0];
#pragma unroll
        for (int channel = 0; channel < kStaged; channel += kShares) {
          const uint32_t both = *reinterpret_cast<const uint32_t*>(in + channel * kPitch);
          if (channel + share < channels) {
            if (pair && reinterpret_cast<uintptr_t>(out) % 4 == 0) {
              *reinterpret_cast<uint32_t*>(out) = both;
            } else {
              if (inside[0]) *reinterpret_cast<uint16_t*>(out) = static_cast<uint16_t>(both);
              if (inside[1]) *reinterpret_cast<uint16_t*>(out + apart) = static_cast<uint16_t>(both >> 16);
            }
          }
          out += kShares * static_cast<int64_t>(to.channel_stride);
        }
      }
    }
  }

  // NDHWC: some channels of a slot at a time, as [voxel][channel].
  __device__ __forceinline__ void store_by_voxels(const PipelinedItem& item, const PipelinedPhase& phase) {
    constexpr int kVector = 16 / sizeof(T), kVectors = (kStaged + kVector - 1) / kVector;
    constexpr int kPitch =
        kStaged + (kStaged % 16 == 0 ? 8 : 0);  // 8 words apart modulo 16: no two lanes meet in a bank
    const GatherVolume& to = arguments_.to;
    float* staging = memory_.staging + warpgroup_ * kStagingFloats;
    const int channels = min(kColumns, to.group_channels - item.column_block * kColumns);
    T* destination = destination_of(item);
#pragma unroll
    for (int first = 0; first < kColumns; first += kStaged) {
      float biases[kStaged / 4];
      load_biases(item, first, biases);
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        int residue[3];
        residues_of(phase, slot, residue);
        const int offset = (residue[0] * to.size[1] + residue[1]) * to.size[2] + residue[2];
        synchronize();
        if (first == 0 && slot == 0) place_destinations(item);
        float* staged = staging + (thread_ / 32 * 16 + lane_ / 4) * kPitch + lane_ % 4 * 2;
#pragma unroll
        for (int block = 0; block < kRowBlocks; ++block) {
#pragma unroll
          for (int i = 0; i < kStaged / 2; i += 2) {
            *reinterpret_cast<float2*>(staged + (block * 64 + i / 2 % 2 * 8) * kPitch + i / 4 * 8) =
                make_float2(totals(block, slot, first / 2 + i) + biases[i / 4 * 2],
                            totals(block, slot, first / 2 + i + 1) + biases[i / 4 * 2 + 1]);
          }
        }
        synchronize();
        const bool by_vectors = arguments_.vector_stores && channels >= first + kStaged;
#pragma unroll
        for (int i = 0; i < (kPositions * kVectors + 127) / 128; ++i) {
          const int piece = thread_ + i * 128, position = piece / kVectors, channel = piece % kVectors * kVector;
          if (piece >= kPositions * kVectors) break;
          const int2 place = memory_.destination_places[warpgroup_ * kPositions + position];
          const float* in = staging + position * kPitch + channel;
          T* out = destination + static_cast<int64_t>(place.x + offset) * to.voxel_stride + first + channel;
          const bool inside = is_inside(place, residue);
          if (by_vectors) {
            alignas(16) T values[kVector];
#pragma unroll
            for (int k = 0; k < kVector; ++k) values[k] = static_cast<T>(in[k]);
            if (inside) *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(values);
          } else if (inside) {
#pragma unroll
            for (int k = 0; k < kVector; ++k) {
              if (first + channel + k < channels) out[k] = static_cast<T>(in[k]);
            }
          }
        }
      }
    }
  }

  const PipelinedArguments<T>& arguments_;
  const PipelinedGather& gather_;
  const PipelinedMemory& memory_;
  const int thread_, lane_, warpgroup_;
  int tile_positions_;
  uint32_t rows_[kRowBlocks][kRows];
  Sums sums_;
  float totals_[kExact ? kRowBlocks : 1][kExact ? kSlots : 1][kExact ? kColumns / 2 : 1];
};

template <class T, int kSlots, int kColumns, int kRowBlocks, bool kExact>
__global__ void __launch_bounds__(512, 1)
    gather_pipelined_kernel(const __grid_constant__ PipelinedArguments<T> arguments) {
#if CONVT3D_HAS_WGMMA
  extern __shared__ __align__(128) unsigned char shared[];
  const PipelinedGather& gather = arguments.gather;
  const PipelinedMemory memory(shared, gather);
  const int multiplying = 128 * gather.warpgroups, thread = static_cast<int>(threadIdx.x) - multiplying;
  const int source_threads = multiplying - 32;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < gather.source_stages; ++stage) {
      ptx::make_barrier(memory.source_full(stage), source_threads);
      ptx::make_barrier(memory.source_free(stage), multiplying / 32);
    }
    for (int stage = 0; stage < gather.weight_stages; ++stage) {
      ptx::make_barrier(memory.weights_full(stage), 1);
      ptx::make_barrier(memory.weights_free(stage), multiplying / 32);
    }
    ptx::fence_shared_for_wgmma();
  }
  __syncthreads();
  if (thread < 0) {
    ptx::claim_registers<kMultiplyingRegisters>();
    Multiplier<T, kSlots, kColumns, kRowBlocks, kExact>(arguments, memory).run();
  } else {
    ptx::give_up_registers<kLoadingRegisters>();
    if (thread < source_threads) {
      SourceLoader<T, sizeof(T) == 4 && !kExact>(arguments, memory, thread, source_threads).run();
    } else if (thread == source_threads) {
      load_weights(arguments, memory);
    }
  }
#endif
}

// The weights in the order in which the kernel above takes them:
// [group][block of columns][block of channels][unit][high, low][16 bytes of channels][column][16 bytes].
// One thread makes 16 bytes. Bound by L2: the weights' own order has taps innermost.
template <class T>
__global__ void __launch_bounds__(256)
    pack_units_kernel(const T* weight, unsigned char* packed, const __grid_constant__ PipelinedGather gather,
                      bool is_forward, bool channels_first, int sources, int destinations, int kernel_taps) {
  constexpr int kChannels = 16 / sizeof(T);
  const int parts = gather.parts(), columns = gather.columns;
  const int64_t pieces = gather.packed_bytes / 16 / parts, piece = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (piece >= pieces) return;
  // Neighbouring threads read neighbouring weights: taps in NCDHW, channels in NDHWC.
  int64_t index = piece;
  const auto digit = [&index](int radix) {
    const auto remainder = static_cast<int>(index % radix);
    index /= radix;
    return remainder;
  };
  int unit = 0;
  if (channels_first) unit = digit(gather.units);
  const int column = digit(columns), half = digit(2);
  if (!channels_first) unit = digit(gather.units);
  const int64_t block = index;
  const int channel_block = digit(gather.channel_blocks);
  const int destination = digit(gather.column_blocks) * columns + column;
  const int64_t group = index;
  const int tap = gather.unit_order[unit] / gather.channel_groups;
  const int channel_group = gather.unit_order[unit] - tap * gather.channel_groups;
  const int first = ((channel_block * gather.channel_groups + channel_group) * 2 + half) * kChannels;
  alignas(16) T values[2][kChannels];
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    const int source = first + i;
    T value = T(0.0f);
    if (source < sources && destination < destinations) {
      const int64_t in = is_forward ? group * sources + source : group * destinations + destination;
      const int out = is_forward ? destination : source, outs = is_forward ? destinations : sources;
      value = weight[channels_first ? (in * outs + out) * kernel_taps + tap : (in * kernel_taps + tap) * outs + out];
    }
    values[0][i] = values[1][i] = value;
    if constexpr (sizeof(T) == 4) {
      values[0][i] = tf32_part(value, false);
      values[1][i] = tf32_part(value, true);
    }
  }
  uint4* place =
      reinterpret_cast<uint4*>(packed) + (((block * gather.units + unit) * parts * 2) + half) * columns + column;
  place[0] = *reinterpret_cast<const uint4*>(values[0]);
  if (gather.exact) place[2 * columns] = *reinterpret_cast<const uint4*>(values[1]);
}

// Launches the kernel of kPipelinedGathers[Entry], if that is the one that the arguments ask for.
template <size_t Entry, class T>
bool launch_pipelined_entry(const PipelinedArguments<T>& arguments, cudaStream_t stream) {
  constexpr GatherConfiguration kEntry = kPipelinedGathers[Entry];
  const PipelinedGather& gather = arguments.gather;
  if (gather.slots != kEntry.slots || gather.columns != kEntry.columns || gather.row_blocks != kEntry.row_blocks ||
      gather.exact != kEntry.exact)
    return false;
  if constexpr (sizeof(T) == 2 && !takes_half_types(kEntry)) {
    return false;
  } else {
    launch("launching gather_pipelined",
           gather_pipelined_kernel<T, kEntry.slots, kEntry.columns, kEntry.row_blocks, kEntry.exact>,
           dim3(static_cast<unsigned>(gather.blocks)), gather.threads(), static_cast<size_t>(gather.shared_bytes),
           stream, arguments);
    return true;
  }
}

template <class T, size_t... Entries>
bool launch_one_of_pipelined(const PipelinedArguments<T>& arguments, cudaStream_t stream,
                             std::index_sequence<Entries...>) {
  return (launch_pipelined_entry<Entries>(arguments, stream) || ...);
}

template <class T>
void gather_pipelined(const Problem& problem, Operator op, const PipelinedGather& gather, const T* source,
                      const T* weight, const T* bias, T* destination, void* packed, cudaStream_t stream) {
  const bool is_forward = op == Operator::forward, channels_first = problem.layout == Layout::ncdhw;
  PipelinedArguments<T> arguments{source,
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
  const auto has_vectors = [&](const GatherVolume& volume, const T* data) {
    return !channels_first && volume.group_channels % kVector == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  };
  arguments.vector_loads = has_vectors(arguments.from, source);
  arguments.vector_stores = has_vectors(arguments.to, destination);
  const int64_t pieces = gather.packed_bytes / 16 / gather.parts();
  launch("launching pack_units", pack_units_kernel<T>, dim3(static_cast<unsigned>((pieces + 255) / 256)), 256, 0,
         stream, weight, static_cast<unsigned char*>(packed), gather, is_forward, channels_first,
         arguments.from.group_channels, arguments.to.group_channels, static_cast<int>(problem.taps()));
  const bool launched =
      launch_one_of_pipelined(arguments, stream, std::make_index_sequence<std::size(kPipelinedGathers)>());
  if (!launched) throw std::logic_error("no pipelined kernel has this configuration");
}

}  // namespace convt3d::direct
