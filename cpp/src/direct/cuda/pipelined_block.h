// What the warps of a block of the pipelined gather share: its arguments, registers, barriers and shared memory, and
// what a tile is (see direct/cuda/pipelined_gather.h).
#pragma once

#include <cstdint>

#include "cuda/ptx.h"
#include "direct/cuda/gather_source.h"
#include "direct/pipelined_gather.h"

namespace convt3d::direct {

// How warps load rows, see SourceLoader::load_rows.
struct RowSteps {
  int warps;            // that load
  int cells;            // of a batch
  int bits;             // of the number of batches of the same cells: 0 or 1, and so its mask as well
  int64_t chunk;        // from one chunk of channels to the next, in bytes of the source
  int second_cells;     // from a batch's first two chunks to its other two: in cells,
  int second_channels;  // or in channels,
  int second_source;    // which are so many elements of the source
  int second_target;    // and bytes of the stage

  RowSteps(const PipelinedGather& gather, const GatherVolume& from)
      : warps(gather.source_threads() / 32),
        cells(gather.batch_cells()),
        bits(gather.batches_of_cells() / 2),
        chunk(int64_t{16} * from.channel_stride),
        second_cells(gather.channel_groups == 1 ? gather.row_cells() : 0),
        second_channels(gather.channel_groups == 1 ? 0 : 32 / gather.element_bytes),
        second_source(second_channels * from.channel_stride),
        second_target(gather.channel_groups == 1 ? 0 : 2 * gather.half_stride) {}
};

template <class T>
struct PipelinedArguments : GatherOperands<T> {
  bool channels_first;
  SourceLoads loads;
  Divisor<int32_t> by_cells, by_line_cells;  // of a stage's source and of a line of it, see SourceLoader
  RowSteps rows;
  int chunk_bits;      // of the number of 16-byte chunks of channels in a stage
  int thread_units;    // see PipelinedGather; of rows, all warps' together
  int* not_finite;     // becomes 1 where the source is not; null where weights have no gaps
  bool vector_stores;  // 16 bytes of channels in NDHWC, or of a row's half types in NCDHW, are neighbours and aligned
  bool pair_stores;    // NCDHW: two neighbours of a row are one word
  bool bulk_stores;    // see PipelinedGather::stores_in_bulk
  bool has_map;        // by which boxes are copied
  PipelinedGather gather;
};

// Registers of a thread that loads, and of one that multiplies, in multiples of 8: together those that two multiplying
// warpgroups and the loading ones are launched with, of which there are 65536.
CONVT3D_HOST_DEVICE constexpr int loading_registers(int loading_warpgroups) {
  return loading_warpgroups == 2 ? 64 : 72;
}
CONVT3D_HOST_DEVICE constexpr int multiplying_registers(int loading_warpgroups) {
  const int warpgroups = 2 + loading_warpgroups, launched = 65536 / (128 * warpgroups) / 8 * 8;
  return (launched * warpgroups - loading_registers(loading_warpgroups) * loading_warpgroups) / 2 / 8 * 8;
}
static_assert(multiplying_registers(2) == 192 && multiplying_registers(3) == 128 && multiplying_registers(4) == 96);

// Named barriers: one for each multiplying warpgroup, one for the warps that load the source, one for those that store.
constexpr int kWarpgroupBarrier = 1, kSourceBarrier = 3, kStoringBarrier = 4;

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
  int* source_tables;

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
    source_tables = reinterpret_cast<int*>(next);
  }
  // Of a warp that stores, behind the runs: what it fills gaps between these from.
  __device__ __forceinline__ unsigned char* constants(const PipelinedGather& gather, int warp) const {
    return reinterpret_cast<unsigned char*>(staging) + gather.staging_bytes - (warp + 1) * kConstantBytes;
  }
  __device__ __forceinline__ uint32_t source_full(int stage) const { return barriers + 8 * stage; }
  __device__ __forceinline__ uint32_t staged_full() const { return barriers + 32; }  // source stages are four at most
  __device__ __forceinline__ uint32_t staged_free() const { return barriers + 40; }
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
    column_block = take_digit(index, gather.by_columns);
    phase_block = take_digit(index, gather.by_phases);
    // Some residues have more taps than others: which of them a block gets changes from tile to tile.
    phase_block += static_cast<int>(static_cast<uint32_t>(index) * 0x9e3779b1u >> 20);
    phase_block -= gather.by_phases.quotient(phase_block) * gather.by_phases.value;
    group = take_digit(index, gather.by_groups);
#pragma unroll
    for (int axis = 2; axis >= 0; --axis) first[axis] = take_digit(index, gather.by_tiles[axis]) * gather.tile[axis];
    sample = static_cast<int64_t>(index) * gather.samples;
  }
};

// A position of the tile along each axis; returns its sample's number in the tile. In place they are ordered by blocks.
template <bool kInPlace>
__device__ __forceinline__ int unfold(const PipelinedGather& gather, int position, int (&along)[3]) {
  const int number = kInPlace ? position / 64 : position;
  const int row = gather.by_tile[2].quotient(number), planes = gather.by_tile[1].quotient(row);
  const int member = gather.by_tile[0].quotient(planes);
  along[0] = planes - member * gather.by_tile[0].value;
  along[1] = row - planes * gather.by_tile[1].value;
  along[2] = number - row * gather.by_tile[2].value;
  if constexpr (kInPlace) {
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) {
      along[axis] = along[axis] * gather.block[axis] + position % 64 / 8 * gather.eight_step[axis];
    }
    along[2] += position % 8;
  }
  return member;
}

// Where a tile's sums belong, of the kernel that kPipelinedGathers[kEntry] says.
template <class T, size_t kEntry>
class Destination {
 public:
  static constexpr GatherConfiguration kConfiguration = kPipelinedGathers[kEntry];
  static constexpr int kSlots = kConfiguration.slots, kColumns = kConfiguration.columns;
  static constexpr int kRowBlocks = kConfiguration.row_blocks;
  static constexpr bool kInPlace = kConfiguration.form == SourceForm::in_place;
  static constexpr int kMostRowSlots = kConfiguration.pattern == Pattern::windows ? 1 : kSlots;  // along the width

  __device__ __forceinline__ explicit Destination(const PipelinedArguments<T>& arguments)
      : arguments_(arguments), gather_(arguments.gather) {}

 protected:
  // A position's first destination voxel, and how many residues along each axis lie inside the volume.
  __device__ __forceinline__ int2 destination_place(const PipelinedItem& item, int position) const {
    const GatherVolume& to = arguments_.to;
    int along[3], voxel = 0, inside = 0;
    const int member = unfold<kInPlace>(gather_, position, along);
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) {
      const int begin = (item.first[axis] + along[axis]) * gather_.destination_stride[axis];
      voxel = voxel * to.size[axis] + begin;
      inside = inside << 10 | max(0, min(gather_.destination_stride[axis], to.size[axis] - begin));
    }
    voxel += member * to.sample_voxels;
    const bool is_there = position < gather_.tile_positions() && member < arguments_.batch - item.sample;
    return make_int2(voxel, is_there ? inside : 0);
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
  // How far on the rows of these residues begin, in voxels.
  __device__ __forceinline__ int row_offset(const int (&residue)[3]) const {
    return (residue[0] * arguments_.to.size[1] + residue[1]) * arguments_.to.size[2];
  }
  // NCDHW: where a run begins, of those that the tile writes of a channel, and how many voxels it has, or none.
  __device__ __forceinline__ int2 place_of_run(const PipelinedItem& item, const PipelinedPhase& phase, int run) const {
    const GatherVolume& to = arguments_.to;
    const int plane = run / gather_.plane_runs, tile_plane = plane / gather_.slot_extent[0];
    const int member = tile_plane / gather_.tile[0];
    const int depth_residue = phase.residue[0] + plane % gather_.slot_extent[0];
    const int depth =
        (item.first[0] + tile_plane - member * gather_.tile[0]) * gather_.destination_stride[0] + depth_residue;
    int height = item.first[1] * gather_.destination_stride[1];
    const int width = item.first[2] * gather_.destination_stride[2];
    int voxels = 0;
    int height_residue = 0;
    if (gather_.whole_planes) {
      voxels = min(gather_.tile[1] * gather_.destination_stride[1], to.size[1] - height) * to.size[2];
    } else {
      const int line = run % gather_.plane_runs, along = line / gather_.slot_extent[1];
      height_residue = phase.residue[1] + line % gather_.slot_extent[1];
      height += along * gather_.destination_stride[1] + height_residue;
      voxels = min(gather_.tile[2] * gather_.destination_stride[2], to.size[2] - width);
    }
    const bool inside = member < arguments_.batch - item.sample && depth_residue < gather_.destination_stride[0] &&
                        depth < to.size[0] && height_residue < gather_.destination_stride[1] && height < to.size[1];
    return make_int2(member * to.sample_voxels + (depth * to.size[1] + height) * to.size[2] + width,
                     inside ? voxels : 0);
  }
  __device__ __forceinline__ T* destination_of(const PipelinedItem& item) const {
    const GatherVolume& to = arguments_.to;
    return arguments_.destination + item.sample * to.sample_stride +
           (static_cast<int64_t>(item.group) * to.group_channels + item.column_block * kColumns) * to.channel_stride;
  }

  // How far behind the beginning of a vector of 16 bytes this lies, in elements.
  __device__ __forceinline__ static int beyond_vector(const T* place) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(place) % 16 / sizeof(T));
  }

  const PipelinedArguments<T>& arguments_;
  const PipelinedGather& gather_;
};

}  // namespace convt3d::direct
