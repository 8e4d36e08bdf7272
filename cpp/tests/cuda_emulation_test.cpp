// The CUDA kernels themselves, run on the CPU (see emulation/block.h), against the definition of the transposed
// convolution, on small problems: each of the pipelined gather's, the direct algorithm's other families, and what the
// GEMM path has beside its products.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "check.h"
#include "direct/algorithm.h"
#include "direct/schedule.h"
#include "emulation/warp.h"
#include "gemm/algorithm.h"
#include "problems.h"
#include "reference.h"

namespace {

using namespace convt3d;
using namespace convt3d::direct;
using namespace convt3d::test;

// One multiprocessor, so that a block goes on from tile to tile.
const Target kTuring{Backend::cuda, 1, 75, 64 << 10}, kAmpere{Backend::cuda, 1, 80, 164 << 10},
    kHopper{Backend::cuda, 1, 90, 228 << 10};

double as_double(double value) { return value; }
template <class T>
double as_double(T value) {
  return static_cast<float>(value);
}

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
  std::transform(values.begin(), values.end(), wide.begin(), [](T value) { return as_double(value); });
  return wide;
}

// A tensor with a margin around it, which nothing is to be written to.
template <class T>
class Destination {
 public:
  explicit Destination(int64_t count) : values_(count + 2 * kMargin, T(kPoison)), count_(count) {}
  T* data() { return values_.data() + kMargin; }
  bool has_clean_margins() const {
    const auto is_clean = [](T value) { return as_double(value) == kPoison; };
    return std::all_of(values_.begin(), values_.begin() + kMargin, is_clean) &&
           std::all_of(values_.end() - kMargin, values_.end(), is_clean);
  }
  // Relative L2 distance.
  double error(const std::vector<double>& expected) const {
    double distance = 0, norm = 0;
    for (int64_t i = 0; i < count_; ++i) {
      const double difference = as_double(values_[kMargin + i]) - expected[i];
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

bool fills_runs(const std::string& configuration) { return configuration.find("filled runs") != std::string::npos; }

template <class T>
void check(const Plan& plan, const std::string& name, unsigned seed, bool biased) {
  const Problem& problem = plan.problem;
  std::mt19937 random(seed);
  const auto input = draw_values<T>(random, problem.input_elements());
  const auto weight = draw_values<T>(random, problem.weight_elements());
  const auto grad_output = draw_values<T>(random, problem.output_elements());
  const auto bias = draw_values<T>(random, problem.out_channels);
  const Reference reference(problem, widened(input), widened(weight), widened(bias), widened(grad_output));
  const bool has_bias = plan.op == Operator::forward && biased;
  const bool both = plan.op == Operator::grad_input_weight;
  Destination<T> output(problem.output_elements()), grad_input(problem.input_elements()),
      grad_weight(problem.weight_elements()), grad_bias(problem.out_channels);
  Operands operands{input.data(), weight.data(), has_bias ? bias.data() : nullptr, grad_output.data()};
  struct Result {
    bool is_wanted;
    Destination<T>& made;
    const std::vector<double>& expected;
    void*& pointer;
  };
  const std::vector<double>& expected_output = has_bias ? reference.output_with_bias : reference.output;
  const Result results[] = {
      {plan.op == Operator::forward, output, expected_output, operands.output},
      {plan.op == Operator::grad_input || both, grad_input, reference.grad_input, operands.grad_input},
      {plan.op == Operator::grad_weight || both, grad_weight, reference.grad_weight, operands.grad_weight},
      {plan.op == Operator::grad_bias, grad_bias, reference.grad_bias, operands.grad_bias}};
  for (const Result& result : results) {
    if (result.is_wanted) result.pointer = result.made.data();
  }
  std::vector<uint4> workspace(plan.workspace_bytes / 16, uint4{~0u, ~0u, ~0u, ~0u});
  (plan.algorithm == Algorithm::gemm ? gemm::run_cuda : direct::run_cuda)(plan, operands, workspace.data(), {});
  const double bound = sizeof(T) == 8                       ? 1e-14
                       : sizeof(T) == 4                     ? 1e-6
                       : problem.dtype == DataType::float16 ? 5e-4
                                                            : 4e-3;
  for (const Result& result : results) {
    if (!result.is_wanted) continue;
    const double error = result.made.error(result.expected);
    CHECK(error < bound) << name << ", problem " << seed << ": " << error;
    CHECK(result.made.has_clean_margins()) << name << ", problem " << seed;
  }
}

// Checks a problem by its kernels, unless as many have been that were computed by the same ones.
class Checker {
 public:
  explicit Checker(int most) : most_(most) {}

  void check_direct(const Problem& problem, Operator op, const Target& target) {
    const Plan plan = plan_direct(problem, op, target, 1 << 20);
    const Schedule& schedule = *plan.schedule;
    const bool is_pipelined = op != Operator::grad_weight && schedule.gather == Family::pipelined;
    if (is_pipelined) pipelined_.insert(schedule.pipelined_gather.name());
    const bool changes_channels = problem.groups * schedule.pipelined_gather.column_blocks > 1;  // from tile to tile
    const bool fills_others = changes_channels && fills_runs(plan.configuration);
    // Patterns are tried with both operators, and several times.
    check(plan, plan.configuration + (fills_others ? " of several blocks" : ""),
          is_pipelined && !schedule.pipelined_gather.has_pattern());
  }
  void check_gemm(const Problem& problem, Operator op, int64_t limit) {
    const Plan plan = make_plan(problem, op, kHopper, limit);
    if (!plan.fits) return;
    check(plan,
          problem.is_pointwise()               ? "gemm, pointwise"
          : problem.has_single_contributions() ? "gemm, apart"
                                               : "gemm",
          false);
  }
  void finish() const {
    CHECK(pipelined_.size() == std::size(kPipelinedGathers)) << pipelined_.size() << " pipelined kernels";
    int filled = 0;
    for (const auto& [name, count] : counts_) filled += fills_runs(name) ? count : 0;
    CHECK(filled >= 20) << filled << " problems whose runs are filled";
    for (const char* family : {"pipelined", "tensor", "simt", "depthwise", "gemm"}) {
      int kinds = 0;
      for (const auto& [name, count] : counts_) kinds += name.find(family) == 0 ? 1 : 0;
      CHECK(kinds >= 6) << kinds << " operators and types of " << family;
    }
    CHECK(counts_.size() > 100) << counts_.size() << " kinds";
  }

 private:
  void check(const Plan& plan, const std::string& kernels, bool once) {
    static const char* const kOperators[] = {"forward", "grad_input", "grad_weight", "grad_input_weight", "grad_bias"};
    ++seed_;
    std::string name = kernels + ' ' + name_of(plan.problem.dtype);
    if (!once) name += std::string(" ") + kOperators[static_cast<int>(plan.op)];
    if (counts_[name]++ >= (once ? 1 : most_)) return;
    check_once(plan, name, seed_ % 2 == 0);
    if (fills_runs(plan.configuration)) check_once(plan, name, seed_ % 2 != 0);  // what bias there is decides how
  }
  void check_once(const Plan& plan, const std::string& name, bool has_bias) const {
    switch (plan.problem.dtype) {
      case DataType::float64:
        return ::check<double>(plan, name, seed_, has_bias);
      case DataType::float32:
        return ::check<float>(plan, name, seed_, has_bias);
      case DataType::float16:
        return ::check<__half>(plan, name, seed_, has_bias);
      case DataType::bfloat16:
        return ::check<__nv_bfloat16>(plan, name, seed_, has_bias);
    }
  }

  const int most_;
  unsigned seed_ = 0;
  std::set<std::string> pipelined_;
  std::map<std::string, int> counts_;
};

// Any geometry, or one as in decoders, whose volumes and channels are even.
Problem draw_small(std::mt19937& random) {
  const auto pick = [&random](std::initializer_list<int64_t> values) {
    return values.begin()[random() % values.size()];
  };
  for (;;) {
    Problem problem;
    const bool is_even = random() % 3 == 0, is_interleaved = is_even && random() % 2 == 0;  // as kernel = stride
    problem.batch = pick({1, 2, 3});
    problem.groups = is_even ? 1 : pick({1, 1, 2, 4});
    problem.in_channels = problem.groups * (is_even ? pick({8, 16, 32}) : pick({1, 3, 8, 16, 32}));
    problem.out_channels = problem.groups * (is_even ? pick({16, 32, 48, 64, 128}) : pick({3, 8, 24, 32, 48, 64}));
    if (!is_even && random() % 2 == 0) std::swap(problem.in_channels, problem.out_channels);
    if (!is_even && random() % 4 == 0) problem.groups = problem.out_channels = problem.in_channels;  // depthwise
    for (int axis = 0; axis < 3; ++axis) {
      problem.stride[axis] = is_even ? pick({1, 2}) : pick({1, 2, 2, 3});
      problem.kernel[axis] = is_interleaved ? problem.stride[axis] : pick({1, 2, 2, 3, 3, 4});
      if (!is_interleaved) problem.padding[axis] = pick({0, 1});
      if (!is_even) problem.dilation[axis] = pick({1, 1, 1, 2});
      if (!is_even && problem.stride[axis] > 1) problem.output_padding[axis] = pick({0, 0, 1});
      problem.input[axis] = is_even ? pick({4, 8, 16}) : axis < 2 ? pick({1, 2, 3, 5}) : pick({3, 8, 16, 33});
    }
    problem.dtype = static_cast<DataType>(pick({0, 1, 1, 1, 2, 3, 3, 3}));
    problem.precision = random() % 4 == 0 ? Precision::ieee : Precision::tf32;
    problem.layout = random() % 3 == 0 ? Layout::ndhwc : Layout::ncdhw;
    const int64_t products = problem.weight_elements() * problem.batch * problem.input_voxels();
    constexpr int64_t kMostProducts = 4 << 20;
    if (is_valid(problem) && products <= kMostProducts) return problem;
  }
}

}  // namespace

int main() {
  Checker checker(4);
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
          checker.check_direct(problem, Operator::forward, kHopper);
        }
      }
    }
  }
  // Every other row without taps: what leaves in runs has these as well, in blocks of columns and groups, with a bias.
  for (const DataType dtype : {DataType::float32, DataType::float16, DataType::bfloat16}) {
    for (const int64_t groups : {1, 2}) {
      for (const int64_t channels : {16, 32, 64, 80}) {
        for (const Extent& beyond : {none, Extent{1, 1, 0}}) {
          Problem odd = problem_of(6, 16 * groups, channels * groups, groups, {3, 5, 16}, three, two, one, beyond, two);
          odd.dtype = dtype;
          odd.precision = Precision::tf32;
          checker.check_direct(odd, Operator::forward, kHopper);
        }
      }
    }
  }
  // Windows: planes that are more than whole blocks of slots, blocks of columns, groups, and one or more stages.
  for (const DataType dtype : {DataType::float32, DataType::bfloat16}) {
    for (const int64_t channels : {24, 32, 48, 64, 96}) {
      for (const int64_t groups : {1, 2}) {
        for (const Layout layout : {Layout::ncdhw, Layout::ndhwc}) {
          Problem dense = problem_of(1, 20 * groups, channels * groups, groups, {7, 9, 16}, three, one, one, none, one);
          dense.dtype = dtype;
          dense.layout = layout;
          dense.precision = Precision::tf32;
          checker.check_direct(dense, Operator::forward, kHopper);
          std::swap(dense.in_channels, dense.out_channels);
          checker.check_direct(dense, Operator::grad_input, kHopper);
        }
      }
    }
  }
  // Cubes: with and without a last voxel of every other residue, groups, several stages, and rows that are no boxes.
  for (const DataType dtype : {DataType::float32, DataType::bfloat16}) {
    for (const Extent& beyond : {none, one}) {
      for (Problem up : {problem_of(1, 256, 32, 1, {4, 4, 8}, three, two, one, beyond, one),
                         problem_of(1, 192, 64, 2, {4, 6, 9}, three, two, one, beyond, one)}) {
        up.dtype = dtype;
        up.precision = Precision::tf32;
        checker.check_direct(up, Operator::forward, kHopper);
      }
    }
  }
  // Points, on few tiles: blocks of 24 and 32 columns, channels left over, groups, and several samples in a tile; and
  // what has one tap too many for them.
  const Target small{Backend::cuda, 8, 90, 228 << 10};
  for (const int64_t groups : {1, 2}) {
    for (const int64_t sources : {24, 44, 64}) {
      for (const int64_t channels : {24, 40, 64}) {
        for (const Extent& kernel : {two, Extent{3, 2, 2}}) {
          Problem apart =
              problem_of(3, sources * groups, channels * groups, groups, {3, 4, 8}, kernel, two, none, none, one);
          apart.precision = Precision::tf32;
          checker.check_direct(apart, Operator::forward, kernel == two ? small : kHopper);
        }
      }
    }
  }
  // Contacts so far outside of a small volume that their places need more than 32 bits.
  Problem far = problem_of(1, 12, 12, 1, {3, 64, 64}, one, {46000, 1, 1}, {45999, 0, 0}, none, one);
  far.dtype = DataType::float64;
  far.layout = Layout::ndhwc;
  for (const Operator op : {Operator::grad_input, Operator::grad_weight}) checker.check_direct(far, op, kHopper);
  std::mt19937 random(1);
  for (int i = 0; i < 1500; ++i) {
    const Problem problem = draw_small(random);
    for (const Operator op : {Operator::forward, Operator::grad_input, Operator::grad_weight}) {
      checker.check_direct(problem, op, kHopper);
      if (i % 4 == 0) checker.check_direct(problem, op, kAmpere);
      if (i % 8 == 0) checker.check_direct(problem, op, kTuring);
    }
    for (const Operator op :
         {Operator::forward, Operator::grad_input, Operator::grad_input_weight, Operator::grad_bias}) {
      checker.check_gemm(problem, op, i % 2 == 0 ? 1 << 26 : 1 << 16);  // the columns at once, and in pieces
    }
  }
  checker.finish();
  return finish();
}
