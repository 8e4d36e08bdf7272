// What the kernels in plain CUDA share: the gather of direct/gather.h with its contacts in closed form, so that no
// table bounds kernel, stride or dilation, and where elements lie in memory.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "convt3d/convt3d.h"
#include "geometry.h"
#include "operands.h"

namespace convt3d::direct {

// The contacts of one residue along one axis: the i-th of `count` is tap + i * tap_step, at offset + i * offset_step.
template <class Index>
struct Contacts {
  Index tap = 0, tap_step = 0;
  Index offset = 0, offset_step = 0;
  Index count = 0;

  // Leaves those with lowest <= offset <= highest, where offsets rise or fall by `by_step`'s value.
  CONVT3D_HOST_DEVICE void clip(Index lowest, Index highest, const Divisor<Index>& by_step) {
    const bool rises = offset_step > 0;
    const Index step = by_step.value;
    const Index before = rises ? lowest - offset : offset - highest;
    const Index skipped = before > 0 ? by_step.quotient(before + step - 1) : 0;
    tap += skipped * tap_step;
    offset += skipped * offset_step;
    count -= skipped;
    const Index room = rises ? highest - offset : offset - lowest;
    count = room < 0 || count <= 0 ? 0 : smaller(count, by_step.quotient(room) + 1);
  }
};

// One axis of the gather, with blocks of one destination position.
template <class Index>
struct AxisGather {
  Axis<Index> axis;
  bool forward = true;
  Index destination = 1, source = 1;                // positions
  Index destination_stride = 1, source_stride = 1;  // S and M
  Index residues = 1;                               // those that hold any destination position
  Index positions = 1;                              // of q
  Divisor<Index> by_offset_step;                    // of neighbouring contacts

  AxisGather() = default;
  AxisGather(const Problem& problem, Operator op, int which)
      : axis(problem, which),
        forward(op == Operator::forward),
        destination(forward ? axis.output : axis.input),
        source(forward ? axis.input : axis.output),
        destination_stride(forward ? axis.stride : 1),
        source_stride(forward ? 1 : axis.stride),
        residues(smaller(destination_stride, destination)),
        positions((destination + destination_stride - 1) / destination_stride),
        by_offset_step(forward ? axis.index_step : axis.dilation) {}

  // The contacts of `residue` that reach a source from any q in [first, last].
  CONVT3D_HOST_DEVICE Contacts<Index> contacts(Index residue, Index first, Index last) const {
    Contacts<Index> contacts;
    if (forward) {
      contacts.tap = axis.first_tap(residue);
      if (contacts.tap >= axis.kernel) return contacts;
      contacts.tap_step = axis.tap_step;
      // The division leaves nothing over.
      contacts.offset = (residue + axis.padding - contacts.tap * axis.dilation) / axis.stride;
      contacts.offset_step = -axis.index_step;
      contacts.count = axis.by_tap_step.quotient(axis.kernel - 1 - contacts.tap) + 1;
    } else {
      contacts.tap_step = 1;
      contacts.offset = residue * axis.stride - axis.padding;
      contacts.offset_step = axis.dilation;
      contacts.count = axis.kernel;
    }
    contacts.clip(-source_stride * last, source - 1 - source_stride * first, by_offset_step);
    return contacts;
  }
};

// What neighbours lie apart, in elements.
struct VolumeSteps {
  int64_t sample = 0, channel = 0, voxel = 0;

  VolumeSteps() = default;
  VolumeSteps(Layout layout, int64_t channels, int64_t voxels)
      : sample(channels * voxels),
        channel(layout == Layout::ncdhw ? voxels : 1),
        voxel(layout == Layout::ncdhw ? 1 : channels) {}
};

struct WeightSteps {
  int64_t group = 0, input_channel = 0, output_channel = 0, tap = 0;

  WeightSteps() = default;
  explicit WeightSteps(const Problem& problem)
      : group(problem.group_in_channels() * problem.group_out_channels() * problem.taps()),
        input_channel(problem.group_out_channels() * problem.taps()),
        output_channel(problem.layout == Layout::ncdhw ? problem.taps() : 1),
        tap(problem.layout == Layout::ncdhw ? 1 : problem.group_out_channels()) {}
};

// How many of `products` a running sum takes before it is folded into a second one. In float32 about the square root of
// them all, as a sum's error grows with the root of its length and both are to be short; `bound` for the other types,
// of which double has no need and half rounds its results far more coarsely.
template <class T>
int run_length(int64_t products, int bound) {
  if (!std::is_same_v<T, float>) return bound;
  int length = 16;
  while (int64_t{length} * length < products) length *= 2;
  return length;
}

// Forward or grad_input, where a group has at most four destination channels and the weights of one fit beside the
// sums: bound by memory, so not padded to the tiles of gather_simt. False for the geometries that it is not compiled
// for, or whose tensors take 64-bit indices.
template <class T>
bool gather_narrow_groups(const Problem& problem, Operator op, const T* source, const T* weight, const T* bias,
                          T* destination, cudaStream_t stream);

// Forward of half types' depthwise layers on tensor cores, from compute capability 8.0 on. False for the geometries
// that it does not suit.
template <class T>
bool forward_by_bands(const Problem& problem, const Target& target, const T* source, const T* weight, const T* bias,
                      T* destination, cudaStream_t stream);

// The same for grad_input, on compute capability 9.0.
template <class T>
bool grad_input_by_bands(const Problem& problem, const Target& target, const T* grad_output, const T* weight,
                         T* grad_input, cudaStream_t stream);

// Depthwise in every geometry and layout.
template <class T>
void gather_depthwise_any(const Problem& problem, Operator op, const T* source, const T* weight, const T* bias,
                          T* destination, cudaStream_t stream);
template <class T>
void reduce_depthwise_any(const Problem& problem, int64_t parts, const T* grad_output, const T* input,
                          Accumulator<T>* partials, cudaStream_t stream);

// Whether 32-bit indices reach every voxel of a volume, times the channels where those lie between voxels.
inline bool volumes_fit_32_bits(const Problem& problem) {
  const int64_t between = problem.layout == Layout::ncdhw ? 1 : std::max(problem.in_channels, problem.out_channels);
  return Geometry<int32_t>::fits(problem) && std::max(problem.in_channels, problem.out_channels) < (int64_t{1} << 30) &&
         std::max(problem.input_voxels(), problem.output_voxels()) * between < (int64_t{1} << 30);
}

// More blocks than these go round in a loop.
constexpr int64_t kMostBlocks = int64_t{1} << 30;
inline unsigned grid_of(int64_t blocks) { return static_cast<unsigned>(std::min(blocks, kMostBlocks)); }

// The size of one of as few equal parts as have at most `most` each, of which the last may be smaller.
template <class Index>
Index equal_share(Index all, Index most) {
  return ceil_divide(all, ceil_divide(all, most));
}

}  // namespace convt3d::direct
