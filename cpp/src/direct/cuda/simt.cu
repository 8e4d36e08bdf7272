// The direct algorithm in plain CUDA: every problem, every type, every GPU.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cuda/launch.h"
#include "cuda/ptx.h"
#include "direct/cuda/contacts.h"
#include "direct/cuda/kernels.h"

namespace convt3d::direct {
namespace {

constexpr int64_t kBlocksOfRareWork = 512;  // few, since they mostly find that there is nothing to do

// Shared memory of a block on compute capability 7.5.
constexpr size_t kMostSharedBytes = 64 * 1024;

// Products summed before they are folded into a second sum, which bounds the error of long sums; float32 has its own.
constexpr int kRunLength = 128;

constexpr size_t round_up(size_t bytes, size_t multiple) { return (bytes + multiple - 1) / multiple * multiple; }

constexpr int64_t kLimit = int64_t{1} << 30;

// Whether 32-bit indices reach from a position to every place that a contact names, be it far outside of the volume.
bool offsets_fit_32_bits(const Problem& problem, const Extent& volume, int64_t channels) {
  int64_t step = problem.layout == Layout::ndhwc ? channels : 1, reached = 0;
  for (int axis = 2; axis >= 0; --axis) {
    const int64_t span = problem.dilation[axis] * (problem.kernel[axis] - 1);
    const int64_t reach = problem.padding[axis] + span + problem.stride[axis];
    if (reach >= kLimit / step) return false;
    reached += reach * step;
    step *= volume[axis];
  }
  return reached < kLimit;
}

// Whether 32-bit indices reach every voxel of all samples, every element of one sample, and every weight.
bool fits_32_bits(const Problem& problem) {
  int64_t rounded = problem.batch;  // destination positions, rounded up to whole strides
  const Extent output = problem.output();
  for (int axis = 0; axis < 3; ++axis) rounded *= output[axis] / problem.stride[axis] + 1;
  return Geometry<int32_t>::fits(problem) && rounded < kLimit && problem.batch * problem.input_voxels() < kLimit &&
         problem.in_channels * problem.input_voxels() < kLimit &&
         problem.out_channels * problem.output_voxels() < kLimit && problem.weight_elements() < kLimit &&
         offsets_fit_32_bits(problem, problem.input, problem.in_channels) &&
         offsets_fit_32_bits(problem, output, problem.out_channels);
}

// ---- the gather ----------------------------------------------------------------------------------------------------

// Contacts held in shared memory at once.
constexpr int kContacts = 128;

// A block makes kPositions destination positions of one residue triple by kChannels destination channels. Its threads
// form a grid of PositionThreads x ChannelThreads, each with kThreadPositions x kThreadChannels sums.
template <class T, int PositionThreads, int ChannelThreads, int Depth, bool ChannelsLast>
struct GatherTile {
  using Sum = Accumulator<T>;
  static constexpr bool kChannelsLast = ChannelsLast;
  static constexpr int kThreads = PositionThreads * ChannelThreads;
  static constexpr int kResidentBlocks = (sizeof(T) == 8 ? 256 : 512) / kThreads;  // which have registers
  static constexpr int kPositionThreads = PositionThreads;
  static constexpr int kThreadPositions = sizeof(T) == 8 ? 4 : 8, kThreadChannels = 4;
  static constexpr int kPositions = PositionThreads * kThreadPositions, kChannels = ChannelThreads * kThreadChannels;
  static constexpr int kDepth = Depth;  // slots of a stage: pairs of a contact and a source channel
  // Sources lie as they come: slot by position, or position by slot. The rows are padded, so that threads that go along
  // a column meet different banks.
  static constexpr int kSourcePitch = (ChannelsLast ? kDepth : kPositions) + 4, kWeightPitch = kChannels + 4;
  static constexpr int kWeightBegin = kSourcePitch * (ChannelsLast ? kPositions : kDepth);
  static constexpr int kStage = kWeightBegin + kDepth * kWeightPitch;
  static constexpr int kResultPitch = (ChannelsLast ? kChannels : kPositions) + 4;
  // Two stages, whose place the results take in the end.
  static constexpr size_t kBufferBytes =
      round_up(std::max(2 * kStage, kResultPitch*(ChannelsLast ? kPositions : kChannels)) * sizeof(Sum), 16);

  // The i-th position of a thread's.
  static CONVT3D_HOST_DEVICE constexpr int position(int thread, int i) {
    return ChannelsLast ? i * PositionThreads + thread : i / 4 * (PositionThreads * 4) + thread * 4 + i % 4;
  }
};

// Where a contact's source lies from the position that offset 0 names, also in elements.
template <class Index>
struct alignas(4 * sizeof(Index)) ContactEntry {
  Index depth, height, width;
  Index source;
};

// The source position that offset 0 names.
template <class Index>
struct PositionEntry {
  Index depth, height, width;
};

// What a block works on. It lies in shared memory to leave the registers to the sums.
template <class Index>
struct alignas(16) GatherBlock {
  Contacts<Index> depth, height, width;
  int64_t contacts;
  int64_t group;
  int channel_begin, columns;  // destination channels of the group
};

template <class T, class Index>
struct GatherArguments {
  AxisGather<Index> depth, height, width;
  const T* source;
  const T* weight;
  const T* bias;
  T* destination;
  int64_t rows;  // samples times positions of q: the rows of the tiles
  Index sample_rows;
  Divisor<Index> by_sample_rows, by_positions_h, by_positions_w;
  VolumeSteps source_steps, destination_steps;
  int64_t weight_group, weight_source, weight_destination, weight_tap;  // steps
  int source_channels, destination_channels;                            // of a group
  // Of an element of a stage's weights: where its contact, source channel and destination channel begin.
  int contact_shift, source_shift, destination_shift;
  int channel_bits, contact_bits;  // of a slot's number: its channel, then contact
  bool vectors;                    // four channels lie in one aligned vector
  int run_length;
  int64_t row_tiles, channel_tiles, groups, phases;
  const int* only_if;  // points to a 0 where there is nothing to do
};

// Copies an element to shared memory as a sum's type, or a zero.
template <class T>
__device__ __forceinline__ void stage(Accumulator<T>* shared, const T* global, bool valid) {
  if constexpr (std::is_same_v<T, Accumulator<T>>) {
    ptx::copy_element(shared, global, valid);
  } else {
    *shared = valid ? static_cast<Accumulator<T>>(*global) : Accumulator<T>(0);
  }
}

// Four neighbours at once, which both pointers are aligned for.
template <class T>
struct alignas(4 * sizeof(T)) Quad {
  T element[4];
};
template <class T>
__device__ __forceinline__ void stage_quad(Accumulator<T>* shared, const T* global, bool valid) {
  if constexpr (std::is_same_v<T, Accumulator<T>>) {
#pragma unroll
    for (int i = 0; i < 4; i += 16 / sizeof(T)) ptx::copy_vector(shared + i, global + i, valid);
  } else {
    Quad<T> from{};
    if (valid) from = *reinterpret_cast<const Quad<T>*>(global);
    Quad<Accumulator<T>> to;
#pragma unroll
    for (int i = 0; i < 4; ++i) to.element[i] = static_cast<Accumulator<T>>(from.element[i]);
    *reinterpret_cast<Quad<Accumulator<T>>*>(shared) = to;
  }
}

template <class Index>
__device__ __forceinline__ bool is_inside(Index index, Index size) {
  return static_cast<std::make_unsigned_t<Index>>(index) < static_cast<std::make_unsigned_t<Index>>(size);
}

// The gather as a product of matrices: a row is a destination position, a column a destination channel, and the
// reduction runs over the contacts of the residue triple and the source channels. No contact is tried in vain but at
// the volume's edges, where zeros stand for the sources outside. Stages of kDepth slots go through shared memory, the
// next one arriving while this one is summed. Threads load along positions, or along channels where those are
// contiguous; results go through shared memory too, so that neighbours are stored together.
//
// For each slot a thread loads 3 vectors from shared memory for 32 multiplications, so that with many channels the
// N * Cin * Cout/G * T * S multiplications bound it: 4 x 32 channels of 32 x 64 x 128 to as many at kernel 3, stride 2
// in float32 are 58 GFLOP, 1.14 ms on an H200, and 1.18 GB of x and y, 0.28 ms. With few channels it is the loads, one
// for each 4 to 16 multiplications.
template <class T, class Index, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, sizeof(Index) == 8 ? 1 : Tile::kResidentBlocks)
    gather_tiles(const __grid_constant__ GatherArguments<T, Index> in) {
  using Sum = Accumulator<T>;
  constexpr int kThreads = Tile::kThreads, kPositions = Tile::kPositions, kChannels = Tile::kChannels;
  constexpr int kThreadPositions = Tile::kThreadPositions, kThreadChannels = Tile::kThreadChannels;
  constexpr int kDepth = Tile::kDepth;
  constexpr bool kFolds = sizeof(Sum) == 4;
  CONVT3D_DYNAMIC_SHARED(16, shared);
  if (in.only_if != nullptr) {
    ptx::wait_for_previous_kernel();
    if (*in.only_if == 0) return;
  }
  Sum* const stages = reinterpret_cast<Sum*>(shared);
  GatherBlock<Index>& work = *reinterpret_cast<GatherBlock<Index>*>(shared + Tile::kBufferBytes);
  int64_t* const source_base = reinterpret_cast<int64_t*>(&work + 1);
  int64_t* const destination_offset = source_base + kPositions;
  ContactEntry<Index>* const contact = reinterpret_cast<ContactEntry<Index>*>(destination_offset + kPositions);
  Index* const contact_weight = reinterpret_cast<Index*>(contact + kContacts);  // elements
  PositionEntry<Index>* const position = reinterpret_cast<PositionEntry<Index>*>(contact_weight + kContacts);
  const int thread = threadIdx.x;
  const int thread_n = thread % (kThreads / Tile::kPositionThreads),
            thread_m = thread / (kThreads / Tile::kPositionThreads);

  const int64_t blocks = in.row_tiles * in.channel_tiles * in.groups * in.phases;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    // Phases of the same tile follow each other, so that they find the sources, and merge their writes, in the L2
    // cache.
    int64_t rest = block / in.phases;
    int64_t phase = block - rest * in.phases;
    const int channel_begin = static_cast<int>(rest % in.channel_tiles) * kChannels;
    rest /= in.channel_tiles;
    const int64_t row_begin = rest % in.row_tiles * kPositions;
    const int64_t group = rest / in.row_tiles;
    const Index residue_w = static_cast<Index>(phase % in.width.residues);
    phase /= in.width.residues;
    const Index residue_h = static_cast<Index>(phase % in.height.residues);
    const Index residue_d = static_cast<Index>(phase / in.height.residues);

    for (int m = thread; m < kPositions; m += kThreads) {
      const int64_t row = row_begin + m;
      // From here no contact leads into the volume.
      PositionEntry<Index> entry{-in.depth.source - in.depth.axis.stride, 0, 0};
      destination_offset[m] = -1;
      source_base[m] = 0;
      if (row < in.rows) {
        const Index sample = in.by_sample_rows.quotient(static_cast<Index>(row));
        const Index voxel = static_cast<Index>(row) - sample * in.sample_rows;
        const Index line = in.by_positions_w.quotient(voxel), q_d = in.by_positions_h.quotient(line);
        const Index q_w = voxel - line * in.width.positions, q_h = line - q_d * in.height.positions;
        const Index d = q_d * in.depth.destination_stride + residue_d;
        const Index h = q_h * in.height.destination_stride + residue_h;
        const Index w = q_w * in.width.destination_stride + residue_w;
        if (d < in.depth.destination && h < in.height.destination && w < in.width.destination) {
          entry = {q_d * in.depth.source_stride, q_h * in.height.source_stride, q_w * in.width.source_stride};
          source_base[m] =
              sample * in.source_steps.sample +
              ((static_cast<int64_t>(entry.depth) * in.height.source + entry.height) * in.width.source + entry.width) *
                  in.source_steps.voxel;
          destination_offset[m] = sample * in.destination_steps.sample +
                                  ((static_cast<int64_t>(d) * in.height.destination + h) * in.width.destination + w) *
                                      in.destination_steps.voxel;
        }
      }
      position[m] = entry;
    }

    if (thread == 0) {
      work.depth = in.depth.contacts(residue_d, 0, in.depth.positions - 1);
      work.height = in.height.contacts(residue_h, 0, in.height.positions - 1);
      work.width = in.width.contacts(residue_w, 0, in.width.positions - 1);
      work.contacts = static_cast<int64_t>(work.depth.count) * work.height.count * work.width.count;
      work.group = group;
      work.channel_begin = channel_begin;
      work.columns = smaller(kChannels, in.destination_channels - channel_begin);
    }
    __syncthreads();

    Sum sum[kThreadPositions][kThreadChannels] = {}, run[kThreadPositions][kThreadChannels] = {};
    int length = 0;

    for (int64_t segment = 0; segment < work.contacts; segment += kContacts) {
      const int segment_contacts = static_cast<int>(smaller<int64_t>(kContacts, work.contacts - segment));
      const T* const source = in.source + work.group * in.source_channels * in.source_steps.channel;
      const T* const weight = in.weight + work.group * in.weight_group + work.channel_begin * in.weight_destination;
      __syncthreads();
      for (int c = thread; c < segment_contacts; c += kThreads) {
        const Contacts<Index>&contacts_d = work.depth, &contacts_h = work.height, &contacts_w = work.width;
        const int64_t line = (segment + c) / contacts_w.count;
        const Index i_w = static_cast<Index>(segment + c - line * contacts_w.count);
        const Index i_d = static_cast<Index>(line / contacts_h.count);
        const Index i_h = static_cast<Index>(line - static_cast<int64_t>(i_d) * contacts_h.count);
        ContactEntry<Index> entry{contacts_d.offset + i_d * contacts_d.offset_step,
                                  contacts_h.offset + i_h * contacts_h.offset_step,
                                  contacts_w.offset + i_w * contacts_w.offset_step, 0};
        entry.source = ((entry.depth * in.height.source + entry.height) * in.width.source + entry.width) *
                       static_cast<Index>(in.source_steps.voxel);
        const Index tap_line = (contacts_d.tap + i_d * contacts_d.tap_step) * in.height.axis.kernel + contacts_h.tap +
                               i_h * contacts_h.tap_step;
        contact_weight[c] = (tap_line * in.width.axis.kernel + contacts_w.tap + i_w * contacts_w.tap_step) *
                            static_cast<Index>(in.weight_tap);
        contact[c] = entry;
      }
      __syncthreads();

      // Fills a stage: slot a << channel_bits | b takes contact `first` + a and source channel `channel` + b.
      const auto load = [&](Sum* buffer, int channel, int first) {
        const int count = smaller(1 << in.contact_bits, segment_contacts - first);
        const int stage_channels = 1 << in.channel_bits,
                  channels = smaller(stage_channels, in.source_channels - channel);
        const T* const from_channel = source + channel * in.source_steps.channel;
        if constexpr (!Tile::kChannelsLast) {
          for (int m = thread % kPositions; m < kPositions; m += kThreads) {
            const PositionEntry<Index> at = position[m];
            const T* const from_position = from_channel + source_base[m];
            for (int a = thread / kPositions; a<count; a += kThreads> kPositions ? kThreads / kPositions : 1) {
              const ContactEntry<Index> entry = contact[first + a];
              const bool valid = is_inside(at.depth + entry.depth, in.depth.source) &&
                                 is_inside(at.height + entry.height, in.height.source) &&
                                 is_inside(at.width + entry.width, in.width.source);
              const T* from = valid ? from_position + entry.source : source;
              Sum* to = buffer + (a << in.channel_bits) * Tile::kSourcePitch + m;
#pragma unroll 4
              for (int b = 0; b < stage_channels; ++b) {
                stage<T>(to, from, valid && b < channels);
                from += in.source_steps.channel;
                to += Tile::kSourcePitch;
              }
            }
          }
        } else {
          const auto load_slots = [&](auto width) {
            constexpr int kWidth = decltype(width)::value, kUnits = kDepth / kWidth;
            const int slot = thread % kUnits * kWidth, a = slot >> in.channel_bits, b = slot & (stage_channels - 1);
            const ContactEntry<Index> entry = contact[first + smaller(a, count - 1)];
            const T* const from_slot = from_channel + b + entry.source;
            for (int m = thread / kUnits; m < kPositions; m += kThreads / kUnits) {
              const PositionEntry<Index> at = position[m];
              const bool valid = a < count && is_inside(at.depth + entry.depth, in.depth.source) &&
                                 is_inside(at.height + entry.height, in.height.source) &&
                                 is_inside(at.width + entry.width, in.width.source);
              const T* const from = valid ? from_slot + source_base[m] : source;
              Sum* const to = buffer + m * Tile::kSourcePitch + slot;
              if constexpr (kWidth == 4) {
                stage_quad<T>(to, from, valid && b < channels);
              } else {
                stage<T>(to, from, valid && b < channels);
              }
            }
          };
          if (in.vectors) {
            load_slots(std::integral_constant<int, 4>());
          } else {
            load_slots(std::integral_constant<int, 1>());
          }
        }
        Sum* const weights = buffer + Tile::kWeightBegin;
        constexpr int kUnrolled = Tile::kChannelsLast ? 1 : 2;  // as registers allow
#pragma unroll kUnrolled
        for (int j = 0; j < (kDepth * kChannels + kThreads - 1) / kThreads; ++j) {
          const int i = j * kThreads + thread;
          if (i >= kDepth * kChannels) break;
          const int a = i >> in.contact_shift & (1 << in.contact_bits) - 1;
          const int b = i >> in.source_shift & stage_channels - 1;
          const int n = (i >> in.destination_shift) % kChannels;
          const bool valid = a < count && b < channels && n < work.columns;
          const T* from = weight;
          if (valid) {
            from += (channel + b) * static_cast<Index>(in.weight_source) +
                    n * static_cast<Index>(in.weight_destination) + contact_weight[first + a];
          }
          stage<T>(weights + (a << in.channel_bits | b) * Tile::kWeightPitch + n, from, valid);
        }
      };

      const int rounds = (segment_contacts + (1 << in.contact_bits) - 1) >> in.contact_bits;
      const int turns = (in.source_channels + (1 << in.channel_bits) - 1) >> in.channel_bits;
      int round = 0, turn = 0, slots = 0;
      for (int buffer = 0;; buffer ^= 1) {
        const bool loads = turn < turns;
        const int next_slots = smaller(1 << in.contact_bits, segment_contacts - (round << in.contact_bits))
                               << in.channel_bits;
        if (loads) load(stages + buffer * Tile::kStage, turn << in.channel_bits, round << in.contact_bits);
        if (++round == rounds) {
          round = 0;
          ++turn;
        }
        const Sum* const summed = stages + (buffer ^ 1) * Tile::kStage;
        const Sum* w = summed + Tile::kWeightBegin + thread_n * kThreadChannels;
        if constexpr (!Tile::kChannelsLast) {
          const Sum* x = summed + Tile::position(thread_m, 0);
#pragma unroll 4
          for (int slot = 0; slot < slots; ++slot) {
            Sum left[kThreadPositions], right[kThreadChannels];
#pragma unroll
            for (int i = 0; i < kThreadPositions; ++i) left[i] = x[Tile::position(0, i)];
#pragma unroll
            for (int j = 0; j < kThreadChannels; ++j) right[j] = w[j];
#pragma unroll
            for (int i = 0; i < kThreadPositions; ++i) {
#pragma unroll
              for (int j = 0; j < kThreadChannels; ++j) run[i][j] += left[i] * right[j];
            }
            x += Tile::kSourcePitch;
            w += Tile::kWeightPitch;
          }
        } else {
          // Slots beyond the last are zeros.
          const Sum* x = summed + thread_m * Tile::kSourcePitch;
#pragma unroll 1
          for (int slot = 0; slot < slots; slot += 4) {
            Sum right[4][kThreadChannels];
#pragma unroll
            for (int k = 0; k < 4; ++k) {
#pragma unroll
              for (int j = 0; j < kThreadChannels; ++j) right[k][j] = w[k * Tile::kWeightPitch + j];
            }
#pragma unroll
            for (int i = 0; i < kThreadPositions; ++i) {
              Sum left[4];
#pragma unroll
              for (int k = 0; k < 4; ++k) left[k] = x[Tile::position(0, i) * Tile::kSourcePitch + k];
#pragma unroll
              for (int k = 0; k < 4; ++k) {
#pragma unroll
                for (int j = 0; j < kThreadChannels; ++j) run[i][j] += left[k] * right[k][j];
              }
            }
            x += 4;
            w += 4 * Tile::kWeightPitch;
          }
        }
        length += slots;
        if (kFolds && length >= in.run_length) {
          length = 0;
#pragma unroll
          for (int i = 0; i < kThreadPositions; ++i) {
#pragma unroll
            for (int j = 0; j < kThreadChannels; ++j) {
              sum[i][j] += run[i][j];
              run[i][j] = 0;
            }
          }
        }
        if (!loads) break;
        slots = next_slots;
        ptx::wait_for_all_copies();
        __syncthreads();
      }
    }

    __syncthreads();
#pragma unroll
    for (int i = 0; i < kThreadPositions; ++i) {
      const int m = Tile::position(thread_m, i);
#pragma unroll
      for (int j = 0; j < kThreadChannels; ++j) {
        const int n = thread_n * kThreadChannels + j;
        stages[Tile::kChannelsLast ? m * Tile::kResultPitch + n : n * Tile::kResultPitch + m] =
            kFolds ? sum[i][j] + run[i][j] : run[i][j];
      }
    }
    __syncthreads();
    const int64_t first_channel = work.group * in.destination_channels + work.channel_begin;
    T* const destination = in.destination + first_channel * in.destination_steps.channel;
    const T* const bias = in.bias == nullptr ? nullptr : in.bias + first_channel;
    for (int i = thread; i < kPositions * kChannels; i += kThreads) {
      const int m = Tile::kChannelsLast ? i / kChannels : i % kPositions;
      const int n = Tile::kChannelsLast ? i % kChannels : i / kPositions;
      const int64_t offset = destination_offset[m];
      if (n >= work.columns || offset < 0) continue;
      Sum value = stages[Tile::kChannelsLast ? m * Tile::kResultPitch + n : n * Tile::kResultPitch + m];
      if (bias != nullptr) value += static_cast<Sum>(bias[n]);
      destination[offset + n * in.destination_steps.channel] = static_cast<T>(value);
    }
    __syncthreads();
  }
}

// The least b with 1 << b >= value.
int bits_for(int64_t value) {
  int bits = 0;
  while ((int64_t{1} << bits) < value) ++bits;
  return bits;
}

template <class T, class Index, class Tile>
void launch_gather(const Problem& problem, Operator op, const T* source, const T* weight, const T* bias, T* destination,
                   cudaStream_t stream, const int* only_if) {
  const bool forward = op == Operator::forward;
  GatherArguments<T, Index> arguments;
  arguments.depth = AxisGather<Index>(problem, op, 0);
  arguments.height = AxisGather<Index>(problem, op, 1);
  arguments.width = AxisGather<Index>(problem, op, 2);
  arguments.source = source;
  arguments.weight = weight;
  arguments.bias = bias;
  arguments.destination = destination;
  const int64_t sample_rows =
      static_cast<int64_t>(arguments.depth.positions) * arguments.height.positions * arguments.width.positions;
  arguments.rows = problem.batch * sample_rows;
  arguments.sample_rows = static_cast<Index>(sample_rows);
  arguments.by_sample_rows = Divisor<Index>(sample_rows);
  arguments.by_positions_h = Divisor<Index>(arguments.height.positions);
  arguments.by_positions_w = Divisor<Index>(arguments.width.positions);
  const VolumeSteps input(problem.layout, problem.in_channels, problem.input_voxels());
  const VolumeSteps output(problem.layout, problem.out_channels, problem.output_voxels());
  arguments.source_steps = forward ? input : output;
  arguments.destination_steps = forward ? output : input;
  const WeightSteps steps(problem);
  arguments.weight_group = steps.group;
  arguments.weight_source = forward ? steps.input_channel : steps.output_channel;
  arguments.weight_destination = forward ? steps.output_channel : steps.input_channel;
  arguments.weight_tap = steps.tap;
  arguments.source_channels = static_cast<int>(forward ? problem.group_in_channels() : problem.group_out_channels());
  arguments.destination_channels =
      static_cast<int>(forward ? problem.group_out_channels() : problem.group_in_channels());
  // Contiguous taps are taken two at a time; where channels are contiguous, as many of those as there is room for.
  constexpr int kBits = Tile::kDepth == 16 ? 4 : 3;
  static_assert(Tile::kDepth == 1 << kBits, "slots are numbered by bits");
  int64_t contacts = 1;
  for (const AxisGather<Index>* axis : {&arguments.depth, &arguments.height, &arguments.width}) {
    contacts *= forward ? axis->axis.most_taps() : axis->axis.kernel;
  }
  arguments.channel_bits =
      std::min(kBits - (Tile::kChannelsLast || contacts == 1 ? 0 : 1), bits_for(arguments.source_channels));
  arguments.contact_bits = kBits - arguments.channel_bits;
  arguments.run_length = run_length<T>(contacts * arguments.source_channels, kRunLength);
  // Threads go along what lies closest together in memory.
  const int contact_bits = arguments.contact_bits, source_bits = arguments.channel_bits,
            destination_bits = bits_for(Tile::kChannels);
  if (arguments.weight_tap == 1) {
    arguments.contact_shift = 0;
    const bool sources_first = arguments.weight_source < arguments.weight_destination;
    arguments.source_shift = contact_bits + (sources_first ? 0 : destination_bits);
    arguments.destination_shift = contact_bits + (sources_first ? source_bits : 0);
  } else {
    const bool sources_first = arguments.weight_source == 1;
    arguments.source_shift = sources_first ? 0 : destination_bits;
    arguments.destination_shift = sources_first ? source_bits : 0;
    arguments.contact_shift = source_bits + destination_bits;
  }
  arguments.vectors = Tile::kChannelsLast && arguments.source_channels % 4 == 0 &&
                      reinterpret_cast<uintptr_t>(source) % (4 * sizeof(T)) == 0;
  arguments.row_tiles = (arguments.rows + Tile::kPositions - 1) / Tile::kPositions;
  arguments.channel_tiles = (arguments.destination_channels + Tile::kChannels - 1) / Tile::kChannels;
  arguments.groups = problem.groups;
  arguments.phases =
      static_cast<int64_t>(arguments.depth.residues) * arguments.height.residues * arguments.width.residues;
  const int64_t blocks = arguments.row_tiles * arguments.channel_tiles * arguments.groups * arguments.phases;
  constexpr size_t kSharedBytes = Tile::kBufferBytes + sizeof(GatherBlock<Index>) +
                                  Tile::kPositions * (2 * sizeof(int64_t) + sizeof(PositionEntry<Index>)) +
                                  kContacts * (sizeof(ContactEntry<Index>) + sizeof(Index));
  static_assert(kSharedBytes <= kMostSharedBytes, "the oldest GPUs have no more");
  arguments.only_if = only_if;
  const int64_t most_blocks = only_if == nullptr ? kMostBlocks : kBlocksOfRareWork;
  launch(only_if == nullptr ? Begins::in_turn : Begins::early, "simt gather", gather_tiles<T, Index, Tile>,
         static_cast<unsigned>(std::min(blocks, most_blocks)), Tile::kThreads, kSharedBytes, stream, arguments);
}

// Picks the tile that wastes the fewest channels.
template <class T, bool ChannelsLast>
void gather_simt(const Problem& problem, Operator op, const T* source, const T* weight, const T* bias, T* destination,
                 cudaStream_t stream, const int* only_if) {
  const int64_t channels = op == Operator::forward ? problem.group_out_channels() : problem.group_in_channels();
  const auto launch = [&](auto index, auto tile) {
    launch_gather<T, decltype(index), decltype(tile)>(problem, op, source, weight, bias, destination, stream, only_if);
  };
  if (!fits_32_bits(problem)) {
    return launch(int64_t(), GatherTile<T, 32, 8, 16, ChannelsLast>());
  }
  if constexpr (!ChannelsLast) {
    if (channels <= 4) return launch(int32_t(), GatherTile<T, 64, 1, 8, ChannelsLast>());
  }
  if (channels <= 8) {
    launch(int32_t(), GatherTile<T, 32, 2, 16, ChannelsLast>());
  } else if (channels <= 16) {
    launch(int32_t(), GatherTile<T, 32, 4, 16, ChannelsLast>());
  } else if (channels <= 32 || (channels > 64 && channels % 64 != 0 && channels % 64 <= 32)) {
    launch(int32_t(), GatherTile<T, 32, 8, 16, ChannelsLast>());
  } else {
    launch(int32_t(), GatherTile<T, 16, 16, 16, ChannelsLast>());
  }
}

// ---- the reduction -------------------------------------------------------------------------------------------------

// A block makes, for one part of the input voxels, kRows input channels by kColumns pairs of an output channel and a
// tap. Its threads form a grid of RowThreads x ColumnThreads x Slices, each with kThreadRows x kThreadColumns sums over
// every Slices-th voxel.
template <class T, int RowThreads, int ColumnThreads, int Slices>
struct ReduceTile {
  using Sum = Accumulator<T>;
  static constexpr int kThreads = RowThreads * ColumnThreads * Slices, kSlices = Slices;
  static constexpr int kResidentBlocks = (sizeof(T) == 8 ? 256 : 512) / kThreads;  // which have registers
  static constexpr int kColumnThreads = ColumnThreads;
  static constexpr int kThreadRows = 4, kThreadColumns = sizeof(T) == 8 ? 4 : 8;
  static constexpr int kRows = RowThreads * kThreadRows, kColumns = ColumnThreads * kThreadColumns;
  static constexpr int kDepth = Slices == 1 ? 16 : 32;  // voxels of a stage
  static constexpr int kRowPitch = kRows + 4, kColumnPitch = kColumns + 4;
  static constexpr int kStage = kDepth * (kRowPitch + kColumnPitch);
  // Two stages, whose place the slices' sums take in the end.
  static constexpr size_t kBufferBytes =
      round_up(std::max(2 * kStage, Slices == 1 ? 0 : Slices * kRows * kColumns) * sizeof(Sum), 16);

  // The j-th column of a thread's.
  static CONVT3D_HOST_DEVICE constexpr int column(int thread, int j) {
    return j / 4 * (ColumnThreads * 4) + thread * 4 + j % 4;
  }
};

// The output position that input 0 and a column's tap meet, and its element, in the column's channel.
template <class Index>
struct alignas(4 * sizeof(Index)) ColumnEntry {
  Index depth, height, width;
  Index output;
};

// The output position that a voxel and a tap at offset 0 meet, and the elements of both.
template <class Index>
struct alignas(16) VoxelEntry {
  Index depth, height, width;
  int64_t input, output;
};

template <class T, class Index>
struct ReduceArguments {
  Geometry<Index> geometry;
  const T* grad_output;
  const T* input;
  Accumulator<T>* partials;
  VolumeSteps input_steps, output_steps;
  WeightSteps weight_steps;
  Divisor<Index> by_input_voxels, by_output_channels, by_taps;
  int64_t parts, groups, row_tiles, column_tiles;
  Index items, share;  // voxels of all samples, and those of a part
  Index columns;
  int64_t elements;  // of the weight
  int input_channels, output_channels;
  bool vectors;  // four output channels lie in one aligned vector
  int run_length;
};

// The reduction as a product of matrices: a row is an input channel, a column an output channel with a tap, and the sum
// runs over a part's voxels, in stages that go through shared memory, the next one arriving while this one is summed.
// Outputs that no voxel meets count as zeros. Threads load along voxels, or along channels where those are contiguous.
// With few channels a block's threads take the voxels of a stage in turn, slice by slice, and their sums are added in
// the order of the slices.
//
// A thread loads 3 vectors from shared memory for 32 multiplications, and gathers an element of the output for every
// kRows of them: bound by the multiplications, as many as the gather's, where rows are many, else by the gathering. x
// and the output are read once for each tile, mostly from the L2 cache.
template <class T, class Index, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, sizeof(Index) == 8 ? 1 : Tile::kResidentBlocks)
    reduce_tiles(const __grid_constant__ ReduceArguments<T, Index> in) {
  using Sum = Accumulator<T>;
  constexpr int kThreads = Tile::kThreads, kRows = Tile::kRows, kColumns = Tile::kColumns, kDepth = Tile::kDepth;
  constexpr int kThreadRows = Tile::kThreadRows, kThreadColumns = Tile::kThreadColumns;
  constexpr bool kFolds = sizeof(Sum) == 4;
  CONVT3D_DYNAMIC_SHARED(16, shared);
  Sum* const stages = reinterpret_cast<Sum*>(shared);
  VoxelEntry<Index>* const voxels = reinterpret_cast<VoxelEntry<Index>*>(shared + Tile::kBufferBytes);  // two stages
  ColumnEntry<Index>* const column = reinterpret_cast<ColumnEntry<Index>*>(voxels + 2 * kDepth);
  Index* const column_weight = reinterpret_cast<Index*>(column + kColumns);
  const int thread = threadIdx.x;
  const int slice = thread / (kThreads / Tile::kSlices), thread_in_slice = thread % (kThreads / Tile::kSlices);
  const int thread_n = thread_in_slice % Tile::kColumnThreads, thread_m = thread_in_slice / Tile::kColumnThreads;
  const bool channels_last = in.input_steps.channel == 1;
  const Geometry<Index>& g = in.geometry;

  const int64_t blocks = in.parts * in.groups * in.row_tiles * in.column_tiles;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    // Tiles of the same part follow each other, so that they find its voxels in the L2 cache.
    int64_t rest = block / in.column_tiles;
    const Index column_begin = static_cast<Index>(block - rest * in.column_tiles) * kColumns;
    const int row_begin = static_cast<int>(rest % in.row_tiles) * kRows;
    rest /= in.row_tiles;
    const int64_t group = rest % in.groups, part = rest / in.groups;
    const Index begin = static_cast<Index>(smaller<int64_t>(part * in.share, in.items));
    const Index end = static_cast<Index>(smaller<int64_t>(begin + static_cast<int64_t>(in.share), in.items));
    const int rows = smaller(kRows, in.input_channels - row_begin);
    const int columns = static_cast<int>(smaller<Index>(kColumns, in.columns - column_begin));

    // Columns in the order of the weight's memory: output channel by tap, or tap by output channel.
    for (int n = thread; n < columns; n += kThreads) {
      const Index which = column_begin + n;
      const Index quotient = channels_last ? in.by_output_channels.quotient(which) : in.by_taps.quotient(which);
      const Index remainder = which - quotient * (channels_last ? static_cast<Index>(in.output_channels) : g.taps);
      const Index channel = channels_last ? remainder : quotient, tap = channels_last ? quotient : remainder;
      const Index line = g.by_kernel_width.quotient(tap), plane = g.by_kernel_height.quotient(line);
      ColumnEntry<Index> entry{g.depth.output_at(0, plane), g.height.output_at(0, line - plane * g.height.kernel),
                               g.width.output_at(0, tap - line * g.width.kernel), 0};
      entry.output = ((entry.depth * g.height.output + entry.height) * g.width.output + entry.width) *
                         static_cast<Index>(in.output_steps.voxel) +
                     channel * static_cast<Index>(in.output_steps.channel);
      column[n] = entry;
      column_weight[n] =
          channel * static_cast<Index>(in.weight_steps.output_channel) + tap * static_cast<Index>(in.weight_steps.tap);
    }

    const T* const input = in.input + (group * in.input_channels + row_begin) * in.input_steps.channel;
    const T* const output = in.grad_output + group * in.output_channels * in.output_steps.channel;

    // The voxels of the stage that begins at `item`.
    const auto locate = [&](VoxelEntry<Index>* stage_voxels, Index item) {
      if (thread >= kDepth || item + thread >= end) return;
      const Index sample = in.by_input_voxels.quotient(item + thread), v = item + thread - sample * g.input_voxels;
      const Index line = g.by_input_width.quotient(v), plane = g.by_input_height.quotient(line);
      VoxelEntry<Index> entry{plane * g.depth.stride, (line - plane * g.height.input) * g.height.stride,
                              (v - line * g.width.input) * g.width.stride};
      entry.input = sample * in.input_steps.sample + v * in.input_steps.voxel;
      entry.output =
          sample * in.output_steps.sample +
          ((static_cast<int64_t>(entry.depth) * g.height.output + entry.height) * g.width.output + entry.width) *
              in.output_steps.voxel;
      stage_voxels[thread] = entry;
    };
    const auto meets = [&](const VoxelEntry<Index>& voxel, const ColumnEntry<Index>& to) {
      return is_inside(voxel.depth + to.depth, g.depth.output) &&
             is_inside(voxel.height + to.height, g.height.output) && is_inside(voxel.width + to.width, g.width.output);
    };
    const auto load = [&](Sum* x, const VoxelEntry<Index>* stage_voxels, int count) {
      Sum* const y = x + kDepth * Tile::kRowPitch;
      if (!channels_last) {
        // Eight threads along neighbouring voxels.
        for (int k = thread % 8; k < kDepth; k += 8) {
          const VoxelEntry<Index> voxel = stage_voxels[smaller(k, count - 1)];
          for (int m = thread / 8; m < kRows; m += kThreads / 8) {
            const bool valid = k < count && m < rows;
            stage<T>(x + k * Tile::kRowPitch + m, valid ? input + voxel.input + m * in.input_steps.channel : input,
                     valid);
          }
#pragma unroll 2
          for (int n = thread / 8; n < kColumns; n += kThreads / 8) {
            const ColumnEntry<Index> to = column[smaller(n, columns - 1)];
            const bool valid = k < count && n < columns && meets(voxel, to);
            stage<T>(y + k * Tile::kColumnPitch + n, valid ? output + voxel.output + to.output : output, valid);
          }
        }
      } else {
        for (int i = thread; i < kDepth * kRows; i += kThreads) {
          const int k = i / kRows, m = i % kRows;
          const bool valid = k < count && m < rows;
          stage<T>(x + k * Tile::kRowPitch + m, valid ? input + stage_voxels[k].input + m : input, valid);
        }
        const auto load_columns = [&](auto width) {
          constexpr int kWidth = decltype(width)::value, kUnits = kColumns / kWidth;
          for (int i = thread; i < kDepth * kUnits; i += kThreads) {
            const int k = i / kUnits, n = i % kUnits * kWidth;
            const VoxelEntry<Index> voxel = stage_voxels[smaller(k, count - 1)];
            const ColumnEntry<Index> to = column[smaller(n, columns - 1)];
            const bool valid = k < count && n < columns && meets(voxel, to);
            const T* const from = valid ? output + voxel.output + to.output : output;
            if constexpr (kWidth == 4) {
              stage_quad<T>(y + k * Tile::kColumnPitch + n, from, valid);
            } else {
              stage<T>(y + k * Tile::kColumnPitch + n, from, valid);
            }
          }
        };
        if (in.vectors) {
          load_columns(std::integral_constant<int, 4>());
        } else {
          load_columns(std::integral_constant<int, 1>());
        }
      }
    };

    Sum sum[kThreadRows][kThreadColumns] = {}, run[kThreadRows][kThreadColumns] = {};
    int length = 0;
    locate(voxels, begin);
    // In each turn one stage is loaded, the voxels of the next are located, and the one before is summed.
    Index item = begin;
    for (int buffer = 0;; buffer ^= 1, item += kDepth) {
      __syncthreads();
      if (item < end) {
        load(stages + buffer * Tile::kStage, voxels + buffer * kDepth,
             static_cast<int>(smaller<Index>(kDepth, end - item)));
        locate(voxels + (buffer ^ 1) * kDepth, item + kDepth);
      }
      if (item > begin) {
        const Sum* x = stages + (buffer ^ 1) * Tile::kStage + slice * Tile::kRowPitch + thread_m * kThreadRows;
        const Sum* y = stages + (buffer ^ 1) * Tile::kStage + kDepth * Tile::kRowPitch + slice * Tile::kColumnPitch;
#pragma unroll 4
        for (int k = 0; k < kDepth / Tile::kSlices; ++k) {
          Sum left[kThreadRows], right[kThreadColumns];
#pragma unroll
          for (int i = 0; i < kThreadRows; ++i) left[i] = x[i];
#pragma unroll
          for (int j = 0; j < kThreadColumns; ++j) right[j] = y[Tile::column(thread_n, j)];
#pragma unroll
          for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
            for (int j = 0; j < kThreadColumns; ++j) run[i][j] += left[i] * right[j];
          }
          x += Tile::kSlices * Tile::kRowPitch;
          y += Tile::kSlices * Tile::kColumnPitch;
        }
        length += kDepth / Tile::kSlices;
        if (kFolds && length >= in.run_length) {
          length = 0;
#pragma unroll
          for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
            for (int j = 0; j < kThreadColumns; ++j) {
              sum[i][j] += run[i][j];
              run[i][j] = 0;
            }
          }
        }
      }
      if (item >= end) break;
      ptx::wait_for_all_copies();
    }

    Sum* const partial =
        in.partials + part * in.elements + group * in.weight_steps.group + row_begin * in.weight_steps.input_channel;
    if constexpr (Tile::kSlices == 1) {
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i) {
        const int m = thread_m * kThreadRows + i;
#pragma unroll
        for (int j = 0; j < kThreadColumns; ++j) {
          const int n = Tile::column(thread_n, j);
          if (m < rows && n < columns) {
            partial[m * in.weight_steps.input_channel + column_weight[n]] = kFolds ? sum[i][j] + run[i][j] : run[i][j];
          }
        }
      }
    } else {
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i) {
        const int m = thread_m * kThreadRows + i;
#pragma unroll
        for (int j = 0; j < kThreadColumns; ++j) {
          stages[(slice * kRows + m) * kColumns + Tile::column(thread_n, j)] =
              kFolds ? sum[i][j] + run[i][j] : run[i][j];
        }
      }
      __syncthreads();
      for (int i = thread; i < rows * kColumns; i += kThreads) {
        const int m = i / kColumns, n = i % kColumns;
        if (n >= columns) continue;
        Sum result = 0;
        for (int s = 0; s < Tile::kSlices; ++s) result += stages[s * kRows * kColumns + i];
        partial[m * in.weight_steps.input_channel + column_weight[n]] = result;
      }
    }
    __syncthreads();
  }
}

template <class T, class Index, class Tile>
void launch_reduce(const Problem& problem, int64_t parts, const T* grad_output, const T* input,
                   Accumulator<T>* partials, cudaStream_t stream) {
  ReduceArguments<T, Index> arguments{Geometry<Index>(problem)};
  arguments.grad_output = grad_output;
  arguments.input = input;
  arguments.partials = partials;
  arguments.input_steps = VolumeSteps(problem.layout, problem.in_channels, problem.input_voxels());
  arguments.output_steps = VolumeSteps(problem.layout, problem.out_channels, problem.output_voxels());
  arguments.weight_steps = WeightSteps(problem);
  arguments.by_input_voxels = Divisor<Index>(problem.input_voxels());
  arguments.by_output_channels = Divisor<Index>(problem.group_out_channels());
  arguments.by_taps = Divisor<Index>(problem.taps());
  arguments.parts = parts;
  arguments.groups = problem.groups;
  arguments.input_channels = static_cast<int>(problem.group_in_channels());
  arguments.output_channels = static_cast<int>(problem.group_out_channels());
  arguments.vectors = problem.layout == Layout::ndhwc && arguments.output_channels % 4 == 0 &&
                      reinterpret_cast<uintptr_t>(grad_output) % (4 * sizeof(T)) == 0;
  const int64_t columns = problem.group_out_channels() * problem.taps();
  arguments.columns = static_cast<Index>(columns);
  arguments.row_tiles = (arguments.input_channels + Tile::kRows - 1) / Tile::kRows;
  arguments.column_tiles = (columns + Tile::kColumns - 1) / Tile::kColumns;
  const int64_t items = problem.batch * problem.input_voxels();
  arguments.items = static_cast<Index>(items);
  arguments.share = static_cast<Index>((items + parts - 1) / parts);
  arguments.run_length = run_length<T>(arguments.share / Tile::kSlices, kRunLength);
  arguments.elements = problem.weight_elements();
  const int64_t blocks = parts * arguments.groups * arguments.row_tiles * arguments.column_tiles;
  constexpr size_t kSharedBytes = Tile::kBufferBytes + 2 * Tile::kDepth * sizeof(VoxelEntry<Index>) +
                                  Tile::kColumns * (sizeof(ColumnEntry<Index>) + sizeof(Index));
  static_assert(kSharedBytes <= kMostSharedBytes, "the oldest GPUs have no more");
  launch("simt reduction", reduce_tiles<T, Index, Tile>, grid_of(blocks), Tile::kThreads, kSharedBytes, stream,
         arguments);
}

}  // namespace

template <class T>
void gather_simt(const Problem& problem, Operator op, const T* source, const T* weight, const T* bias, T* destination,
                 cudaStream_t stream, const int* only_if) {
  if (only_if == nullptr && gather_narrow_groups<T>(problem, op, source, weight, bias, destination, stream)) return;
  if (problem.layout == Layout::ndhwc) {
    gather_simt<T, true>(problem, op, source, weight, bias, destination, stream, only_if);
  } else {
    gather_simt<T, false>(problem, op, source, weight, bias, destination, stream, only_if);
  }
}

template <class T>
void reduce_simt(const Problem& problem, int64_t parts, const T* grad_output, const T* input, Accumulator<T>* partials,
                 cudaStream_t stream) {
  const auto launch = [&](auto index, auto tile) {
    launch_reduce<T, decltype(index), decltype(tile)>(problem, parts, grad_output, input, partials, stream);
  };
  const int64_t channels = problem.group_in_channels();
  if (!fits_32_bits(problem)) {
    launch(int64_t(), ReduceTile<T, 8, 32, 1>());
  } else if (channels <= 4) {
    launch(int32_t(), ReduceTile<T, 1, 16, 16>());
  } else if (channels <= 8) {
    launch(int32_t(), ReduceTile<T, 2, 16, 8>());
  } else if (channels <= 16) {
    launch(int32_t(), ReduceTile<T, 4, 16, 4>());
  } else if (channels <= 32 || (channels > 64 && channels % 64 != 0 && channels % 64 <= 32)) {
    launch(int32_t(), ReduceTile<T, 8, 32, 1>());
  } else {
    launch(int32_t(), ReduceTile<T, 16, 16, 1>());
  }
}

#define CONVT3D_INSTANTIATE(T)                                                                                     \
  template void gather_simt(const Problem&, Operator, const T*, const T*, const T*, T*, cudaStream_t, const int*); \
  template void reduce_simt(const Problem&, int64_t, const T*, const T*, Accumulator<T>*, cudaStream_t);
CONVT3D_INSTANTIATE(double)
CONVT3D_INSTANTIATE(float)
CONVT3D_INSTANTIATE(__half)
CONVT3D_INSTANTIATE(__nv_bfloat16)
#undef CONVT3D_INSTANTIATE

}  // namespace convt3d::direct
