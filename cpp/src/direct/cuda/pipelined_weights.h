// The weights of the pipelined gather: how they are packed, and copied to shared memory (see
// direct/cuda/pipelined_gather.h).
#pragma once

#include <cstdint>

#include "cuda/launch.h"
#include "cuda/ptx.h"
#include "direct/cuda/contacts.h"
#include "direct/cuda/gather_source.h"
#include "direct/cuda/pipelined_block.h"

namespace convt3d::direct {

template <class T>
struct PackArguments {
  const T* weight;
  unsigned char* packed;
  int* not_finite;                                              // becomes 0; null where weights have no gaps
  int64_t group_step, source_step, destination_step, tap_step;  // of the weights, in elements
  int sources, destinations;                                    // of a group
  int merged_groups;                                            // that count as one, see with_merged_groups
  Divisor<int32_t> by_merged_destinations;                      // of one of these
  bool channels_first;
  int band, threads;
  Divisor<int32_t> by_near_columns, by_far_columns;  // columns of a band that neighbouring threads make, and such sets
  Divisor<int32_t> by_columns, by_units, by_channel_blocks, by_channel_groups;
};

// The weights in the order in which the gather takes them:
// [group][block of columns][block of channels][unit][high, low][16 bytes of channels][slot, column][16 bytes].
// One thread makes a unit's 32 bytes of channels of one column. Neighbouring threads write neighbouring columns: in
// NDHWC all of a band's, in NCDHW four and then the next unit's, mostly of a neighbouring tap, so that reads, too,
// share sectors. Where lanes have every other channel of a boxed source, so do these bytes. Bound by L2.
template <class T>
__global__ void __launch_bounds__(256) pack_units_kernel(const __grid_constant__ PackArguments<T> arguments,
                                                         const __grid_constant__ PipelinedGather gather) {
  constexpr int kChannels = 16 / sizeof(T);
  ptx::let_next_kernel_begin();  // it loads its source meanwhile
  const uint32_t thread = blockIdx.x * 256 + threadIdx.x;
  if (thread == 0 && arguments.not_finite != nullptr) *arguments.not_finite = 0;
  if (thread >= static_cast<uint32_t>(arguments.threads)) return;
  int index = static_cast<int>(thread);
  const int near_column = take_digit(index, arguments.by_near_columns), unit = take_digit(index, arguments.by_units);
  const int column = take_digit(index, arguments.by_far_columns) * arguments.by_near_columns.value + near_column;
  const int slot = arguments.by_columns.quotient(column), slot_column = column - slot * gather.columns;
  const int64_t block = index;
  const int channel_block = take_digit(index, arguments.by_channel_blocks);
  const int destination =
      take_digit(index, gather.by_columns) * gather.columns +
      (arguments.channels_first ? slot_column : channel_of_column(slot_column, gather.columns, sizeof(T)));
  const int order = gather.unit_order[unit * arguments.band + slot];
  const int tap = arguments.by_channel_groups.quotient(order);
  const int channel_group = order - tap * gather.channel_groups;
  const int source = (channel_block * gather.channel_groups + channel_group) * 2 * kChannels;
  // The source channels of the destination's own group, from the unit's first one on.
  const int own_group = arguments.by_merged_destinations.quotient(destination);
  const int group_sources = arguments.sources / arguments.merged_groups, first = own_group * group_sources - source;
  const bool exists = order != PipelinedGather::kNoTap && destination < arguments.destinations;
  const int end = exists ? first + group_sources : 0;
  const T* weight = arguments.weight + (index * arguments.merged_groups + own_group) * arguments.group_step -
                    first * arguments.source_step +
                    (destination - own_group * arguments.by_merged_destinations.value) * arguments.destination_step +
                    tap * arguments.tap_step;
  T values[2 * kChannels];
#pragma unroll
  for (int i = 0; i < 2 * kChannels; ++i, weight += arguments.source_step) {
    values[i] = i >= first && i < end ? *weight : T(0.0f);
  }
  const int columns = arguments.band * gather.columns;
  uint4* place = reinterpret_cast<uint4*>(arguments.packed) +
                 (block * gather.units + unit) * (2 * gather.parts() * columns) + column;
  const auto store = [&](bool low) {
#pragma unroll
    for (int half = 0; half < 2; ++half, place += columns) {
      alignas(16) T piece[kChannels];
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        piece[i] = sizeof(T) == 4 && gather.channel_step == 2 ? values[2 * i + half] : values[half * kChannels + i];
        if constexpr (sizeof(T) == 4) piece[i] = tf32_part(piece[i], low);
      }
      *place = *reinterpret_cast<const uint4*>(piece);
    }
  };
  store(false);
  if (gather.exact) store(true);
}

template <class T>
void pack_units(const Problem& problem, bool is_forward, const PipelinedArguments<T>& of, const T* weight,
                unsigned char* packed, cudaStream_t stream) {
  const PipelinedGather& gather = of.gather;
  const WeightSteps steps(problem);
  const int band = gather.band(), columns = band * gather.columns, near_columns = of.channels_first ? 4 : columns;
  PackArguments<T> arguments;
  arguments.weight = weight;
  arguments.packed = packed;
  arguments.not_finite = of.not_finite;
  arguments.group_step = steps.group;
  arguments.source_step = is_forward ? steps.input_channel : steps.output_channel;
  arguments.destination_step = is_forward ? steps.output_channel : steps.input_channel;
  arguments.tap_step = steps.tap;
  arguments.sources = of.from.group_channels;
  arguments.destinations = of.to.group_channels;
  arguments.merged_groups = gather.merged_groups;
  arguments.by_merged_destinations = Divisor<int32_t>(of.to.group_channels / gather.merged_groups);
  arguments.channels_first = of.channels_first;
  arguments.band = band;
  arguments.threads = static_cast<int>(gather.weight_bytes() / 32 / gather.parts());
  arguments.by_near_columns = Divisor<int32_t>(near_columns);
  arguments.by_far_columns = Divisor<int32_t>(columns / near_columns);
  arguments.by_columns = Divisor<int32_t>(gather.columns);
  arguments.by_units = Divisor<int32_t>(gather.units);
  arguments.by_channel_blocks = Divisor<int32_t>(gather.channel_blocks);
  arguments.by_channel_groups = Divisor<int32_t>(gather.channel_groups);
  launch("launching pack_units", pack_units_kernel<T>, dim3((static_cast<unsigned>(arguments.threads) + 255) / 256),
         256, 0, stream, arguments, gather);
}

// The thread that has the weights copied, once pack_units_kernel has packed them. It waits for that in every block,
// even one without taps, so that no later kernel finds this one ended and that one not.
template <class T>
__device__ __forceinline__ void load_weights(const PipelinedArguments<T>& arguments, const PipelinedMemory& memory) {
  const PipelinedGather& gather = arguments.gather;
  ptx::wait_for_previous_kernel();
  ptx::fence_global_for_bulk_copies();
  Ring ring;
  for (int64_t index = blockIdx.x; index < gather.items; index += gridDim.x) {
    const PipelinedItem item(gather, static_cast<int>(index));
    const PipelinedPhase& phase = gather.tables.phases[item.phase_block];
    const int64_t first = (static_cast<int64_t>(item.group) * gather.column_blocks + item.column_block) *
                          gather.channel_blocks * gather.units;
    for (int number = 0; number < phase.passes; ++number) {
      const PipelinedPass& pass = gather.tables.passes[phase.first_pass + number];
      for (int block = 0; block < gather.channel_blocks; ++block) {
        const int64_t units_before = first + static_cast<int64_t>(block) * gather.units;
        for (int i = pass.first_piece; i < pass.first_piece + pass.pieces; ++i) {
          const WeightPiece& piece = gather.tables.pieces[i];
          ptx::wait(memory.weights_free(ring.stage), ring.parity ^ 1);
          const uint32_t bytes = static_cast<uint32_t>(piece.units) * gather.unit_bytes;
          ptx::arrive_announcing(memory.weights_full(ring.stage), bytes);
          ptx::copy_bulk(memory.weights + ring.stage * static_cast<uint32_t>(gather.weight_stage_bytes),
                         arguments.packed + (units_before + piece.first_unit) * gather.unit_bytes, bytes,
                         memory.weights_full(ring.stage));
          ring.advance(gather.weight_stages);
        }
      }
    }
    if (gather.keeps_weights) break;
  }
}

}  // namespace convt3d::direct
