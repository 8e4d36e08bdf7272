// The transposed convolution by its definition, in double: every product of an input voxel and a tap, one at a time.
#pragma once

#include <cstdint>
#include <vector>

#include "convt3d/problem.h"

namespace convt3d::test {

// Where element (channel, voxel) of a sample lies, in the problem's layout.
inline int64_t volume_index(const Problem& problem, int64_t sample, int64_t channels, int64_t channel, int64_t voxels,
                            int64_t voxel) {
  return problem.layout == Layout::ncdhw ? (sample * channels + channel) * voxels + voxel
                                         : (sample * voxels + voxel) * channels + channel;
}

// Calls visit(index into input, index into weight, index into output) for every product of the convolution.
template <class Visit>
void for_each_product(const Problem& problem, const Visit& visit) {
  const Extent out = problem.output();
  const int64_t group_in = problem.group_in_channels(), group_out = problem.group_out_channels();
  const auto along = [&](int axis, int64_t index, int64_t tap) {
    return index * problem.stride[axis] - problem.padding[axis] + tap * problem.dilation[axis];
  };
  for (int64_t sample = 0; sample < problem.batch; ++sample) {
    for (int64_t from = 0; from < problem.in_channels; ++from) {
      for (int64_t to = 0; to < group_out; ++to) {
        for (int64_t voxel = 0; voxel < problem.input_voxels(); ++voxel) {
          for (int64_t tap = 0; tap < problem.taps(); ++tap) {
            const int64_t d =
                along(0, voxel / problem.input[2] / problem.input[1], tap / problem.kernel[2] / problem.kernel[1]);
            const int64_t h =
                along(1, voxel / problem.input[2] % problem.input[1], tap / problem.kernel[2] % problem.kernel[1]);
            const int64_t w = along(2, voxel % problem.input[2], tap % problem.kernel[2]);
            if (d < 0 || d >= out[0] || h < 0 || h >= out[1] || w < 0 || w >= out[2]) continue;
            visit(volume_index(problem, sample, problem.in_channels, from, problem.input_voxels(), voxel),
                  volume_index(problem, from, group_out, to, problem.taps(), tap),
                  volume_index(problem, sample, problem.out_channels, from / group_in * group_out + to,
                               problem.output_voxels(), (d * out[1] + h) * out[2] + w));
          }
        }
      }
    }
  }
}

// Calls visit(channel, index into output) for every output voxel.
template <class Visit>
void for_each_output(const Problem& problem, const Visit& visit) {
  const int64_t voxels = problem.output_voxels();
  for (int64_t sample = 0; sample < problem.batch; ++sample) {
    for (int64_t channel = 0; channel < problem.out_channels; ++channel) {
      for (int64_t voxel = 0; voxel < voxels; ++voxel) {
        visit(channel, volume_index(problem, sample, problem.out_channels, channel, voxels, voxel));
      }
    }
  }
}

// Results of the same names, from given inputs, weights, biases and output gradients.
struct Reference {
  std::vector<double> output, output_with_bias, grad_input, grad_weight, grad_bias;

  Reference(const Problem& problem, const std::vector<double>& input, const std::vector<double>& weight,
            const std::vector<double>& bias, const std::vector<double>& grad_output)
      : output(grad_output.size()), grad_input(input.size()), grad_weight(weight.size()), grad_bias(bias.size()) {
    for_each_product(problem, [&](int64_t i, int64_t w, int64_t o) {
      output[o] += input[i] * weight[w];
      grad_input[i] += grad_output[o] * weight[w];
      grad_weight[w] += grad_output[o] * input[i];
    });
    output_with_bias = output;
    for_each_output(problem, [&](int64_t channel, int64_t o) {
      output_with_bias[o] += bias[channel];
      grad_bias[channel] += grad_output[o];
    });
  }
};

}  // namespace convt3d::test
