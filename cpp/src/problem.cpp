#include "convt3d/problem.h"

#include <algorithm>
#include <numeric>
#include <sstream>

namespace convt3d {
namespace {

constexpr const char* kAxisName[3] = {"depth", "height", "width"};

// Keeps every product of two parameters inside 64 bits.
constexpr int64_t kParameterLimit = int64_t{1} << 31;

template <class... Parts>
[[noreturn]] void reject(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw InvalidProblem(message.str());
}

std::string text(const Extent& extent) {
  std::ostringstream out;
  out << '(' << extent[0] << ", " << extent[1] << ", " << extent[2] << ')';
  return out.str();
}

// Throws unless the factors' product fits in 64 bits.
void check_product(std::initializer_list<int64_t> factors, const char* what, const Problem& problem) {
  int64_t product = 1;
  for (const int64_t factor : factors) {
    if (__builtin_mul_overflow(product, factor, &product)) {
      reject(what, " overflows 64 bits: got batch ", problem.batch, ", ", problem.in_channels, " channels in and ",
             problem.out_channels, " out, input ", text(problem.input), ", kernel ", text(problem.kernel), ", stride ",
             text(problem.stride), ", padding ", text(problem.padding), ", dilation ", text(problem.dilation));
    }
  }
}

int64_t checked_output(const Problem& problem, int axis) {
  int64_t reach = 0, span = 0, crop = 0, size = 0;
  const bool overflow = __builtin_mul_overflow(problem.input[axis] - 1, problem.stride[axis], &reach) ||
                        __builtin_mul_overflow(problem.dilation[axis], problem.kernel[axis] - 1, &span) ||
                        __builtin_mul_overflow(problem.padding[axis], int64_t{2}, &crop) ||
                        __builtin_add_overflow(reach, span, &size) ||
                        __builtin_add_overflow(size, problem.output_padding[axis] + 1, &size) ||
                        __builtin_sub_overflow(size, crop, &size);
  if (overflow) {
    reject("output ", kAxisName[axis], " overflows 64 bits for input ", problem.input[axis], ", kernel ",
           problem.kernel[axis], ", stride ", problem.stride[axis], ", padding ", problem.padding[axis], ", dilation ",
           problem.dilation[axis]);
  }
  return size;
}

}  // namespace

int64_t element_size(DataType dtype) {
  switch (dtype) {
    case DataType::float64:
      return 8;
    case DataType::float32:
      return 4;
    case DataType::float16:
    case DataType::bfloat16:
      return 2;
  }
  reject("dtype must be float64, float32, float16 or bfloat16");
}

void Problem::validate() const {
  if (batch < 0) reject("input's batch size must not be negative, got ", batch);
  if (groups < 1) reject("non-positive groups is not supported: groups must be at least 1, got ", groups);
  if (in_channels < 1) reject("input's channels must be at least 1, got ", in_channels);
  if (out_channels < 1) reject("weight's output channels must be at least 1, got ", out_channels);
  if (in_channels % groups != 0) {
    reject("groups must divide the input's channels: got groups=", groups, " and ", in_channels, " channels");
  }
  if (out_channels % groups != 0) {
    reject("groups must divide the output's channels: got groups=", groups, " and ", out_channels, " channels");
  }
  for (int axis = 0; axis < 3; ++axis) {
    const char* name = kAxisName[axis];
    if (input[axis] < 1) {
      reject("input's ", name, " must be at least 1 (only the batch may be empty), got input size ", text(input));
    }
    if (kernel[axis] < 1) reject("weight's kernel ", name, " must be at least 1, got kernel size ", text(kernel));
    if (stride[axis] < 1) reject("non-positive stride is not supported: stride must be at least 1, got ", text(stride));
    if (dilation[axis] < 1) {
      reject("non-positive dilation is not supported: dilation must be at least 1, got ", text(dilation));
    }
    if (padding[axis] < 0) reject("negative padding is not supported: got padding ", text(padding));
    if (output_padding[axis] < 0) {
      reject("negative output_padding is not supported: got output_padding ", text(output_padding));
    }
    if (std::max({stride[axis], dilation[axis], padding[axis]}) >= kParameterLimit) {
      reject("stride, dilation and padding must be below 2^31: got stride ", text(stride), ", dilation ",
             text(dilation), ", padding ", text(padding));
    }
    if (output_padding[axis] >= stride[axis] && output_padding[axis] >= dilation[axis]) {
      reject("output_padding must be smaller than either stride or dilation in every dimension: got output_padding ",
             text(output_padding), ", stride ", text(stride), ", dilation ", text(dilation));
    }
    if (checked_output(*this, axis) < 1) {
      reject("output size must be at least 1 in every dimension, but its ", name, " would be ",
             checked_output(*this, axis), ": input ", text(input), ", kernel ", text(kernel), ", stride ", text(stride),
             ", padding ", text(padding), ", output_padding ", text(output_padding), ", dilation ", text(dilation));
    }
  }
  const Extent out = output();
  // The factor 8, the widest element, makes every byte count safe as well.
  const int64_t samples = std::max<int64_t>(batch, 1);  // one sample's sizes are asked for even where there is none
  check_product({samples, in_channels, input[0], input[1], input[2], 8}, "input's size in bytes", *this);
  check_product({samples, out_channels, out[0], out[1], out[2], 8}, "output's size in bytes", *this);
  check_product({in_channels, out_channels / groups, kernel[0], kernel[1], kernel[2], 8}, "weight's size in bytes",
                *this);
  check_product({out_channels, kernel[0], kernel[1], kernel[2], input[0], input[1], input[2], 8},
                "one sample's column matrix", *this);
}

Extent Problem::output() const {
  return {checked_output(*this, 0), checked_output(*this, 1), checked_output(*this, 2)};
}

int64_t Problem::output_voxels() const {
  const Extent out = output();
  return out[0] * out[1] * out[2];
}

bool Problem::is_pointwise() const {
  const Extent one{1, 1, 1}, zero{0, 0, 0};
  return kernel == one && stride == one && padding == zero && output_padding == zero;
}

bool Problem::has_single_contributions() const {
  for (int axis = 0; axis < 3; ++axis) {
    // Taps a whole stride / gcd(stride, dilation) apart are the ones that share an output voxel.
    const int64_t tap_step = stride[axis] / std::gcd(stride[axis], dilation[axis]);
    if (kernel[axis] > tap_step) return false;
  }
  return true;
}

}  // namespace convt3d
