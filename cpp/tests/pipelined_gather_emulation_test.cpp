// The pipelined gather's kernels themselves, run on the CPU (see emulation/block.h), against the definition of the
// transposed convolution: each of them on small problems that its plan is cut for.
#include "direct/cuda/pipelined_gather.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "direct/cuda/bare_rows.cu"
#include "problems.h"
#include "reference.h"

namespace convt3d::direct {

// Computes everything again where the source is not finite, which it is here.
template <class T>
void gather_simt(const Problem&, Operator, const T*, const T*, const T*, T*, cudaStream_t, const int* only_if) {
  if (*only_if != 0) throw std::logic_error("a source that is finite was taken for one that is not");
}

}  // namespace convt3d::direct

namespace {

using namespace convt3d;
using namespace convt3d::direct;
using namespace convt3d::test;

// One multiprocessor, so that a block goes on from tile to tile.
const Target kTarget{Backend::cuda, 1, 90, 228 << 10};

// Values of T that TF32 holds as well.
template <class T>
std::vector<T> draw_values(std::mt19937& random, int64_t count) {
  std::normal_distribution<float> normal;
  std::vector<T> values(count);
  for (T& value : values) value = static_cast<T>(emulation::round_to_tf32(normal(random)));
  return values;
}
template <class T>
std::vector<double> widened(const std::vector<T>& values) {
  std::vector<double> wide(values.size());
  std::transform(values.begin(), values.end(), wide.begin(), [](T value) { return static_cast<float>(value); });
  return wide;
}

// A tensor with a margin around it, which nothing is to be written to.
template <class T>
class Destination {
 public:
  explicit Destination(int64_t count) : values_(count + 2 * kMargin, T(kPoison)), count_(count) {}
  T* data() { return values_.data() + kMargin; }
  bool has_clean_margins() const {
    const auto is_clean = [](T value) { return static_cast<float>(value) == kPoison; };
    return std::all_of(values_.begin(), values_.begin() + kMargin, is_clean) &&
           std::all_of(values_.end() - kMargin, values_.end(), is_clean);
  }
  // Relative L2 distance.
  double error(const std::vector<double>& expected) const {
    double distance = 0, norm = 0;
    for (int64_t i = 0; i < count_; ++i) {
      const double difference = static_cast<float>(values_[kMargin + i]) - expected[i];
      distance += difference * difference;
      norm += expected[i] * expected[i];
    }
    return std::sqrt(distance / std::max(norm, std::numeric_limits<double>::min()));
  }

 private:
  static constexpr int kMargin = 64;
  static constexpr float kPoison = 12288;  // far from every sum, and exact in half types
  std::vector<T> values_;
  int64_t count_;
};

template <class T>
void check(const Problem& problem, Operator op, const PipelinedGather& gather, unsigned seed) {
  std::mt19937 random(seed);
  const bool forward = op == Operator::forward, has_bias = forward && seed % 2 == 0;
  const auto input = draw_values<T>(random, problem.input_elements());
  const auto weight = draw_values<T>(random, problem.weight_elements());
  const auto grad_output = draw_values<T>(random, problem.output_elements());
  const auto bias = draw_values<T>(random, problem.out_channels);
  const Reference reference(problem, widened(input), widened(weight), widened(bias), widened(grad_output));
  const std::vector<double>& expected = !forward   ? reference.grad_input
                                        : has_bias ? reference.output_with_bias
                                                   : reference.output;
  Destination<T> destination(static_cast<int64_t>(expected.size()));
  std::vector<uint4> packed(gather.packed_bytes / 16, uint4{~0u, ~0u, ~0u, ~0u});
  gather_pipelined<T>(problem, op, gather, forward ? input.data() : grad_output.data(), weight.data(),
                      has_bias ? bias.data() : nullptr, destination.data(), packed.data(), nullptr);
  const double error = destination.error(expected), bound = sizeof(T) == 4 ? 1e-6 : 4e-3;
  CHECK(error < bound) << gather.name() << " of problem " << seed << ": " << error;
  CHECK(destination.has_clean_margins()) << gather.name() << " of problem " << seed;
}

// Any geometry, or one as in decoders, whose volumes and channels are even.
Problem draw_small(std::mt19937& random) {
  const auto pick = [&random](std::initializer_list<int64_t> values) {
    return values.begin()[random() % values.size()];
  };
  for (;;) {
    Problem problem;
    const bool is_even = random() % 3 == 0, is_interleaved = is_even && random() % 2 == 0;  // as kernel = stride
    problem.batch = pick({1, 2, 3});
    problem.groups = is_even ? 1 : pick({1, 1, 1, 2, 4});
    problem.in_channels = problem.groups * (is_even ? pick({8, 16, 32}) : pick({1, 3, 8, 16, 32}));
    problem.out_channels = problem.groups * (is_even ? pick({16, 32, 48, 64, 128}) : pick({3, 8, 24, 32, 48, 64}));
    if (!is_even && random() % 2 == 0) std::swap(problem.in_channels, problem.out_channels);
    for (int axis = 0; axis < 3; ++axis) {
      problem.stride[axis] = is_even ? pick({1, 2}) : pick({1, 2, 2, 3});
      problem.kernel[axis] = is_interleaved ? problem.stride[axis] : pick({1, 2, 2, 3, 3, 4});
      if (!is_interleaved) problem.padding[axis] = pick({0, 1});
      if (!is_even) problem.dilation[axis] = pick({1, 1, 1, 2});
      if (!is_even && problem.stride[axis] > 1) problem.output_padding[axis] = pick({0, 0, 1});
      problem.input[axis] = is_even ? pick({4, 8, 16}) : axis < 2 ? pick({1, 2, 3, 5}) : pick({3, 8, 16, 33});
    }
    problem.dtype = random() % 2 == 0 ? DataType::float32 : DataType::bfloat16;
    problem.precision = random() % 4 == 0 ? Precision::ieee : Precision::tf32;
    problem.layout = random() % 3 == 0 ? Layout::ndhwc : Layout::ncdhw;
    const int64_t products = problem.weight_elements() * problem.batch * problem.input_voxels();
    constexpr int64_t kMostProducts = 8 << 20;
    if (is_valid(problem) && products <= kMostProducts) return problem;
  }
}

}  // namespace

int main() {
  std::set<std::string> kernels, checked;
  unsigned seed = 0;
  const auto check_once = [&](const Problem& problem, Operator op) {
    PipelinedGather gather;
    ++seed;
    if (!cut_pipelined_gather(problem, op, kTarget, gather)) return;
    kernels.insert(gather.name());
    const bool is_float = problem.dtype == DataType::float32;
    std::string name = gather.name() + (is_float ? " float" : " half");
    if (gather.storing_warps > 0) name += gather.stores_runs ? " runs" : " words";
    if (!checked.insert(name).second) return;
    is_float ? check<float>(problem, op, gather, seed) : check<__nv_bfloat16>(problem, op, gather, seed);
  };
  // What is multiplied in place has wide channels and even extents; what is copied, kernel = stride.
  const Extent one{1, 1, 1}, two{2, 2, 2}, three{3, 3, 3}, none{0, 0, 0};
  for (const Layout layout : {Layout::ncdhw, Layout::ndhwc}) {
    for (const DataType dtype : {DataType::float32, DataType::bfloat16}) {
      for (const int64_t channels : {16, 32, 48, 64, 128}) {
        for (Problem problem : {problem_of(1, 24, channels, 1, {4, 8, 16}, three, one, one, none, one),
                                problem_of(1, 32, channels, 1, {4, 8, 16}, two, two, none, none, one)}) {
          problem.layout = layout;
          problem.dtype = dtype;
          problem.precision = Precision::tf32;
          check_once(problem, Operator::forward);
        }
      }
    }
  }
  std::mt19937 random(1);
  for (int i = 0; i < 1200; ++i) {
    const Problem problem = draw_small(random);
    check_once(problem, Operator::forward);
    check_once(problem, Operator::grad_input);
  }
  CHECK(kernels.size() == std::size(kPipelinedGathers)) << kernels.size() << " kernels reached";
  CHECK(checked.size() > 70) << checked.size() << " kernels, types and ways out";
  return finish();
}
