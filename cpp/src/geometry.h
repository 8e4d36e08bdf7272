// The arithmetic of a transposed convolution along one axis, shared by the CPU loops and the CUDA kernels.
//
// Input voxel i and tap j meet output voxel o where o = i * stride - padding + j * dilation. With g = gcd(stride,
// dilation), tap j reaches o only if (o + padding - j * dilation) % stride == 0. If some tap does, the first one, j0,
// lies in [0, stride / g), and the others follow every stride / g taps, while the input index falls by dilation / g.
#pragma once

#include <cstdint>
#include <limits>
#include <numeric>
#include <utility>

#include "convt3d/problem.h"

#ifdef __CUDACC__
#define CONVT3D_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define CONVT3D_HOST_DEVICE inline
#endif

namespace convt3d {

// A divisor known only at run time. In 32 bits the device multiplies by its reciprocal (Granlund and Montgomery, 1994),
// which holds for every numerator below 2^31.
template <class Index>
struct Divisor {
  Index value = 1;

  Divisor() = default;
  explicit Divisor(int64_t divisor) : value(static_cast<Index>(divisor)) {}
  CONVT3D_HOST_DEVICE Index quotient(Index numerator) const { return numerator / value; }
};

template <>
struct Divisor<int32_t> {
  int32_t value = 1;
  uint32_t multiplier = 1;
  uint32_t shift = 0;

  Divisor() = default;
  explicit Divisor(int64_t divisor) : value(static_cast<int32_t>(divisor)) {
    while ((int64_t{1} << shift) < divisor) ++shift;
    const uint64_t excess = (uint64_t{1} << shift) - static_cast<uint64_t>(divisor);
    multiplier = static_cast<uint32_t>((excess << 32) / static_cast<uint64_t>(divisor) + 1);
  }
  CONVT3D_HOST_DEVICE int32_t quotient(int32_t numerator) const {
#ifdef __CUDA_ARCH__
    const uint32_t n = static_cast<uint32_t>(numerator);
    return static_cast<int32_t>((__umulhi(n, multiplier) + n) >> shift);
#else
    return numerator / value;
#endif
  }
};

// The taps that meet one output position: `count` of them, from `tap` upwards, reading inputs from `index` downwards.
template <class Index>
struct TapWalk {
  Index tap = 0;
  Index index = 0;
  Index count = 0;
};

// A half-open range.
template <class Index>
struct Range {
  Index begin = 0;
  Index end = 0;
};

template <class Index>
CONVT3D_HOST_DEVICE Index smaller(Index a, Index b) {
  return a < b ? a : b;
}

template <class Index>
CONVT3D_HOST_DEVICE Index larger(Index a, Index b) {
  return a > b ? a : b;
}

// Quotients rounded down and up, of any numerator by a positive divisor.
template <class Index>
CONVT3D_HOST_DEVICE Index floor_divide(Index numerator, Index divisor) {
  return numerator >= 0 ? numerator / divisor : -((-numerator + divisor - 1) / divisor);
}
template <class Index>
CONVT3D_HOST_DEVICE Index ceil_divide(Index numerator, Index divisor) {
  return -floor_divide(-numerator, divisor);
}

template <class Index>
struct Axis {
  Index input = 1, output = 1, kernel = 1, stride = 1, padding = 0, dilation = 1;
  Index tap_step = 1;        // stride / g
  Index index_step = 1;      // dilation / g
  Index inverse = 0;         // of index_step, modulo tap_step
  Divisor<Index> by_common;  // g
  Divisor<Index> by_stride;
  Divisor<Index> by_tap_step;
  Divisor<Index> by_index_step;

  Axis() = default;
  Axis(const Problem& problem, int axis)
      : input(static_cast<Index>(problem.input[axis])),
        output(static_cast<Index>(problem.output()[axis])),
        kernel(static_cast<Index>(problem.kernel[axis])),
        stride(static_cast<Index>(problem.stride[axis])),
        padding(static_cast<Index>(problem.padding[axis])),
        dilation(static_cast<Index>(problem.dilation[axis])) {
    const Index common = std::gcd(stride, dilation);
    tap_step = stride / common;
    index_step = dilation / common;
    by_common = Divisor<Index>(common);
    by_stride = Divisor<Index>(stride);
    by_tap_step = Divisor<Index>(tap_step);
    by_index_step = Divisor<Index>(index_step);
    inverse = static_cast<Index>(modular_inverse(index_step, tap_step));
  }

  // The output position that input `index` and `tap` meet, which may lie outside [0, output).
  CONVT3D_HOST_DEVICE Index output_at(Index index, Index tap) const {
    return index * stride - padding + tap * dilation;
  }

  // The most taps that meet any one output position.
  CONVT3D_HOST_DEVICE Index most_taps() const { return (kernel + tap_step - 1) / tap_step; }

  // The first of the taps that can meet output position `position`, which depends on (position + padding) % stride
  // alone; `kernel` or more where there is none.
  CONVT3D_HOST_DEVICE Index first_tap(Index position) const {
    const Index shifted = position + padding;
    const Index residue = shifted - by_stride.quotient(shifted) * stride;
    const Index reduced = by_common.quotient(residue);
    if (reduced * by_common.value != residue) return kernel;
    const Index product = reduced * inverse;
    return product - by_tap_step.quotient(product) * tap_step;
  }

  // The taps that meet output position `position`, none of them tried and discarded.
  CONVT3D_HOST_DEVICE TapWalk<Index> taps_at(Index position) const {
    TapWalk<Index> walk;
    Index tap = first_tap(position);
    if (tap >= kernel) return walk;
    // With position + padding = stride * quotient + residue, the difference below is a multiple of the stride, and not
    // negative.
    const Index quotient = by_stride.quotient(position + padding);
    const Index residue = position + padding - quotient * stride;
    Index index = quotient - by_stride.quotient(tap * dilation - residue);
    if (index >= input) {
      const Index skipped = by_index_step.quotient(index - input + index_step);
      index -= skipped * index_step;
      tap += skipped * tap_step;
    }
    if (tap >= kernel || index < 0) return walk;
    walk.tap = tap;
    walk.index = index;
    walk.count = smaller(by_tap_step.quotient(kernel - 1 - tap), by_index_step.quotient(index)) + 1;
    return walk;
  }

  // The inputs that `tap` takes to an output position inside the volume.
  CONVT3D_HOST_DEVICE Range<Index> inputs_of(Index tap) const {
    const Index shift = padding - tap * dilation;
    Range<Index> range;
    range.begin = larger(ceil_divide(shift, stride), Index{0});
    range.end = larger(smaller(floor_divide(output - 1 + shift, stride) + 1, input), range.begin);
    return range;
  }

  // The inputs that any tap takes to the output positions [positions.begin, positions.end).
  CONVT3D_HOST_DEVICE Range<Index> inputs_reaching(Range<Index> positions) const {
    Range<Index> range;
    range.begin = larger(ceil_divide(positions.begin + padding - (kernel - 1) * dilation, stride), Index{0});
    range.end = larger(smaller(floor_divide(positions.end - 1 + padding, stride) + 1, input), range.begin);
    return range;
  }

 private:
  // x with (value * x) % modulus == 1, by the extended Euclidean algorithm; 0 where modulus is 1.
  static int64_t modular_inverse(int64_t value, int64_t modulus) {
    int64_t remainder = modulus, next = value % modulus, coefficient = 0, next_coefficient = 1;
    while (next != 0) {
      const int64_t quotient = remainder / next;
      remainder -= quotient * next;
      std::swap(remainder, next);
      coefficient -= quotient * next_coefficient;
      std::swap(coefficient, next_coefficient);
    }
    return modulus == 1 ? 0 : (coefficient % modulus + modulus) % modulus;
  }
};

// The three axes, and the sizes that turn positions along them into offsets.
template <class Index>
struct Geometry {
  Axis<Index> depth, height, width;
  Index taps = 1;
  Index input_voxels = 1;
  Index output_voxels = 1;
  Divisor<Index> by_input_width, by_input_height, by_output_width, by_output_height, by_kernel_width, by_kernel_height;

  explicit Geometry(const Problem& problem)
      : depth(problem, 0),
        height(problem, 1),
        width(problem, 2),
        taps(static_cast<Index>(problem.taps())),
        input_voxels(static_cast<Index>(problem.input_voxels())),
        output_voxels(static_cast<Index>(problem.output_voxels())),
        by_input_width(width.input),
        by_input_height(height.input),
        by_output_width(width.output),
        by_output_height(height.output),
        by_kernel_width(width.kernel),
        by_kernel_height(height.kernel) {}

  // Whether every intermediate of the arithmetic above fits in Index.
  static bool fits(const Problem& problem) {
    constexpr int64_t kLimit = std::numeric_limits<Index>::max();
    const Extent output = problem.output();
    for (int axis = 0; axis < 3; ++axis) {
      const int64_t reach =
          output[axis] + problem.padding[axis] + problem.dilation[axis] * problem.kernel[axis] + problem.stride[axis];
      if (reach > kLimit / 2 || problem.stride[axis] > kLimit / problem.stride[axis]) return false;
    }
    // Rounded up to whole strides, as kernels that take an output row a stride at a time count them.
    const int64_t rounded = output[0] * (output[1] + problem.stride[1]) * (output[2] + problem.stride[2]);
    return problem.taps() * problem.input_voxels() <= kLimit / 2 && rounded <= kLimit / 2;
  }
};

}  // namespace convt3d
