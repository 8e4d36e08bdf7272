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
// so that a warp writes neighbours, in NDHWC in bulk, behind the products of the next tile. In NCDHW up to four of the
// loading warps may store instead: sums are handed over to them, half types', or such as belong to rows that begin
// anywhere, and leave behind the next products as well. Where a block's tiles all take the same weights, and its stages
// hold these, they stay there. Where the source is copied in bulk, it lies as [channel][position]: half types where all
// taps of a tile read the same voxels, one run of each channel, as with kernel = stride, whose fragments ldmatrix
// transposes; floats as boxes of the volume, by a tensor map, whose fragments are loaded a word at a time, and so may
// be shifted by any position.
//
// Traffic: the source once for every block of columns and residues, with its halo; the weights once for every tile, or
// for every block of threads, from L2; the destination once. Floor: 2 * taps * channels operations a destination at the
// tensor cores' rate, or its bytes. With 64 columns and more, products run at cuBLAS's rate; below, shared memory
// bounds it, which gives 16 cycles to 64 positions and columns / 4 to a product's weights: with fragments once for all
// slots, but such that loads and products wait for each other (of 2 x 64 columns 40 cycles a product instead of 32), in
// place for each product, and beside it. With a pattern a fragment serves two products and more of four or eight slots,
// and nothing waits but for the products two groups before. Where writing should bound it, taking turns does, unless
// sums are handed over: on kb73 in TF32 a multiplying warp is on the way out for half its time, and multiplies nothing
// meanwhile.
//
// Here are the multiplying warps and the kernel; those that load the source, copy weights and store are in files of
// their own, and what all of them share is in pipelined_block.h.
#pragma once

#include <iterator>
#include <optional>
#include <type_traits>
#include <utility>

#include "cuda/launch.h"
#include "cuda/ptx.h"
#include "cuda/tensor_map.h"
#include "direct/cuda/gather_source.h"
#include "direct/cuda/kernels.h"
#include "direct/cuda/pipelined_block.h"
#include "direct/cuda/pipelined_source.h"
#include "direct/cuda/pipelined_storer.h"
#include "direct/cuda/pipelined_weights.h"

namespace convt3d::direct {

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

// A multiplying warpgroup.
template <class T, size_t kEntry>
class Multiplier : Destination<T, kEntry> {
  using Base = Destination<T, kEntry>;
  using Base::arguments_, Base::gather_;
  using Base::beyond_vector, Base::destination_of, Base::destination_place, Base::is_inside, Base::residues_of,
      Base::row_offset;
  using Base::kColumns, Base::kConfiguration, Base::kInPlace, Base::kMostRowSlots, Base::kRowBlocks, Base::kSlots;

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
      } else if constexpr (kBoxed) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          rows_[2 * block + half] = ptx::shared_address(memory_.source) + first_of_box(block, half);
        }
      } else if constexpr (kCopied) {
        rows_[block] = ptx::shared_address(memory_.source) + first_of_copied(block);
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
      if constexpr (kFlows) {
        if (phase.passes > 0) {
          Course course{item, phase, source, weights};
          if constexpr (kConfiguration.pattern != Pattern::listed) {
            multiply_pattern(course);
          } else {
            multiply_tile(course);
          }
        }
      } else {
        for (int number = 0; number < phase.passes; ++number) {
          const PipelinedPass& pass = gather_.tables.passes[phase.first_pass + number];
          for (int block = 0; block < gather_.channel_blocks; ++block) {
            ptx::wait(memory_.source_full(source.stage), source.parity);
            if constexpr (kInPlace) ptx::fence_shared_for_wgmma();
            const uint32_t source_offset = first_of_stage(item, pass, source);
            for (int piece = 0; piece < pass.pieces; ++piece) {
              ptx::wait(memory_.weights_full(weights.stage), weights.parity);
              const WeightPiece& steps = gather_.tables.pieces[pass.first_piece + piece];
              const uint32_t stage =
                  memory_.weights + weights.stage * static_cast<uint32_t>(gather_.weight_stage_bytes);
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
      }
      if constexpr (kInPlace) {
        ptx::wait_for_products<0>();
        free_stages();
      }
      if constexpr (kConfiguration.pattern == Pattern::points) {
        store_from_registers(item, phase);
      } else if (gather_.storing_warps > 0) {
        hand_over(item, phase);
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
  static constexpr bool kExact = kConfiguration.exact;
  static constexpr bool kCopied = kConfiguration.form == SourceForm::copied;
  static constexpr bool kBoxed = kConfiguration.form == SourceForm::boxed;
  static constexpr int kParts = kExact ? 2 : 1;
  static constexpr int kBand = band_slots(kConfiguration), kBands = kSlots / kBand;
  static constexpr int kProductColumns = kBand * kColumns;
  static constexpr int kUnit = 2 * kProductColumns;              // 16-byte rows of a unit's part
  static constexpr int kDepth = units_together(kConfiguration);  // of a step, at most
  static constexpr int kStaged = staged_columns(kColumns, kRowBlocks);
  static constexpr int kStagingFloats = staging_floats(kColumns, kRowBlocks);
  static constexpr int kPositions = 64 * kRowBlocks;
  static constexpr int kHanded = handed_columns(kConfiguration, sizeof(T));
  static constexpr bool kFlows = flows_through_pieces(kConfiguration);
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

  // Of a source as [channel][position], what this lane names of a block's first fragment: a channel's row of eight
  // positions, which are transposed on their way.
  __device__ __forceinline__ int first_of_copied(int block) const {
    int position = (warpgroup_ * kRowBlocks + block) * 64 + thread_ / 32 * 16;
    if (position >= gather_.tile_positions()) position = 0;  // sixteen are the tile's, or none of them
    return (lane_ / 16 * 8 + lane_ % 8) * gather_.channel_pitch + 2 * (position + lane_ / 8 % 2 * 8);
  }
  // Of a source as [sample][channel][plane][row][column], what this lane names of the upper or the lower eight rows.
  __device__ __forceinline__ int first_of_box(int block, int half) const {
    int position = (warpgroup_ * kRowBlocks + block) * 64 + thread_ / 32 * 16 + half * 8 + lane_ / 4;
    if (position >= gather_.tile_positions()) position = 0;
    int along[3];
    const int member = unfold<kInPlace>(gather_, position, along);
    const int plane = along[0] * gather_.source_stride[0], row = along[1] * gather_.source_stride[1];
    return (member * gather_.stage_channels() + lane_ % 4 * gather_.channel_step) * gather_.channel_pitch +
           4 * ((plane * gather_.rows + row) * gather_.row_pitch + along[2]);
  }

  // From the first stage's source to this one's, in bytes; a box begins with the vector that the pass's origin is in.
  __device__ __forceinline__ uint32_t first_of_stage(const PipelinedItem& item, const PipelinedPass& pass,
                                                     const Ring& ring) const {
    const uint32_t stage = ring.stage * static_cast<uint32_t>(gather_.source_stage_bytes);
    return kBoxed ? stage + 4 * ((item.first[2] + pass.origin[2]) & 3) : stage;
  }

  // The positions of a block that are `shift` further on than its own, or 32 bytes of their channels.
  __device__ __forceinline__ void load_fragment(uint32_t (&fragment)[4], int block, uint32_t shift) const {
    if constexpr (kBoxed) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t value = ptx::load_shared(rows_[2 * block + i % 2] + shift + i / 2 * gather_.half_stride);
        // Rounded here and not where it is multiplied: there the register may be one that products still read.
        fragment[i] = ptx::opaque(ptx::nearly_rounded_for_tf32(value));
      }
    } else if constexpr (kCopied) {
      ptx::load_matrices_transposed(fragment, rows_[block] + shift);
    } else {
      ptx::load_matrices(fragment, rows_[block] + shift);
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
          load_fragment(fragment, block, source + step.shift[k]);
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
  static constexpr size_t kCodes = kDepth * BandSets<kBands>::kCount;
  template <size_t kCode>
  __device__ __forceinline__ void multiply_coded(const Fragments& fragments, uint32_t unit, bool keeps) {
    if constexpr (kCode < kCodes) {
      multiply_set<BandSets<kBands>::template kSet<kCode / kDepth>, kCode % kDepth + 1>(fragments, unit, keeps);
    } else {
      __builtin_unreachable();
    }
  }
  template <size_t kFirst, size_t kCount>
  __device__ __forceinline__ void multiply_one_of(const Fragments& fragments, uint32_t code, uint32_t unit,
                                                  bool keeps) {
    if constexpr (kCount == 1) {
      multiply_coded<kFirst>(fragments, unit, keeps);
    } else if (code < kFirst + kCount / 2) {
      multiply_one_of<kFirst, kCount / 2>(fragments, code, unit, keeps);
    } else {
      multiply_one_of<kFirst + kCount / 2, kCount - kCount / 2>(fragments, code, unit, keeps);
    }
  }
  // By comparisons where these are few, which is faster, else by a jump table (see CMakeLists.txt): ten
  // comparisons were two fifths of what the time of warps that multiply eight slots went into.
#define CONVT3D_CASE(code) \
  case (code):             \
    return multiply_coded<(code)>(fragments, unit, keeps);
#define CONVT3D_CASES_8(first) \
  CONVT3D_CASE(first)          \
  CONVT3D_CASE((first) + 1)    \
  CONVT3D_CASE((first) + 2)    \
  CONVT3D_CASE((first) + 3)    \
  CONVT3D_CASE((first) + 4) CONVT3D_CASE((first) + 5) CONVT3D_CASE((first) + 6) CONVT3D_CASE((first) + 7)
  __device__ __forceinline__ void multiply(const Fragments& fragments, uint32_t code, uint32_t unit, bool keeps) {
    if constexpr (kCodes <= 16) return multiply_one_of<0, kCodes>(fragments, code, unit, keeps);
    static_assert(kCodes <= 72);
    switch (code) {
      CONVT3D_CASES_8(0)
      CONVT3D_CASES_8(8)
      CONVT3D_CASES_8(16)
      CONVT3D_CASES_8(24)
      CONVT3D_CASES_8(32)
      CONVT3D_CASES_8(40)
      CONVT3D_CASES_8(48)
      CONVT3D_CASES_8(56)
      CONVT3D_CASES_8(64)
      default:
        __builtin_unreachable();
    }
  }
#undef CONVT3D_CASES_8
#undef CONVT3D_CASE

  // In place a step is no more than its products' places: nothing waits for these but the stages that they read, which
  // are given back once the first products of the next piece have begun.
  __device__ __forceinline__ void multiply_piece_in_place(const WeightPiece& piece, uint32_t source, uint32_t weights) {
#if CONVT3D_HAS_WGMMA
    const uint32_t base = ptx::wgmma_columns(weights, kProductColumns * 16);
    const PipelinedStep* steps = gather_.tables.steps + piece.first_step;
    Fragments fragments;
    load(fragments, *steps, source);
    uint32_t code = steps->code, unit = base + steps->weights;  // a copy of the step would be loaded byte by byte
    for (int left = piece.steps; left > 0; --left) {
      multiply(fragments, code, unit, true);
      ++steps;
      load(fragments, *steps, source);
      code = steps->code;
      unit = base + steps->weights;
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
        multiply(fragments[i], next[i].code, base + next[i].weights, !next[i].starts);
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

  // Where products are that go on from piece to piece, and from stage to stage: at the end of one its last products are
  // under way, too.
  struct Course {
    const PipelinedItem& item;
    const PipelinedPhase& phase;
    Ring &source, &weights;
    int pass = 0, block = 0, piece = 0;
    const PipelinedStep* steps = nullptr;  // from this one on
    int left = 0;                          // of them in the piece
    uint32_t stage = 0, base = 0;          // where its source and its weights are
  };
  __device__ __forceinline__ const PipelinedPass& pass_of(const Course& at) const {
    return gather_.tables.passes[at.phase.first_pass + at.pass];
  }
  __device__ __forceinline__ void begin_piece(Course& at) const {
    if (at.piece == 0) ptx::wait(memory_.source_full(at.source.stage), at.source.parity);
    ptx::wait(memory_.weights_full(at.weights.stage), at.weights.parity);
    const WeightPiece& piece = gather_.tables.pieces[pass_of(at).first_piece + at.piece];
    at.steps = gather_.tables.steps + piece.first_step;
    at.left = piece.steps;
    at.stage = first_of_stage(at.item, pass_of(at), at.source);
    at.base = ptx::wgmma_columns(memory_.weights + at.weights.stage * static_cast<uint32_t>(gather_.weight_stage_bytes),
                                 kProductColumns * 16);
  }
  // Whether there is another one.
  __device__ __forceinline__ bool end_piece(Course& at) {
    if (!gather_.keeps_weights) weights_to_free_ = memory_.weights_free(at.weights.stage);
    at.weights.advance(gather_.weight_stages);
    if (++at.piece < pass_of(at).pieces) return true;
    at.piece = 0;
    source_to_free_ = memory_.source_free(at.source.stage);
    at.source.advance(gather_.source_stages);
    if (++at.block < gather_.channel_blocks) return true;
    at.block = 0;
    return ++at.pass < at.phase.passes;
  }
  __device__ __forceinline__ void multiply_tile(Course at) {
#if CONVT3D_HAS_WGMMA
    begin_piece(at);
    Fragments fragments[2];
    PipelinedStep next[2] = {at.steps[0], at.steps[1]};
    load(fragments[0], next[0], at.stage);
    for (;;) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        multiply(fragments[i], next[i].code, at.base + next[i].weights, true);
        ptx::wait_for_products<1>();
        free_stages();
        if (--at.left > 0) {
          ++at.steps;
        } else {
          if (!end_piece(at)) {
            ptx::wait_for_products<0>();
            return free_stages();
          }
          begin_piece(at);
          next[1 - i] = at.steps[0];
        }
        next[i] = at.steps[1];
        load(fragments[1 - i], next[1 - i], at.stage);
      }
    }
#endif
  }

  // Where steps have a pattern, its parts are loaded once each, and multiplied for all slots that have a tap there, in
  // groups of about as many products. When a group begins, the kPending before it may be under way; behind its products
  // the parts are loaded of the group that is kAhead further on, in this step or the next.
  static constexpr int kStepParts = StepPattern(kConfiguration).parts();
  static constexpr int kGroups = kConfiguration.pattern == Pattern::windows  ? kSlots
                                 : kConfiguration.pattern == Pattern::points ? kStepParts
                                                                             : 6;
  static constexpr int kPending = 2, kAhead = 2;
  static_assert(kPending + kAhead <= kGroups);
  static constexpr int products_before(int part) {
    int products = 0;
    for (int i = 0; i < part * kSlots; ++i) {
      products += StepPattern(kConfiguration).has(i / kSlots, i % kSlots) ? 1 : 0;
    }
    return products;
  }
  static constexpr int first_part_of(int group) {
    int part = 0;
    while (part < kStepParts && products_before(part) * kGroups < group * products_before(kStepParts)) ++part;
    return part;
  }
  template <int kGroup>
  static constexpr int kFirstPart = first_part_of(kGroup);
  using Parts = uint32_t[kStepParts][kRowBlocks][4];
  template <int kGroup>
  __device__ __forceinline__ void load_group(Parts& parts, uint32_t source) const {
    constexpr StepPattern kPattern(kConfiguration);
#pragma unroll
    for (int part = kFirstPart<kGroup>; part < kFirstPart<kGroup + 1>; ++part) {
#pragma unroll
      for (int block = 0; block < kRowBlocks; ++block) {
        const int shift = kPattern.shift(part, plane_bytes_, row_bytes_, kVoxelBytes, group_bytes_);
        load_fragment(parts[part][block], block, source + shift);
      }
    }
  }
  template <int kGroup>
  __device__ __forceinline__ void load_first_groups(Parts& parts, uint32_t source) const {
    if constexpr (kGroup < kAhead) {
      load_group<kGroup>(parts, source);
      load_first_groups<kGroup + 1>(parts, source);
    }
  }
  template <int kGroup>
  __device__ __forceinline__ void multiply_group(const Parts& parts, uint32_t weights) {
#if CONVT3D_HAS_WGMMA
    constexpr StepPattern kPattern(kConfiguration);
    ptx::begin_products();
#pragma unroll
    for (int part = kFirstPart<kGroup>; part < kFirstPart<kGroup + 1>; ++part) {
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        if (!kPattern.has(part, slot)) continue;
#pragma unroll
        for (int block = 0; block < kRowBlocks; ++block) {
          ptx::Wgmma<T, kColumns>::run(sums_[block][slot], parts[part][block],
                                       ptx::wgmma_descriptor(weights + kPattern.unit(part, slot) * kUnit));
        }
      }
    }
    ptx::commit_products();
    ptx::wait_for_products<kPending>();
#endif
  }
  // The groups of a step in turn. `advance` is called before the first part of the next step is loaded, and tells where
  // that is.
  template <int kGroup, class Advance>
  __device__ __forceinline__ void multiply_groups(Parts& parts, uint32_t source, uint32_t& next_source,
                                                  uint32_t weights, const Advance& advance) {
    if constexpr (kGroup < kGroups) {
      multiply_group<kGroup>(parts, weights);
      if constexpr (kGroup == kPending - 1) free_stages();  // of the step before
      constexpr int kLoaded = kGroup + kAhead;
      if constexpr (kLoaded < kGroups) {
        load_group<kLoaded>(parts, source);
      } else {
        if constexpr (kLoaded == kGroups) next_source = advance();
        load_group<kLoaded - kGroups>(parts, next_source);
      }
      multiply_groups<kGroup + 1>(parts, source, next_source, weights, advance);
    }
  }
  __device__ __forceinline__ void multiply_pattern(Course at) {
#if CONVT3D_HAS_WGMMA
    begin_piece(at);
    Parts parts;
    bool has_next = true;
    uint32_t source = at.stage + at.steps->shift[0], weights = at.base + at.steps->weights, next_weights = 0;
    load_first_groups<0>(parts, source);
    while (has_next) {
      // Read before it is needed, and of the next piece perhaps in vain.
      const uint32_t next_shift = ptx::opaque(at.steps[1].shift[0]), next_unit = ptx::opaque(at.steps[1].weights);
      const auto advance = [&] {  // beyond the last step its parts are loaded again
        if (--at.left > 0) {
          ++at.steps;
          next_weights = at.base + next_unit;
          return at.stage + next_shift;
        }
        has_next = end_piece(at);
        if (!has_next) return source;
        begin_piece(at);
        next_weights = at.base + at.steps->weights;
        return at.stage + at.steps->shift[0];
      };
      uint32_t next_source = 0;
      multiply_groups<0>(parts, source, next_source, weights, advance);
      source = next_source;
      weights = next_weights;
    }
    ptx::wait_for_products<0>();
    free_stages();
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

  // NCDHW: the tile's sums for the warps that store. Half types' all at once, as [row of slots][channel][voxel]; or
  // some channels at a time, as they lie in the destination.
  __device__ __forceinline__ void hand_over(const PipelinedItem& item, const PipelinedPhase& phase) {
    if constexpr (hands_over_runs(kConfiguration)) {
      add_bias(item, [](int column) { return column; });
      if (gather_.stores_runs) {
        if (gather_.slot_bits[2] == 0) {
          stage_runs<0, false>(item, phase);
        } else if (!arguments_.pair_stores) {
          stage_runs<1, false>(item, phase);
        } else {
          stage_runs<1, true>(item, phase);
        }
        return;
      }
      if constexpr (hands_over_words(kConfiguration, sizeof(T))) {
        wait_for_room();
        if (gather_.slot_bits[2] != 0) {
          stage_pairs();
        } else {
          stage_matrices();
        }
        ptx::arrive(memory_.staged_full());
      }
    }
  }
  __device__ __forceinline__ void wait_for_room() {
    ptx::wait(memory_.staged_free(), staged_parity_);
    staged_parity_ ^= 1;
  }
  // Each run of a channel at a place of its own, as far behind 16 bytes' beginning as in the destination. A row has
  // 1 << kBits slots; `kPairs`: two of these are one word.
  template <int kBits, bool kPairs>
  __device__ __forceinline__ void stage_runs(const PipelinedItem& item, const PipelinedPhase& phase) {
    constexpr int kRow = 1 << kBits, kVector = 16 / sizeof(T);
    if constexpr (kRow <= kMostRowSlots) {
      const GatherVolume& to = arguments_.to;
      const bool whole_planes = gather_.whole_planes;
      const int pitch = gather_.run_pitch, own_column = lane_ % 4 * 2, next_column = to.channel_stride % kVector;
      const int first_beyond = beyond_vector(destination_of(item)) + own_column * next_column;
      T* const staged = reinterpret_cast<T*>(memory_.staging) + own_column * pitch;
      int runs[2 * kRowBlocks], elements[2 * kRowBlocks], starts[2 * kRowBlocks];  // of a position's first slot
      bool inside[2 * kRowBlocks][kRow];
#pragma unroll
      for (int half = 0; half < 2 * kRowBlocks; ++half) {
        const int position = warpgroup_ * kPositions + half / 2 * 64 + thread_ / 32 * 16 + half % 2 * 8 + lane_ / 4;
        int along[3];
        const int member = unfold<kInPlace>(gather_, position, along);
        const int width = along[2] * kRow;
        runs[half] = (member * gather_.tile[0] + along[0]) * gather_.slot_extent[0] * gather_.plane_runs +
                     (whole_planes ? 0 : along[1] * gather_.slot_extent[1]);
        elements[half] = (whole_planes ? along[1] * gather_.destination_stride[1] * to.size[2] : 0) + width;
        starts[half] = destination_place(item, position).x - elements[half];
#pragma unroll
        for (int i = 0; i < kRow; ++i) {
          inside[half][i] = position < gather_.tile_positions() && (!whole_planes || width + i < to.size[2]);
        }
      }
#pragma unroll
      for (int first = 0; first < kColumns; first += kHanded) {
        wait_for_room();
#pragma unroll
        for (int slot = 0; slot < kSlots; slot += kRow) {
          int residue[3];
          residues_of(phase, slot, residue);
          const int lines = whole_planes ? residue[1] * to.size[2] : 0;
          const int offset = row_offset(residue) - lines;
          const int run =
              (residue[0] - phase.residue[0]) * gather_.plane_runs + (whole_planes ? 0 : residue[1] - phase.residue[1]);
#pragma unroll
          for (int half = 0; half < 2 * kRowBlocks; ++half) {
            const int beyond = first_beyond + starts[half] + offset;
            T* const place = staged + (runs[half] + run) * kHanded * pitch + elements[half] + lines;
#pragma unroll
            for (int parity = 0; parity < 2; ++parity) {
              // Eight columns further on it is as many elements more, and so as far behind 16 bytes' beginning.
              T* out = place + parity * pitch + (beyond + parity * next_column) % kVector;
#pragma unroll
              for (int column = first; column < first + kHanded && column < kColumns; column += 8, out += 8 * pitch) {
                const int i = column / 2 + half % 2 * 2 + parity;
                const auto value = static_cast<T>(totals(half / 2, slot, i));
                const auto next = static_cast<T>(totals(half / 2, slot + kRow - 1, i));
                if constexpr (kPairs) {
                  if (inside[half][1]) store_pair(out, value, next);
                } else {
                  if (inside[half][0]) out[0] = value;
                  if (kRow > 1 && inside[half][kRow - 1]) out[kRow - 1] = next;
                }
              }
            }
          }
        }
        ptx::fence_shared_for_wgmma();  // and for bulk stores
        ptx::arrive(memory_.staged_full());
      }
    }
  }
  // Both residues of a row as one word.
  __device__ __forceinline__ void stage_pairs() {
    if constexpr (kMostRowSlots > 1) {
      const int pitch = staging_pitch(2 * gather_.positions(), sizeof(T));
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
      const int pitch = staging_pitch(gather_.positions(), sizeof(T));
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

  // NCDHW, half types where a tile has one residue along the width, and points, which have both: each thread writes
  // what it has. Eight lanes have neighbours of the tile's row, which in the volume are a stride apart, and four lanes
  // a channel each.
  __device__ __forceinline__ void store_from_registers(const PipelinedItem& item, const PipelinedPhase& phase) {
    constexpr int kRow = kConfiguration.pattern == Pattern::points ? 2 : 1;
    const GatherVolume& to = arguments_.to;
    const int left = to.group_channels - item.column_block * kColumns - lane_ % 4 * 2;
    T* const destination = destination_of(item) + static_cast<int64_t>(lane_ % 4 * 2) * to.channel_stride;
    add_bias(item, [](int column) { return column; });
#pragma unroll
    for (int half = 0; half < 2 * kRowBlocks; ++half) {
      const int row = thread_ / 32 * 16 + half % 2 * 8 + lane_ / 4;
      const int2 place = destination_place(item, (warpgroup_ * kRowBlocks + half / 2) * 64 + row);
#pragma unroll
      for (int slot = 0; slot < kSlots; slot += kRow) {
        int residue[3];
        residues_of(phase, slot, residue);
        if (!is_inside(place, residue)) continue;
        T* out = destination + (place.x + row_offset(residue) + residue[2]);
#pragma unroll
        for (int column = 0; column < kColumns; column += 8) {
#pragma unroll
          for (int parity = 0; parity < 2; ++parity) {
            const int i = column / 2 + half % 2 * 2 + parity;
            const auto value = static_cast<T>(totals(half / 2, slot, i));
            if (column + parity >= left) continue;
            T* const own = out + parity * static_cast<int64_t>(to.channel_stride);
            if constexpr (kRow == 1) {
              *own = value;
            } else {
              const auto next = static_cast<T>(totals(half / 2, slot + kRow - 1, i));
              if (arguments_.pair_stores) {
                store_pair(own, value, next);
              } else {
                own[0] = value;
                own[kRow - 1] = next;
              }
            }
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
    constexpr int kPitch = staging_pitch(kRun, sizeof(Staged));
    if constexpr (kRow <= kMostRowSlots) {
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
    constexpr int kRun = kPositions << kBits, kThreads = kRun / kWidth, kPitch = staging_pitch(kRun, sizeof(Staged));
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
    if constexpr (kRow <= kMostRowSlots) {
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
  uint32_t rows_[kBoxed ? 2 * kRowBlocks : kRowBlocks];
  // A stage's source, for patterns: from one voxel, row and plane to the next.
  static constexpr int kVoxelBytes = kBoxed ? 4 : 16;
  const int row_bytes_ = kVoxelBytes * gather_.row_pitch, plane_bytes_ = row_bytes_ * gather_.rows;
  const int group_bytes_ = gather_.group_bytes();
  uint32_t staged_parity_ = 0;
  // Barriers of stages that products may still be read from, in place and from piece to piece.
  uint32_t weights_to_free_ = 0, source_to_free_ = 0;
  Sums sums_;
  float totals_[kExact ? kRowBlocks : 1][kExact ? kSlots : 1][kExact ? kColumns / 2 : 1];
};

template <class T, size_t kEntry>
__global__ void __launch_bounds__(128 * (2 + loading_warpgroups(kPipelinedGathers[kEntry])), 1)
    gather_pipelined_kernel(const __grid_constant__ PipelinedArguments<T> arguments,
                            const __grid_constant__ CUtensorMap map) {
#if CONVT3D_HAS_WGMMA
  constexpr GatherConfiguration kConfiguration = kPipelinedGathers[kEntry];
  constexpr bool kBoxed = kConfiguration.form == SourceForm::boxed;
  constexpr bool kWatches = watches_source(kConfiguration);
  CONVT3D_DYNAMIC_SHARED(128, shared);
  const PipelinedGather& gather = arguments.gather;
  const PipelinedMemory memory(shared, gather);
  const int multiplying = 128 * gather.warpgroups, thread = static_cast<int>(threadIdx.x) - multiplying;
  const int source_threads = gather.source_threads();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < gather.source_stages; ++stage) {
      ptx::make_barrier(memory.source_full(stage), source_threads);
      ptx::make_barrier(memory.source_free(stage), multiplying + (kBoxed && kWatches ? source_threads : 0));
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
  constexpr int kLoading = loading_warpgroups(kConfiguration);
  if (thread < 0) {
    ptx::claim_registers<multiplying_registers(kLoading)>();
    Multiplier<T, kEntry>(arguments, memory).run();
  } else {
    ptx::give_up_registers<loading_registers(kLoading)>();
    if (thread < source_threads) {
      if constexpr (kBoxed) {
        copy_boxes<kWatches>(arguments, memory, map, thread, source_threads);
      } else if constexpr (kConfiguration.form == SourceForm::copied) {
        copy_source(arguments, memory, thread, source_threads);
      } else {
        constexpr bool kRounds = sizeof(T) == 4 && !kConfiguration.exact;
        constexpr bool kHurries = kConfiguration.columns < 128 || kConfiguration.form == SourceForm::in_place;
        SourceLoader<T, kRounds, kWatches, kHurries>(arguments, memory, thread, source_threads).run();
      }
    } else if (thread == source_threads) {
      load_weights(arguments, memory);
    } else if (thread >= source_threads + 32) {
      if constexpr (hands_over_runs(kConfiguration)) {
        Storer<T, kEntry>(arguments, memory, thread - source_threads - 32).run();
      }
    }
  }
#endif
}

// The map by which a stage's boxes of the source are copied, if there can be one.
inline std::optional<CUtensorMap> map_of_source(const PipelinedArguments<float>& arguments) {
  const PipelinedGather& gather = arguments.gather;
  const GatherVolume& from = arguments.from;
  const int64_t row = from.size[2];
  return map_of_boxes(arguments.source, {row, from.size[1], from.size[0], from.channels, arguments.batch},
                      {row, row * from.size[1], from.channel_stride, from.sample_stride},
                      {gather.row_pitch, gather.rows, gather.planes, gather.stage_channels(), gather.samples});
}

// Launches the kernel of kPipelinedGathers[kEntry], if that is the one that the arguments ask for.
template <size_t kEntry, class T>
bool launch_pipelined_entry(PipelinedArguments<T>& arguments, cudaStream_t stream) {
  constexpr GatherConfiguration kConfiguration = kPipelinedGathers[kEntry];
  constexpr bool kBoxed = kConfiguration.form == SourceForm::boxed, kCopied = kConfiguration.form == SourceForm::copied;
  const PipelinedGather& gather = arguments.gather;
  if (!(gather.configuration() == kConfiguration)) return false;
  if constexpr (sizeof(T) == 2 ? kConfiguration.exact || kBoxed : kCopied) {
    return false;
  } else {
    std::optional<CUtensorMap> map;
    if constexpr (kBoxed) map = map_of_source(arguments);
    arguments.has_map = map.has_value();
    launch(Begins::early, "launching gather_pipelined", gather_pipelined_kernel<T, kEntry>,
           dim3(static_cast<unsigned>(gather.blocks)), gather.threads(), static_cast<size_t>(gather.shared_bytes),
           stream, arguments, map.value_or(CUtensorMap{}));
    return true;
  }
}

template <class T, size_t... Entries>
bool launch_one_of_pipelined(PipelinedArguments<T>& arguments, cudaStream_t stream, std::index_sequence<Entries...>) {
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
  arguments.pair_stores =
      arguments.to.size[2] % 2 == 0 && reinterpret_cast<uintptr_t>(destination) % (2 * sizeof(T)) == 0;
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
