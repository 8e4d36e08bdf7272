// grad_weight on tensor cores. direct/reduction.h has the terms.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <utility>

#include "cuda/launch.h"
#include "cuda/ptx.h"
#include "direct/cuda/kernels.h"

namespace convt3d::direct {
namespace {

constexpr int kComputingWarps = 8;
constexpr int kComputingThreads = 32 * kComputingWarps;
constexpr int kLoadingThreads = 128;
constexpr int kThreads = kComputingThreads + kLoadingThreads;

// On sm_90, registers a thread; 168 times kThreads in all.
constexpr int kComputingRegisters = 184, kLoadingRegisters = 136;

// Channels in 16 bytes.
template <class T>
constexpr int kChunk = 16 / static_cast<int>(sizeof(T));

// Voxels of one tensor-core product.
template <class T>
constexpr int kStep = 32 / static_cast<int>(sizeof(T));

// The regions of a block.
constexpr int kInput = 0, kGradOutput = 1;

// How a loading thread fetches chunks of 16 bytes of channels: where they are neighbours in memory, and aligned, each
// by one load; otherwise an element a load, for one position, or, where chunks are few, for two or four at once.
enum class Fetch : int { vectors, one, two, four };

// x or gy in global memory. Strides are in bytes, but where they say elements.
template <class T>
struct Volume {
  const T* data = nullptr;
  int64_t sample_elements = 0;
  int32_t channel_stride = 0, voxel_stride = 0;
  Fetch fetch = Fetch::one;
  int32_t blocks = 0;        // of positions, of a box
  int32_t chunk_groups = 1;  // loads that take all chunks of a position
};

template <class T>
struct Arguments {
  TensorReduction cut;
  Volume<T> volume[2];
  float* partials;
  int64_t partial_elements;
  bool channels_last;
};

// A position of a region: where in the volume, from the region's origin, and where in shared memory.
struct Entry {
  int32_t voxel, target;  // the latter in bytes
};

// A block's output tile, and its share of the boxes.
struct alignas(8) Assignment {
  int32_t group, first_out_channel, first_in_channel;
  int32_t first_tap[3];
  int32_t part, first_box, boxes;

  Assignment() = default;
  __device__ explicit Assignment(const TensorReduction& cut) {
    part = static_cast<int32_t>(blockIdx.x) / cut.tiles;
    int32_t tile = static_cast<int32_t>(blockIdx.x) - part * cut.tiles;
#pragma unroll
    for (int axis = 2; axis >= 0; --axis) {
      const int32_t next = tile / cut.axis[axis].tap_tiles;
      first_tap[axis] = (tile - next * cut.axis[axis].tap_tiles) * cut.axis[axis].taps;
      tile = next;
    }
    const int32_t channel_tile = tile / cut.column_tiles;
    first_in_channel = (tile - channel_tile * cut.column_tiles) * cut.columns_per_tile;
    group = channel_tile / cut.channel_tiles;
    first_out_channel = (channel_tile - group * cut.channel_tiles) * cut.channel_bands * 8;
    first_box = static_cast<int32_t>(static_cast<int64_t>(cut.boxes) * part / cut.parts);
    boxes = static_cast<int32_t>(static_cast<int64_t>(cut.boxes) * (part + 1) / cut.parts) - first_box;
  }

  __device__ int32_t first_channel(const TensorReduction& cut, int region) const {
    return region == kInput ? group * cut.in_channels + first_in_channel : group * cut.out_channels + first_out_channel;
  }
  // Channels of the group from the first one on.
  __device__ int32_t channels(const TensorReduction& cut, int region) const {
    return region == kInput ? cut.in_channels - first_in_channel : cut.out_channels - first_out_channel;
  }
};

// Goes through boxes in order.
struct BoxWalk {
  int32_t sample;
  int32_t box[3];

  __device__ BoxWalk(const TensorReduction& cut, int32_t first) {
#pragma unroll
    for (int axis = 2; axis >= 0; --axis) {
      const int32_t next = first / cut.axis[axis].voxel_boxes;
      box[axis] = first - next * cut.axis[axis].voxel_boxes;
      first = next;
    }
    sample = first;
  }

  __device__ void advance(const TensorReduction& cut) {
    if (++box[2] < cut.axis[2].voxel_boxes) return;
    box[2] = 0;
    if (++box[1] < cut.axis[1].voxel_boxes) return;
    box[1] = 0;
    if (++box[0] < cut.axis[0].voxel_boxes) return;
    box[0] = 0;
    ++sample;
  }
};

// The shifts of a position along the three axes in one word, each below a bit that is 0, the guard.
constexpr uint32_t kGuards = 1u << 31 | 1u << 21 | 1u << 11;
__device__ uint32_t packed_shifts(int depth, int height, int width) {
  return static_cast<uint32_t>(depth) << 22 | static_cast<uint32_t>(height) << 12 | static_cast<uint32_t>(width);
}

// A position of one axis.
struct Along {
  int32_t shift, slot;
};

// Writes the positions of one axis in the order of their shifts, so that neighbouring threads load neighbours.
__device__ void tabulate(const RegionAxis& axis, Along* table) {
  for (int run = 0; run < axis.runs; ++run) {
    const RegionAxis::Run own = axis.run[run];
    for (int at = threadIdx.x; at < own.length; at += kThreads) {
      const int shift = own.shift + at * axis.stride;
      int rank = at;
      for (int other = 0; other < axis.runs; ++other) {
        if (other == run) continue;
        const int below = ceil_divide(shift - axis.run[other].shift, axis.stride);
        rank += smaller(larger(below, 0), axis.run[other].length);
      }
      table[rank] = {shift, axis.slot(own.place + at)};
    }
  }
}

// Writes all positions of a region, from the tables of its width, height and depth.
__device__ void tabulate(const Region& region, const Along* widths, Entry* entries, uint32_t* shifts) {
  const Along* heights = widths + region.axis[2].entries;
  const Along* depths = heights + region.axis[1].entries;
  for (int index = threadIdx.x; index < region.entries; index += kThreads) {
    const int line = index / region.axis[2].entries, plane = line / region.axis[1].entries;
    const Along depth = depths[plane], height = heights[line - plane * region.axis[1].entries],
                width = widths[index - line * region.axis[2].entries];
    const int slot = depth.slot + height.slot + width.slot, group = slot >> region.slot_bits;
    entries[index] = {(depth.shift * region.axis[1].extent + height.shift) * region.axis[2].extent + width.shift,
                      group * region.slot_pitch + (slot - (group << region.slot_bits)) * 4};
    shifts[index] = packed_shifts(depth.shift, height.shift, width.shift);
  }
}

// Where gy's region holds a voxel of a step, and each step, in bytes.
__device__ int voxel_offset(const TensorReduction& cut, int voxel) {
  const RegionAxis(&axis)[3] = cut.region[kGradOutput].axis;
  const int line = voxel / cut.axis[2].step, plane = line / cut.axis[1].step;
  return (plane * axis[0].slot_pitch + (line - plane * cut.axis[1].step) * axis[1].slot_pitch +
          (voxel - line * cut.axis[2].step) * axis[2].slot_pitch) *
         16;
}
__device__ void tabulate_steps(const TensorReduction& cut, int32_t* table) {
  const RegionAxis(&axis)[3] = cut.region[kGradOutput].axis;
  const int width_steps = cut.axis[2].voxels / cut.axis[2].step, height_steps = cut.axis[1].voxels / cut.axis[1].step;
  for (int step = threadIdx.x; step < cut.steps; step += kThreads) {
    const int line = step / width_steps, plane = line / height_steps;
    table[step] = (plane * cut.axis[0].step * axis[0].slot_pitch +
                   (line - plane * height_steps) * cut.axis[1].step * axis[1].slot_pitch +
                   (step - line * width_steps) * cut.axis[2].step * axis[2].slot_pitch) *
                  16;
  }
}

// Loads under way: 16-byte vectors, or the elements that will make them up, and where they go.
template <class T>
struct Batch {
  static constexpr int kRegisters = 32;
  static constexpr int kVectors = kRegisters / 4;           // of Fetch::vectors,
  static constexpr int kVectorPositions = 4;                // for so many positions
  static constexpr int kGathered = kRegisters / kChunk<T>;  // of the other ways
  uint32_t element[kRegisters];
  int32_t target[kVectors];  // in bytes from the region's beginning
  bool gathered;
  bool waiting = false;  // to be stored
};

// The tables of both regions, one after the other.
struct Tables {
  const Entry* entries;
  const uint32_t* shifts;
};

// All loads of a thread, through the boxes, their regions, the positions and their channels.
template <class T>
class Loader {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;

 public:
  __device__ Loader(const Arguments<T>& in, const Assignment& own, const Tables& tables)
      : in_(in), own_(own), tables_(tables), walk_(in.cut, own.first_box) {
    thread_ = static_cast<int>(threadIdx.x) - kComputingThreads;
    if (own.boxes > 0) enter();
  }

  // The next of them, if there is one.
  __device__ void fetch(Batch<T>& batch) {
    if (boxes_ == own_.boxes) return;
    batch.waiting = true;
    switch (in_.volume[region_].fetch) {
      case Fetch::vectors:
        vectors(batch);
        break;
      case Fetch::one:
        gather<1>(batch);
        break;
      case Fetch::two:
        gather<2>(batch);
        break;
      case Fetch::four:
        gather<4>(batch);
        break;
    }
    if (++chunk_group_ < in_.volume[region_].chunk_groups) return;
    chunk_group_ = 0;
    if (++block_ < in_.volume[region_].blocks) return;
    block_ = 0;
    region_ = 1 - region_;
    if (region_ == kInput) {
      walk_.advance(in_.cut);
      if (++boxes_ == own_.boxes) return;
    }
    enter();
  }

 private:
  // Begins a region.
  __device__ void enter() {
    const TensorReduction& cut = in_.cut;
    const Region& region = cut.region[region_];
    const Volume<T>& volume = in_.volume[region_];
    const int limit[3] = {511, 511, 2047};
    int64_t voxel = 0;
    int low[3], high[3];
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) {
      const ReductionAxis& along = cut.axis[axis];
      int origin = walk_.box[axis] * along.voxels;
      if (region_ == kGradOutput) {
        origin = origin * along.stride - along.padding + own_.first_tap[axis] * along.dilation;
      }
      const int extent = region.axis[axis].extent, last = extent - 1 - origin;
      voxel = voxel * extent + origin;
      low[axis] = last < 0 ? limit[axis] : smaller(larger(-origin, 0), limit[axis]);
      high[axis] = smaller(larger(last, 0), limit[axis]);
    }
    low_ = packed_shifts(low[0], low[1], low[2]);
    high_ = packed_shifts(high[0], high[1], high[2]) | kGuards;
    data_ = reinterpret_cast<const char*>(volume.data + walk_.sample * volume.sample_elements) +
            static_cast<int64_t>(own_.first_channel(cut, region_)) * volume.channel_stride +
            voxel * volume.voxel_stride;
    channels_ = own_.channels(cut, region_);
    first_entry_ = region_ == kInput ? 0 : cut.region[kInput].entries;
    // Whether 16 bytes or four times 4, 16 bytes apart, no two threads write to the same ones.
    scratch_ = region.scratch + (region.slot_bits == 0 ? thread_ * 16 : thread_ / 4 * 64 + thread_ % 4 * 4);
  }

  struct Place {
    const char* source;
    int32_t target, chunk_pitch;
    bool inside;
  };

  __device__ Place place(int index) const {
    const Region& region = in_.cut.region[region_];
    const bool exists = index < region.entries;
    const int at = first_entry_ + smaller(index, region.entries - 1);
    const Entry entry = tables_.entries[at];
    const uint32_t shifts = tables_.shifts[at];
    // The subtractions leave the guards standing where nothing is borrowed.
    const bool inside = (((shifts | kGuards) - low_) & (high_ - shifts) & kGuards) == kGuards;
    Place result;
    result.source = data_ + static_cast<int64_t>(entry.voxel) * ptx::opaque(in_.volume[region_].voxel_stride);
    result.target = exists ? entry.target : scratch_;
    result.chunk_pitch = exists ? region.chunk_pitch : 0;
    result.inside = exists & inside;
    return result;
  }

  __device__ int32_t target(const Place& at, int chunk) const {
    return chunk < in_.cut.region[region_].chunks ? at.target + chunk * at.chunk_pitch : scratch_;
  }

  template <int Positions>
  __device__ void gather(Batch<T>& batch) const {
    constexpr int kChunks = Batch<T>::kGathered / Positions, kElements = kChunks * kChunk<T>;
    const int first_chunk = chunk_group_ * kChunks, channels = channels_ - first_chunk * kChunk<T>;
    const int32_t stride = in_.volume[region_].channel_stride;
    const int64_t skipped = static_cast<int64_t>(first_chunk * kChunk<T>) * stride;
    const char* source[Positions];
    bool inside[Positions];
    batch.gathered = true;
#pragma unroll
    for (int p = 0; p < Positions; ++p) {
      const Place at = place((block_ * Positions + p) * kLoadingThreads + thread_);
      source[p] = ptx::opaque(at.source + skipped);
      inside[p] = at.inside;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) batch.target[p * kChunks + c] = target(at, first_chunk + c);
    }
    const auto load = [&](int p, int i) {
      return __ldg(reinterpret_cast<const Bits*>(source[p] + static_cast<int64_t>(i) * ptx::opaque(stride)));
    };
    if (channels >= kElements) {
#pragma unroll
      for (int e = 0; e < Positions * kElements; ++e) {
        batch.element[e] = inside[e / kElements] ? load(e / kElements, e % kElements) : Bits{0};
      }
    } else {
#pragma unroll
      for (int e = 0; e < Positions * kElements; ++e) {
        const bool exists = inside[e / kElements] & (e % kElements < channels);
        batch.element[e] = exists ? load(e / kElements, e % kElements) : Bits{0};
      }
    }
  }

  // Two threads share a position, so that their loads fill a sector; eight take two chunks of four positions, whose
  // stores meet no bank twice.
  __device__ void vectors(Batch<T>& batch) const {
    constexpr int kPositions = Batch<T>::kVectorPositions;
    constexpr int kChunks = Batch<T>::kVectors / kPositions;  // of a thread and position, every other one
    const int first_chunk = chunk_group_ * 2 * kChunks + thread_ % 2;
    batch.gathered = false;
#pragma unroll
    for (int p = 0; p < kPositions; ++p) {
      const Place at = place((block_ * kPositions + p) * (kLoadingThreads / 2) + thread_ / 2);
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int chunk = first_chunk + 2 * c;
        uint4 vector = make_uint4(0, 0, 0, 0);
        if (at.inside & (chunk * kChunk<T> < channels_)) {
          vector = __ldg(reinterpret_cast<const uint4*>(at.source + chunk * 16));
        }
        uint32_t* element = batch.element + 4 * (p * kChunks + c);
        element[0] = vector.x;
        element[1] = vector.y;
        element[2] = vector.z;
        element[3] = vector.w;
        batch.target[p * kChunks + c] = target(at, chunk);
      }
    }
  }

  const Arguments<T>& in_;
  const Assignment& own_;
  const Tables tables_;
  BoxWalk walk_;
  int thread_;
  // The next load.
  int boxes_ = 0, region_ = kInput, block_ = 0, chunk_group_ = 0;
  // Its region: the volume at the region's origin, channels left, the shifts that lie inside, its part of the tables,
  // and where to write what belongs nowhere.
  const char* data_ = nullptr;
  int32_t channels_ = 0, first_entry_ = 0, scratch_ = 0;
  uint32_t low_ = 0, high_ = 0;
};

// Rounds to TF32, but for the bits after it, which the tensor cores ignore.
__device__ float round_for_tf32(float value) {
  constexpr uint32_t kHalf = 1u << 12;
  return __uint_as_float(__float_as_uint(value) + (fabsf(value) < INFINITY ? kHalf : 0));
}

// Stores what has been loaded, float32 rounded to TF32 if `Round`; with `spread`, each channel 16 bytes from the next.
template <class T, bool Round>
__device__ void store(const Batch<T>& batch, bool spread, unsigned char* region) {
  if constexpr (sizeof(T) == 4) {
    const auto value = [&](int i) {
      const float element = __uint_as_float(batch.element[i]);
      return Round ? round_for_tf32(element) : element;
    };
    if (spread) {
#pragma unroll
      for (int i = 0; i < Batch<T>::kRegisters; ++i) {
        *reinterpret_cast<float*>(region + batch.target[i / 4] + i % 4 * 16) = value(i);
      }
    } else {
#pragma unroll
      for (int i = 0; i < Batch<T>::kRegisters; i += 4) {
        *reinterpret_cast<float4*>(region + batch.target[i / 4]) =
            make_float4(value(i), value(i + 1), value(i + 2), value(i + 3));
      }
    }
  } else {
    constexpr int kWords = 4;
    if (batch.gathered) {
#pragma unroll
      for (int i = 0; i < Batch<T>::kGathered; ++i) {
        const uint32_t* element = batch.element + kChunk<T> * i;
        uint32_t word[kWords];
#pragma unroll
        for (int j = 0; j < kWords; ++j) word[j] = element[2 * j] | element[2 * j + 1] << 16;
        *reinterpret_cast<uint4*>(region + batch.target[i]) = make_uint4(word[0], word[1], word[2], word[3]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < Batch<T>::kVectors; ++i) {
        const uint32_t* word = batch.element + kWords * i;
        *reinterpret_cast<uint4*>(region + batch.target[i]) = make_uint4(word[0], word[1], word[2], word[3]);
      }
    }
  }
}

// The named barriers by which the loading and the computing warps hand each other the stages.
__device__ int full(int stage) { return 1 + stage; }
__device__ int empty(const TensorReduction& cut, int stage) { return 1 + cut.stages + stage; }

// The loading warps: a stream of loads through all boxes, two batches of which are under way.
template <class T, bool Round>
__device__ void load_boxes(const Arguments<T>& in, const Assignment& own, const Tables& tables, unsigned char* stages) {
  const TensorReduction& cut = in.cut;
  const int input_loads = in.volume[kInput].blocks * in.volume[kInput].chunk_groups;
  const int loads = input_loads + in.volume[kGradOutput].blocks * in.volume[kGradOutput].chunk_groups;  // of a box
  int boxes = 0, load = 0, stage = 0;
  const auto put = [&](Batch<T>& batch) {
    if (!batch.waiting) return;
    batch.waiting = false;
    if (load == 0 && boxes >= cut.stages) ptx::barrier_sync(empty(cut, stage), kThreads);
    const bool input = load < input_loads;
    const int offset = stage * cut.stage_bytes + (input ? cut.region[kInput].offset : cut.region[kGradOutput].offset);
    store<T, Round>(batch, input, stages + offset);
    if (++load == loads) {
      ptx::fence_shared_for_wgmma();
      ptx::barrier_arrive(full(stage), kThreads);
      load = 0;
      ++boxes;
      stage = stage + 1 == cut.stages ? 0 : stage + 1;
    }
  };

  Loader<T> loader(in, own, tables);
  Batch<T> even, odd;
  while (boxes < own.boxes) {
    loader.fetch(odd);
    put(even);
    loader.fetch(even);
    put(odd);
  }
}

// The one by which the computing warps wait for each other.
constexpr int kSumsBarrier = 15;

// A band of the block's tile: one tap and eight output channels.
struct Band {
  int32_t offset;  // of its first voxel in gy's region, in bytes
  int32_t sum;     // of its first channel among the sums of the tile's first input channel; negative if it has none
};

// How those sums lie: in the order of the weights.
struct SumPitches {
  int32_t tap, channel, in_channel;

  __device__ SumPitches(const TensorReduction& cut, bool channels_last) {
    const int taps = cut.axis[0].taps * cut.axis[1].taps * cut.axis[2].taps, channels = 8 * cut.channel_bands;
    tap = channels_last ? channels : 1;
    channel = channels_last ? 1 : taps;
    in_channel = channels * taps;
  }
};

// From a warp's band to its next pair: the warps of a warpgroup take turns.
constexpr int kPairPitch = 8;

template <class T>
__device__ void tabulate_bands(const Arguments<T>& in, int bands, Band* table) {
  const TensorReduction& cut = in.cut;
  const SumPitches pitches(cut, in.channels_last);
  for (int band = threadIdx.x; band < bands; band += kThreads) {
    int rest = band, slot = 0, tap = 0, pitch = 1;
    for (int axis = 2; axis >= 0; --axis) {
      const int taps = cut.axis[axis].taps, next = rest / taps, own = rest - next * taps;
      slot += cut.region[kGradOutput].axis[axis].tap_slot[own];
      tap += own * pitch;
      pitch *= taps;
      rest = next;
    }
    const bool exists = rest < cut.channel_bands;
    const int channel = exists ? rest * 8 : 0;
    table[band] = {slot * 16 + channel / kChunk<T> * cut.region[kGradOutput].chunk_pitch,
                   exists ? tap * pitches.tap + channel * pitches.channel : -1};
  }
}

// How a warp reads the rows of its products, gy, from shared memory: 16 bands' channels by the voxels of a step.
template <class T, int Pairs>
class Rows {
 public:
  // The half types: eight rows of 16 bytes are eight voxels of eight channels, transposed as they are loaded.
  __device__ Rows(const TensorReduction& cut, const Band* bands, int lane) {
    const int row = lane % 8, matrix = lane / 8, voxel = voxel_offset(cut, matrix / 2 * 8 + row);
#pragma unroll
    for (int p = 0; p < Pairs; ++p) pair_[p] = bands[p * kPairPitch + matrix % 2].offset + voxel;
  }

  __device__ void load(const unsigned char* grad_output, int p, uint32_t (&a)[4]) const {
    ptx::load_matrices_transposed(a, ptx::shared_address(grad_output) + pair_[p]);
  }

 private:
  int pair_[Pairs];
};

template <int Pairs>
class Rows<float, Pairs> {
 public:
  __device__ Rows(const TensorReduction& cut, const Band* bands, int lane) {
    const int lane_offset =
        lane / 16 * cut.region[kGradOutput].chunk_pitch + lane / 4 % 4 * 4 + voxel_offset(cut, lane % 4);
#pragma unroll
    for (int p = 0; p < Pairs; ++p) {
#pragma unroll
      for (int half = 0; half < 2; ++half) pair_[p][half] = bands[p * kPairPitch + half].offset + lane_offset;
    }
    upper_ = voxel_offset(cut, 4);
  }

  __device__ void load(const unsigned char* grad_output, int p, uint32_t (&a)[4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned char* at = grad_output + pair_[p][half];
      a[half] = *reinterpret_cast<const uint32_t*>(at);
      a[2 + half] = *reinterpret_cast<const uint32_t*>(at + upper_);
    }
  }

 private:
  int pair_[Pairs][2];
  int upper_;  // from a step's first four voxels to the others
};

// How a warp reads the columns of its products, x: 8 * Columns channels by the voxels of a step.
template <class T, int Columns>
class ColumnsOf {
 public:
  __device__ ColumnsOf(const TensorReduction& cut, int first_column, int lane) {
    const Region& region = cut.region[kInput];
    if constexpr (sizeof(T) == 4) {
      pitch_ = 8 * 16;
      upper_ = region.slot_pitch;
    } else {
      pitch_ = region.chunk_pitch;
      upper_ = 8 * 16;
    }
    first_ = first_column * pitch_;
    lane_ = first_ + lane / 16 * pitch_ + lane / 8 % 2 * upper_ + lane % 8 * 16;
  }

  // `Count` blocks of 8, from `first` on, into registers.
  template <int Count>
  __device__ void load(uint32_t input, int first, uint32_t (&b)[Count][2]) const {
    const uint32_t at = input + lane_ + first * pitch_;
#pragma unroll
    for (int n = 0; n + 1 < Count; n += 2) {
      uint32_t both[4];
      if constexpr (sizeof(T) == 4) {
        ptx::load_matrices(both, at + n * pitch_);
      } else {
        ptx::load_matrices_transposed(both, at + n * pitch_);
      }
      b[n][0] = both[0];
      b[n][1] = both[1];
      b[n + 1][0] = both[2];
      b[n + 1][1] = both[3];
    }
    if constexpr (Count % 2 == 1) {
      if constexpr (sizeof(T) == 4) {
        ptx::load_matrices(b[Count - 1], at + (Count - 1) * pitch_);
      } else {
        ptx::load_matrices_transposed(b[Count - 1], at + (Count - 1) * pitch_);
      }
    }
  }

#if CONVT3D_HAS_WGMMA
  // sum += a @ columns, on the four warps of a warpgroup.
  __device__ void multiply(uint32_t input, const uint32_t (&a)[4], float (&sum)[4 * Columns]) const {
    constexpr int kMost = 8;  // columns of one instruction
#pragma unroll
    for (int n = 0; n < Columns; n += kMost) {
      constexpr int kWide = 8 * (Columns < kMost ? Columns : kMost);
      const uint32_t at = input + first_ + n * pitch_;
      if constexpr (sizeof(T) == 4) {
        ptx::Wgmma<T, kWide>::run(sum + 4 * n, a, ptx::wgmma_descriptor(ptx::wgmma_columns(at, upper_)));
      } else {
        ptx::WgmmaTransposed<T, kWide>::run(sum + 4 * n, a, ptx::wgmma_rows(at, upper_, pitch_));
      }
    }
  }
#endif

 private:
  int pitch_;  // of 8 channels
  int upper_;  // from a step's first half to the second
  int first_, lane_;
};

// float32 as the sum of two TF32 values.
struct Halves {
  uint32_t high, low;
  __device__ explicit Halves(uint32_t bits) {
    const float value = __uint_as_float(bits), rounded = ptx::round_to_tf32(value);
    high = __float_as_uint(rounded);
    low = __float_as_uint(value - rounded);
  }
};

// sum += the products of one step.
template <class T, int Pairs, int Columns>
__device__ void multiply(const Rows<T, Pairs>& rows, const ColumnsOf<T, Columns>& columns,
                         const unsigned char* grad_output, uint32_t input, float (&sum)[Pairs][4 * Columns]) {
#if CONVT3D_HAS_WGMMA
  // A group of products a pair; a pair's fragment is loaded anew when its group of the step before is done.
#pragma unroll
  for (int p = 0; p < Pairs; ++p) {
    ptx::wait_for_products<Pairs - 1>();
    uint32_t a[4];
    rows.load(grad_output, p, a);
    ptx::begin_products();
    columns.multiply(input, a, sum[p]);
    ptx::commit_products();
  }
#else
  // Where registers are few, a few columns at a time, at the price of loading the rows again.
  constexpr bool kFewRegisters = Pairs * Columns >= 32;
  constexpr int kColumns = kFewRegisters ? 4 : Columns, kFragments = kFewRegisters ? 1 : 2;
#pragma unroll
  for (int first = 0; first < Columns; first += kColumns) {
    uint32_t b[kColumns][2], a[kFragments][4];
    columns.load(input, first, b);
    if (kFragments == 2) rows.load(grad_output, 0, a[0]);
#pragma unroll
    for (int p = 0; p < Pairs; ++p) {
      const int ahead = p + kFragments - 1;
      if (ahead < Pairs) rows.load(grad_output, ahead, a[ahead % kFragments]);
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        ptx::mma<T>(reinterpret_cast<float (&)[4]>(sum[p][4 * (first + n)]), a[p % kFragments], b[n]);
      }
    }
  }
#endif
}

// The same in IEEE float32, by three TF32 products.
template <int Pairs, int Columns>
__device__ void multiply_ieee(const Rows<float, Pairs>& rows, const ColumnsOf<float, Columns>& columns,
                              const unsigned char* grad_output, uint32_t input, float (&sum)[Pairs][4 * Columns]) {
  uint32_t b[Columns][2], b_low[Columns][2];
  columns.load(input, 0, b);
#pragma unroll
  for (int n = 0; n < Columns; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Halves halves(b[n][i]);
      b[n][i] = halves.high;
      b_low[n][i] = halves.low;
    }
  }
#pragma unroll
  for (int p = 0; p < Pairs; ++p) {
    uint32_t a[4], a_low[4];
    rows.load(grad_output, p, a);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Halves halves(a[i]);
      a[i] = halves.high;
      a_low[i] = halves.low;
    }
    // The tensor cores truncate their sums: the last of the three does so noticeably, and the addition is rounded.
    float part[Columns][4] = {};
#pragma unroll
    for (int n = 0; n < Columns; ++n) ptx::mma<float>(part[n], a_low, b[n]);
#pragma unroll
    for (int n = 0; n < Columns; ++n) ptx::mma<float>(part[n], a, b_low[n]);
#pragma unroll
    for (int n = 0; n < Columns; ++n) ptx::mma<float>(part[n], a, b[n]);
#pragma unroll
    for (int i = 0; i < 4 * Columns; ++i) sum[p][i] += part[i / 4][i % 4];
  }
}

// What a computing warp has to do: its bands, its input channels, and which steps of a box.
template <int Pairs, int Columns>
struct Role {
  int lane, first_band, first_column, first_step;

  __device__ explicit Role(const TensorReduction& cut) {
    // Computed anew where it is needed, rather than kept in registers.
    const int thread = ptx::opaque(static_cast<int>(threadIdx.x)), warp = thread / 32, warpgroup = warp / 4;
    lane = thread % 32;
    first_band = (cut.row_warps == kComputingWarps ? warpgroup * Pairs * kPairPitch : 0) + warp % 4 * 2;
    first_column = cut.column_warps == 2 ? warpgroup * Columns : 0;
    first_step = cut.voxel_warps == 2 ? warpgroup : 0;
  }
};

// The computing warps' sums over their share of every box's steps.
template <class T, bool Ieee, int Pairs, int Columns>
__device__ void multiply_boxes(const TensorReduction& cut, const Assignment& own, const Band* bands,
                               const int32_t* steps, const unsigned char* stages, float (&sum)[Pairs][4 * Columns]) {
  const Role<Pairs, Columns> role(cut);
  const Rows<T, Pairs> rows(cut, bands + role.first_band, role.lane);
  const ColumnsOf<T, Columns> columns(cut, role.first_column, role.lane);
  const int step_bytes = (kStep<T> >> cut.region[kInput].slot_bits) * cut.region[kInput].slot_pitch;
  int stage = 0, previous = 0;
  for (int box = 0; box < own.boxes; ++box) {
    ptx::barrier_sync(full(stage), kThreads);
    const unsigned char* base = stages + stage * cut.stage_bytes;
    const uint32_t input = ptx::shared_address(base + cut.region[kInput].offset);
    const unsigned char* grad_output = base + cut.region[kGradOutput].offset;
    for (int step = role.first_step; step < cut.steps; step += cut.voxel_warps) {
      if constexpr (Ieee) {
        multiply_ieee(rows, columns, grad_output + steps[step], input + step * step_bytes, sum);
      } else {
        multiply<T>(rows, columns, grad_output + steps[step], input + step * step_bytes, sum);
      }
      // After the first step the products of the box before are surely done.
      if (step == role.first_step && box > 0 && box - 1 + cut.stages < own.boxes) {
        ptx::barrier_arrive(empty(cut, previous), kThreads);
      }
    }
    previous = stage;
    stage = stage + 1 == cut.stages ? 0 : stage + 1;
  }
  if constexpr (!Ieee) ptx::wait_for_products<0>();
}

// Writes the computing warps' sums to the block's part of the partial sums, which lie as the weights do: through shared
// memory, where two warpgroups that shared the voxels add up.
template <class T, int Pairs, int Columns>
__device__ void write_sums(const Arguments<T>& in, const Assignment& own, const Band* bands, unsigned char* stages,
                           const float (&sum)[Pairs][4 * Columns]) {
  const TensorReduction& cut = in.cut;
  const Role<Pairs, Columns> role(cut);
  bands += role.first_band;
  const SumPitches pitches(cut, in.channels_last);
  float* tile = reinterpret_cast<float*>(stages);
#pragma unroll 1
  for (int warpgroups = 0; warpgroups < cut.voxel_warps; ++warpgroups) {
    ptx::barrier_sync(kSumsBarrier, kComputingThreads);
    if (warpgroups != role.first_step) continue;
#pragma unroll
    for (int p = 0; p < Pairs; ++p) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int first = bands[p * kPairPitch + half].sum;
        if (first < 0) continue;
        float* target = tile + first + role.lane / 4 * pitches.channel +
                        (role.first_column * 8 + role.lane % 4 * 2) * pitches.in_channel;
#pragma unroll
        for (int i = 0; i < 2 * Columns; ++i) {
          const float value = sum[p][i / 2 * 4 + 2 * half + i % 2];
          float& total = target[(i / 2 * 8 + i % 2) * pitches.in_channel];
          total = warpgroups == 0 ? value : total + value;
        }
      }
    }
  }
  ptx::barrier_sync(kSumsBarrier, kComputingThreads);
  const int taps = cut.axis[0].kernel * cut.axis[1].kernel * cut.axis[2].kernel;
  const int in_channels = smaller(cut.in_channels - own.first_in_channel, cut.columns_per_tile);
  float* partial = in.partials + own.part * in.partial_elements;
  const int fast_extent = in.channels_last ? pitches.tap : pitches.channel;
  for (int index = threadIdx.x; index < pitches.in_channel; index += kComputingThreads) {
    const int slow = index / fast_extent, fast = index - slow * fast_extent;
    const int tile_tap = in.channels_last ? slow : fast;
    const int out_channel = own.first_out_channel + (in.channels_last ? fast : slow);
    const int line = tile_tap / cut.axis[2].taps, plane = line / cut.axis[1].taps;
    const int tap[3] = {own.first_tap[0] + plane, own.first_tap[1] + line - plane * cut.axis[1].taps,
                        own.first_tap[2] + tile_tap - line * cut.axis[2].taps};
    const bool exists = out_channel < cut.out_channels && tap[0] < cut.axis[0].kernel && tap[1] < cut.axis[1].kernel &&
                        tap[2] < cut.axis[2].kernel;
    if (!exists) continue;
    const int kernel_tap = (tap[0] * cut.axis[1].kernel + tap[1]) * cut.axis[2].kernel + tap[2];
    float* target =
        partial + (in.channels_last ? kernel_tap * cut.out_channels + out_channel : out_channel * taps + kernel_tap);
    const int first_channel = own.first_channel(cut, kInput);
    for (int channel = 0; channel < in_channels; ++channel) {
      target[static_cast<int64_t>(first_channel + channel) * cut.out_channels * taps] =
          tile[channel * pitches.in_channel + index];
    }
  }
}

// Thread mapping: two warpgroups compute, one loads. The loading threads bring a box of x and the region of gy around
// it to shared memory, some boxes ahead: a thread takes positions, gathers the channels of each, and stores them 16
// bytes at a time. The computing warpgroups share the tile's bands, its input channels, or the steps of the box; a warp
// keeps its Pairs * 16 by Columns * 8 sums in registers to the end. A fragment of gy (registers) serves all of a warp's
// input channels; on sm_90 the products are wgmma with x straight from shared memory, else mma.sync with x in registers
// too.
//
// Traffic: x once for every tile of taps and output channels, gy once for every tile of input channels, and again where
// the regions of boxes or of depth taps overlap, mostly from L2; a tile of sums for every part. Multiplications:
// batch * voxels * in_channels * out_channels / groups * taps, and what tiles leave idle.
//
// Bound by the tensor cores from 64 input channels on; by shared memory below (a step of 64 rows takes 16 cycles for
// gy and 2 * Columns for x, the tensor cores 4 * Columns, or 13 at least); and with few output channels, or
// kernel = stride, by loading gy.
template <class T, bool Ieee, int Pairs, int Columns>
__global__ void __launch_bounds__(kThreads, 1) reduce_tensor_kernel(const __grid_constant__ Arguments<T> in) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  extern __shared__ __align__(16) unsigned char shared[];
  const TensorReduction& cut = in.cut;
  // Kept out of registers, as little of it is needed at a time.
  Assignment& own = *reinterpret_cast<Assignment*>(shared);
  if (threadIdx.x == 0) own = Assignment(cut);
  const int all_entries = cut.region[kInput].entries + cut.region[kGradOutput].entries;
  Entry* entries = reinterpret_cast<Entry*>(shared + sizeof(Assignment));
  Band* bands = reinterpret_cast<Band*>(entries + all_entries);
  const int all_bands = 2 * Pairs * cut.row_warps;
  uint32_t* shifts = reinterpret_cast<uint32_t*>(bands + all_bands);
  int32_t* steps = reinterpret_cast<int32_t*>(shifts + all_entries);
  unsigned char* stages = shared + cut.table_bytes;
  // The stages are still free for the axes' tables.
  const Region* regions = cut.region;
  Along* axes = reinterpret_cast<Along*>(stages);
  for (int region = 0; region < 2; ++region) {
    for (int axis = 2; axis >= 0; --axis) {
      tabulate(regions[region].axis[axis], axes);
      axes += regions[region].axis[axis].entries;
    }
  }
  tabulate_bands(in, all_bands, bands);
  tabulate_steps(cut, steps);
  __syncthreads();
  axes = reinterpret_cast<Along*>(stages);
  for (int region = 0; region < 2; ++region) {
    const int first = region == kInput ? 0 : regions[kInput].entries;
    tabulate(regions[region], axes, entries + first, shifts + first);
    for (int axis = 0; axis < 3; ++axis) axes += regions[region].axis[axis].entries;
  }
  __syncthreads();
  if (threadIdx.x < kComputingThreads) {
    ptx::claim_registers<kComputingRegisters>();
    float sum[Pairs][4 * Columns] = {};
    multiply_boxes<T, Ieee, Pairs, Columns>(cut, own, bands, steps, stages, sum);
    write_sums<T, Pairs, Columns>(in, own, bands, stages, sum);
  } else {
    ptx::give_up_registers<kLoadingRegisters>();
    load_boxes<T, sizeof(T) == 4 && !Ieee>(in, own, {entries, shifts}, stages);
  }
#endif
}

template <class T>
Volume<T> make_volume(const Problem& problem, const Region& region, const T* data, int64_t channels,
                      int64_t group_channels, int64_t voxels) {
  constexpr int kSize = sizeof(T);
  Volume<T> volume;
  const bool channels_last = problem.layout == Layout::ndhwc;
  volume.data = data;
  volume.sample_elements = channels * voxels;
  volume.channel_stride = static_cast<int32_t>(kSize * (channels_last ? 1 : voxels));
  volume.voxel_stride = static_cast<int32_t>(kSize * (channels_last ? channels : 1));
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && group_channels % kChunk<T> == 0;
  const auto blocks = [](int64_t count, int64_t size) { return static_cast<int32_t>((count + size - 1) / size); };
  int positions, chunks;  // of a thread and load
  if (channels_last && aligned) {
    volume.fetch = Fetch::vectors;
    positions = Batch<T>::kVectorPositions;
    chunks = Batch<T>::kVectors / positions;
  } else {
    positions = 4;
    while (positions > 1 && Batch<T>::kGathered / positions < region.chunks) positions /= 2;
    volume.fetch = positions == 4 ? Fetch::four : positions == 2 ? Fetch::two : Fetch::one;
    chunks = Batch<T>::kGathered / positions;
  }
  const int sharers = volume.fetch == Fetch::vectors ? 2 : 1;  // threads of a position
  volume.chunk_groups = blocks(region.chunks, chunks * sharers);
  volume.blocks = blocks(region.entries, positions * kLoadingThreads / sharers);
  return volume;
}

template <class T>
using Kernel = void (*)(Arguments<T>);

template <class T, bool Ieee, const auto& Tiles, size_t... I>
Kernel<T> kernel_of(size_t index, std::index_sequence<I...>) {
  constexpr Kernel<T> kKernels[] = {reduce_tensor_kernel<T, Ieee, Tiles[I].pairs, Tiles[I].columns>...};
  return kKernels[index];
}

template <class T, bool Ieee, const auto& Tiles>
Kernel<T> kernel_of(size_t index) {
  return kernel_of<T, Ieee, Tiles>(index, std::make_index_sequence<Tiles.size()>());
}

template <class T>
Kernel<T> kernel_for(const Problem& problem, const TensorReduction& cut) {
  if constexpr (std::is_same_v<T, float>) {
    if (problem.precision == Precision::ieee) return kernel_of<T, true, kIeeeWarpTiles>(cut.warp_tile);
  }
  return kernel_of<T, false, kWarpTiles>(cut.warp_tile);
}

}  // namespace

template <class T>
void reduce_tensor(const Problem& problem, const TensorReduction& reduction, const T* grad_output, const T* input,
                   float* partials, cudaStream_t stream) {
  Arguments<T> arguments;
  arguments.cut = reduction;
  arguments.volume[kInput] = make_volume<T>(problem, reduction.region[kInput], input, problem.in_channels,
                                            problem.group_in_channels(), problem.input_voxels());
  arguments.volume[kGradOutput] =
      make_volume<T>(problem, reduction.region[kGradOutput], grad_output, problem.out_channels,
                     problem.group_out_channels(), problem.output_voxels());
  arguments.partials = partials;
  arguments.partial_elements = problem.weight_elements();
  arguments.channels_last = problem.layout == Layout::ndhwc;
  const size_t shared_bytes = reduction.table_bytes + static_cast<size_t>(reduction.stages) * reduction.stage_bytes;
  launch("reduce_tensor", kernel_for<T>(problem, reduction),
         dim3(static_cast<unsigned>(reduction.tiles) * static_cast<unsigned>(reduction.parts)), kThreads, shared_bytes,
         stream, arguments);
}

template void reduce_tensor(const Problem&, const TensorReduction&, const float*, const float*, float*, cudaStream_t);
template void reduce_tensor(const Problem&, const TensorReduction&, const __half*, const __half*, float*, cudaStream_t);
template void reduce_tensor(const Problem&, const TensorReduction&, const __nv_bfloat16*, const __nv_bfloat16*, float*,
                            cudaStream_t);

}  // namespace convt3d::direct
