// The one description of a transposed 3-D convolution. Every other part takes a Problem.
#pragma once

#include <array>
#include <cstdint>
#include <stdexcept>

namespace convt3d {

enum class DataType { float64, float32, float16, bfloat16 };

// How the volumes lie in memory. NCDHW: input (N, Cin, D, H, W), weight (Cin, Cout/G, kd, kh, kw).
// NDHWC: input (N, D, H, W, Cin), weight (Cin, kd, kh, kw, Cout/G); what PyTorch calls channels_last_3d.
enum class Layout { ncdhw, ndhwc };

// What float32 multiplications may round to. Other dtypes ignore it.
enum class Precision { ieee, tf32 };

using Extent = std::array<int64_t, 3>;  // depth, height, width

// A request that no convolution satisfies; its message names the argument, what was given and what is allowed.
class InvalidProblem : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct Problem {
  int64_t batch = 1;
  int64_t in_channels = 1;
  int64_t out_channels = 1;
  int64_t groups = 1;
  Extent input{1, 1, 1};
  Extent kernel{1, 1, 1};
  Extent stride{1, 1, 1};
  Extent padding{0, 0, 0};
  Extent output_padding{0, 0, 0};
  Extent dilation{1, 1, 1};
  Layout layout = Layout::ncdhw;
  DataType dtype = DataType::float32;
  Precision precision = Precision::ieee;

  // Throws InvalidProblem. The sizes below may be asked for only after it has passed.
  void validate() const;

  // (input - 1) * stride - 2 * padding + dilation * (kernel - 1) + output_padding + 1, per dimension.
  Extent output() const;

  int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  int64_t input_voxels() const { return input[0] * input[1] * input[2]; }
  int64_t output_voxels() const;
  int64_t group_in_channels() const { return in_channels / groups; }
  int64_t group_out_channels() const { return out_channels / groups; }
  int64_t input_elements() const { return batch * in_channels * input_voxels(); }
  int64_t weight_elements() const { return in_channels * group_out_channels() * taps(); }
  int64_t output_elements() const { return batch * out_channels * output_voxels(); }

  // Kernel 1, stride 1, nothing padded: the columns are the output volume itself.
  bool is_pointwise() const;

  // At most one (input voxel, tap) pair meets each output voxel, as where kernel = stride, so nothing is summed.
  bool has_single_contributions() const;
};

int64_t element_size(DataType dtype);

}  // namespace convt3d
