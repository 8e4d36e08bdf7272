// The GEMM path, written once for every backend: which matrices are multiplied, in which pieces, and where they lie.
//
// A Backend offers
//   gemm(Gemm, a, b, c)                                  a batched product
//   col2vol(problem, block, planes, columns, bias, out)  sums columns into the output planes [planes.begin, planes.end)
//   vol2col(problem, block, volume, columns)             copies the output-shaped volume into columns
//   fill_bias(problem, bias, volume)                     sets every voxel to its channel's bias
//   sum_partials(partials, count, elements, result)      adds equal-sized arrays in a fixed order
//   bias_partials(problem, partials, volume, sums)       per-channel sums of parts of the volume
//   clear(pointer, bytes)                                sets memory to zero
#pragma once

#include <algorithm>

#include "gemm/columns.h"
#include "gemm/gemm.h"
#include "gemm/plan.h"
#include "geometry.h"
#include "operands.h"
#include "workspace.h"

namespace convt3d::gemm {

template <class Backend, class T>
class Driver {
 public:
  Driver(const Backend& backend, const Plan& plan, void* workspace)
      : backend_(backend),
        plan_(plan),
        problem_(plan.problem),
        input_strides_(problem_.layout, problem_.in_channels, problem_.input_voxels()),
        workspace_(static_cast<char*>(workspace)),
        layout_(plan) {}

  template <class Column>
  void forward(const T* input, const T* weight, const T* bias, T* output) const {
    if (problem_.batch == 0) return;
    if (problem_.is_pointwise()) {
      if (bias != nullptr) backend_.fill_bias(problem_, bias, output);
      multiply_columns(whole_block(), ColumnStrides::of_output(problem_), input, weight, output, bias != nullptr);
      return;
    }
    Column* columns = reinterpret_cast<Column*>(workspace_ + layout_.columns);
    const Axis<int64_t> depth(problem_, 0);
    const int64_t plane = problem_.input[1] * problem_.input[2];
    const int64_t group = problem_.group_out_channels();
    // A block of channels is whole groups or lies inside one.
    const int64_t span = std::max(plan_.channels, group);
    for (int64_t sample = 0; sample < problem_.batch; sample += plan_.samples) {
      for (int64_t first = 0; first < problem_.out_channels; first += span) {
        const int64_t last = std::min(first + span, problem_.out_channels);
        for (int64_t channel = first; channel < last; channel += plan_.channels) {
          for (int64_t begin = 0; begin < depth.output; begin += plan_.output_planes) {
            const Range<int64_t> planes{begin, std::min(begin + plan_.output_planes, depth.output)};
            // Several samples at once are whole ones, so that their NDHWC rows stay adjacent.
            const Range<int64_t> inputs =
                plan_.samples > 1 ? Range<int64_t>{0, depth.input} : depth.inputs_reaching(planes);
            ColumnBlock block = whole_block();
            block.sample_begin = sample;
            block.samples = std::min(plan_.samples, problem_.batch - sample);
            block.channel_begin = channel;
            block.channels = std::min(plan_.channels, last - channel);
            block.group_channels = std::min(block.channels, group);
            block.voxel_begin = inputs.begin * plane;
            block.voxels = (inputs.end - inputs.begin) * plane;
            if (block.voxels > 0) {
              multiply_columns(block, ColumnStrides::of(block), input, weight, columns, false);
            }
            backend_.col2vol(problem_, block, planes, columns, bias, output);
          }
        }
      }
    }
  }

  // Either of the gradients may be null, and is then not made.
  void gradients(const T* grad_output, const T* input, const T* weight, T* grad_input, T* grad_weight) const {
    if (problem_.batch == 0) {
      if (grad_weight != nullptr) backend_.clear(grad_weight, problem_.weight_elements() * sizeof(T));
      return;
    }
    bool first = true;
    const auto consume = [&](const ColumnBlock& block, const ColumnStrides& strides, const T* columns) {
      if (grad_input != nullptr) multiply_grad_input(block, strides, columns, weight, grad_input);
      if (grad_weight != nullptr)
        multiply_grad_weight(block, strides, columns, input, partial_sums(grad_weight), first);
      first = false;
    };
    if (problem_.is_pointwise()) {
      consume(whole_block(), ColumnStrides::of_output(problem_), grad_output);
    } else {
      T* columns = reinterpret_cast<T*>(workspace_ + layout_.columns);
      for (int64_t sample = 0; sample < problem_.batch; sample += plan_.samples) {
        for (int64_t voxel = 0; voxel < problem_.input_voxels(); voxel += plan_.voxels) {
          ColumnBlock block = whole_block();
          block.sample_begin = sample;
          block.samples = std::min(plan_.samples, problem_.batch - sample);
          block.voxel_begin = voxel;
          block.voxels = std::min(plan_.voxels, problem_.input_voxels() - voxel);
          backend_.vol2col(problem_, block, grad_output, columns);
          consume(block, ColumnStrides::of(block), columns);
        }
      }
    }
    if (grad_weight != nullptr && !sums_in_place()) {
      backend_.sum_partials(partial_sums(grad_weight), plan_.partials, problem_.weight_elements(), grad_weight);
    }
  }

  void grad_bias(const T* grad_output, T* result) const {
    if (problem_.batch == 0) return backend_.clear(result, problem_.out_channels * sizeof(T));
    Sum* partials = reinterpret_cast<Sum*>(workspace_ + layout_.partials);
    backend_.bias_partials(problem_, plan_.partials, grad_output, partials);
    backend_.sum_partials(partials, plan_.partials, problem_.out_channels, result);
  }

 private:
  using Sum = Accumulator<T>;

  bool sums_in_place() const { return plan_.partial_bytes == 0; }

  Sum* partial_sums(T* grad_weight) const {
    return reinterpret_cast<Sum*>(sums_in_place() ? reinterpret_cast<char*>(grad_weight)
                                                  : workspace_ + layout_.partials);
  }

  ColumnBlock whole_block() const {
    ColumnBlock block;
    block.layout = problem_.layout;
    block.taps = problem_.taps();
    block.samples = problem_.batch;
    block.channels = problem_.out_channels;
    block.group_channels = problem_.group_out_channels();
    block.voxels = problem_.input_voxels();
    return block;
  }

  // Elements of one group's weights, and of one input's channels of one group.
  int64_t group_weights() const { return problem_.weight_elements() / problem_.groups; }
  int64_t group_inputs() const { return problem_.group_in_channels() * input_strides_.channel; }
  int64_t weight_row() const { return problem_.group_out_channels() * problem_.taps(); }

  int64_t first_group(const ColumnBlock& block) const { return block.channel_begin / problem_.group_out_channels(); }

  int64_t input_offset(const ColumnBlock& block) const {
    return input_strides_.offset(block.sample_begin, first_group(block) * problem_.group_in_channels(),
                                 block.voxel_begin);
  }

  // columns = weight^T @ input, per sample and group.
  template <class Column>
  void multiply_columns(const ColumnBlock& block, const ColumnStrides& strides, const T* input, const T* weight,
                        Column* columns, bool accumulate) const {
    const int64_t channel = block.channel_begin % problem_.group_out_channels();
    const T* group_weight = weight + first_group(block) * group_weights();
    const T* group_input = input + input_offset(block);
    Gemm gemm;
    gemm.k = problem_.group_in_channels();
    gemm.accumulate = accumulate;
    gemm.ldc = strides.row;
    const BatchLevel groups{block.groups(), group_weights(), group_inputs(), strides.group};
    if (problem_.layout == Layout::ncdhw) {
      gemm.m = block.group_channels * block.taps;
      gemm.n = block.voxels;
      gemm.transpose_a = true;
      gemm.lda = weight_row();
      gemm.ldb = input_strides_.channel;
      const BatchLevel samples{block.samples, 0, input_strides_.sample, strides.sample};
      run_batches(backend_, gemm, samples, groups, group_weight + channel * block.taps, group_input, columns);
      return;
    }
    gemm.m = block.rows();
    gemm.n = weight_row();
    gemm.lda = input_strides_.voxel;
    gemm.ldb = weight_row();
    if (block.group_channels == problem_.group_out_channels()) {
      run_batches(backend_, gemm, {groups.count, groups.stride_b, groups.stride_a, groups.stride_c}, BatchLevel{},
                  group_input, group_weight, columns);
    } else {
      // Part of a group's channels: their weights are not adjacent across taps, so every tap is a product of its own.
      gemm.n = block.group_channels;
      const BatchLevel taps{block.taps, 0, problem_.group_out_channels(), block.group_channels};
      run_batches(backend_, gemm, taps, BatchLevel{}, group_input, group_weight + channel, columns);
    }
  }

  // grad_input = weight @ columns, per sample and group.
  void multiply_grad_input(const ColumnBlock& block, const ColumnStrides& strides, const T* columns, const T* weight,
                           T* grad_input) const {
    T* result = grad_input + input_offset(block);
    Gemm gemm;
    gemm.k = weight_row();
    if (problem_.layout == Layout::ncdhw) {
      gemm.m = problem_.group_in_channels();
      gemm.n = block.voxels;
      gemm.lda = weight_row();
      gemm.ldb = strides.row;
      gemm.ldc = input_strides_.channel;
      const BatchLevel samples{block.samples, 0, strides.sample, input_strides_.sample};
      const BatchLevel groups{block.groups(), group_weights(), strides.group, group_inputs()};
      run_batches(backend_, gemm, samples, groups, weight, columns, result);
    } else {
      gemm.m = block.rows();
      gemm.n = problem_.group_in_channels();
      gemm.transpose_b = true;
      gemm.lda = strides.row;
      gemm.ldb = weight_row();
      gemm.ldc = input_strides_.voxel;
      const BatchLevel groups{block.groups(), strides.group, group_weights(), group_inputs()};
      run_batches(backend_, gemm, groups, BatchLevel{}, columns, weight, result);
    }
  }

  // The block's share of grad_weight = input @ columns^T, added to the partial sums unless it is the first.
  void multiply_grad_weight(const ColumnBlock& block, const ColumnStrides& strides, const T* columns, const T* input,
                            Sum* sums, bool first) const {
    const bool channels_first = problem_.layout == Layout::ncdhw;
    const T* operand = input + input_offset(block);
    Gemm gemm;
    gemm.m = problem_.group_in_channels();
    gemm.n = weight_row();
    gemm.lda = channels_first ? input_strides_.channel : input_strides_.voxel;
    gemm.ldb = strides.row;
    gemm.ldc = weight_row();
    gemm.transpose_a = !channels_first;
    gemm.transpose_b = channels_first;
    const BatchLevel groups{block.groups(), group_inputs(), strides.group, group_weights()};
    // What one step along the reduction, a voxel, moves in either operand.
    const int64_t step_a = channels_first ? 1 : gemm.lda, step_b = channels_first ? 1 : gemm.ldb;
    // Adds operand[begin...] @ columns[begin...]^T, in `parts` parts of `length` voxels, to as many partial sums, and
    // no more than `plan.reduction` voxels of a part at a time.
    const auto reduce = [&](int64_t sample, int64_t samples, int64_t begin, int64_t parts, int64_t length,
                            bool accumulate) {
      const BatchLevel shares =
          samples > 1 ? BatchLevel{samples, input_strides_.sample, strides.sample, problem_.weight_elements()}
                      : BatchLevel{parts, length * step_a, length * step_b, problem_.weight_elements()};
      for (int64_t done = 0; done < length; done += plan_.reduction) {
        gemm.k = std::min(plan_.reduction, length - done);
        gemm.accumulate = accumulate || done > 0;
        run_batches(backend_, gemm, shares, groups, operand + sample * input_strides_.sample + (begin + done) * step_a,
                    columns + sample * strides.sample + (begin + done) * step_b, sums);
      }
    };

    if (channels_first && plan_.splits == 1) {
      // Samples share the reduction, `partials` at a time.
      for (int64_t sample = 0; sample < block.samples; sample += plan_.partials) {
        const int64_t samples = std::min(plan_.partials, block.samples - sample);
        reduce(sample, samples, 0, 1, block.voxels, !(first && sample == 0));
      }
      return;
    }
    // Runs of voxels share it: of one sample after the other, or of all rows at once where samples are adjacent.
    const int64_t runs = channels_first ? block.samples : 1;
    const int64_t voxels = channels_first ? block.voxels : block.rows();
    // Parts of whole 64 voxels stay aligned; what is left over is added to the first sum.
    const int64_t share = voxels / plan_.splits;
    const int64_t length = plan_.splits == 1 || share < 64 ? share : share / 64 * 64;
    for (int64_t run = 0; run < runs; ++run) {
      const bool accumulate = !(first && run == 0);
      if (length > 0) reduce(run, 1, 0, plan_.splits, length, accumulate);
      const int64_t done = length * plan_.splits;
      if (done < voxels) reduce(run, 1, done, 1, voxels - done, true);
    }
  }

  const Backend& backend_;
  const Plan& plan_;
  const Problem& problem_;
  VolumeStrides input_strides_;
  char* workspace_;
  WorkspaceLayout layout_;
};

}  // namespace convt3d::gemm
