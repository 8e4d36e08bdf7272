// col2vol, vol2col and the sums beside them, as loops over whole rows that one thread keeps in its cache.
#include <algorithm>
#include <vector>

#include "cpu/sums.h"
#include "gemm/cpu/backend.h"
#include "parallel.h"

namespace convt3d::gemm {
namespace {

using Indices = Geometry<int64_t>;

// Calls visit(tap, voxel) for every input line that meets a row of outputs: the line's first voxel within the block,
// and the first of the width taps that it is met by.
template <class Visit>
void visit_lines(const Indices& geometry, const ColumnBlock& block, const TapWalk<int64_t>& depth,
                 const TapWalk<int64_t>& height, const Visit& visit) {
  for (int64_t a = 0; a < depth.count; ++a) {
    const int64_t tap_d = depth.tap + a * geometry.depth.tap_step;
    const int64_t plane = depth.index - a * geometry.depth.index_step;
    for (int64_t b = 0; b < height.count; ++b) {
      const int64_t tap_h = height.tap + b * geometry.height.tap_step;
      const int64_t line = height.index - b * geometry.height.index_step;
      visit((tap_d * geometry.height.kernel + tap_h) * geometry.width.kernel,
            (plane * geometry.height.input + line) * geometry.width.input - block.voxel_begin);
    }
  }
}

// What is the same for every row of outputs. With output = residue + stride * m, a width tap adds the columns of inputs
// m - shift for the m in a range; a residue's taps follow each other every tap_step from its first.
struct RowTaps {
  std::vector<int64_t> first;  // by residue
  std::vector<int64_t> shift;  // by tap, like `range`
  std::vector<Range<int64_t>> range;

  explicit RowTaps(const Axis<int64_t>& width) : shift(width.kernel), range(width.kernel) {
    for (int64_t residue = 0; residue < std::min(width.stride, width.output); ++residue) {
      first.push_back(width.first_tap(residue));
      for (int64_t tap = first.back(); tap < width.kernel; tap += width.tap_step) {
        const Range<int64_t> inputs = width.inputs_of(tap);
        shift[tap] = (width.output_at(0, tap) - residue) / width.stride;
        range[tap] = {inputs.begin + shift[tap], inputs.end + shift[tap]};
      }
    }
  }
};

// Sums one row of output voxels of one channel. `taps` holds the channel's columns, [tap][voxel of the block]. The
// outputs of one residue of the stride add up runs of neighbouring columns, so the sums are vectors, and each is stored
// once.
template <class T>
void sum_row(const Indices& geometry, const ColumnBlock& block, const RowTaps& row_taps, const TapWalk<int64_t>& depth,
             const TapWalk<int64_t>& height, const T* taps, T bias, T* row) {
  constexpr int64_t kRun = 256;
  T sums[kRun];
  const Axis<int64_t>& width = geometry.width;
  const int64_t residues = static_cast<int64_t>(row_taps.first.size());
  for (int64_t residue = 0; residue < residues; ++residue) {
    const int64_t outputs = (width.output - residue + width.stride - 1) / width.stride;
    for (int64_t begin = 0; begin < outputs; begin += kRun) {
      const int64_t end = std::min(begin + kRun, outputs);
      std::fill(sums, sums + (end - begin), bias);
      visit_lines(geometry, block, depth, height, [&](int64_t tap, int64_t voxel) {
        for (int64_t tap_w = row_taps.first[residue]; tap_w < width.kernel; tap_w += width.tap_step) {
          const T* source = taps + (tap + tap_w) * block.voxels + voxel - row_taps.shift[tap_w];
          const int64_t stop = std::min(row_taps.range[tap_w].end, end);
          for (int64_t m = std::max(row_taps.range[tap_w].begin, begin); m < stop; ++m) sums[m - begin] += source[m];
        }
      });
      T* target = row + residue + begin * width.stride;
      for (int64_t m = 0; m < end - begin; ++m) target[m * width.stride] = sums[m];
    }
  }
}

// Sums one output voxel over all channels of the block. `columns` begins at the block's sample.
template <class T>
void sum_voxel(const Indices& geometry, const ColumnBlock& block, const TapWalk<int64_t>& depth,
               const TapWalk<int64_t>& height, const TapWalk<int64_t>& width, const T* columns, const T* bias,
               T* target) {
  const ColumnStrides strides = ColumnStrides::of(block);
  if (bias == nullptr) {
    std::fill(target, target + block.channels, T{0});
  } else {
    std::copy(bias, bias + block.channels, target);
  }
  visit_lines(geometry, block, depth, height, [&](int64_t tap, int64_t voxel) {
    for (int64_t c = 0; c < width.count; ++c) {
      const int64_t tap_w = width.tap + c * geometry.width.tap_step;
      const int64_t index = width.index - c * geometry.width.index_step;
      const T* source = columns + (voxel + index) * strides.row + (tap + tap_w) * block.group_channels;
      for (int64_t group = 0; group < block.groups(); ++group) {
        T* channels = target + group * block.group_channels;
        for (int64_t i = 0; i < block.group_channels; ++i) channels[i] += source[group * strides.group + i];
      }
    }
  });
}

// Copies what one tap reads of one channel for the block's voxels; zero where it reads outside the volume.
template <class T>
void copy_tap(const Indices& geometry, const ColumnBlock& block, int64_t tap, const T* volume, T* row) {
  const int64_t tap_w = tap % geometry.width.kernel;
  const int64_t tap_h = tap / geometry.width.kernel % geometry.height.kernel;
  const int64_t tap_d = tap / geometry.width.kernel / geometry.height.kernel;
  const Range<int64_t> inside = geometry.width.inputs_of(tap_w);
  const int64_t stop = block.voxel_begin + block.voxels;
  for (int64_t voxel = block.voxel_begin; voxel < stop;) {
    const int64_t line = voxel / geometry.width.input;
    const int64_t begin = voxel - line * geometry.width.input;
    const int64_t end = std::min(geometry.width.input, begin + stop - voxel);
    const int64_t out_h = geometry.height.output_at(line % geometry.height.input, tap_h);
    const int64_t out_d = geometry.depth.output_at(line / geometry.height.input, tap_d);
    T* target = row + (voxel - block.voxel_begin) - begin;
    if (out_h < 0 || out_h >= geometry.height.output || out_d < 0 || out_d >= geometry.depth.output) {
      std::fill(target + begin, target + end, T{0});
    } else {
      const T* source = volume + (out_d * geometry.height.output + out_h) * geometry.width.output;
      const int64_t first = std::clamp(inside.begin, begin, end), last = std::clamp(inside.end, first, end);
      std::fill(target + begin, target + first, T{0});
      for (int64_t i = first; i < last; ++i) target[i] = source[geometry.width.output_at(i, tap_w)];
      std::fill(target + last, target + end, T{0});
    }
    voxel += end - begin;
  }
}

// Copies what all taps read for one input voxel, all channels. `columns` begins at the block's sample.
template <class T>
void copy_voxel(const Indices& geometry, const ColumnBlock& block, int64_t voxel, const T* volume, T* columns) {
  const ColumnStrides strides = ColumnStrides::of(block);
  const int64_t line = voxel / geometry.width.input;
  T* row = columns + (voxel - block.voxel_begin) * strides.row;
  for (int64_t tap = 0; tap < block.taps; ++tap) {
    const int64_t out_w = geometry.width.output_at(voxel % geometry.width.input, tap % geometry.width.kernel);
    const int64_t out_h =
        geometry.height.output_at(line % geometry.height.input, tap / geometry.width.kernel % geometry.height.kernel);
    const int64_t out_d =
        geometry.depth.output_at(line / geometry.height.input, tap / geometry.width.kernel / geometry.height.kernel);
    const bool inside = out_w >= 0 && out_w < geometry.width.output && out_h >= 0 && out_h < geometry.height.output &&
                        out_d >= 0 && out_d < geometry.depth.output;
    const int64_t position = (out_d * geometry.height.output + out_h) * geometry.width.output + out_w;
    for (int64_t group = 0; group < block.groups(); ++group) {
      T* target = row + group * strides.group + tap * block.group_channels;
      if (inside) {
        std::copy_n(volume + position * block.channels + group * block.group_channels, block.group_channels, target);
      } else {
        std::fill_n(target, block.group_channels, T{0});
      }
    }
  }
}

}  // namespace

template <class T>
void CpuBackend::col2vol(const Problem& problem, const ColumnBlock& block, Range<int64_t> planes, const T* columns,
                         const T* bias, T* output) const {
  const Indices geometry(problem);
  const VolumeStrides volume(problem.layout, problem.out_channels, problem.output_voxels());
  const ColumnStrides strides = ColumnStrides::of(block);
  const RowTaps row_taps(geometry.width);
  const int64_t plane_count = planes.end - planes.begin, lines = geometry.height.output;
  const bool channels_first = problem.layout == Layout::ncdhw;
  const int64_t volumes = channels_first ? block.samples * block.channels : block.samples;
  parallel_for(threads_, volumes * plane_count, [&](int64_t task) {
    const int64_t plane = planes.begin + task % plane_count;
    const int64_t sample = channels_first ? task / plane_count / block.channels : task / plane_count;
    const int64_t channel = channels_first ? task / plane_count % block.channels : 0;
    const TapWalk<int64_t> depth = geometry.depth.taps_at(plane);
    for (int64_t line = 0; line < lines; ++line) {
      const TapWalk<int64_t> height = geometry.height.taps_at(line);
      const int64_t voxel = (plane * lines + line) * geometry.width.output;
      T* row = output + volume.offset(block.sample_begin + sample, block.channel_begin + channel, voxel);
      if (channels_first) {
        const T* taps = columns + (sample * block.channels + channel) * block.taps * block.voxels;
        sum_row(geometry, block, row_taps, depth, height, taps,
                bias == nullptr ? T{0} : bias[block.channel_begin + channel], row);
        continue;
      }
      for (int64_t out_w = 0; out_w < geometry.width.output; ++out_w) {
        sum_voxel(geometry, block, depth, height, geometry.width.taps_at(out_w), columns + sample * strides.sample,
                  bias == nullptr ? nullptr : bias + block.channel_begin, row + out_w * volume.voxel);
      }
    }
  });
}

template <class T>
void CpuBackend::vol2col(const Problem& problem, const ColumnBlock& block, const T* volume, T* columns) const {
  const Indices geometry(problem);
  const VolumeStrides volume_strides(problem.layout, problem.out_channels, problem.output_voxels());
  if (problem.layout == Layout::ncdhw) {
    parallel_for(threads_, block.samples * block.channels * block.taps, [&](int64_t row) {
      const int64_t channel = row / block.taps % block.channels, sample = row / block.taps / block.channels;
      const T* source = volume + volume_strides.offset(block.sample_begin + sample, channel, 0);
      copy_tap(geometry, block, row % block.taps, source, columns + row * block.voxels);
    });
  } else {
    parallel_for(threads_, block.samples * block.voxels, [&](int64_t row) {
      const int64_t sample = row / block.voxels;
      copy_voxel(geometry, block, block.voxel_begin + row % block.voxels,
                 volume + volume_strides.offset(block.sample_begin + sample, 0, 0),
                 columns + sample * ColumnStrides::of(block).sample);
    });
  }
}

template <class T>
void CpuBackend::fill_bias(const Problem& problem, const T* bias, T* volume) const {
  const int64_t voxels = problem.output_voxels();
  if (problem.layout == Layout::ncdhw) {
    parallel_for(threads_, problem.batch * problem.out_channels,
                 [&](int64_t i) { std::fill_n(volume + i * voxels, voxels, bias[i % problem.out_channels]); });
  } else {
    parallel_for(threads_, problem.batch * voxels,
                 [&](int64_t i) { std::copy_n(bias, problem.out_channels, volume + i * problem.out_channels); });
  }
}

template <class T>
void CpuBackend::sum_partials(const T* partials, int64_t count, int64_t elements, T* result) const {
  convt3d::sum_partials(partials, count, elements, result, threads_);
}

template <class T>
void CpuBackend::bias_partials(const Problem& problem, int64_t count, const T* volume, T* partials) const {
  const VolumeStrides strides(problem.layout, problem.out_channels, problem.output_voxels());
  const int64_t voxels = problem.output_voxels();
  parallel_for(threads_, count, [&](int64_t part) {
    // Sums of millions of voxels need more places than float32 has; a few channels at a time share a cache line.
    constexpr int64_t kChannels = 16;
    T* sums = partials + part * problem.out_channels;
    const int64_t begin = voxels * part / count, end = voxels * (part + 1) / count;
    for (int64_t first = 0; first < problem.out_channels; first += kChannels) {
      const int64_t channels = std::min(kChannels, problem.out_channels - first);
      double totals[kChannels] = {};
      for (int64_t sample = 0; sample < problem.batch; ++sample) {
        const T* rows = volume + strides.offset(sample, first, 0);
        if (problem.layout == Layout::ncdhw) {
          for (int64_t channel = 0; channel < channels; ++channel) {
            const T* row = rows + channel * strides.channel;
            for (int64_t voxel = begin; voxel < end; ++voxel) totals[channel] += row[voxel];
          }
        } else {
          for (int64_t voxel = begin; voxel < end; ++voxel) {
            const T* row = rows + voxel * strides.voxel;
            for (int64_t channel = 0; channel < channels; ++channel) totals[channel] += row[channel];
          }
        }
      }
      for (int64_t channel = 0; channel < channels; ++channel) sums[first + channel] = static_cast<T>(totals[channel]);
    }
  });
}

#define CONVT3D_INSTANTIATE(T)                                                                                         \
  template void CpuBackend::col2vol(const Problem&, const ColumnBlock&, Range<int64_t>, const T*, const T*, T*) const; \
  template void CpuBackend::vol2col(const Problem&, const ColumnBlock&, const T*, T*) const;                           \
  template void CpuBackend::fill_bias(const Problem&, const T*, T*) const;                                             \
  template void CpuBackend::sum_partials(const T*, int64_t, int64_t, T*) const;                                        \
  template void CpuBackend::bias_partials(const Problem&, int64_t, const T*, T*) const;
CONVT3D_INSTANTIATE(float)
CONVT3D_INSTANTIATE(double)
#undef CONVT3D_INSTANTIATE

}  // namespace convt3d::gemm
