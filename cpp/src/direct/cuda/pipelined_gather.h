// The gather with wgmma, in a pipeline (see direct/pipelined_gather.h): forward and grad_input on GPUs of compute
// capability 9.0.
//
// Thread mapping: one or two warpgroups multiply, `loading` ones load. A multiplying warpgroup makes 64 * kRowBlocks
// positions for kSlots residues and kColumns channels in registers. Any shifted window of positions is one of rows in
// shared memory, where the source lies as [16 bytes of channels][position][16 bytes], so that ldmatrix loads fragments
// alike whatever the step; in place wgmma reads such rows where they are, by eights that are equally far apart. Weights
// lie as [16 bytes of channels][column][16 bytes], which wgmma reads where they are, too.
// Of the loading warps one has the weights copied in bulk, in pieces; through the others' registers the source passes.
// Both fill rings of stages; a barrier for each stage says that it is full, another that it is free again. A block goes
// from tile to tile, so that the next one is loaded while the sums of the last leave: in NCDHW through shared memory,
// so that a warp writes neighbours, in NDHWC in bulk, behind the products of the next tile. In NCDHW up to two of the
// loading warps may store instead: half types' sums are handed over to them, and leave behind the next products as
// well. Where a block's tiles all take the same weights, and its stages hold these, they stay there.
//
// Traffic: the source once for every block of columns and residues, with its halo; the weights once for every tile, or
// for every block of threads, from L2; the destination once. Floor: 2 * taps * channels operations a destination at the
// tensor cores' rate, or its bytes. With 64 columns and more, products run at cuBLAS's rate; below, shared memory
// bounds it, which gives 16 cycles to 64 positions and columns / 4 to a product's weights: with fragments once for all
// slots, but such that loads and products wait for each other (of 2 x 64 columns 40 cycles a product instead of 32), in
// place for each product, and beside it. Where writing should bound it, taking turns does: on kb73 a multiplying warp
// is on the way out for half its time, and multiplies nothing meanwhile.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <iterator>
#include <type_traits>
#include <utility>

#include "cuda/launch.h"
#include "cuda/ptx.h"
#include "direct/cuda/contacts.h"
#include "direct/cuda/gather_source.h"
#include "direct/cuda/kernels.h"

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
struct PipelinedArguments {
  const T* source;
  const unsigned char* packed;
  const T* bias;
  T* destination;
  GatherVolume from, to;
  int64_t batch;
  bool channels_first;
  SourceLoads loads;
  Divisor<int32_t> by_cells, by_line_cells;  // of a stage's source and of a line of it, see SourceLoader
  RowSteps rows;
  int chunk_bits;      // of the number of 16-byte chunks of channels in a stage
  int thread_units;    // see PipelinedGather; of rows, all warps' together
  int* not_finite;     // becomes 1 where the source is not; null where weights have no gaps
  bool vector_stores;  // 16 bytes of channels in NDHWC, or of a row's half types in NCDHW, are neighbours and aligned
  bool bulk_stores;    // see PipelinedGather::stores_in_bulk
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

// The warps that load the source; `thread` of `threads`. It passes through registers, where channels that lie apart are
// gathered and floats rounded to TF32, in batches: while one is stored the next is on its way, be it another stage's or
// another tile's. A cell is a position, or two neighbours along the width where these are one load, or 16 bytes of
// them; a unit is 16 bytes of channels of each of its positions. Of 16 bytes of neighbours each lane has a channel: a
// warp loads units of several cells at once, and they are transposed on their way to shared memory, which takes six
// instructions for ten. The source was complete before pack_units_kernel began, so nothing waits here. Loading is bound
// by instructions, some seven cycles each: `kHurries` takes as few as may be, which has a batch's loads issue in a row.
// Where products bound, those would keep the multiplying warps' fragments waiting.
template <class T, bool kRounds, bool kWatches, bool kHurries>
class SourceLoader {
 public:
  __device__ __forceinline__ SourceLoader(const PipelinedArguments<T>& arguments, const PipelinedMemory& memory,
                                          int thread, int threads)
      : arguments_(arguments), gather_(arguments.gather), memory_(memory), thread_(thread), threads_(threads) {}

  __device__ __forceinline__ void run() {
    if (arguments_.loads == SourceLoads::vectors) return run_with<SourceLoads::vectors>();
    if (arguments_.loads == SourceLoads::rows) return run_with_rows();
    if constexpr (sizeof(T) == 2) {
      if (arguments_.loads == SourceLoads::pairs) return run_with<SourceLoads::pairs>();
    }
    run_with<SourceLoads::elements>();
  }

 private:
  static constexpr int kUnitChannels = 16 / int{sizeof(T)};

  // Units as loaded, so that nothing waits for them before they are stored.
  template <SourceLoads kLoads>
  struct Batch {
    static constexpr int kUnits = units_of_batch(kLoads, sizeof(T)), kWords = 16 / kUnits;
    uint32_t words[kUnits][kWords];  // of pairs, the lower half is the former position's
  };
  // Of rows, four chunks' vectors, each of a lane's channel of its cell; and in the stage, where the first and the
  // third of these go.
  struct RowBatch {
    uint32_t words[4][4];
    uint32_t targets[2];
  };
  struct Piece {
    int cell, chunk;
  };
  template <SourceLoads kLoads>
  static constexpr int kChunksOfCell = chunks_together(kLoads);
  template <SourceLoads kLoads>
  static constexpr int kPositions = cell_positions(kLoads, sizeof(T));

  template <SourceLoads kLoads>
  __device__ __forceinline__ void run_with() {
    begin<kLoads>();
    Batch<kLoads> batch, next;
#pragma unroll 1
    for (bool is_first = true;; is_first = false) {
      const bool goes_on = advance<kLoads>();
      if (goes_on) load<kLoads>(next);
      if (!is_first) store<kLoads>(batch);
      if (!goes_on) break;
      batch = next;
      phases_ = (phases_ & 255) * 257;
    }
    report();
  }
  // The same by turns, since copying a batch would be a sixth of the instructions.
  __device__ __forceinline__ void run_with_rows() {
    begin<SourceLoads::rows>();
    RowBatch batches[2];
    // What the first turn stores belongs nowhere; it should be finite where that is watched.
    if (kWatches) batches[0] = {};
    batches[0].targets[0] = batches[0].targets[1] = gather_.half_stride - 16;
    stored_ = -batch_units<SourceLoads::rows>();
    const auto turn = [&](RowBatch& next, const RowBatch& batch) {
      const bool goes_on = advance<SourceLoads::rows>();
      if (goes_on) load_rows(next);
      store_rows(batch);
      return goes_on;
    };
#pragma unroll 1
    while (turn(batches[1], batches[0]) && turn(batches[0], batches[1])) {
    }
  }
  template <SourceLoads kLoads>
  __device__ __forceinline__ void begin() {
    places_ = memory_.source_tables;
    int* targets = first_target<kLoads>();
#pragma unroll 1  // little code, so that the multiplying warps' stays in the cache of instructions
    for (int column = thread_ - kPositions<kLoads>; column < arguments_.by_cells.value * kPositions<kLoads>;
         column += threads_) {
      targets[column] = target_of<kLoads>(column);
    }
    unit_ = arguments_.thread_units;  // so that the first batch begins a pass
  }
  __device__ __forceinline__ void report() const {
    if (kWatches && not_finite_ && arguments_.not_finite != nullptr) {
      ptx::wait_for_previous_kernel();  // which makes it 0
      *arguments_.not_finite = 1;
    }
  }

  // The next pass of the block's tile, or of the next one that has any; false where there is none. Leaving a tile with
  // its last pass, instead of finding out here that there is none, has ptxas spill registers of the half types'
  // kernels.
  template <SourceLoads kLoads>
  __device__ __forceinline__ bool begin_pass() {
    for (; index_ < gather_.items; index_ += static_cast<int>(gridDim.x), pass_ = 0) {
      const PipelinedItem item(gather_, index_);
      const PipelinedPhase& residues = gather_.tables.phases[item.phase_block];
      if (pass_ == residues.passes) continue;
      const PipelinedPass& pass = gather_.tables.passes[residues.first_pass + pass_++];
      const GatherVolume& from = arguments_.from;
      base_ = arguments_.source + item.sample * from.sample_stride +
              static_cast<int64_t>(item.group) * from.group_channels * from.channel_stride;
      left_ = from.group_channels;
      int origin[3];
#pragma unroll
      for (int axis = 0; axis < 3; ++axis) {
        origin[axis] = item.first[axis] * gather_.source_stride[axis] * gather_.source_step[axis] + pass.origin[axis];
      }
      const int phase = origin[2] & (kPositions<kLoads> - 1);
      if (kLoads == SourceLoads::pairs) phases_ = (phases_ & ~255) | phase;
      const int64_t left_samples = arguments_.batch - item.sample;
      const int samples = left_samples < gather_.samples ? static_cast<int>(left_samples) : gather_.samples;
      // Two passes' places alternate, since warps may be one apart.
      places_ =
          places_ == memory_.source_tables ? memory_.source_tables + arguments_.by_cells.value : memory_.source_tables;
#pragma unroll 1
      for (int cell = thread_; cell < arguments_.by_cells.value; cell += threads_) {
        places_[cell] = place_of<kLoads>(pass, origin, phase, samples, cell);
      }
      ptx::barrier_sync(kSourceBarrier, threads_);
      if (kLoads == SourceLoads::rows) targets_ = first_target<kLoads>() + lane_column() - phase;
      return true;
    }
    return false;
  }
  // From one batch of a thread to its next; of rows, units are the batches of all warps.
  template <SourceLoads kLoads>
  __device__ __forceinline__ int batch_units() const {
    return kLoads == SourceLoads::rows ? arguments_.rows.warps : Batch<kLoads>::kUnits;
  }
  // To the next batch, and the stage or pass that it may begin.
  template <SourceLoads kLoads>
  __device__ __forceinline__ bool advance() {
    unit_ += batch_units<kLoads>();
    if (unit_ < arguments_.thread_units) return true;
    unit_ = kLoads == SourceLoads::rows ? static_cast<int>(static_cast<uint32_t>(ptx::opaque(thread_)) / 32) : 0;
    const int stage_channels = 2 * gather_.channel_groups * kUnitChannels;
    left_ -= stage_channels;
    if (left_ <= 0) return begin_pass<kLoads>();
    base_ += static_cast<int64_t>(stage_channels) * arguments_.from.channel_stride;
    return true;
  }

  // The table of targets, which has some of columns before the first line's.
  template <SourceLoads kLoads>
  __device__ __forceinline__ int* first_target() const {
    return memory_.source_tables + 2 * arguments_.by_cells.value + kPositions<kLoads>;
  }
  // Where in a stage a column belongs, in bytes, or -1 if no step reads it; of rows, the spare position, since a warp
  // stores all or nothing. Lines have the columns of their cells, of a pass whose origin is a cell's: of one that
  // begins `phase` columns further on, a cell's columns are so many further back. What is left over at the end of each
  // line and before the first serves those before the origin.
  template <SourceLoads kLoads>
  __device__ __forceinline__ int target_of(int column) const {
    const int line = column < 0 ? -1 : arguments_.by_line_cells.quotient(column / kPositions<kLoads>);
    const int in_line = column - line * arguments_.by_line_cells.value * kPositions<kLoads>;
    const int along = gather_.by_source_stride.quotient(in_line), residue = in_line - along * gather_.source_stride[2];
    const int in_row = residue * gather_.residue_pitch + along;
    const bool is_read = line >= 0 && line < gather_.lines() && in_line < gather_.width && in_row < gather_.row_pitch;
    const int nowhere = kLoads == SourceLoads::rows ? gather_.half_stride - 16 : -1;
    return is_read ? 16 * (line * gather_.row_pitch + in_row) : nowhere;
  }
  // Where a cell comes from, in elements, or -1 outside the volume and where the pass needs none.
  template <SourceLoads kLoads>
  __device__ __forceinline__ int place_of(const PipelinedPass& pass, const int (&origin)[3], int phase, int samples,
                                          int cell) const {
    const GatherVolume& from = arguments_.from;
    const int line = arguments_.by_line_cells.quotient(cell);
    const int width = origin[2] - phase +
                      (cell - line * arguments_.by_line_cells.value) * kPositions<kLoads> * gather_.source_step[2];
    const int planes = gather_.by_rows.quotient(line), row = line - planes * gather_.rows;
    const int member = gather_.by_planes.quotient(planes), plane = planes - member * gather_.planes;
    const int depth = origin[0] + plane * gather_.source_step[0], height = origin[1] + row * gather_.source_step[1];
    const bool inside = member < samples && plane < pass.planes && row < pass.rows && width >= 0 &&
                        width < from.size[2] && height >= 0 && height < from.size[1] && depth >= 0 &&
                        depth < from.size[0];
    return inside ? member * static_cast<int>(from.sample_stride) +
                        ((depth * from.size[1] + height) * from.size[2] + width) * from.voxel_stride
                  : -1;
  }

  // Neighbouring threads take chunks of channels that are neighbours, or else neighbouring cells, of which the chunk
  // lies beyond the stage where there are no more.
  template <SourceLoads kLoads>
  __device__ __forceinline__ Piece piece_of(int unit) const {
    const int piece = thread_ + unit / kChunksOfCell<kLoads> * threads_;
    if constexpr (kLoads == SourceLoads::vectors) {
      return {piece >> arguments_.chunk_bits, piece & ((1 << arguments_.chunk_bits) - 1)};
    } else {
      const int chunks = arguments_.by_cells.quotient(piece);
      return {piece - chunks * arguments_.by_cells.value, chunks * kChunksOfCell<kLoads>};
    }
  }
  template <SourceLoads kLoads>
  __device__ __forceinline__ bool is_in_stage(const Piece& piece) const {
    return kLoads == SourceLoads::vectors ? piece.cell < arguments_.by_cells.value
                                          : piece.chunk >> arguments_.chunk_bits == 0;
  }
  template <SourceLoads kLoads>
  __device__ __forceinline__ void load(Batch<kLoads>& batch) {
    if (kHurries && left_ >= 2 * gather_.channel_groups * kUnitChannels) {
      load_words<kLoads, true>(batch.words);
    } else {
      load_words<kLoads, false>(batch.words);
    }
  }
  // `kWhole`: the stage has all of its channels, so that one predicate serves all loads of a cell.
  template <SourceLoads kLoads, bool kWhole>
  __device__ __forceinline__ void load_words(uint32_t (&words)[Batch<kLoads>::kUnits][Batch<kLoads>::kWords]) const {
    using Word = std::conditional_t<sizeof(T) == 4 || kLoads == SourceLoads::pairs, uint32_t, uint16_t>;
    const int stride = arguments_.from.channel_stride;
    bool inside = false;
    int channels = 0;
    const T* from = nullptr;
#pragma unroll
    for (int u = 0; u < Batch<kLoads>::kUnits; ++u) {
      if (u % kChunksOfCell<kLoads> == 0) {
        const Piece piece = piece_of<kLoads>(unit_ + u);
        const int place = is_in_stage<kLoads>(piece) ? places_[piece.cell] : -1, channel = piece.chunk * kUnitChannels;
        inside = place >= 0;
        channels = inside ? left_ - channel : 0;
        from = base_ + (place + channel * stride);
      } else {
        channels -= kUnitChannels;
        if constexpr (!kHurries) from += kUnitChannels * stride;
      }
      if constexpr (kLoads == SourceLoads::vectors) {
        uint4 vector = make_uint4(0, 0, 0, 0);
        if (channels > 0) vector = __ldg(reinterpret_cast<const uint4*>(from));
        words[u][0] = vector.x, words[u][1] = vector.y, words[u][2] = vector.z, words[u][3] = vector.w;
      } else {
#pragma unroll
        for (int i = 0; i < kUnitChannels; ++i) {
          words[u][i] = 0;
          const T* own = kHurries ? from : from + int64_t{i} * stride;
          if (kWhole ? inside : i < channels) words[u][i] = __ldg(reinterpret_cast<const Word*>(own));
          if constexpr (kHurries) from = ptx::opaque(from + stride);  // one instruction, where a multiple would be five
        }
      }
    }
  }
  template <SourceLoads kLoads>
  __device__ __forceinline__ void store(const Batch<kLoads>& batch) {
    unsigned char* stage = stage_to_store();
    Piece piece{};
    int targets[2]{};
#pragma unroll
    for (int u = 0; u < Batch<kLoads>::kUnits; ++u) {
      if (u % kChunksOfCell<kLoads> == 0) {
        piece = piece_of<kLoads>(stored_ + u);
        const bool in_stage = is_in_stage<kLoads>(piece);
#pragma unroll
        for (int i = 0; i < kPositions<kLoads>; ++i) {
          targets[i] = in_stage ? first_target<kLoads>()[kPositions<kLoads> * piece.cell - (phases_ >> 8) + i] : -1;
        }
      } else {
        ++piece.chunk;
      }
      unsigned char* chunk = stage + piece.chunk * gather_.half_stride;
      const uint32_t (&words)[Batch<kLoads>::kWords] = batch.words[u];
      if (targets[0] >= 0) {
        uint4* target = reinterpret_cast<uint4*>(chunk + targets[0]);
        if constexpr (sizeof(T) == 2 && kLoads != SourceLoads::vectors) {
          *target = watched(halves_of<0x5410>(words));
        } else {
          *target = watched(make_uint4(rounded(words[0]), rounded(words[1]), rounded(words[2]), rounded(words[3])));
        }
      }
      if constexpr (kLoads == SourceLoads::pairs) {
        if (targets[1] >= 0) *reinterpret_cast<uint4*>(chunk + targets[1]) = watched(halves_of<0x7632>(words));
      }
    }
    end_of_batch<kLoads>();
  }
  // The column of a warp's cells that this lane names the place of.
  __device__ __forceinline__ uint32_t lane_column() const {
    const uint32_t lane = ptx::opaque(threadIdx.x) % 32, turn = lane / 2 % 2 * 2;
    return sizeof(T) == 4 ? lane % 8 * 4 + (lane / 8 ^ turn) : lane % 8 / 2 * 8 + (lane / 8 ^ turn) * 2 + lane % 2;
  }
  // A warp takes 8 x 8 half types of each of four cells, or 4 x 4 floats of eight: a lane has one channel of a cell. As
  // matrices of 8 x 16 bytes, the i-th words of all lanes are columns 2 * i and 2 * i + 1 of four cells by 8 channels,
  // which are stored transposed; or of eight cells column i by 4 channels, stored as they are. So lane l names the
  // place of column 2 * (l / 8) + l % 2 of cell l % 8 / 2, or of column l / 8 of cell l % 8. Where that is odd, or odd
  // when halved, the words' halves are exchanged: else neighbouring cells' places would meet in banks by fours, which
  // leaves pairs; what would part these, too, costs as many instructions again.
  __device__ __forceinline__ void load_rows(RowBatch& batch) const {
    const RowSteps& rows = arguments_.rows;
    const uint32_t lane = ptx::opaque(threadIdx.x) % 32;  // worked out anew: registers are few
    const int lane_cell = static_cast<int>(sizeof(T) == 4 ? lane / 4 : lane % 4);
    const int lane_channel = static_cast<int>(sizeof(T) == 4 ? lane % 4 : lane / 4);
    const int first_cell = (unit_ >> rows.bits) * rows.cells, chunk = 4 * (unit_ & rows.bits);
    const int channel = chunk * kUnitChannels + lane_channel;
    const int* places = places_ + first_cell + lane_cell;
    const int* targets = targets_ + first_cell * kPositions<SourceLoads::rows>;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int place = places[half * rows.second_cells];
      const int channels = left_ - channel - half * rows.second_channels;
      batch.targets[half] = targets[half * rows.second_cells * kPositions<SourceLoads::rows>] +
                            (chunk * gather_.half_stride + half * rows.second_target);
      auto from = reinterpret_cast<const unsigned char*>(
          base_ + (place + channel * arguments_.from.channel_stride + half * rows.second_source));
#pragma unroll
      for (int u = 0; u < 2; ++u, from += rows.chunk) {
        uint4 vector = make_uint4(0, 0, 0, 0);
        if (place >= 0 && channels > u * kUnitChannels) vector = __ldg(reinterpret_cast<const uint4*>(from));
        uint32_t (&words)[4] = batch.words[2 * half + u];
        words[0] = vector.x, words[1] = vector.y, words[2] = vector.z, words[3] = vector.w;
      }
    }
  }
  __device__ __forceinline__ void store_rows(const RowBatch& batch) {
    const uint32_t stage = ptx::shared_address(stage_to_store());
    not_finite_ = false;
    const bool turned = (ptx::opaque(threadIdx.x) & (sizeof(T) == 4 ? 8 : 1)) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t (&words)[4] = batch.words[i];
      const uint4 unit =
          watched(make_uint4(rounded(words[0]), rounded(words[1]), rounded(words[2]), rounded(words[3])));
      const uint32_t matrices[4] = {turned ? unit.z : unit.x, turned ? unit.w : unit.y, turned ? unit.x : unit.z,
                                    turned ? unit.y : unit.w};
      const uint32_t target = stage + batch.targets[i / 2] + i % 2 * gather_.half_stride;
      if constexpr (sizeof(T) == 4) {
        ptx::store_matrices(target, matrices);
      } else {
        ptx::store_matrices_transposed(target, matrices);
      }
    }
    report();  // at once, so that no register keeps it
    end_of_batch<SourceLoads::rows>();
  }
  // Where a batch goes, once the multiplying warps have left the stage.
  __device__ __forceinline__ unsigned char* stage_to_store() const {
    if (stored_ == 0) ptx::wait(memory_.source_free(ring_.stage), ring_.parity ^ 1);
    return memory_.source + ring_.stage * gather_.source_stage_bytes;
  }
  template <SourceLoads kLoads>
  __device__ __forceinline__ void end_of_batch() {
    stored_ += batch_units<kLoads>();
    if (stored_ < arguments_.thread_units) return;
    stored_ = 0;
    ptx::arrive(memory_.source_full(ring_.stage));
    ring_.advance(gather_.source_stages);
  }
  // The lower or the upper halves of eight words.
  template <uint32_t kSelector>
  __device__ __forceinline__ static uint4 halves_of(const uint32_t (&words)[8]) {
    return make_uint4(__byte_perm(words[0], words[1], kSelector), __byte_perm(words[2], words[3], kSelector),
                      __byte_perm(words[4], words[5], kSelector), __byte_perm(words[6], words[7], kSelector));
  }
  // The same unit, after a look at whether all of it is finite: whether no exponent is all ones.
  __device__ __forceinline__ uint4 watched(uint4 unit) {
    if constexpr (kWatches && sizeof(T) == 4) {
      const auto is_finite = [](uint32_t word) { return fabsf(__uint_as_float(word)) < __uint_as_float(0x7f800000u); };
      not_finite_ |= !(is_finite(unit.x) & is_finite(unit.y) & is_finite(unit.z) & is_finite(unit.w));
    } else if constexpr (kWatches) {
      constexpr uint32_t kLowest = std::is_same_v<T, __half> ? 0x04000400u : 0x00800080u;  // bits of exponents
      constexpr uint32_t kExponents = 0x80008000u - kLowest;
      const auto carries = [](uint32_t word) { return (word & kExponents) + kLowest; };
      not_finite_ |= ((carries(unit.x) | carries(unit.y) | carries(unit.z) | carries(unit.w)) & 0x80008000u) != 0;
    }
    return unit;
  }
  __device__ __forceinline__ static uint32_t rounded(uint32_t word) {
    return kRounds ? ptx::rounded_for_tf32(word) : word;
  }

  const PipelinedArguments<T>& arguments_;
  const PipelinedGather& gather_;
  const PipelinedMemory& memory_;
  const int thread_, threads_;
  // What is loaded next.
  int index_ = static_cast<int>(blockIdx.x);  // of the tile
  int pass_ = 0;                              // of the tile, the next one
  const T* base_ = nullptr;                   // of the stage's channels
  int left_ = 0, unit_ = 0;                   // channels from there on; unit of the stage
  int* places_ = nullptr;
  int phases_ = 0;                // of pairs, see place_of: the pass's, and 256 times that of what is stored next
  const int* targets_ = nullptr;  // of rows in this pass, those of this lane
  bool not_finite_ = false;       // something that was loaded
  // What is stored next.
  Ring ring_;
  int stored_ = 0;
};

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

// The sets of bands that a kernel has code for.
template <int kBands>
struct BandSets {
  static constexpr const uint8_t* table() {
    return kBands == 1 ? kSetsOf1 : kBands == 2 ? kSetsOf2 : kBands == 4 ? kSetsOf4 : kSetsOf8;
  }
  static constexpr size_t kCount = kBands < 8 ? (1u << kBands) - 1 : sizeof(kSetsOf8);
  template <size_t kNumber>
  static constexpr uint32_t kSet = table()[kNumber];
};

// Where a tile's sums belong.
template <class T, int kColumns, bool kInPlace>
class Destination {
 public:
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
  __device__ __forceinline__ T* destination_of(const PipelinedItem& item) const {
    const GatherVolume& to = arguments_.to;
    return arguments_.destination + item.sample * to.sample_stride +
           (static_cast<int64_t>(item.group) * to.group_channels + item.column_block * kColumns) * to.channel_stride;
  }

  const PipelinedArguments<T>& arguments_;
  const PipelinedGather& gather_;
};

// A multiplying warpgroup.
template <class T, int kSlots, int kColumns, int kRowBlocks, bool kExact, bool kInPlace>
class Multiplier : Destination<T, kColumns, kInPlace> {
  using Base = Destination<T, kColumns, kInPlace>;
  using Base::arguments_, Base::gather_;
  using Base::destination_of, Base::destination_place, Base::is_inside, Base::residues_of, Base::row_offset;

 public:
  __device__ __forceinline__ Multiplier(const PipelinedArguments<T>& arguments, const PipelinedMemory& memory)
      : Base(arguments),
        memory_(memory),
        thread_(threadIdx.x % 128),
        lane_(threadIdx.x % 32),
        warpgroup_(threadIdx.x / 128) {
    // Which row of the fragments this lane names, at shift 0: half the lanes the rows' second halves. In place a
    // block's first row, as wgmma wants it.
#pragma unroll
    for (int block = 0; block < kRowBlocks; ++block) {
      int position = (warpgroup_ * kRowBlocks + block) * 64 + (kInPlace ? 0 : thread_ / 32 * 16 + lane_ % 16);
      if (position >= gather_.tile_positions()) position = 0;
      int along[3];
      const int member = unfold<kInPlace>(gather_, position, along);
      const int plane = member * gather_.planes + along[0] * gather_.source_stride[0];
      const int place = (plane * gather_.rows + along[1] * gather_.source_stride[1]) * gather_.row_pitch + along[2];
      const uint32_t row = ptx::shared_address(memory_.source) + 16 * place;
      if constexpr (kInPlace) {
        rows_[block] = ptx::or_of_warp(ptx::wgmma_columns(row, gather_.half_stride));  // so that it is known to be one
      } else {
        rows_[block] = row + lane_ / 16 * gather_.half_stride;
      }
    }
  }

  __device__ __forceinline__ void run() {
    Ring source, weights;
    for (int64_t index = blockIdx.x; index < gather_.items; index += gridDim.x) {
      const PipelinedItem item(gather_, static_cast<int>(index));
      const PipelinedPhase& phase = gather_.tables.phases[item.phase_block];
      for_each_sum([&](int block, int slot, int i) { totals(block, slot, i) = 0.0f; });
      if (gather_.keeps_weights) weights = {};  // the stages that the first tile's came to
      for (int number = 0; number < phase.passes; ++number) {
        const PipelinedPass& pass = gather_.tables.passes[phase.first_pass + number];
        for (int block = 0; block < gather_.channel_blocks; ++block) {
          ptx::wait(memory_.source_full(source.stage), source.parity);
          if constexpr (kInPlace) ptx::fence_shared_for_wgmma();
          const uint32_t source_offset = source.stage * static_cast<uint32_t>(gather_.source_stage_bytes);
          for (int piece = 0; piece < pass.pieces; ++piece) {
            ptx::wait(memory_.weights_full(weights.stage), weights.parity);
            const WeightPiece& steps = gather_.tables.pieces[pass.first_piece + piece];
            const uint32_t stage = memory_.weights + weights.stage * static_cast<uint32_t>(gather_.weight_stage_bytes);
            if constexpr (kInPlace) {
              multiply_piece_in_place(steps, source_offset, stage);
            } else {
              multiply_piece(steps, source_offset, stage);
            }
            if (!gather_.keeps_weights) give_back(weights_to_free_, memory_.weights_free(weights.stage));
            weights.advance(gather_.weight_stages);
          }
          give_back(source_to_free_, memory_.source_free(source.stage));
          source.advance(gather_.source_stages);
        }
      }
      if constexpr (kInPlace) {
        ptx::wait_for_products<0>();
        free_stages();
      }
      if (gather_.storing_warps > 0) {
        hand_over(item);
      } else if (gather_.stores_from_registers) {
        store_from_registers(item, phase);
      } else if (arguments_.channels_first && gather_.slot_bits[2] != 0) {
        store_by_channels<1>(item, phase);
      } else if (arguments_.channels_first) {
        store_by_channels<0>(item, phase);
      } else if (arguments_.bulk_stores && gather_.slot_bits[2] != 0) {
        store_in_bulk<1>(item, phase);
      } else if (arguments_.bulk_stores) {
        store_in_bulk<0>(item, phase);
      } else {
        store_by_voxels(item, phase);
      }
    }
    ptx::wait_for_bulk_stores<0>();
  }

 private:
  static constexpr int kParts = kExact ? 2 : 1;
  static constexpr int kBand = band_slots(kSlots, kColumns), kBands = kSlots / kBand;
  static constexpr int kProductColumns = kBand * kColumns;
  static constexpr int kUnit = 2 * kProductColumns;  // 16-byte rows of a unit's part
  static constexpr int kDepth = units_together({kSlots, kColumns, kRowBlocks, kExact, kInPlace});  // of a step, at most
  static constexpr int kStaged = staged_columns(kColumns, kRowBlocks);
  static constexpr int kStagingFloats = staging_floats(kColumns, kRowBlocks);
  static constexpr int kPositions = 64 * kRowBlocks;
  static constexpr bool kHandsOver = hands_over({kSlots, kColumns, kRowBlocks, kExact, kInPlace}, sizeof(T));
  using Staged = std::conditional_t<sizeof(T) == 2, T, float>;  // on the way out, in NCDHW
  using Sums = float[kRowBlocks][kSlots][kColumns / 2];
  // Of a step: of each unit, what its rows are multiplied by; in place, how far on they are, in 16 bytes.
  using Fragments = std::conditional_t<kInPlace, uint32_t[kDepth], uint32_t[kDepth][kParts][kRowBlocks][4]>;

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

  __device__ __forceinline__ float& totals(int block, int slot, int i) {
    if constexpr (kExact) {
      return totals_[block][slot][i];
    } else {
      return sums_[block][slot][i];
    }
  }

  // A step's fragments; of one that has fewer, the last again.
  __device__ __forceinline__ void load(Fragments& fragments, const PipelinedStep& step, uint32_t source) const {
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      if constexpr (kInPlace) {
        fragments[k] = (source + step.shift[k]) / 16;
      } else {
#pragma unroll
        for (int block = 0; block < kRowBlocks; ++block) {
          uint32_t (&fragment)[4] = fragments[k][0][block];
          ptx::load_matrices(fragment, rows_[block] + (source + step.shift[k]));
          if constexpr (kExact) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float value = __uint_as_float(fragment[i]);
              fragment[i] = __float_as_uint(tf32_part(value, false));
              fragments[k][1][block][i] = __float_as_uint(tf32_part(value, true));
            }
          }
        }
      }
    }
  }

  __device__ __forceinline__ void multiply_band(const Fragments& fragments, int k, int block, int band, uint32_t unit,
                                                bool keeps) {
#if CONVT3D_HAS_WGMMA
    using Product = ptx::Wgmma<T, kProductColumns>;
    float* sums = sums_[block][band * kBand];  // and on through the band's other slots
    if constexpr (kInPlace) {
      const uint32_t rows = rows_[block] + fragments[k];
      Product::run(sums, ptx::wgmma_descriptor(rows, gather_.eight_stride), ptx::wgmma_descriptor(unit));
    } else {
      if constexpr (kExact) {
        // The small products first: tensor cores cut off what a sum cannot hold, and theirs are small sums.
        Product::run_if(keeps, sums, fragments[k][1][block], ptx::wgmma_descriptor(unit));
        Product::run(sums, fragments[k][0][block], ptx::wgmma_descriptor(unit + kUnit));
      }
      Product::run(sums, fragments[k][0][block], ptx::wgmma_descriptor(unit));
    }
#endif
  }
  // The products of one step begin: its units follow each other, those of one fragment band by band. Each set of bands
  // has code of its own, without branches: between these ptxas would wait for products before all of a step's are
  // begun. The exact ones, which are one unit, are a group for each row block, so that one block's sums can be added up
  // while the next one's products are under way.
  template <uint32_t kSet, int kUnits>
  __device__ __forceinline__ void multiply_set(const Fragments& fragments, uint32_t unit, bool keeps) {
    ptx::begin_products();
    const auto for_each_band = [&](int k, const auto& body) {
      uint32_t place = unit + k * (kUnit * kParts) * __builtin_popcount(kSet);
#pragma unroll
      for (int band = 0; band < kBands; ++band) {
        if ((kSet >> band & 1) == 0) continue;
        body(band, place);
        place += kUnit * kParts;
      }
    };
    if constexpr (kExact) {
#pragma unroll
      for (int block = 0; block < kRowBlocks; ++block) {
        for_each_band(0, [&](int band, uint32_t place) { multiply_band(fragments, 0, block, band, place, keeps); });
        ptx::commit_products();
      }
    } else {
#pragma unroll
      for (int k = 0; k < kUnits; ++k) {
        for_each_band(k, [&](int band, uint32_t place) {
#pragma unroll
          for (int block = 0; block < kRowBlocks; ++block) multiply_band(fragments, k, block, band, place, keeps);
        });
      }
      ptx::commit_products();
    }
  }
  // Tensor cores cut off what their sums cannot hold. Where that matters, those of a step or two are added up and
  // rounded, in the bands that they are for, as soon as their products have been made.
  template <int kBlock>
  __device__ __forceinline__ void fold(uint32_t bands) {
    if constexpr (kBlock < kRowBlocks) {
      ptx::wait_for_products<kRowBlocks - 1 - kBlock>();
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        if ((bands >> slot / kBand & 1) == 0) continue;
#pragma unroll
        for (int i = 0; i < kColumns / 2; ++i) totals_[kBlock][slot][i] += sums_[kBlock][slot][i];
      }
      fold<kBlock + 1>(bands);
    }
  }
  // A step's code says for which one of the sets of bands it is, and how many units.
  template <size_t kCode>
  __device__ __forceinline__ void multiply_coded(const Fragments& fragments, uint32_t unit, bool keeps) {
    if constexpr (kCode < kDepth * BandSets<kBands>::kCount) {
      multiply_set<BandSets<kBands>::template kSet<kCode / kDepth>, kCode % kDepth + 1>(fragments, unit, keeps);
    }
  }
  // A jump table: comparisons would take longer than the products.
  template <size_t kFirst>
  __device__ __forceinline__ void multiply(const Fragments& fragments, uint32_t code, uint32_t unit, bool keeps) {
    constexpr size_t kNext = kFirst + 16;
    if constexpr (kNext < kDepth * BandSets<kBands>::kCount) {
      if (code >= kNext) return multiply<kNext>(fragments, code, unit, keeps);
    }
    switch (code - kFirst) {
      case 0:
        return multiply_coded<kFirst + 0>(fragments, unit, keeps);
      case 1:
        return multiply_coded<kFirst + 1>(fragments, unit, keeps);
      case 2:
        return multiply_coded<kFirst + 2>(fragments, unit, keeps);
      case 3:
        return multiply_coded<kFirst + 3>(fragments, unit, keeps);
      case 4:
        return multiply_coded<kFirst + 4>(fragments, unit, keeps);
      case 5:
        return multiply_coded<kFirst + 5>(fragments, unit, keeps);
      case 6:
        return multiply_coded<kFirst + 6>(fragments, unit, keeps);
      case 7:
        return multiply_coded<kFirst + 7>(fragments, unit, keeps);
      case 8:
        return multiply_coded<kFirst + 8>(fragments, unit, keeps);
      case 9:
        return multiply_coded<kFirst + 9>(fragments, unit, keeps);
      case 10:
        return multiply_coded<kFirst + 10>(fragments, unit, keeps);
      case 11:
        return multiply_coded<kFirst + 11>(fragments, unit, keeps);
      case 12:
        return multiply_coded<kFirst + 12>(fragments, unit, keeps);
      case 13:
        return multiply_coded<kFirst + 13>(fragments, unit, keeps);
      case 14:
        return multiply_coded<kFirst + 14>(fragments, unit, keeps);
      case 15:
        return multiply_coded<kFirst + 15>(fragments, unit, keeps);
      default:
        __builtin_unreachable();
    }
  }

  // In place a step is no more than its products' places: nothing waits for these but the stages that they read, which
  // are given back once the first products of the next piece have begun.
  __device__ __forceinline__ void multiply_piece_in_place(const WeightPiece& piece, uint32_t source, uint32_t weights) {
#if CONVT3D_HAS_WGMMA
    const uint32_t base = ptx::wgmma_columns(weights, kProductColumns * 16);
    const PipelinedStep* steps = gather_.tables.steps + piece.first_step;
    PipelinedStep next = *steps;
    for (int left = piece.steps; left > 0; --left) {
      Fragments fragments;
      load(fragments, next, source);
      multiply<0>(fragments, next.code, base + next.weights, true);
      next = *++steps;
      if (left == piece.steps) {
        ptx::wait_for_products<1>();
        free_stages();
      }
    }
#endif
  }
  // The stage that this barrier belongs to: at once where its products have been made.
  __device__ __forceinline__ static void give_back(uint32_t& held, uint32_t barrier) {
    if constexpr (kInPlace) {
      held = barrier;
    } else {
      ptx::arrive(barrier);
    }
  }
  __device__ __forceinline__ void free_stages() {
    if (weights_to_free_ != 0) ptx::arrive(weights_to_free_);
    if (source_to_free_ != 0) ptx::arrive(source_to_free_);
    weights_to_free_ = source_to_free_ = 0;
  }

  // While the products of one step are under way, the fragments of the next are loaded; beyond the last step, some that
  // nobody needs.
  __device__ __forceinline__ void multiply_piece(const WeightPiece& piece, uint32_t source, uint32_t weights) {
#if CONVT3D_HAS_WGMMA
    const uint32_t base = ptx::wgmma_columns(weights, kProductColumns * 16);
    const PipelinedStep* steps = gather_.tables.steps + piece.first_step;
    Fragments fragments[2];
    PipelinedStep next[2] = {steps[0], steps[1]};
    load(fragments[0], next[0], source);
    for (int left = piece.steps;; left -= 2, steps += 2) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        multiply<0>(fragments[i], next[i].code, base + next[i].weights, !next[i].starts);
        const uint32_t folded_bands = next[i].folds ? next[i].bands : 0;
        next[i] = steps[i + 2];
        if constexpr (kExact) {
          load(fragments[1 - i], next[1 - i], source);
          fold<0>(folded_bands);
          if (left == i + 1) return;
        } else {
          ptx::wait_for_products<1>();  // those of the step before have read their fragments
          if (left == i + 1) {
            ptx::wait_for_products<0>();
            return;
          }
          load(fragments[1 - i], next[1 - i], source);
        }
      }
    }
#endif
  }

  __device__ __forceinline__ float bias_of(const PipelinedItem& item, int channel) const {
    const int channels = arguments_.to.group_channels;
    channel += item.column_block * kColumns;
    return arguments_.bias == nullptr || channel >= channels
               ? 0.0f
               : static_cast<float>(arguments_.bias[item.group * channels + channel]);
  }
  template <class Order>
  __device__ __forceinline__ void add_bias(const PipelinedItem& item, const Order& channel_of) {
    if (arguments_.bias == nullptr) return;
#pragma unroll
    for (int i = 0; i < kColumns / 4; ++i) {  // two neighbours of each eight columns
      const float bias = bias_of(item, channel_of(i / 2 * 8 + lane_ % 4 * 2 + i % 2));
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
#pragma unroll
        for (int half = 0; half < 2 * kRowBlocks; ++half) {
          totals(half / 2, slot, i / 2 * 4 + half % 2 * 2 + i % 2) += bias;
        }
      }
    }
  }
  __device__ __forceinline__ void synchronize() const { ptx::barrier_sync(kWarpgroupBarrier + warpgroup_, 128); }

  // NCDHW, half types: all sums of the tile, as [row of slots][channel][voxel], for the warps that store.
  __device__ __forceinline__ void hand_over(const PipelinedItem& item) {
    if constexpr (kHandsOver) {
      add_bias(item, [](int column) { return column; });
      ptx::wait(memory_.staged_free(), staged_parity_ ^ 1);
      staged_parity_ ^= 1;
      if (gather_.slot_bits[2] != 0) {
        stage_pairs();
      } else {
        stage_matrices();
      }
      ptx::arrive(memory_.staged_full());
    }
  }
  // Both residues of a row as one word.
  __device__ __forceinline__ void stage_pairs() {
    if constexpr (kSlots > 1) {
      const int pitch = handed_pitch(2 * gather_.positions());
      T* staged = reinterpret_cast<T*>(memory_.staging) + lane_ % 4 * 2 * pitch +
                  2 * (warpgroup_ * kPositions + thread_ / 32 * 16 + lane_ / 4);
#pragma unroll
      for (int slot = 0; slot < kSlots; slot += 2) {
#pragma unroll
        for (int i = 0; i < kColumns / 2; ++i) {
          T* const place = staged + (slot / 2 * kColumns + i / 4 * 8 + i % 2) * pitch + i / 2 % 2 * 16;
#pragma unroll
          for (int block = 0; block < kRowBlocks; ++block) {
            store_pair(place + block * 128, static_cast<T>(totals(block, slot, i)),
                       static_cast<T>(totals(block, slot + 1, i)));
          }
        }
      }
    }
  }
  // Eight channels by eight positions at a time, transposed.
  __device__ __forceinline__ void stage_matrices() {
    constexpr int kPairs = kColumns / 8 * kRowBlocks;  // of matrices: 16 positions by eight channels
    if constexpr (kPairs % 2 == 0) {
      const int pitch = handed_pitch(gather_.positions());
      const uint32_t staged = ptx::shared_address(memory_.staging) +
                              2 * (lane_ % 8 * pitch + warpgroup_ * kPositions + thread_ / 32 * 16 + lane_ / 8 % 2 * 8);
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
#pragma unroll
        for (int pair = 0; pair < kPairs; pair += 2) {
          uint32_t matrices[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int block = (pair + i / 2) % kRowBlocks, columns = (pair + i / 2) / kRowBlocks;
            alignas(4) T both[2];
#pragma unroll
            for (int k = 0; k < 2; ++k) both[k] = static_cast<T>(totals(block, slot, columns * 4 + i % 2 * 2 + k));
            matrices[i] = *reinterpret_cast<const uint32_t*>(both);
          }
          const int own = pair + lane_ / 16, block = own % kRowBlocks, columns = own / kRowBlocks;
          ptx::store_matrices_transposed(staged + 2 * ((slot * kColumns + columns * 8) * pitch + block * 64), matrices);
        }
      }
    }
  }

  // NCDHW, half types where a tile has one residue along the width: each thread writes what it has. Eight lanes have
  // neighbours of the tile's row, which in the volume are a stride apart, and four lanes a channel each.
  __device__ __forceinline__ void store_from_registers(const PipelinedItem& item, const PipelinedPhase& phase) {
    const GatherVolume& to = arguments_.to;
    const int left = to.group_channels - item.column_block * kColumns - lane_ % 4 * 2;
    T* const destination = destination_of(item) + static_cast<int64_t>(lane_ % 4 * 2) * to.channel_stride;
    add_bias(item, [](int column) { return column; });
#pragma unroll
    for (int half = 0; half < 2 * kRowBlocks; ++half) {
      const int row = thread_ / 32 * 16 + half % 2 * 8 + lane_ / 4;
      const int2 place = destination_place(item, (warpgroup_ * kRowBlocks + half / 2) * 64 + row);
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        int residue[3];
        residues_of(phase, slot, residue);
        if (!is_inside(place, residue)) continue;
        T* out = destination + (place.x + row_offset(residue) + residue[2]);
#pragma unroll
        for (int column = 0; column < kColumns; column += 8) {
#pragma unroll
          for (int parity = 0; parity < 2; ++parity) {
            const float sum = totals(half / 2, slot, column / 2 + half % 2 * 2 + parity);
            if (column + parity < left) out[parity * static_cast<int64_t>(to.channel_stride)] = static_cast<T>(sum);
          }
          out += 8 * static_cast<int64_t>(to.channel_stride);
        }
      }
    }
  }

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
        float biases[kStaged / 4];  // of two neighbours of each eight columns
#pragma unroll
        for (int i = 0; i < kStaged / 4; ++i) biases[i] = bias_of(item, first + i / 2 * 8 + lane_ % 4 * 2 + i % 2);
#pragma unroll
        for (int slot = 0; slot < kSlots; slot += kRow) {
          synchronize();
          if (first == 0 && slot == 0 && thread_ < kPositions) {
            const int position = warpgroup_ * kPositions + thread_;
            memory_.destination_places[position] = destination_place(item, position);
          }
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
          if constexpr (sizeof(T) == 4) {
            store_run<kBits, 1>(item, phase, slot, first, staging);
          } else if (arguments_.vector_stores) {
            store_run<kBits, 8>(item, phase, slot, first, staging);
          } else if (arguments_.to.size[2] % 2 == 0) {
            store_run<kBits, 2>(item, phase, slot, first, staging);
          } else {
            store_run<kBits, 1>(item, phase, slot, first, staging);
          }
        }
      }
    }
  }
  // Neighbouring threads write neighbouring voxels: one each; of half types vectors of them, or two where they can be
  // one write. Of odd rows every other one could not, and the halves of its pairs would write to each sector twice.
  template <int kBits, int kWidth>
  __device__ __forceinline__ void store_run(const PipelinedItem& item, const PipelinedPhase& phase, int slot, int first,
                                            const Staged* staging) const {
    constexpr bool kVectors = kWidth * sizeof(T) == 16;
    constexpr int kRun = kPositions << kBits, kThreads = kRun / kWidth, kPitch = kRun + 16 / sizeof(Staged);
    constexpr int kShares = kThreads < 128 ? 128 / kThreads : 1;  // of the channels
    const GatherVolume& to = arguments_.to;
    const int channels = min(kStaged, to.group_channels - item.column_block * kColumns - first);
    const int share = kShares == 1 ? 0 : thread_ / kThreads;
    T* destination = destination_of(item) + static_cast<int64_t>(first + share) * to.channel_stride;
    int residue[3];
    residues_of(phase, slot, residue);
    const int first_width = residue[2], offset = row_offset(residue);
#pragma unroll
    for (int round = 0; round < (kThreads + 127) / 128; ++round) {
      const int element = (thread_ % (kThreads < 128 ? kThreads : 128) + round * 128) * kWidth;
      constexpr int kLooked = kVectors ? 1 : kWidth;  // a vector is all inside or not at all
      int voxel[kLooked];
      bool inside[kLooked];
#pragma unroll
      for (int i = 0; i < kLooked; ++i) {
        const int2 place = memory_.destination_places[warpgroup_ * kPositions + ((element + i) >> kBits)];
        residue[2] = first_width + ((element + i) & ((1 << kBits) - 1));
        inside[i] = is_inside(place, residue);
        voxel[i] = place.x + offset + residue[2];
      }
      const Staged* in = staging + share * kPitch + element;
      T* out = destination + voxel[0];
      if constexpr (kVectors || kWidth == 1) {
        using Word = std::conditional_t<kVectors, uint4, T>;
        if (!inside[0]) continue;
#pragma unroll
        for (int channel = 0; channel < kStaged; channel += kShares) {
          if (channel + share < channels) {
            *reinterpret_cast<Word*>(out) = *reinterpret_cast<const Word*>(in + channel * kPitch);
          }
          out += kShares * static_cast<int64_t>(to.channel_stride);
        }
      } else {
        // Rows, and so channels, are even: of all channels the same pairs are one word.
        const bool pair =
            inside[0] && inside[1] && voxel[1] == voxel[0] + 1 && reinterpret_cast<uintptr_t>(out) % 4 == 0;
        const int64_t apart = voxel[1] - voxel[0];
#pragma unroll
        for (int channel = 0; channel < kStaged; channel += kShares) {
          const uint32_t both = *reinterpret_cast<const uint32_t*>(in + channel * kPitch);
          if (channel + share < channels) {
            if (pair) {
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

  // NDHWC: the weights' columns are in such an order that a thread has neighbouring channels, and four threads all of
  // some 32 bytes or more.
  __device__ __forceinline__ void store_by_voxels(const PipelinedItem& item, const PipelinedPhase& phase) {
    int2 places[kRowBlocks][2];
#pragma unroll
    for (int block = 0; block < kRowBlocks; ++block) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = thread_ / 32 * 16 + half * 8 + lane_ / 4;
        places[block][half] = destination_place(item, (warpgroup_ * kRowBlocks + block) * 64 + row);
      }
    }
    store_columns<0>(item, phase, places);
  }
  template <int kBlock>
  __device__ __forceinline__ void store_columns(const PipelinedItem& item, const PipelinedPhase& phase,
                                                const int2 (&places)[kRowBlocks][2]) {
    if constexpr (kBlock < kColumns / 8) {
      constexpr int kBlocks = blocks_together(kBlock, kColumns / 8, sizeof(T)), kCount = 2 * kBlocks;
      const GatherVolume& to = arguments_.to;
      const int first = kBlock * 8 + lane_ % 4 * kCount,
                left = to.group_channels - item.column_block * kColumns - first;
      T* destination = destination_of(item) + first;
      float biases[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) biases[i] = bias_of(item, first + i);
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        int residue[3];
        residues_of(phase, slot, residue);
        const int offset = row_offset(residue) + residue[2];
#pragma unroll
        for (int i = 0; i < 2 * kRowBlocks; ++i) {
          const int2 place = places[i / 2][i % 2];
          alignas(16) T values[kCount];
#pragma unroll
          for (int k = 0; k < kCount; ++k) {
            values[k] = static_cast<T>(totals(i / 2, slot, (kBlock + k / 2) * 4 + i % 2 * 2 + k % 2) + biases[k]);
          }
          if (!is_inside(place, residue)) continue;
          T* out = destination + static_cast<int64_t>(place.x + offset) * to.voxel_stride;
          if (arguments_.vector_stores && left >= kCount) {
            using Vector = std::conditional_t<sizeof(values) == 16, uint4,
                                              std::conditional_t<sizeof(values) == 8, uint2, uint32_t>>;
            *reinterpret_cast<Vector*>(out) = *reinterpret_cast<const Vector*>(values);
          } else {
#pragma unroll
            for (int k = 0; k < kCount; ++k) {
              if (k < left) out[k] = values[k];
            }
          }
        }
      }
      store_columns<kBlock + kBlocks>(item, phase, places);
    }
  }

  // NDHWC: eight positions of a row of slots at a time, as [position][slot][channel], go through shared memory of the
  // warp's own, and are stored from there while it goes on, with the next ones or the next tile's products. Voxels of
  // all channels that follow each other in the tile's row are one run; else each of them is one.
  template <int kBits>
  __device__ __forceinline__ void store_in_bulk(const PipelinedItem& item, const PipelinedPhase& phase) {
    constexpr int kRow = 1 << kBits, kBytes = bulk_bytes(kRow, kColumns, sizeof(T)), kBuffers = bulk_buffers(kBytes);
    if constexpr (kRow <= kSlots) {
      const GatherVolume& to = arguments_.to;
      const int channels = min(kColumns, to.group_channels - item.column_block * kColumns);
      const int voxel_bytes = channels * static_cast<int>(sizeof(T));
      add_bias(item, [](int column) { return channel_of_column(column, kColumns, sizeof(T)); });
      static_assert(2 * kRowBlocks * (kSlots / kRow) % kBuffers == 0);
      unsigned char* const buffers =
          reinterpret_cast<unsigned char*>(memory_.staging) + (threadIdx.x / 32) * (kBuffers * kBytes);
#pragma unroll
      for (int half = 0; half < 2 * kRowBlocks; ++half) {
        const int first = (warpgroup_ * kRowBlocks + half / 2) * 64 + thread_ / 32 * 16 + half % 2 * 8;
        const int2 place = destination_place(item, first + (lane_ >> kBits) % 8);
        const int run = voxels_of_run<kRow>(item, first);
#pragma unroll
        for (int slot = 0; slot < kSlots; slot += kRow) {
          unsigned char* const buffer = buffers + (half * (kSlots / kRow) + slot / kRow) % kBuffers * kBytes;
          ptx::wait_for_bulk_stores<kBuffers - 1>();
          __syncwarp();
#pragma unroll
          for (int i = 0; i < kRow; ++i) {
            stage_columns<0>(buffer + ((lane_ / 4 << kBits) + i) * voxel_bytes, half, slot + i, channels);
          }
          ptx::fence_shared_for_wgmma();
          __syncwarp();
          int residue[3];
          residues_of(phase, slot, residue);
          residue[2] += lane_ % kRow;
          if (run > 0 && is_inside(place, residue)) {
            const int offset = row_offset(residue) + residue[2];
            ptx::store_bulk(destination_of(item) + static_cast<int64_t>(place.x + offset) * to.voxel_stride,
                            ptx::shared_address(buffer) + lane_ * voxel_bytes, run * voxel_bytes);
          }
          ptx::commit_bulk_stores();
        }
      }
    }
  }
  // Of the run that begins with this lane's voxel, of a row of slots of eight positions; 0 where none begins.
  template <int kRow>
  __device__ __forceinline__ int voxels_of_run(const PipelinedItem& item, int first) const {
    if (lane_ >= 8 * kRow) return 0;
    if (!gather_.whole_rows) return 1;
    int along[3];
    unfold<kInPlace>(gather_, first + lane_ / kRow, along);
    if (lane_ != 0 && (lane_ % kRow != 0 || along[2] != 0)) return 0;
    const int positions = min(8 - lane_ / kRow, gather_.tile[2] - along[2]);
    return min(positions * kRow, arguments_.to.size[2] - (item.first[2] + along[2]) * kRow);
  }
  // The channels of this thread's position.
  template <int kBlock>
  __device__ __forceinline__ void stage_columns(unsigned char* voxel, int half, int slot, int channels) {
    if constexpr (kBlock < kColumns / 8) {
      constexpr int kBlocks = blocks_together(kBlock, kColumns / 8, sizeof(T)), kCount = 2 * kBlocks;
      const int first = kBlock * 8 + lane_ % 4 * kCount;
      alignas(16) T values[kCount];
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        const float sum = totals(half / 2, slot, (kBlock + k / 2) * 4 + half % 2 * 2 + k % 2);
        values[k] = static_cast<T>(sum);
      }
      using Vector =
          std::conditional_t<sizeof(values) == 16, uint4, std::conditional_t<sizeof(values) == 8, uint2, uint32_t>>;
      if (first < channels) {
        *reinterpret_cast<Vector*>(voxel + first * sizeof(T)) = *reinterpret_cast<const Vector*>(values);
      }
      stage_columns<kBlock + kBlocks>(voxel, half, slot, channels);
    }
  }

  const PipelinedMemory& memory_;
  const int thread_, lane_, warpgroup_;
  uint32_t rows_[kRowBlocks];
  uint32_t staged_parity_ = 0;
  uint32_t weights_to_free_ = 0, source_to_free_ = 0;  // in place: barriers of stages that products are still read from
  Sums sums_;
  float totals_[kExact ? kRowBlocks : 1][kExact ? kSlots : 1][kExact ? kColumns / 2 : 1];
};

// The warps that store what multiplying ones have handed over, in NCDHW, half types; `thread` of theirs.
template <class T, int kSlots, int kColumns>
class Storer : Destination<T, kColumns, false> {
  using Base = Destination<T, kColumns, false>;
  using Base::arguments_, Base::gather_;
  using Base::destination_of, Base::destination_place, Base::is_inside, Base::residues_of, Base::row_offset;

 public:
  __device__ __forceinline__ Storer(const PipelinedArguments<T>& arguments, const PipelinedMemory& memory, int thread)
      : Base(arguments), memory_(memory), thread_(thread) {}

  __device__ __forceinline__ void run() {
    uint32_t parity = 0;
    for (int64_t index = blockIdx.x; index < gather_.items; index += gridDim.x, parity ^= 1) {
      const PipelinedItem item(gather_, static_cast<int>(index));
      const PipelinedPhase& phase = gather_.tables.phases[item.phase_block];
      synchronize();
#pragma unroll 1
      for (int position = thread_; position < gather_.positions(); position += 32 * gather_.storing_warps) {
        memory_.destination_places[position] = destination_place(item, position);
      }
      synchronize();
      ptx::wait(memory_.staged_full(), parity);
      if (gather_.slot_bits[2] != 0) {
        if constexpr (kSlots > 1) store_tile<1>(item, phase);
      } else {
        store_tile<0>(item, phase);
      }
      ptx::arrive(memory_.staged_free());
    }
  }

 private:
  __device__ __forceinline__ void synchronize() const {
    ptx::barrier_sync(kStoringBarrier, 32 * gather_.storing_warps);
  }
  template <int kBits>
  __device__ __forceinline__ void store_tile(const PipelinedItem& item, const PipelinedPhase& phase) const {
    constexpr int kVector = 16 / sizeof(T);
    const int share = (gather_.positions() << kBits) / 32;  // of a row of slots, that a lane has
    if (arguments_.vector_stores && share >= kVector) {
      store_rounds<kBits, uint4>(item, phase);
    } else if (arguments_.vector_stores && share >= kVector / 2) {
      store_rounds<kBits, uint2>(item, phase);
    } else if (arguments_.to.size[2] % 2 == 0) {
      store_rounds<kBits, ushort2>(item, phase);
    } else {
      store_rounds<kBits, T>(item, phase);
    }
  }
  // A round is what a warp has lanes for of a row of slots' voxels, a word of these a lane, of all channels.
  template <int kBits, class Word>
  __device__ __forceinline__ void store_rounds(const PipelinedItem& item, const PipelinedPhase& phase) const {
    constexpr int kWidth = sizeof(Word) / sizeof(T), kLooked = kIsPair<Word> ? 2 : 1;
    const GatherVolume& to = arguments_.to;
    const int run = gather_.positions() << kBits, pitch = handed_pitch(run), rounds = run / (32 * kWidth);
    T* const destination = destination_of(item);
#pragma unroll 1
    for (int number = thread_ / 32; number < rounds * (kSlots >> kBits); number += gather_.storing_warps) {
      const int row = number / rounds, element = ((number - row * rounds) * 32 + thread_ % 32) * kWidth;
      int residue[3];
      residues_of(phase, row << kBits, residue);
      const int first_width = residue[2], offset = row_offset(residue);
      int voxel[kLooked];
      bool inside[kLooked];
#pragma unroll
      for (int i = 0; i < kLooked; ++i) {
        const int2 place = memory_.destination_places[(element + i) >> kBits];
        residue[2] = first_width + ((element + i) & ((1 << kBits) - 1));
        inside[i] = is_inside(place, residue);
        voxel[i] = place.x + offset + residue[2];
      }
      const T* in = reinterpret_cast<const T*>(memory_.staging) + row * kColumns * pitch + element;
      T* const out = destination + voxel[0];
      const int channels = min(kColumns, to.group_channels - item.column_block * kColumns);
      if constexpr (kIsPair<Word>) {
        // Rows, and so channels, are even: of all channels the same pairs are one word.
        const bool is_word =
            inside[0] && inside[1] && voxel[1] == voxel[0] + 1 && reinterpret_cast<uintptr_t>(out) % 4 == 0;
        const bool apart[2] = {inside[0] && !is_word, inside[1] && !is_word};
        if (__any_sync(0xffffffffu, apart[0] || apart[1])) {
          const int second = voxel[1] - voxel[0];
          store_channels<Word>(in, pitch, out, channels, [&](T* place, Word word) {
            if (is_word) *reinterpret_cast<Word*>(place) = word;
            if (apart[0]) *reinterpret_cast<uint16_t*>(place) = word.x;
            if (apart[1]) *reinterpret_cast<uint16_t*>(place + second) = word.y;
          });
        } else {
          store_channels<Word>(in, pitch, out, channels, [&](T* place, Word word) {
            if (is_word) *reinterpret_cast<Word*>(place) = word;
          });
        }
      } else {  // all inside or not at all
        store_channels<Word>(in, pitch, out, channels, [&](T* place, Word word) {
          if (inside[0]) *reinterpret_cast<Word*>(place) = word;
        });
      }
    }
  }
  // A word of each channel: eight are read before the first is written, and addresses take one instruction each, since
  // what bounds these warps is that each instruction waits for the one before it.
  template <class Word, class Store>
  __device__ __forceinline__ void store_channels(const T* in, int pitch, T* out, int channels,
                                                 const Store& store) const {
    constexpr int kTogether = 8;
#pragma unroll 1
    for (; channels > 0; channels -= kTogether) {
      const int stride = ptx::opaque(arguments_.to.channel_stride);
      Word words[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) words[i] = *reinterpret_cast<const Word*>(in + i * pitch);
      if (channels >= kTogether) {
#pragma unroll
        for (int i = 0; i < kTogether; ++i) store(out + static_cast<int64_t>(stride) * i, words[i]);
      } else {
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          if (i < channels) store(out + static_cast<int64_t>(stride) * i, words[i]);
        }
      }
      in += kTogether * pitch;
      out += static_cast<int64_t>(stride) * kTogether;
    }
  }
  template <class Word>
  static constexpr bool kIsPair = std::is_same_v<Word, ushort2>;  // which may be half inside

  const PipelinedMemory& memory_;
  const int thread_;
};

// Warpgroups that load for two that multiply.
template <int kSlots, int kColumns, int kRowBlocks, bool kExact, bool kInPlace>
constexpr int kLoadingWarpgroups = loading_warpgroups({kSlots, kColumns, kRowBlocks, kExact, kInPlace});

template <class T, int kSlots, int kColumns, int kRowBlocks, bool kExact, bool kInPlace>
__global__ void __launch_bounds__(128 * (2 + kLoadingWarpgroups<kSlots, kColumns, kRowBlocks, kExact, kInPlace>), 1)
    gather_pipelined_kernel(const __grid_constant__ PipelinedArguments<T> arguments) {
#if CONVT3D_HAS_WGMMA
  extern __shared__ __align__(128) unsigned char shared[];
  const PipelinedGather& gather = arguments.gather;
  const PipelinedMemory memory(shared, gather);
  const int multiplying = 128 * gather.warpgroups, thread = static_cast<int>(threadIdx.x) - multiplying;
  const int source_threads = gather.source_threads();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < gather.source_stages; ++stage) {
      ptx::make_barrier(memory.source_full(stage), source_threads);
      ptx::make_barrier(memory.source_free(stage), multiplying);
    }
    for (int stage = 0; stage < gather.weight_stages; ++stage) {
      ptx::make_barrier(memory.weights_full(stage), 1);
      ptx::make_barrier(memory.weights_free(stage), multiplying);
    }
    if (gather.storing_warps > 0) {
      ptx::make_barrier(memory.staged_full(), multiplying);
      ptx::make_barrier(memory.staged_free(), 32 * gather.storing_warps);
    }
    ptx::fence_shared_for_wgmma();
  }
  __syncthreads();
  constexpr int kLoading = kLoadingWarpgroups<kSlots, kColumns, kRowBlocks, kExact, kInPlace>;
  if (thread < 0) {
    ptx::claim_registers<multiplying_registers(kLoading)>();
    Multiplier<T, kSlots, kColumns, kRowBlocks, kExact, kInPlace>(arguments, memory).run();
  } else {
    ptx::give_up_registers<loading_registers(kLoading)>();
    if (thread < source_threads) {
      constexpr bool kRounds = sizeof(T) == 4 && !kExact, kWatches = watches_source(kSlots, kColumns);
      SourceLoader<T, kRounds, kWatches, (kColumns < 128 || kInPlace)>(arguments, memory, thread, source_threads).run();
    } else if (thread == source_threads) {
      load_weights(arguments, memory);
    } else if (thread >= source_threads + 32) {
      if constexpr (hands_over({kSlots, kColumns, kRowBlocks, kExact, kInPlace}, sizeof(T))) {
        Storer<T, kSlots, kColumns>(arguments, memory, thread - source_threads - 32).run();
      }
    }
  }
#endif
}

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

// The weights in the order in which the kernel above takes them:
// [group][block of columns][block of channels][unit][high, low][16 bytes of channels][slot, column][16 bytes].
// One thread makes a unit's 32 bytes of channels of one column. Neighbouring threads write neighbouring columns: in
// NDHWC all of a band's, in NCDHW four and then the next unit's, mostly of a neighbouring tap, so that reads, too,
// share sectors. Bound by L2.
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
        piece[i] = values[half * kChannels + i];
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

// Launches the kernel of kPipelinedGathers[Entry], if that is the one that the arguments ask for.
template <size_t Entry, class T>
bool launch_pipelined_entry(const PipelinedArguments<T>& arguments, cudaStream_t stream) {
  constexpr GatherConfiguration kEntry = kPipelinedGathers[Entry];
  const PipelinedGather& gather = arguments.gather;
  if (gather.slots != kEntry.slots || gather.columns != kEntry.columns || gather.row_blocks != kEntry.row_blocks ||
      gather.exact != kEntry.exact || gather.in_place != kEntry.in_place)
    return false;
  if constexpr (sizeof(T) == 2 && kEntry.exact) {
    return false;
  } else {
    launch(Begins::early, "launching gather_pipelined",
           gather_pipelined_kernel<T, kEntry.slots, kEntry.columns, kEntry.row_blocks, kEntry.exact, kEntry.in_place>,
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
  const Problem merged = with_merged_groups(problem, gather.merged_groups);
  PipelinedArguments<T> arguments{source,
                                  static_cast<const unsigned char*>(packed),
                                  bias,
                                  destination,
                                  GatherVolume(merged, is_forward),
                                  GatherVolume(merged, !is_forward),
                                  problem.batch,
                                  channels_first,
                                  SourceLoads::elements,
                                  {},
                                  {},
                                  RowSteps(gather, GatherVolume(problem, is_forward)),
                                  0,
                                  0,
                                  nullptr,
                                  false,
                                  false,
                                  gather};
  arguments.loads = source_loads(merged, op, gather, reinterpret_cast<uintptr_t>(source));
  arguments.by_cells = Divisor<int32_t>(gather.cells(arguments.loads));
  arguments.by_line_cells = Divisor<int32_t>(gather.line_cells(arguments.loads));
  for (int chunks = 2 * gather.channel_groups; chunks > 1; chunks /= 2) ++arguments.chunk_bits;
  arguments.thread_units = gather.thread_units(arguments.loads);
  if (arguments.loads == SourceLoads::rows) arguments.thread_units *= arguments.rows.warps;
  // A row's vectors: rows begin with one, in the volume as in the tile, and every residue along the width is there.
  constexpr int kVector = 16 / sizeof(T);
  const int extent = gather.slot_extent[2];
  const bool has_row_vectors = channels_first && sizeof(T) == 2 && extent == gather.destination_stride[2] &&
                               gather.tile[2] * extent % kVector == 0 && arguments.to.size[2] % kVector == 0;
  const bool has_channel_vectors = !channels_first && arguments.to.group_channels % kVector == 0;
  arguments.vector_stores =
      (has_row_vectors || has_channel_vectors) && reinterpret_cast<uintptr_t>(destination) % 16 == 0;
  arguments.bulk_stores = arguments.vector_stores && gather.stores_in_bulk;
  if (gather.has_gaps) {
    arguments.not_finite = reinterpret_cast<int*>(static_cast<unsigned char*>(packed) + gather.weight_bytes());
  }
  fill_bare_rows<T>(problem, gather, bias, destination, stream);
  pack_units<T>(problem, is_forward, arguments, weight, static_cast<unsigned char*>(packed), stream);
  const bool launched =
      launch_one_of_pipelined(arguments, stream, std::make_index_sequence<std::size(kPipelinedGathers)>());
  if (!launched) throw std::logic_error("no pipelined kernel has this configuration");
  // Where 0 * inf may have spoilt something, all of it again, by the kernel that multiplies nothing but taps.
  if (arguments.not_finite != nullptr) {
    gather_simt<T>(problem, op, source, weight, bias, destination, stream, arguments.not_finite);
  }
}

}  // namespace convt3d::direct
