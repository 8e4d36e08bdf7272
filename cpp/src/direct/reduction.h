// grad_weight on tensor cores: how its reduction over all voxels is cut.
//
// grad_weight[ci, co, tap] sums x[ci, i] * gy[co, i * stride - padding + tap * dilation] over the samples and the input
// voxels i: a matrix product whose rows are (tap, co), whose columns are ci, and which reduces over voxels. Eight
// output channels at one tap are a *band*; two bands are the 16 rows of a tensor-core product. A thread block takes
// some taps, output channels and input channels of one group, its *tile*, and a share of the voxels, its *part*. It
// goes through its share a box of voxels at a time: the box of x and the region of gy that its taps reach from there
// lie in shared memory, where every tap finds gy at a shift of its own.
#pragma once

#include <array>
#include <cstdint>
#include <optional>

#include "convt3d/convt3d.h"
#include "geometry.h"

namespace convt3d::direct {

// The sums of one warp: pairs of bands by blocks of 8 input channels, which are template parameters of the kernel.
struct WarpTile {
  int pairs, columns;
};

// float32 as TF32 and the half types; the choice among them is made by cost, in reduction.cpp.
constexpr std::array<WarpTile, 11> kWarpTiles{
    {{7, 4}, {5, 4}, {4, 4}, {2, 4}, {4, 6}, {3, 6}, {4, 8}, {2, 16}, {7, 2}, {4, 2}, {7, 1}}};
// IEEE float32, which needs more registers.
constexpr std::array<WarpTile, 4> kIeeeWarpTiles{{{4, 4}, {2, 6}, {7, 2}, {7, 1}}};

// What a block holds along one axis of x or gy. A tap at shift u = tap * dilation needs positions that leave u % stride
// over, so the positions of each such residue form a *run* in which neighbouring voxels are neighbours.
struct RegionAxis {
  static constexpr int kMostTaps = 8;
  static constexpr int kMostShift[3] = {510, 510, 2046};  // of a position from the region's origin, along each axis
  struct Run {
    int32_t shift;   // of its first position from the region's origin; the others follow a stride apart
    int32_t place;   // of the first one
    int32_t length;  // in positions
  };

  int32_t extent = 1;  // of the volume
  int32_t stride = 1;  // of the positions of a run
  int32_t runs = 1;
  int32_t entries = 1;  // positions held, in all runs
  int32_t loaded = 1;   // of them: without those that lie outside of the volume in every box, and stay zero
  int32_t places = 1;   // along the axis: entries, and gaps between the runs
  int32_t slot_pitch = 1, step = 1, step_pitch = 1;
  Run run[kMostTaps] = {};
  int32_t tap_slot[kMostTaps] = {};  // where voxel 0 of the box finds each tap's position

  // The slot of a place; after every `step` places comes a leap of step_pitch.
  CONVT3D_HOST_DEVICE int32_t slot(int32_t place) const {
    const int32_t steps = place / step;
    return steps * step_pitch + (place - steps * step) * slot_pitch;
  }
  // Positions held before a shift.
  CONVT3D_HOST_DEVICE int32_t count_before(int32_t shift) const {
    int32_t count = 0;
    for (int32_t own = 0; own < runs; ++own) {
      count += smaller(larger(ceil_divide(shift - run[own].shift, stride), 0), run[own].length);
    }
    return count;
  }
  // The slot of the position at a shift; negative where none is held.
  CONVT3D_HOST_DEVICE int32_t slot_at(int32_t shift) const {
    for (int32_t own = 0; own < runs; ++own) {
      const int32_t before = shift - run[own].shift, at = before / stride;
      if (before >= 0 && at * stride == before && at < run[own].length) return slot(run[own].place + at);
    }
    return -1;
  }
};

// A block's part of x or gy in shared memory. A position's slot is the sum of its slots along the axes.
// gy lies as [16 bytes of channels][slot][16 bytes]: as each slot is 16 bytes, a tap may shift the slots as it likes.
// x is not shifted, and its slots are in the order of the products. Those want voxels as the inner index where an
// element has 4 bytes: [4 slots][channel][16 bytes]; half types lie likewise, [8 slots][channel][16 bytes], where rows
// can be copied so, and else as gy does, to be transposed by the products.
struct Region {
  RegionAxis axis[3];
  int32_t span = 1;          // positions that are loaded together along the width: 1, 2 or 4, or 8 that are copied
  int32_t spans = 0;         // of a line, where they are several
  int32_t loaded_spans = 0;  // of them: without those that lie outside of the volume in every box
  bool copied = false;       // x in half types: 16 bytes of voxels at a time, as they lie in global memory
  int32_t chunks = 0;        // of 16 bytes of channels
  int32_t chunk_pitch = 0;   // bytes
  int32_t slot_bits = 0;     // x with voxels inside: 2 or 3, as 4 or 8 slots share 16 bytes
  int32_t slot_pitch = 16;   // bytes, of such a group of slots
  int32_t offset = 0;        // bytes from a stage's beginning

  // What is loaded together along the width.
  CONVT3D_HOST_DEVICE int32_t cells_of_line() const { return span > 1 ? loaded_spans : axis[2].loaded; }
  CONVT3D_HOST_DEVICE int32_t cells() const { return axis[0].loaded * axis[1].loaded * cells_of_line(); }
  // Whether something is held that is not loaded.
  CONVT3D_HOST_DEVICE bool leaves_out() const {
    return cells() < axis[0].entries * axis[1].entries * (span > 1 ? spans : axis[2].entries);
  }
};

// Threads of a block that load, beside the 256 that compute, of which each keeps so many sums: as many as registers are
// left for.
constexpr CONVT3D_HOST_DEVICE int loading_threads(int64_t compute_capability, int sums, bool ieee) {
  if (compute_capability != 90) return 128;
  return sums <= 80 && !ieee ? 384 : 256;
}

// A loading thread takes 64 bytes at once, a unit: so many chunks of 16 bytes of channels of a cell, that is of each of
// its `span` positions. Where channels are neighbours in memory, it takes two chunks of two cells.
constexpr CONVT3D_HOST_DEVICE int chunks_of_unit(int span, int element_size) {
  return (span * element_size < 4 ? 16 : 64 / (span * element_size)) * element_size / 16;
}

// Channels of a cell of x that a thread copies at once.
constexpr int kCopiedChannels = 8;

// The units of a region: `together` follow each other before those of the next channels begin.
struct Units {
  int32_t together = 1, count = 1;
  int32_t sharers = 1;  // neighbouring threads that take a cell's chunks in turn, so that their loads fill a sector
  double cycles = 0;    // that a warp takes for its 32

  Units(const Region& region, bool vectors, int element_size);
};

struct ReductionAxis {
  int32_t kernel = 1, stride = 1, padding = 0, dilation = 1;
  int32_t taps = 1, tap_tiles = 1;      // of a block, and blocks that share the kernel
  int32_t voxels = 1, voxel_boxes = 1;  // of a box, and boxes that share the volume
  int32_t step = 1;                     // voxels of one tensor-core product, a power of two
};

struct TensorReduction {
  static constexpr int32_t kAssignmentBytes = 144, kCellBytes = 16;  // of the kernel's tables: a block's share, a cell

  int32_t in_channels = 1, out_channels = 1;  // of a group
  int32_t groups = 1;
  ReductionAxis axis[3];
  Region region[2];  // of x and of gy

  int32_t warp_tile = 0;         // the index in kWarpTiles or kIeeeWarpTiles
  int32_t row_warps = 4;         // warps that share a tile's bands,
  int32_t column_warps = 1;      // its input channels,
  int32_t voxel_warps = 1;       // and the steps of the boxes
  int32_t channel_bands = 1;     // of 8 output channels of a tile, at each tap
  int32_t channel_tiles = 1;     // tiles that share a group's output channels,
  int32_t columns_per_tile = 8;  // input channels of a tile,
  int32_t column_tiles = 1;      // and tiles that share the group's
  int32_t tiles = 1;             // all of them, the groups' too

  int32_t loading_threads = 128;
  int32_t input_warps = 1;  // of them: those that load x, where the others load gy

  int32_t boxes = 1;   // of voxels, in all samples
  int32_t parts = 1;   // shares of them, each with a partial sum
  int32_t steps = 1;   // of a box
  int32_t stages = 1;  // boxes held at once
  int32_t stage_bytes = 0;
  int32_t table_bytes = 0;  // of shared memory, before the stages
};

// A tile's sums on their way out through shared memory, in floats: [input channel][output channel][tap], or with the
// last two exchanged where the weights' channels are innermost. Those of eight output channels by four every other
// input channel, which a warp writes at once, meet in no bank.
struct SumPitches {
  int32_t tap, channel, in_channel;

  CONVT3D_HOST_DEVICE SumPitches(const TensorReduction& cut, bool channels_last) {
    const int32_t taps = cut.axis[0].taps * cut.axis[1].taps * cut.axis[2].taps, channels = 8 * cut.channel_bands;
    tap = channels_last ? channels : 1;
    channel = channels_last ? 1 : taps | 1;
    const int32_t all = channels_last ? taps * tap : channels * channel;
    in_channel = all + (4 - all % 8 + 8) % 8;
  }
};

// How the tensor-core kernel takes the problem, with at most `budget` bytes of partial sums, and the clock cycles that
// this is expected to take; or nothing where it doesn't.
std::optional<double> cut_tensor_reduction(const Problem& problem, const Target& target, int64_t budget,
                                           TensorReduction& reduction);

}  // namespace convt3d::direct
