// The warps of the pipelined gather that store (see direct/cuda/pipelined_gather.h).
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/ptx.h"
#include "direct/cuda/pipelined_block.h"
#include "direct/cuda/pipelined_gaps.h"

namespace convt3d::direct {

// The warps that store what multiplying ones have handed over, in NCDHW; `thread` of theirs. Runs, as they lie in the
// destination, some channels at a time, are stored in bulk, and by lanes what they have of the sectors at their ends;
// rows without taps may be parts of them, and what lies between them is then stored while there is nothing else. Else
// half types, all of a tile's, leave a word of each lane at a time.
template <class T, size_t kEntry>
class Storer : Destination<T, kEntry> {
  using Base = Destination<T, kEntry>;
  using Base::arguments_, Base::gather_;
  using Base::beyond_vector, Base::destination_of, Base::destination_place, Base::is_inside, Base::place_of_run,
      Base::residues_of, Base::row_offset;
  using Base::kColumns, Base::kConfiguration, Base::kMostRowSlots, Base::kSlots;

 public:
  __device__ __forceinline__ Storer(const PipelinedArguments<T>& arguments, const PipelinedMemory& memory, int thread)
      : Base(arguments), memory_(memory), thread_(thread) {}

  __device__ __forceinline__ void run() {
    if (kMayFill && gather_.fills_runs) {
      GapFiller<T> gaps(arguments_, memory_, thread_ / 32);
      fill_runs(blockIdx.x, 0);
      store_runs_of_tiles<kMayFill>([&gaps](uint32_t full, uint32_t parity) {
        while (__any_sync(0xffffffffu, !ptx::has_ended(full, parity))) {
          if (!gaps.store_some()) return ptx::wait(full, parity);
        }
      });
      while (gaps.store_some()) {
      }
      ptx::wait_for_bulk_stores<0>();
    } else if (gather_.stores_runs) {
      store_runs_of_tiles<false>([](uint32_t full, uint32_t parity) { ptx::wait(full, parity); });
    } else if constexpr (hands_over_words(kConfiguration, sizeof(T))) {
      store_words_of_tiles();
    }
  }

 private:
  static constexpr int kHanded = handed_columns(kConfiguration, sizeof(T));
  static constexpr bool kMayFill = may_fill_runs(kConfiguration);
  using Element = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;

  __device__ __forceinline__ void synchronize() const {
    ptx::barrier_sync(kStoringBarrier, 32 * gather_.storing_warps);
  }
  // A channel of a run, in bytes from the sector that it begins in: where it lies, and where its whole sectors do.
  struct ChannelRun {
    unsigned char* destination;
    const unsigned char* staged;
    int begin, end, sectors, sectors_end;
  };
  __device__ __forceinline__ ChannelRun channel_run(T* destination, int channels, int number) const {
    constexpr int kSector = 32;
    const int run = number / kHanded, channel = number - run * kHanded;
    const int2 place = memory_.destination_places[run];
    T* const first = destination + (channel * static_cast<int64_t>(arguments_.to.channel_stride) + place.x);
    ChannelRun result;
    result.begin = static_cast<int>(reinterpret_cast<uintptr_t>(first) % kSector);
    result.end = result.begin + (channel < channels ? place.y * static_cast<int>(sizeof(T)) : 0);
    result.destination = reinterpret_cast<unsigned char*>(first) - result.begin;
    result.staged = reinterpret_cast<const unsigned char*>(memory_.staging) - result.begin / 16 * 16 +
                    number * gather_.run_pitch * static_cast<int>(sizeof(T));
    result.sectors = (result.begin + kSector - 1) / kSector * kSector;
    result.sectors_end = result.end / kSector * kSector;
    return result;
  }
  // `wait` is for the barrier of what is handed over, with its parity.
  template <bool kFills, class Wait>
  __device__ __forceinline__ void store_runs_of_tiles(const Wait& wait) {
    uint32_t parity = 0;
    ptx::arrive(memory_.staged_free());
    for (int64_t index = blockIdx.x; index < gather_.items; index += gridDim.x) {
      const PipelinedItem item(gather_, static_cast<int>(index));
      const PipelinedPhase& phase = gather_.tables.phases[item.phase_block];
      synchronize();
#pragma unroll 1
      for (int run = thread_; run < gather_.runs; run += 32 * gather_.storing_warps) {
        memory_.destination_places[run] = place_of_run(item, phase, run);
      }
      synchronize();
#pragma unroll 1
      for (int first = 0; first < kColumns; first += kHanded, parity ^= 1) {
        wait(memory_.staged_full(), parity);
        store_channels_of_runs(destination_of(item) + first * static_cast<int64_t>(arguments_.to.channel_stride),
                               min(kColumns, arguments_.to.group_channels - item.column_block * kColumns) - first);
        if constexpr (kFills) {
          const int next = first + kHanded;
          synchronize();  // all have been copied from
          fill_runs(next < kColumns ? index : index + gridDim.x, next < kColumns ? next : 0);
        }
        ptx::arrive(memory_.staged_free());
      }
    }
  }
  // What rows without taps have of the channels that this item hands over next, and all others until they come: the
  // bias, a warp for each channel of a run. Without a bias they have it still, if runs lie as those before.
  __device__ __forceinline__ void fill_runs(int64_t index, int first) {
    if (index >= gather_.items) return;
    constexpr int kVector = 16 / sizeof(T);
    const PipelinedItem item(gather_, static_cast<int>(index));
    const PipelinedPhase& phase = gather_.tables.phases[item.phase_block];
    const int beyond = beyond_vector(destination_of(item) + first * static_cast<int64_t>(arguments_.to.channel_stride) +
                                     place_of_run(item, phase, 0).x);
    if (arguments_.bias == nullptr && beyond == filled_beyond_) return;
    filled_beyond_ = beyond;
    const int vectors = gather_.run_pitch / kVector;
    uint4* const begin = reinterpret_cast<uint4*>(memory_.staging);
    if (arguments_.bias == nullptr) {
      return fill(begin, gather_.runs * kHanded * vectors, thread_, 32 * gather_.storing_warps, make_uint4(0, 0, 0, 0));
    }
    const int channels = arguments_.to.group_channels, first_channel = item.column_block * kColumns + first;
#pragma unroll 1
    for (int number = thread_ / 32; number < gather_.runs * kHanded; number += gather_.storing_warps) {
      const int channel = first_channel + number % kHanded;
      const bool has_bias = arguments_.bias != nullptr && channel < channels;
      const T value = has_bias ? arguments_.bias[item.group * channels + channel] : T(0.0f);
      alignas(16) T values[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) values[i] = value;
      fill(begin + number * vectors, vectors, thread_ % 32, 32, *reinterpret_cast<const uint4*>(values));
    }
  }
  __device__ __forceinline__ static void fill(uint4* begin, int vectors, int first, int step, uint4 vector) {
    constexpr int kTogether = 8;
    uint4* place = begin + first;
#pragma unroll 1
    for (int left = vectors - first; left > 0; left -= kTogether * step, place += kTogether * step) {
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (left > i * step) place[i * step] = vector;
      }
    }
  }
  // A lane stores a channel of a run: its whole sectors in bulk, and what it has of those at its ends in words of 2 to
  // 16 bytes, each of them once at most.
  __device__ __forceinline__ void store_channels_of_runs(T* destination, int channels) const {
#pragma unroll 1
    for (int number = thread_; number < gather_.runs * kHanded; number += 32 * gather_.storing_warps) {
      const ChannelRun run = channel_run(destination, channels, number);
      if (run.sectors < run.sectors_end) {
        ptx::store_bulk(run.destination + run.sectors, ptx::shared_address(run.staged + run.sectors),
                        run.sectors_end - run.sectors);
      }
      int at = run.begin;
      if (run.sectors <= run.sectors_end) {
        const int front = run.sectors - run.begin, back = run.end - run.sectors_end;
        if constexpr (sizeof(T) == 2) store_word<uint16_t>(run, at, front);
        store_word<uint32_t>(run, at, front);
        store_word<uint2>(run, at, front);
        store_word<uint4>(run, at, front);
        at = run.sectors_end;
        store_word<uint4>(run, at, back);
        store_word<uint2>(run, at, back);
        store_word<uint32_t>(run, at, back);
        if constexpr (sizeof(T) == 2) store_word<uint16_t>(run, at, back);
      } else {
        while (at < run.end) store_word<Element>(run, at, sizeof(T));
      }
    }
    ptx::commit_bulk_stores();
    ptx::wait_for_bulk_stores<0>();
  }
  // The word at `at`, which this goes on from, if it is one of those that so many bytes consist of.
  template <class Word>
  __device__ __forceinline__ static void store_word(const ChannelRun& run, int& at, int bytes) {
    if ((bytes & sizeof(Word)) == 0) return;
    *reinterpret_cast<Word*>(run.destination + at) = *reinterpret_cast<const Word*>(run.staged + at);
    at += sizeof(Word);
  }

  __device__ __forceinline__ void store_words_of_tiles() const {
    uint32_t parity = 0;
    ptx::arrive(memory_.staged_free());
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
        if constexpr (kMostRowSlots > 1) store_tile<1>(item, phase);
      } else {
        store_tile<0>(item, phase);
      }
      ptx::arrive(memory_.staged_free());
    }
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
    const int run = gather_.positions() << kBits, pitch = staging_pitch(run, sizeof(T)), rounds = run / (32 * kWidth);
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
  int filled_beyond_ = -1;  // how far behind the beginning of a vector the first run lies that was filled last
};

}  // namespace convt3d::direct
