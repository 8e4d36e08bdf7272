// grad_weight on tensor cores. direct/reduction.h has the terms.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <utility>

#include "cuda/launch.h"
#include "cuda/ptx.h"
#include "direct/cuda/kernels.h"

namespace convt3d::direct {
namespace tensor_reduction {

constexpr int kComputingWarps = 8;
constexpr int kComputingThreads = 32 * kComputingWarps;

// The threads of a block, and on 9.0 the registers of those that compute and of those that load: together no more than
// the launch's.
template <int Sums, bool Ieee>
struct Threads {
#if CONVT3D_HAS_WGMMA
  static constexpr bool kMany = loading_threads(90, Sums, Ieee) > 256;
  static constexpr int kAll = kComputingThreads + loading_threads(90, Sums, Ieee);
#else
  static constexpr bool kMany = false;
  static constexpr int kAll = kComputingThreads + loading_threads(80, Sums, Ieee);
#endif
  static constexpr int kComputingRegisters = kMany ? 144 : 184, kLoadingRegisters = kMany ? 64 : 72;
};

// Channels in 16 bytes.
template <class T>
constexpr int kChunk = 16 / static_cast<int>(sizeof(T));

// Voxels of one tensor-core product.
template <class T>
constexpr int kStep = 32 / static_cast<int>(sizeof(T));

// The regions of a block.
constexpr int kInput = 0, kGradOutput = 1;

// How a loading thread fetches channels: 16 bytes where they are neighbours in memory, and aligned; otherwise one by
// one, of one position, or of two or four neighbours along the width where rows and tensors are aligned to so many. In
// copies, 16 bytes of such neighbours stay as they are.
enum class Fetch : int { vectors, elements, pairs, quads, copies };

// What a thread loads at once, a unit: kLoads loads of each of kCells cells make kChunks times 16 bytes of channels.
template <class T, Fetch kFetch>
struct Unit {
  static constexpr bool kVectors = kFetch == Fetch::vectors;
  static constexpr int kSpan = kFetch == Fetch::quads ? 4 : kFetch == Fetch::pairs ? 2 : 1;  // positions of a cell
  static constexpr int kBytes = kVectors ? 16 : kSpan * int{sizeof(T)};                      // of a load
  using Element =
      std::conditional_t<kBytes == 16, uint4,
                         std::conditional_t<kBytes == 8, uint2, std::conditional_t<kBytes == 4, uint32_t, uint16_t>>>;
  static constexpr int kWords = kBytes < 4 ? 1 : kBytes / 4;
  static constexpr int kCells = kVectors ? 2 : 1;
  static constexpr int kLoads = 16 / kCells / kWords;
  static constexpr int kChunks = kVectors ? kLoads : chunks_of_unit(kSpan, sizeof(T));
  static_assert(kVectors || kChunks * kChunk<T> == kLoads);
};

// x or gy in global memory. Strides are in bytes, but where they say elements.
template <class T>
struct Volume {
  const T* data = nullptr;
  int64_t sample_elements = 0;
  int32_t channel_stride = 0, voxel_stride = 0;
  Fetch fetch = Fetch::elements;
  bool aligned = true;                // so that neighbours along the width can be loaded together
  int32_t sharers = 1;                // neighbouring threads that take a cell's chunks in turn
  int32_t cells = 0;                  // of a box's region
  int32_t units = 0;                  // of all their channels
  Divisor<int32_t> by_unit_cells{1};  // units that follow each other before the next channels' begin
};

template <class T>
struct Arguments {
  TensorReduction cut;
  Volume<T> volume[2];
  float* partials;
  T* result;  // where the sums go if there is one part of them
  int64_t partial_elements;
  bool channels_last;
  int32_t input_warps;  // of the loading warps; the others load gy
};

// One or several neighbouring positions of a region, as the loading threads know them.
struct alignas(16) Cell {
  static constexpr int16_t kNone = -1;

  uint32_t shifts;  // of its first position from the region's origin, packed
  int32_t voxel;    // likewise, in voxels
  int16_t slot[4];  // of each position; kNone where no tap wants it
};

// A block's output tile, and its share of the boxes.
struct alignas(16) Assignment {
  // Along one axis of a region.
  struct Along {
    int32_t first, step;    // the origin of the first box's region, and from box to box
    int32_t extent, pitch;  // of the volume: positions, and voxels from one to the next
  };

  int32_t group, first_out_channel, first_in_channel;
  int32_t first_tap[3];
  int32_t part, first_box, boxes;
  Along along[2][3];

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
#pragma unroll
    for (int region = 0; region < 2; ++region) {
      int32_t pitch = 1;
#pragma unroll
      for (int axis = 2; axis >= 0; --axis) {
        const ReductionAxis& of = cut.axis[axis];
        const int32_t extent = cut.region[region].axis[axis].extent;
        along[region][axis] = {0, of.voxels, extent, pitch};
        if (region == kGradOutput) {
          along[region][axis].first = first_tap[axis] * of.dilation - of.padding;
          along[region][axis].step *= of.stride;
        }
        pitch *= extent;
      }
    }
  }

  __device__ int32_t first_channel(const TensorReduction& cut, int region) const {
    return region == kInput ? group * cut.in_channels + first_in_channel : group * cut.out_channels + first_out_channel;
  }
  // Channels of the group from the first one on.
  __device__ int32_t channels(const TensorReduction& cut, int region) const {
    return region == kInput ? cut.in_channels - first_in_channel : cut.out_channels - first_out_channel;
  }
};

// Goes through boxes in order, in a warp's lanes: each of the first three knows its axis, the others the sample.
class LaneWalk {
 public:
  __device__ LaneWalk(const TensorReduction& cut, int32_t first, int lane) {
#pragma unroll
    for (int axis = 2; axis >= 0; --axis) {
      const int32_t next = first / cut.axis[axis].voxel_boxes;
      if (lane == axis) place_ = first - next * cut.axis[axis].voxel_boxes;
      first = next;
    }
    if (lane > 2) place_ = first;
  }

  __device__ void advance(const TensorReduction& cut, int lane) {
    const int32_t last = cut.axis[smaller(lane, 2)].voxel_boxes - 1;
    // The axes whose last box this is. One goes on where all faster ones do.
    const uint32_t ends = __ballot_sync(0xffffffff, lane < 3 && place_ == last);
    const uint32_t faster = lane < 3 ? 7u & ~((2u << lane) - 1) : 7u;
    if ((ends & faster) != faster) return;
    place_ = lane < 3 && place_ == last ? 0 : place_ + 1;
  }

  // A lane's own box along its axis, and the sample.
  __device__ int32_t place() const { return place_; }
  __device__ int32_t sample() const { return __shfl_sync(0xffffffff, place_, 3); }

 private:
  int32_t place_ = 0;
};

// The shifts of a position along the three axes in one word, each below a bit that is 1, the guard.
constexpr uint32_t kGuards = 1u << 31 | 1u << 21 | 1u << 11;
inline __device__ uint32_t packed_shifts(int depth, int height, int width) {
  return kGuards | static_cast<uint32_t>(depth) << 22 | static_cast<uint32_t>(height) << 12 |
         static_cast<uint32_t>(width);
}

// A position of one axis.
struct Along {
  int32_t shift, slot;
};

// Writes the positions of one axis that are loaded, in the order of their shifts, so that neighbouring threads load
// neighbours. `origin` is the first box's.
inline __device__ void tabulate(const RegionAxis& axis, int origin, Along* table) {
  const int left_out = smaller(axis.count_before(-origin), axis.entries - axis.loaded);
  for (int run = 0; run < axis.runs; ++run) {
    const RegionAxis::Run own = axis.run[run];
    for (int at = threadIdx.x; at < own.length; at += blockDim.x) {
      const int shift = own.shift + at * axis.stride, rank = axis.count_before(shift) - left_out;
      if (rank >= 0 && rank < axis.loaded) table[rank] = {shift, axis.slot(own.place + at)};
    }
  }
}

// The cells of a region in the order in which neighbouring threads take them: some of a line, then as many of the next
// ones, so that eight of them store to neighbouring banks. Cells of a line lie so many slots apart, lines an odd
// number.
struct CellOrder {
  int in_line, lines, lines_together, cells_together;

  __device__ CellOrder(const Region& region, bool is_grad_output)
      : in_line(region.cells_of_line()), lines(region.axis[0].loaded * region.axis[1].loaded) {
    const int stride = region.axis[2].stride, apart = region.span % stride == 0 ? region.span / stride : 1;
    lines_together = is_grad_output ? smaller(apart, 4) : 1;
    cells_together = 8 / lines_together;
  }

  __device__ void find(int index, int& line, int& in_width) const {
    const int block = index / (lines_together * in_line), first_line = block * lines_together;
    const int own_lines = smaller(lines_together, lines - first_line), whole = in_line / cells_together;
    int rest = index - block * lines_together * in_line;
    const int column_block = smaller(rest / (cells_together * own_lines), whole);
    rest -= column_block * cells_together * own_lines;
    const int cells = column_block < whole ? cells_together : in_line - whole * cells_together;
    line = first_line + rest / cells;
    in_width = column_block * cells_together + rest % cells;
  }
};

// Writes all cells of a region from the tables of its height and depth, and of its width where cells are single
// positions; else cells begin where the volume's do, some columns before the region. `origin` is the first box's along
// the width.
inline __device__ void tabulate(const Region& region, const Along* widths, int origin, bool is_grad_output,
                                Cell* cells) {
  const Along* heights = widths + region.axis[2].loaded;
  const Along* depths = heights + region.axis[1].loaded;
  const int before = origin & (region.span - 1);
  const int left_out = smaller(larger(before - origin, 0) / region.span, region.spans - region.loaded_spans);
  const CellOrder order(region, is_grad_output);
  for (int index = threadIdx.x; index < region.cells(); index += blockDim.x) {
    int line, in_width;
    order.find(index, line, in_width);
    const int plane = line / region.axis[1].loaded;
    const Along depth = depths[plane], height = heights[line - plane * region.axis[1].loaded];
    const int line_slot = depth.slot + height.slot, shift = region.span * (left_out + in_width);
    Cell cell;
    const int width = region.span > 1 ? shift : widths[in_width].shift;
    cell.shifts = packed_shifts(depth.shift, height.shift, width);
    cell.voxel = (depth.shift * region.axis[1].extent + height.shift) * region.axis[2].extent + width;
    for (int i = 0; i < 4; ++i) {
      const int slot = region.span == 1 ? widths[in_width].slot : region.axis[2].slot_at(shift + i - before);
      cell.slot[i] = static_cast<int16_t>(i < region.span && slot >= 0 ? line_slot + slot : Cell::kNone);
    }
    cells[index] = cell;
  }
}

// Where gy's region holds a voxel of a step, and each step, in bytes.
inline __device__ int voxel_offset(const TensorReduction& cut, int voxel) {
  const RegionAxis(&axis)[3] = cut.region[kGradOutput].axis;
  const int line = voxel / cut.axis[2].step, plane = line / cut.axis[1].step;
  return (plane * axis[0].slot_pitch + (line - plane * cut.axis[1].step) * axis[1].slot_pitch +
          (voxel - line * cut.axis[2].step) * axis[2].slot_pitch) *
         16;
}
// Behind the last step come as many as warps take in turn, so that these may look ahead.
inline __device__ void tabulate_steps(const TensorReduction& cut, int32_t* table) {
  const RegionAxis(&axis)[3] = cut.region[kGradOutput].axis;
  const int width_steps = cut.axis[2].voxels / cut.axis[2].step, height_steps = cut.axis[1].voxels / cut.axis[1].step;
  for (int index = threadIdx.x; index < cut.steps + cut.voxel_warps; index += static_cast<int>(blockDim.x)) {
    const int step = smaller(index, cut.steps - 1), line = step / width_steps, plane = line / height_steps;
    table[index] = (plane * cut.axis[0].step * axis[0].slot_pitch +
                    (line - plane * height_steps) * cut.axis[1].step * axis[1].slot_pitch +
                    (step - line * width_steps) * cut.axis[2].step * axis[2].slot_pitch) *
                   16;
  }
}

static_assert(sizeof(Assignment) == TensorReduction::kAssignmentBytes && sizeof(Cell) == TensorReduction::kCellBytes);

// The named barriers by which the loading and the computing warps hand each other the stages.
inline __device__ int full(int stage) { return 1 + stage; }
inline __device__ int empty(const TensorReduction& cut, int stage) { return 1 + cut.stages + stage; }
inline __device__ int next_stage(const TensorReduction& cut, int stage) {
  return stage + 1 == cut.stages ? 0 : stage + 1;
}

// Where a warp is that goes through a region's boxes: the volume at the region's origin, and the shifts that lie
// inside. Cells of kSpan columns begin where the volume's do, up to so many less one before the region.
template <class T, int kRegion, int kSpan>
class Place {
 public:
  __device__ Place(const Arguments<T>& in, const Assignment& own)
      : in_(in), own_(own), lane_(static_cast<int>(threadIdx.x) % 32), walk_(in.cut, own.first_box, lane_) {
    find();
  }

  __device__ void advance() {
    walk_.advance(in_.cut, lane_);
    find();
  }

  // The channels from one on, `voxel` voxels behind the origin.
  __device__ const char* data(int channel, int voxel) const {
    const Volume<T>& volume = in_.volume[kRegion];
    return data_ + wide_product(channel, volume.channel_stride) + wide_product(voxel, volume.voxel_stride);
  }
  __device__ bool is_inside(uint32_t shifts) const {
    // A subtraction leaves a guard standing where the shift is no less than what is taken away.
    return ((((shifts - low_) ^ kGuards) | (shifts - beyond_)) & kGuards) == 0;
  }

 private:
  // Of two numbers that are not negative: one instruction.
  __device__ static int64_t wide_product(int32_t first, int32_t second) {
    return static_cast<int64_t>(static_cast<uint64_t>(static_cast<uint32_t>(first)) * static_cast<uint32_t>(second));
  }

  // A lane an axis.
  __device__ void find() {
    const int axis = smaller(lane_, 2);
    const Assignment::Along along = own_.along[kRegion][axis];
    const int origin = walk_.place() * along.step + along.first, last = along.extent - 1 - origin;
    const int limit = axis == 2 ? 2047 : 511, bit = axis == 2 ? 0 : axis == 1 ? 12 : 22;
    const int low = last < 0 ? limit : smaller(larger(-origin, 0), limit), high = smaller(larger(last, 0), limit);
    const int before = axis == 2 ? origin & (kSpan - 1) : 0;
    const bool has_axis = lane_ < 3;
    low_ = ptx::or_of_warp(has_axis ? static_cast<uint32_t>(low) << bit : 0);
    beyond_ = ptx::or_of_warp(has_axis ? static_cast<uint32_t>(high + 1) << bit : 0);
    const int voxel = ptx::sum_of_warp(has_axis ? (origin - before) * along.pitch : 0);
    const Volume<T>& volume = in_.volume[kRegion];
    data_ = reinterpret_cast<const char*>(volume.data + walk_.sample() * volume.sample_elements) +
            static_cast<int64_t>(own_.first_channel(in_.cut, kRegion)) * volume.channel_stride +
            static_cast<int64_t>(voxel) * volume.voxel_stride;
  }

  const Arguments<T>& in_;
  const Assignment& own_;
  const int lane_;
  LaneWalk walk_;
  const char* data_ = nullptr;
  uint32_t low_ = 0, beyond_ = 0;  // the first shifts inside, and the first ones behind them
};

// The numbers of a region's units in a box, made up to whole warps.
inline __device__ int whole_warps(int units) { return (units + 31) & ~31; }

// A loading warp, which brings units of one region: the region's warps take 32 of them in turn, through all boxes. Two
// units are in a thread's registers: while one is stored, the other is on its way, be it another box's.
template <class T, bool kRound, int kRegion, Fetch kFetch, bool kAligned = true>
class Loader {
 public:
  // `warp` is one of `warps` that share the region.
  __device__ Loader(const Arguments<T>& in, const Assignment& own, const Cell* cells, unsigned char* stages, int warp,
                    int warps)
      : in_(in),
        own_(own),
        cells_(cells),
        stages_(ptx::shared_address(stages + in.cut.region[kRegion].offset)),
        lane_(static_cast<int>(threadIdx.x) % 32),
        step_(32 * warps),
        units_(whole_warps(in.volume[kRegion].units)),
        place_(in, own),
        boxes_(own.boxes),
        unit_(32 * warp),
        opened_(own.boxes),
        closed_(own.boxes),
        stored_(32 * warp) {}

  __device__ void run() {
    if (boxes_ == 0) return;
    find_unit();
    close_boxes();
    Batch first, second;
    bool has_second = false;
#pragma unroll 1
    do {
      const bool has_first = boxes_ > 0;
      if (has_first) {
        load(first);
        advance();
      }
      if (has_second) put(second);
      has_second = boxes_ > 0;
      if (has_second) {
        load(second);
        advance();
      }
      if (has_first) put(first);
    } while (has_second);
  }

 private:
  using Shape = Unit<T, kFetch>;

  // A unit as loaded, so that nothing waits for it before it is stored.
  struct Batch {
    uint32_t word[16];
    int unit;
  };

  // What a lane has to do of a unit: cells from this one on, and chunks.
  struct Piece {
    int cell, chunk;
  };
  __device__ Piece piece_of(int unit) const {
    const Volume<T>& volume = in_.volume[kRegion];
    const int group = volume.by_unit_cells.quotient(unit), rest = unit - group * volume.by_unit_cells.value;
    return {rest / sharers(), group * Shape::kChunks * sharers() + (rest & (sharers() - 1))};
  }
  // The number of its cell of so many, or -1.
  __device__ int cell_number(int unit, const Piece& piece, int which) const {
    const Volume<T>& volume = in_.volume[kRegion];
    const int cell = which == 0 ? piece.cell : piece.cell + volume.by_unit_cells.value / sharers();
    return unit < volume.units && (!Shape::kVectors || cell < volume.cells) ? cell : -1;
  }

  // To the box that the warp's next units are of; none is left where there is none.
  __device__ void find_unit() {
    while (unit_ >= units_) {
      unit_ -= units_;
      if (--boxes_ == 0) return;
      place_.advance();
    }
  }
  __device__ void advance() {
    unit_ += step_;
    find_unit();
  }

  __device__ int sharers() const { return kFetch == Fetch::vectors ? in_.volume[kRegion].sharers : 1; }

  __device__ __forceinline__ void load(Batch& batch) const {
    const Volume<T>& volume = in_.volume[kRegion];
    batch.unit = unit_ + lane_;
    const Piece piece = piece_of(batch.unit);
    const int first_channel = piece.chunk * kChunk<T>;
    const int channels = own_.channels(in_.cut, kRegion) - first_channel;
    const int vectors_pitch = 16 * sharers();
    const int64_t pitch = Shape::kVectors ? vectors_pitch : volume.channel_stride;  // from load to load
#pragma unroll
    for (int c = 0; c < Shape::kCells; ++c) {
      const int number = cell_number(batch.unit, piece, c);
      const bool exists = number >= 0;
      const Cell& cell = cells_[exists ? number : 0];
      const bool inside = exists && place_.is_inside(cell.shifts);
      const char* source = place_.data(first_channel, cell.voxel);
      uint32_t* word = batch.word + c * Shape::kLoads * Shape::kWords;
      const auto fetch = [&](int i, bool exists) {
        typename Shape::Element element{};
        if (exists) element = load_element(source);
        source = ptx::opaque(source + pitch);  // two instructions, where a multiple of the pitch would be five
        if constexpr (Shape::kWords == 4) {
          word[4 * i] = element.x, word[4 * i + 1] = element.y, word[4 * i + 2] = element.z,
                   word[4 * i + 3] = element.w;
        } else if constexpr (Shape::kWords == 2) {
          word[2 * i] = element.x, word[2 * i + 1] = element.y;
        } else {
          word[i] = element;
        }
      };
      if constexpr (Shape::kVectors) {
#pragma unroll
        for (int i = 0; i < Shape::kLoads; ++i) fetch(i, inside && i * (vectors_pitch / int{sizeof(T)}) < channels);
      } else if (channels >= Shape::kLoads) {
#pragma unroll
        for (int i = 0; i < Shape::kLoads; ++i) fetch(i, inside);
      } else {
#pragma unroll
        for (int i = 0; i < Shape::kLoads; ++i) fetch(i, inside && i < channels);
      }
    }
  }
  __device__ __forceinline__ typename Shape::Element load_element(const char* source) const {
    using Element = typename Shape::Element;
    if constexpr (kAligned) {
      return __ldg(reinterpret_cast<const Element*>(source));
    } else {
      alignas(Element) T values[Shape::kSpan];
#pragma unroll
      for (int i = 0; i < Shape::kSpan; ++i) values[i] = __ldg(reinterpret_cast<const T*>(source) + i);
      return *reinterpret_cast<const Element*>(values);
    }
  }

  // Hands over the stages of boxes of which the warp has nothing left, or nothing at all.
  __device__ __forceinline__ void close_boxes() {
    while (stored_ >= units_ && closed_ > 0) {
      open_box();
      ptx::barrier_arrive(full(stage_), kComputingThreads + in_.cut.loading_threads);
      stored_ -= units_;
      --closed_;
      stage_ = next_stage(in_.cut, stage_);
    }
  }
  // Waits until the stage is empty, if that is not known.
  __device__ __forceinline__ void open_box() {
    if (opened_ < closed_) return;
    if (own_.boxes - opened_ >= in_.cut.stages) {
      ptx::barrier_sync(empty(in_.cut, stage_), kComputingThreads + in_.cut.loading_threads);
    }
    --opened_;
  }

  // Stores a unit in its box's stage.
  __device__ __forceinline__ void put(const Batch& batch) {
    open_box();
    const Region& region = in_.cut.region[kRegion];
    const Piece piece = piece_of(batch.unit);
    const int chunks = region.chunks - piece.chunk;
    const uint32_t to = ptx::opaque(stages_ + stage_ * in_.cut.stage_bytes + piece.chunk * region.chunk_pitch);
#pragma unroll
    for (int c = 0; c < Shape::kCells; ++c) {
      const int number = cell_number(batch.unit, piece, c);
      const uint2 both = *reinterpret_cast<const uint2*>(cells_[number >= 0 ? number : 0].slot);
      const uint32_t* word = batch.word + c * (16 / Shape::kCells);
#pragma unroll
      for (int i = 0; i < Shape::kSpan; ++i) {
        const uint32_t pair = i < 2 ? both.x : both.y;
        const int slot = static_cast<int>(i % 2 == 0 ? pair << 16 : pair) >> 16;
        const bool exists = number >= 0 && slot >= 0;
        if constexpr (kSpreads) {
          store_spread(exists, word, i, slot, to, chunks);
        } else {
#pragma unroll
          for (int chunk = 0; chunk < Shape::kChunks; ++chunk) {
            ptx::store_shared_if(exists && has_chunk(chunk, chunks),
                                 to + slot * 16 + chunk * sharers() * region.chunk_pitch,
                                 chunk_of(word + chunk * (16 / Shape::kCells / Shape::kChunks), i));
          }
        }
      }
    }
    stored_ += step_;
    close_boxes();
  }
  // Whether the region has one of a unit's chunks, from the first of which it has so many.
  __device__ bool has_chunk(int chunk, int chunks) const {
    return (chunk == 0 && !Shape::kVectors) || chunk * sharers() < chunks;
  }
  // x in float32 lies as [4 slots][channel][16 bytes]. Four neighbours share 16 bytes, as reduction.cpp sees to.
  static constexpr bool kSpreads = sizeof(T) == 4 && kRegion == kInput;
  __device__ __forceinline__ void store_spread(bool exists, const uint32_t* word, int position, int slot, uint32_t to,
                                               int chunks) const {
    const Region& region = in_.cut.region[kInput];
    const uint32_t at = to + (slot >> 2) * region.slot_pitch + (slot & 3) * 4;
    if constexpr (Shape::kSpan == 4) {
      if (position > 0) return;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        ptx::store_shared_if(exists, at + 16 * i,
                             make_uint4(rounded(word[4 * i]), rounded(word[4 * i + 1]), rounded(word[4 * i + 2]),
                                        rounded(word[4 * i + 3])));
      }
    } else {
#pragma unroll
      for (int chunk = 0; chunk < Shape::kChunks; ++chunk) {
        const bool has = exists && has_chunk(chunk, chunks);
        const uint4 values = chunk_of(word + chunk * (16 / Shape::kCells / Shape::kChunks), position);
        const uint32_t elements = at + chunk * sharers() * region.chunk_pitch;
        ptx::store_shared_if(has, elements, values.x);
        ptx::store_shared_if(has, elements + 16, values.y);
        ptx::store_shared_if(has, elements + 32, values.z);
        ptx::store_shared_if(has, elements + 48, values.w);
      }
    }
  }
  // 16 bytes of channels of one position, from a unit's words.
  __device__ static uint4 chunk_of(const uint32_t* word, int position) {
    if constexpr (Shape::kVectors) {
      return make_uint4(rounded(word[0]), rounded(word[1]), rounded(word[2]), rounded(word[3]));
    } else if constexpr (sizeof(T) == 4) {
      constexpr int kSpan = Shape::kSpan;
      return make_uint4(rounded(word[position]), rounded(word[kSpan + position]), rounded(word[2 * kSpan + position]),
                        rounded(word[3 * kSpan + position]));
    } else {
      constexpr int kWords = Shape::kWords;
      const uint32_t halves = position % 2 == 0 ? 0x5410 : 0x7632;
      const uint32_t* own = word + position / 2;
      return make_uint4(__byte_perm(own[0], own[kWords], halves), __byte_perm(own[2 * kWords], own[3 * kWords], halves),
                        __byte_perm(own[4 * kWords], own[5 * kWords], halves),
                        __byte_perm(own[6 * kWords], own[7 * kWords], halves));
    }
  }
  __device__ static uint32_t rounded(uint32_t word) { return kRound ? ptx::rounded_for_tf32(word) : word; }

  const Arguments<T>& in_;
  const Assignment& own_;
  const Cell* cells_;
  const uint32_t stages_;
  const int lane_, step_, units_;  // from one of the warp's units to the next, and of a box, made up to whole warps
  // What is loaded next.
  Place<T, kRegion, Shape::kSpan> place_;
  int boxes_;  // that are left
  int unit_;
  // What is stored next.
  int opened_, closed_;  // likewise
  int stage_ = 0, stored_;
};

// A loading warp that copies x, which lies in shared memory as in global memory: 16 bytes of voxels of a channel. A
// unit is a cell's kCopiedChannels channels. Each box's copies are under way while the box before is multiplied.
template <class T, bool kAligned>
class Copier {
 public:
  __device__ Copier(const Arguments<T>& in, const Assignment& own, const Cell* cells, unsigned char* stages, int warp,
                    int warps)
      : in_(in),
        own_(own),
        cells_(cells),
        stages_(ptx::shared_address(stages + in.cut.region[kInput].offset)),
        first_unit_(32 * warp + static_cast<int>(threadIdx.x) % 32),
        step_(32 * warps),
        place_(in, own) {}

  __device__ void run() {
    if (own_.boxes == 0) return;
    // With three stages the next box's copies begin before this one's are waited for: the computing warps then still
    // have a box to multiply while these wait for room.
    const bool is_ahead = in_.cut.stages > 2;
    copy_box();
#pragma unroll 1
    for (int box = 0, stage = 0; box < own_.boxes; ++box) {
      const bool has_next = box + 1 < own_.boxes;
      if (is_ahead && has_next) {
        copy_box();
        ptx::wait_for_copies<1>();
      } else {
        ptx::wait_for_copies<0>();
      }
      ptx::barrier_arrive(full(stage), kComputingThreads + in_.cut.loading_threads);
      stage = next_stage(in_.cut, stage);
      if (!is_ahead && has_next) copy_box();
    }
  }

 private:
  static constexpr int kSpan = 16 / static_cast<int>(sizeof(T));

  // A unit's cell, its first channel, and where that lies in shared memory.
  struct Piece {
    const Cell& cell;
    int channel;
    uint32_t to;
  };
  __device__ Piece piece_of(int unit, uint32_t to) const {
    const Divisor<int32_t>& by_cells = in_.volume[kInput].by_unit_cells;
    const Region& region = in_.cut.region[kInput];
    const int group = by_cells.quotient(unit), channel = group * kCopiedChannels;
    const Cell& cell = cells_[unit - group * by_cells.value];
    return {cell, channel, to + (cell.slot[0] / kSpan) * region.slot_pitch + channel * 16};
  }

  // The next box.
  __device__ __forceinline__ void copy_box() {
    if (copied_ > 0) place_.advance();
    if (copied_ >= in_.cut.stages) {
      ptx::barrier_sync(empty(in_.cut, copy_stage_), kComputingThreads + in_.cut.loading_threads);
    }
#pragma unroll 1
    for (int unit = first_unit_; unit < in_.volume[kInput].units; unit += step_) {
      copy(unit, stages_ + copy_stage_ * in_.cut.stage_bytes);
    }
    ptx::commit_copies();
    ++copied_;
    copy_stage_ = next_stage(in_.cut, copy_stage_);
  }

  __device__ __forceinline__ void copy(int unit, uint32_t to) const {
    const Piece piece = piece_of(unit, to);
    const bool inside = place_.is_inside(piece.cell.shifts);
    const int channels = inside ? own_.channels(in_.cut, kInput) - piece.channel : 0;
    const int64_t pitch = in_.volume[kInput].channel_stride;
    const char* source = place_.data(piece.channel, piece.cell.voxel);
#pragma unroll
    for (int i = 0; i < kCopiedChannels; ++i) {
      if constexpr (kAligned) {
        ptx::copy_async(piece.to + 16 * i,
                        i < channels ? source : reinterpret_cast<const char*>(in_.volume[kInput].data), i < channels);
      } else {
        alignas(16) T values[kSpan];
#pragma unroll
        for (int k = 0; k < kSpan; ++k) {
          values[k] = i < channels ? __ldg(reinterpret_cast<const T*>(source) + k) : T(0.0f);
        }
        ptx::store_shared_if(true, piece.to + 16 * i, *reinterpret_cast<const uint4*>(values));
      }
      source = ptx::opaque(source + pitch);
    }
  }

  const Arguments<T>& in_;
  const Assignment& own_;
  const Cell* cells_;
  const uint32_t stages_;
  const int first_unit_, step_;
  Place<T, kInput, kSpan> place_;  // of the box that is copied next, once one is
  int copied_ = 0, copy_stage_ = 0;
};

// The loading warps of one region.
template <class T, bool kRound, int kRegion>
__device__ void load_boxes(const Arguments<T>& in, const Assignment& own, const Cell* cells, unsigned char* stages,
                           int warp, int warps) {
  const auto run = [&](auto fetch, auto aligned) {
    Loader<T, kRound, kRegion, decltype(fetch)::value, decltype(aligned)::value>(in, own, cells, stages, warp, warps)
        .run();
  };
  const auto run_span = [&](auto fetch) {
    if (in.volume[kRegion].aligned) {
      run(fetch, std::true_type());
    } else {
      run(fetch, std::false_type());
    }
  };
  switch (in.volume[kRegion].fetch) {
    case Fetch::vectors:
      return run(std::integral_constant<Fetch, Fetch::vectors>(), std::true_type());
    case Fetch::elements:
      return run(std::integral_constant<Fetch, Fetch::elements>(), std::true_type());
    case Fetch::pairs:
      return run_span(std::integral_constant<Fetch, Fetch::pairs>());
    case Fetch::quads:
      return run_span(std::integral_constant<Fetch, Fetch::quads>());
    case Fetch::copies:
      // Not of float32, which is rounded on the way.
      if constexpr (kRegion == kInput && sizeof(T) == 2) {
        if (in.volume[kInput].aligned) {
          Copier<T, true>(in, own, cells, stages, warp, warps).run();
        } else {
          Copier<T, false>(in, own, cells, stages, warp, warps).run();
        }
      }
  }
}

// The one by which the computing warps wait for each other.
constexpr int kSumsBarrier = 15;

// A band of the block's tile: one tap and eight output channels.
struct Band {
  int32_t offset;  // of its first voxel in gy's region, in bytes
  int32_t sum;     // of its first channel among the sums of the tile's first input channel; negative if it has none
};

// From a warp's band to its next pair: the warps of a warpgroup take turns.
constexpr int kPairPitch = 8;

template <class T>
__device__ void tabulate_bands(const Arguments<T>& in, int bands, Band* table) {
  const TensorReduction& cut = in.cut;
  const SumPitches pitches(cut, in.channels_last);
  for (int band = threadIdx.x; band < bands; band += static_cast<int>(blockDim.x)) {
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

// How a warp reads the columns of its products, x: 8 * Columns channels by the voxels of a step, which are the inner
// index in shared memory or the outer one.
template <class T, int Columns, bool kVoxelsInner>
class ColumnsOf {
 public:
  __device__ ColumnsOf(const TensorReduction& cut, int first_column, int lane) {
    const Region& region = cut.region[kInput];
    if constexpr (kVoxelsInner) {
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
      if constexpr (kVoxelsInner) {
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
      if constexpr (kVoxelsInner) {
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
      if constexpr (kVoxelsInner) {
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

#if CONVT3D_HAS_WGMMA

// Whether fragments are loaded ahead. Wide products take long enough to hide a load, and better follow each other.
template <int Columns>
constexpr bool kLoadsAhead = Columns <= 8;

// sum += the products of one step, a group a pair. Loading ahead, `a` holds the first pair's fragment; each next one is
// loaded before the products of the one before it begin, once its own products of the step before are done, and after
// the last the first one of the next step, at `next_grad_output`.
template <class T, int Pairs, int Columns, bool kVoxelsInner>
__device__ __forceinline__ void multiply(const Rows<T, Pairs>& rows, const ColumnsOf<T, Columns, kVoxelsInner>& columns,
                                         const unsigned char* grad_output, const unsigned char* next_grad_output,
                                         uint32_t input, uint32_t (&a)[Pairs][4], float (&sum)[Pairs][4 * Columns]) {
#pragma unroll
  for (int p = 0; p < Pairs; ++p) {
    if constexpr (!kLoadsAhead<Columns>) {
      ptx::wait_for_products<Pairs - 1>();
      rows.load(grad_output, p, a[p]);
    } else {
      ptx::wait_for_products<Pairs - 2>();
      if (p + 1 < Pairs) {
        rows.load(grad_output, p + 1, a[(p + 1) % Pairs]);
      } else {
        rows.load(next_grad_output, 0, a[0]);
      }
    }
    ptx::begin_products();
    columns.multiply(input, a[p], sum[p]);
    ptx::commit_products();
  }
}

#else

// sum += the products of one step.
template <class T, int Pairs, int Columns, bool kVoxelsInner>
__device__ void multiply(const Rows<T, Pairs>& rows, const ColumnsOf<T, Columns, kVoxelsInner>& columns,
                         const unsigned char* grad_output, uint32_t input, float (&sum)[Pairs][4 * Columns]) {
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
}

#endif

// The same in IEEE float32, by three TF32 products.
template <int Pairs, int Columns>
__device__ void multiply_ieee(const Rows<float, Pairs>& rows, const ColumnsOf<float, Columns, true>& columns,
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
template <class T, bool Ieee, bool kVoxelsInner, int Pairs, int Columns>
__device__ void multiply_boxes(const TensorReduction& cut, const Assignment& own, const Band* bands,
                               const int32_t* steps, const unsigned char* stages, float (&sum)[Pairs][4 * Columns]) {
  const Role<Pairs, Columns> role(cut);
  const Rows<T, Pairs> rows(cut, bands + role.first_band, role.lane);
  const ColumnsOf<T, Columns, kVoxelsInner> columns(cut, role.first_column, role.lane);
  const int step_bytes = (kStep<T> >> cut.region[kInput].slot_bits) * cut.region[kInput].slot_pitch;
  const int step_pitch = cut.voxel_warps;
  int stage = 0, previous = 0;
  for (int box = 0; box < own.boxes; ++box) {
    ptx::barrier_sync(full(stage), kComputingThreads + cut.loading_threads);
    ptx::fence_shared_for_wgmma();  // here, since it would have the loading threads wait for their loads
    const unsigned char* base = stages + stage * cut.stage_bytes;
    const unsigned char* grad_output = base + cut.region[kGradOutput].offset;
    uint32_t input = ptx::shared_address(base + cut.region[kInput].offset) + role.first_step * step_bytes;
    const int32_t* next = steps + role.first_step;
    int32_t offset = *next;
#if CONVT3D_HAS_WGMMA
    uint32_t a[Pairs][4];
    if constexpr (!Ieee && kLoadsAhead<Columns>) {
      ptx::wait_for_products<Pairs - 2>();
      rows.load(grad_output + offset, 0, a[0]);
    }
#endif
    // After the first step the products of the box before are surely done.
    const int releasing = box > 0 && box - 1 + cut.stages < own.boxes ? role.first_step : -1;
    for (int step = role.first_step; step < cut.steps; step += step_pitch) {
      next += step_pitch;
      const int32_t next_offset = *next;
      if constexpr (Ieee) {
        multiply_ieee(rows, columns, grad_output + offset, input, sum);
      } else {
#if CONVT3D_HAS_WGMMA
        multiply<T>(rows, columns, grad_output + offset, grad_output + next_offset, input, a, sum);
#else
        multiply<T>(rows, columns, grad_output + offset, input, sum);
#endif
      }
      if (step == releasing) ptx::barrier_arrive(empty(cut, previous), kComputingThreads + cut.loading_threads);
      offset = next_offset;
      input += step_pitch * step_bytes;
    }
    previous = stage;
    stage = next_stage(cut, stage);
  }
  if constexpr (!Ieee) ptx::wait_for_products<0>();
}

// Writes the computing warps' sums to the block's part of the partial sums, or the result if that is all of them, which
// lie as the weights do: through shared memory, where two warpgroups that shared the voxels add up.
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
  const int tile_taps = cut.axis[0].taps * cut.axis[1].taps * cut.axis[2].taps, tile_channels = 8 * cut.channel_bands;
  const int fast_extent = in.channels_last ? tile_channels : tile_taps;
  for (int index = threadIdx.x; index < tile_taps * tile_channels; index += kComputingThreads) {
    const int slow = index / fast_extent, fast = index - slow * fast_extent;
    const float* sums = tile + slow * (in.channels_last ? pitches.tap : pitches.channel) + fast;
    const int tile_tap = in.channels_last ? slow : fast;
    const int out_channel = own.first_out_channel + (in.channels_last ? fast : slow);
    const int line = tile_tap / cut.axis[2].taps, plane = line / cut.axis[1].taps;
    const int tap[3] = {own.first_tap[0] + plane, own.first_tap[1] + line - plane * cut.axis[1].taps,
                        own.first_tap[2] + tile_tap - line * cut.axis[2].taps};
    const bool exists = out_channel < cut.out_channels && tap[0] < cut.axis[0].kernel && tap[1] < cut.axis[1].kernel &&
                        tap[2] < cut.axis[2].kernel;
    if (!exists) continue;
    const int kernel_tap = (tap[0] * cut.axis[1].kernel + tap[1]) * cut.axis[2].kernel + tap[2];
    const int target = in.channels_last ? kernel_tap * cut.out_channels + out_channel : out_channel * taps + kernel_tap;
    const int first_channel = own.first_channel(cut, kInput);
    for (int channel = 0; channel < in_channels; ++channel) {
      const int64_t at = static_cast<int64_t>(first_channel + channel) * cut.out_channels * taps + target;
      const float total = sums[channel * pitches.in_channel];
      if (cut.parts == 1) {
        in.result[at] = static_cast<T>(total);
      } else {
        partial[at] = total;
      }
    }
  }
}

// Thread mapping: two warpgroups compute, the others load: two or three on 9.0, else one. Some of the loading warps
// bring boxes of x to shared memory and the others the regions of gy around them, some boxes ahead: through registers
// 64 bytes at a time each, channels of a position or of neighbours along the width, or x in half types as it lies. The
// computing warpgroups share the tile's bands, its input channels, or the steps of the box; a warp keeps its Pairs * 16
// by Columns * 8 sums in registers to the end. A fragment of gy (registers) serves all of a warp's input channels; on
// sm_90 the products are wgmma with x straight from shared memory, else mma.sync with x in registers too.
//
// Traffic: x once for every tile of taps and output channels, gy once for every tile of input channels, and again where
// the regions of boxes or of depth taps overlap, mostly from L2; a tile of sums for every part. Multiplications:
// batch * voxels * in_channels * out_channels / groups * taps, and what tiles leave idle.
//
// Bound by the loading warps wherever a box has few products for what it loads: a unit takes a warp some 150
// instructions, or 500 to 750 cycles. Else by the products: where columns are few by shared memory, where a fragment
// takes 16 cycles and x one more for every 4 columns, else by waiting for what is under way.
template <class T, bool Ieee, int Pairs, int Columns>
__global__ void __launch_bounds__(Threads<4 * Pairs * Columns, Ieee>::kAll, 1)
    reduce_tensor_kernel(const __grid_constant__ Arguments<T> in) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  CONVT3D_DYNAMIC_SHARED(16, shared);
  const TensorReduction& cut = in.cut;
  // Kept out of registers, as little of it is needed at a time.
  Assignment& own = *reinterpret_cast<Assignment*>(shared);
  if (threadIdx.x == 0) own = Assignment(cut);
  const Region* regions = cut.region;
  Cell* cells[2];
  cells[kInput] = reinterpret_cast<Cell*>(shared + sizeof(Assignment));
  cells[kGradOutput] = cells[kInput] + regions[kInput].cells();
  Band* bands = reinterpret_cast<Band*>(cells[kGradOutput] + regions[kGradOutput].cells());
  const int all_bands = 2 * Pairs * cut.row_warps;
  int32_t* steps = reinterpret_cast<int32_t*>(bands + all_bands);
  unsigned char* stages = shared + cut.table_bytes;
  __syncthreads();  // for the regions' origins
  // The stages are still free for the axes' tables.
  Along* axes = reinterpret_cast<Along*>(stages);
  for (int region = 0; region < 2; ++region) {
    for (int axis = 2; axis >= 0; --axis) {
      tabulate(regions[region].axis[axis], own.along[region][axis].first, axes);
      axes += regions[region].axis[axis].loaded;
    }
  }
  tabulate_bands(in, all_bands, bands);
  tabulate_steps(cut, steps);
  __syncthreads();
  axes = reinterpret_cast<Along*>(stages);
  for (int region = 0; region < 2; ++region) {
    tabulate(regions[region], axes, own.along[region][2].first, region == kGradOutput, cells[region]);
    for (int axis = 0; axis < 3; ++axis) axes += regions[region].axis[axis].loaded;
  }
  __syncthreads();
  if (regions[kInput].leaves_out() || regions[kGradOutput].leaves_out()) {
    // What is not loaded stays zero, in all stages.
    uint4* vectors = reinterpret_cast<uint4*>(stages);
    for (int at = threadIdx.x; at < cut.stages * cut.stage_bytes / 16; at += blockDim.x) vectors[at] = uint4{};
    __syncthreads();
  }
  if (threadIdx.x < kComputingThreads) {
    ptx::claim_registers<Threads<4 * Pairs * Columns, Ieee>::kComputingRegisters>();
    float sum[Pairs][4 * Columns] = {};
    if (sizeof(T) == 4 || regions[kInput].slot_bits > 0) {
      multiply_boxes<T, Ieee, true, Pairs, Columns>(cut, own, bands, steps, stages, sum);
    } else {
      multiply_boxes<T, Ieee, sizeof(T) == 4, Pairs, Columns>(cut, own, bands, steps, stages, sum);
    }
    write_sums<T, Pairs, Columns>(in, own, bands, stages, sum);
  } else {
    ptx::give_up_registers<Threads<4 * Pairs * Columns, Ieee>::kLoadingRegisters>();
    constexpr bool kRound = sizeof(T) == 4 && !Ieee;
    // From one lane, so that the compiler knows that it is the whole warp's.
    const int warp = __shfl_sync(0xffffffff, (static_cast<int>(threadIdx.x) - kComputingThreads) / 32, 0);
    const int warps = cut.loading_threads / 32;
    if (warp < in.input_warps) {
      load_boxes<T, kRound, kInput>(in, own, cells[kInput], stages, warp, in.input_warps);
    } else {
      load_boxes<T, kRound, kGradOutput>(in, own, cells[kGradOutput], stages, warp - in.input_warps,
                                         warps - in.input_warps);
    }
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
  volume.cells = region.cells();
  const bool vectors = channels_last && aligned;
  const Units units(region, vectors, kSize);
  volume.aligned = vectors || reinterpret_cast<uintptr_t>(data) % (region.span * sizeof(T)) == 0;
  volume.fetch = region.copied      ? Fetch::copies
                 : vectors          ? Fetch::vectors
                 : region.span == 4 ? Fetch::quads
                 : region.span == 2 ? Fetch::pairs
                                    : Fetch::elements;
  volume.sharers = units.sharers;
  volume.by_unit_cells = Divisor<int32_t>(units.together);
  volume.units = units.count;
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

}  // namespace tensor_reduction

template <class T>
void reduce_tensor(const Problem& problem, const TensorReduction& reduction, const T* grad_output, const T* input,
                   float* partials, T* result, cudaStream_t stream) {
  using namespace tensor_reduction;
  Arguments<T> arguments;
  arguments.cut = reduction;
  const T* data[2] = {input, grad_output};
  for (int side = 0; side < 2; ++side) {
    const bool is_input = side == kInput;
    arguments.volume[side] = make_volume<T>(problem, reduction.region[side], data[side],
                                            is_input ? problem.in_channels : problem.out_channels,
                                            is_input ? problem.group_in_channels() : problem.group_out_channels(),
                                            is_input ? problem.input_voxels() : problem.output_voxels());
  }
  arguments.input_warps = reduction.input_warps;
  arguments.partials = partials;
  arguments.result = result;
  arguments.partial_elements = problem.weight_elements();
  arguments.channels_last = problem.layout == Layout::ndhwc;
  const size_t shared_bytes = reduction.table_bytes + static_cast<size_t>(reduction.stages) * reduction.stage_bytes;
  launch("reduce_tensor", kernel_for<T>(problem, reduction),
         dim3(static_cast<unsigned>(reduction.tiles) * static_cast<unsigned>(reduction.parts)),
         kComputingThreads + reduction.loading_threads, shared_bytes, stream, arguments);
}

}  // namespace convt3d::direct
