// The warps of the pipelined gather that load the source (see direct/cuda/pipelined_gather.h).
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/ptx.h"
#include "direct/cuda/pipelined_block.h"

namespace convt3d::direct {

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

// The warps that have a stage's source copied, where its voxels are one run of each channel, or copy it themselves
// where this does not begin with 16 bytes. A lane has a channel; a warp's copies begin one after the other, so that all
// warps share them.
template <class T>
__device__ __forceinline__ void copy_source(const PipelinedArguments<T>& arguments, const PipelinedMemory& memory,
                                            int thread, int threads) {
  const PipelinedGather& gather = arguments.gather;
  const GatherVolume& from = arguments.from;
  const int channels = gather.stage_channels(), warps = threads / 32;
  const int first_channel = thread % 32 * warps + thread / 32;
  const int own_channels = (channels - first_channel + threads - 1) / threads;
  const bool is_aligned = reinterpret_cast<uintptr_t>(arguments.source) % 16 == 0;
  Ring ring;
  for (int64_t index = blockIdx.x; index < gather.items; index += gridDim.x) {
    const PipelinedItem item(gather, static_cast<int>(index));
    if (gather.tables.phases[item.phase_block].passes == 0) continue;
    const int planes = min(gather.tile[0], from.size[0] - item.first[0]);
    const int rows = min(gather.tile[1], from.size[1] - item.first[1]);
    const int voxels = ((planes - 1) * from.size[1] + rows) * from.size[2];
    const T* source = arguments.source + item.sample * from.sample_stride +
                      static_cast<int64_t>(item.group) * from.group_channels * from.channel_stride +
                      (item.first[0] * from.size[1] + item.first[1]) * from.size[2];
    for (int block = 0; block < gather.channel_blocks; ++block, source += channels * from.channel_stride) {
      ptx::wait(memory.source_free(ring.stage), ring.parity ^ 1);
      const uint32_t full = memory.source_full(ring.stage), bytes = voxels * sizeof(T);
      unsigned char* stage = memory.source + ring.stage * gather.source_stage_bytes;
      if (is_aligned) ptx::arrive_announcing(full, bytes * own_channels);
      for (int channel = first_channel; channel < channels; channel += threads) {
        const T* run = source + channel * from.channel_stride;
        T* place = reinterpret_cast<T*>(stage + channel * gather.channel_pitch);
        if (is_aligned) {
          ptx::copy_bulk(ptx::shared_address(place), run, bytes, full);
        } else {
          for (int i = 0; i < voxels; ++i) place[i] = run[i];
        }
      }
      if (!is_aligned) ptx::arrive(full);
      ring.advance(gather.source_stages);
    }
  }
}

// What a tensor map would copy, element by element.
__device__ __forceinline__ void copy_box_by_elements(float* stage, const PipelinedArguments<float>& arguments,
                                                     const int (&at)[5], int thread, int threads) {
  const PipelinedGather& gather = arguments.gather;
  const GatherVolume& from = arguments.from;
  const int extents[5] = {gather.row_pitch, gather.rows, gather.planes, gather.stage_channels(), gather.samples};
  const int64_t sizes[5] = {from.size[2], from.size[1], from.size[0], from.channels, arguments.batch};
  const int64_t row = from.size[2];
  const int64_t strides[5] = {1, row, row * from.size[1], from.channel_stride, from.sample_stride};
  for (int element = thread; element < gather.box_bytes() / 4; element += threads) {
    int left = element;
    int64_t place = 0;
    bool inside = true;
#pragma unroll
    for (int axis = 0; axis < 5; ++axis) {
      const int index = at[axis] + left % extents[axis];
      left /= extents[axis];
      inside = inside && index >= 0 && index < sizes[axis];
      place += index * strides[axis];
    }
    stage[element] = inside ? arguments.source[place] : 0.0f;
  }
}

// Whether what these threads look at of a stage is finite: products with zero are not otherwise.
__device__ __forceinline__ bool is_finite(const unsigned char* stage, int bytes, int thread, int threads) {
  float zero = 0.0f;
  for (int place = thread * 16; place < bytes; place += threads * 16) {
    const float4 four = *reinterpret_cast<const float4*>(stage + place);
    zero = fmaf(four.x, 0.0f, fmaf(four.y, 0.0f, fmaf(four.z, 0.0f, fmaf(four.w, 0.0f, zero))));
  }
  return zero == 0.0f;
}

// The warps that have a stage's source copied as a box of the volume, whose rows begin with whole vectors. `kWatches`:
// all but the first look at what has arrived, where weights have gaps.
template <bool kWatches>
__device__ __forceinline__ void copy_boxes(const PipelinedArguments<float>& arguments, const PipelinedMemory& memory,
                                           const CUtensorMap& map, int thread, int threads) {
  const PipelinedGather& gather = arguments.gather;
  const int bytes = gather.box_bytes();
  const bool watches = kWatches && arguments.not_finite != nullptr && thread >= 32;
  bool finite = true;
  Ring ring;
  for (int64_t index = blockIdx.x; index < gather.items; index += gridDim.x) {
    const PipelinedItem item(gather, static_cast<int>(index));
    const PipelinedPhase& phase = gather.tables.phases[item.phase_block];
    for (int number = 0; number < phase.passes; ++number) {
      const PipelinedPass& pass = gather.tables.passes[phase.first_pass + number];
      int at[5];  // where the box begins, the width first
#pragma unroll
      for (int axis = 0; axis < 3; ++axis) {
        at[2 - axis] = item.first[axis] * gather.source_stride[axis] + pass.origin[axis];
      }
      at[0] &= ~3;
      at[3] = item.group * arguments.from.group_channels;
      at[4] = static_cast<int>(item.sample);
      for (int block = 0; block < gather.channel_blocks; ++block, at[3] += gather.stage_channels()) {
        ptx::wait(memory.source_free(ring.stage), ring.parity ^ 1);
        const uint32_t full = memory.source_full(ring.stage);
        unsigned char* stage = memory.source + ring.stage * gather.source_stage_bytes;
        if (arguments.has_map && thread == 0) {
          ptx::arrive_announcing(full, bytes);
          ptx::copy_box(ptx::shared_address(stage), &map, at, full);
        } else {
          if (!arguments.has_map) {
            copy_box_by_elements(reinterpret_cast<float*>(stage), arguments, at, thread, threads);
          }
          ptx::arrive(full);
        }
        if constexpr (kWatches) {
          if (watches) {
            ptx::wait(full, ring.parity);
            finite &= is_finite(stage, bytes, thread - 32, threads - 32);
          }
          ptx::arrive(memory.source_free(ring.stage));
        }
        ring.advance(gather.source_stages);
      }
    }
  }
  if (!finite) {
    ptx::wait_for_previous_kernel();  // which makes it 0
    *arguments.not_finite = 1;
  }
}

}  // namespace convt3d::direct
