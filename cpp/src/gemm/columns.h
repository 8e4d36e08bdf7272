// The column matrix, and the part of a volume it is made from or summed into.
//
// A block holds the columns of some samples, output channels and input voxels:
//   NCDHW  [sample][channel][tap][voxel]
//   NDHWC  [group][sample][voxel][tap][channel of the group]
#pragma once

#include <cstdint>

#include "convt3d/problem.h"
#include "operands.h"

namespace convt3d::gemm {

struct ColumnBlock {
  Layout layout = Layout::ncdhw;
  int64_t taps = 1;
  int64_t sample_begin = 0, samples = 0;
  int64_t channel_begin = 0, channels = 0;  // of all output channels
  int64_t group_channels = 1;               // channels of one group in the block: all of the group's, or a part
  int64_t voxel_begin = 0, voxels = 0;      // of one sample's input voxels, in row-major order

  int64_t groups() const { return channels / group_channels; }
  int64_t elements() const { return samples * channels * taps * voxels; }
  int64_t rows() const { return samples * voxels; }  // of the NDHWC matrix
};

// Element strides between the matrices of a block, one per sample and group, and between the rows of one matrix:
// [channel and tap, voxel] in NCDHW, [voxel, tap and channel] in NDHWC.
struct ColumnStrides {
  int64_t row, sample, group;

  static ColumnStrides of(const ColumnBlock& block) {
    const int64_t matrix = block.group_channels * block.taps * block.voxels;
    if (block.layout == Layout::ncdhw) return {block.voxels, block.groups() * matrix, matrix};
    return {block.taps * block.group_channels, matrix, block.samples * matrix};
  }

  // Of a pointwise problem, whose column matrix is the output volume itself.
  static ColumnStrides of_output(const Problem& problem) {
    const int64_t voxels = problem.input_voxels(), channels = problem.out_channels;
    if (problem.layout == Layout::ncdhw) return {voxels, channels * voxels, problem.group_out_channels() * voxels};
    return {channels, voxels * channels, problem.group_out_channels()};
  }
};

}  // namespace convt3d::gemm
