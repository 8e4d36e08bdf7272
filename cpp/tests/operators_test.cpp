// Every operator on the CPU against the definition, over all problems, layouts, dtypes, limits and numbers of threads.
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "convt3d/convt3d.h"
#include "cpu/half.h"
#include "problems.h"
#include "reference.h"

namespace {

using namespace convt3d;
using namespace convt3d::test;

// How a dtype is stored, and the relative error (L2) that a result may have. Half types are computed in float32 and
// rounded once, so theirs is that of rounding to nearest.
template <class T>
struct Storage;
template <>
struct Storage<double> {
  static constexpr DataType dtype = DataType::float64;
  static constexpr double bound = 1e-12;
  static double store(double value) { return value; }
  static double load(double stored) { return stored; }
};
template <>
struct Storage<float> {
  static constexpr DataType dtype = DataType::float32;
  static constexpr double bound = 2e-6;
  static float store(double value) { return static_cast<float>(value); }
  static double load(float stored) { return stored; }
};
template <>
struct Storage<Float16> {
  static constexpr DataType dtype = DataType::float16;
  static constexpr double bound = 0x1p-11;
  static Float16 store(double value) { return Float16::round(static_cast<float>(value)); }
  static double load(Float16 stored) { return stored.widen(); }
};
template <>
struct Storage<BFloat16> {
  static constexpr DataType dtype = DataType::bfloat16;
  static constexpr double bound = 0x1p-8;
  static BFloat16 store(double value) { return BFloat16::round(static_cast<float>(value)); }
  static double load(BFloat16 stored) { return stored.widen(); }
};

template <class T>
std::vector<T> random_tensor(int64_t elements, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  std::vector<T> values(static_cast<size_t>(elements));
  for (T& value : values) value = Storage<T>::store(normal(random));
  return values;
}

template <class T>
std::vector<double> widened(const std::vector<T>& values) {
  std::vector<double> wide;
  for (const T& value : values) wide.push_back(Storage<T>::load(value));
  return wide;
}

// Memory that an operator writes, full of NaN before, with a margin behind that must stay as it is.
template <class T>
class Poisoned {
 public:
  explicit Poisoned(int64_t elements) : bytes_(elements * sizeof(T)), memory_(bytes_ + kMargin, kPoison) {}

  T* data() { return bytes_ == 0 ? nullptr : reinterpret_cast<T*>(memory_.data()); }
  const std::vector<unsigned char>& bytes() const { return memory_; }

  bool is_margin_intact() const {
    for (size_t i = bytes_; i < memory_.size(); ++i) {
      if (memory_[i] != kPoison) return false;
    }
    return true;
  }
  std::vector<double> values() const {
    std::vector<double> wide;
    for (size_t offset = 0; offset < bytes_; offset += sizeof(T)) {
      T value;
      std::memcpy(&value, memory_.data() + offset, sizeof value);
      wide.push_back(Storage<T>::load(value));
    }
    return wide;
  }

 private:
  static constexpr size_t kMargin = 4096;
  static constexpr unsigned char kPoison = 0xff;  // a NaN in every dtype
  size_t bytes_;
  std::vector<unsigned char> memory_;
};

double relative_error(const std::vector<double>& result, const std::vector<double>& expected) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    error += (result[i] - expected[i]) * (result[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  return norm > 0 ? std::sqrt(error / norm) : std::sqrt(error);
}

// All operators of one problem, which is computed by definition once.
template <class T>
class Comparison {
 public:
  explicit Comparison(const NamedProblem& named)
      : named_(named),
        problem_(named.problem),
        input_(random_tensor<T>(problem_.input_elements(), 1)),
        weight_(random_tensor<T>(problem_.weight_elements(), 2)),
        bias_(random_tensor<T>(problem_.out_channels, 3)),
        grad_output_(random_tensor<T>(problem_.output_elements(), 4)),
        reference_(problem_, widened(input_), widened(weight_), widened(bias_), widened(grad_output_)) {}

  void run(Algorithm algorithm, int64_t limit, int threads) {
    algorithm_ = algorithm;
    limit_ = limit;
    threads_ = threads;
    const T *input = input_.data(), *weight = weight_.data(), *bias = bias_.data(), *grad_output = grad_output_.data();
    Poisoned<T> output(problem_.output_elements()), output_with_bias(problem_.output_elements());
    call(Operator::forward, [&](const Plan& plan, void* workspace, const Execution& execution) {
      forward(plan, input, weight, nullptr, output.data(), workspace, execution);
    });
    check("forward without bias", output, reference_.output);
    call(Operator::forward, [&](const Plan& plan, void* workspace, const Execution& execution) {
      forward(plan, input, weight, bias, output_with_bias.data(), workspace, execution);
    });
    check("forward", output_with_bias, reference_.output_with_bias);

    Poisoned<T> input_gradient(problem_.input_elements()), weight_gradient(problem_.weight_elements());
    call(Operator::grad_input, [&](const Plan& plan, void* workspace, const Execution& execution) {
      grad_input(plan, grad_output, weight, input_gradient.data(), workspace, execution);
    });
    check("grad_input", input_gradient, reference_.grad_input);
    call(Operator::grad_weight, [&](const Plan& plan, void* workspace, const Execution& execution) {
      grad_weight(plan, grad_output, input, weight_gradient.data(), workspace, execution);
    });
    check("grad_weight", weight_gradient, reference_.grad_weight);

    Poisoned<T> both_input(problem_.input_elements()), both_weight(problem_.weight_elements());
    call(Operator::grad_input_weight, [&](const Plan& plan, void* workspace, const Execution& execution) {
      grad_input_weight(plan, grad_output, input, weight, both_input.data(), both_weight.data(), workspace, execution);
    });
    check("grad_input of both", both_input, reference_.grad_input);
    check("grad_weight of both", both_weight, reference_.grad_weight);

    Poisoned<T> bias_gradient(problem_.out_channels), again(problem_.out_channels);
    for (Poisoned<T>* result : {&bias_gradient, &again}) {
      call(Operator::grad_bias, [&](const Plan& plan, void* workspace, const Execution& execution) {
        grad_bias(plan, grad_output, result->data(), workspace, execution);
      });
    }
    check("grad_bias", bias_gradient, reference_.grad_bias);

    // The same call twice gives the same bits.
    CHECK(bias_gradient.bytes() == again.bytes()) << context("grad_bias");
    Poisoned<T> output_again(problem_.output_elements()), weight_again(problem_.weight_elements());
    call(Operator::forward, [&](const Plan& plan, void* workspace, const Execution& execution) {
      forward(plan, input, weight, bias, output_again.data(), workspace, execution);
    });
    call(Operator::grad_weight, [&](const Plan& plan, void* workspace, const Execution& execution) {
      grad_weight(plan, grad_output, input, weight_again.data(), workspace, execution);
    });
    CHECK(output_with_bias.bytes() == output_again.bytes()) << context("forward");
    CHECK(weight_gradient.bytes() == weight_again.bytes()) << context("grad_weight");
  }

 private:
  template <class Call>
  void call(Operator op, const Call& call) {
    const Plan plan = make_plan(problem_, op, Target::cpu(threads_), limit_, algorithm_);
    Poisoned<unsigned char> workspace(plan.workspace_bytes);
    Execution execution;
    execution.threads = threads_;
    call(plan, workspace.data(), execution);
    CHECK(workspace.is_margin_intact()) << context("the workspace of operator ") << static_cast<int>(op);
  }

  void check(const char* what, const Poisoned<T>& result, const std::vector<double>& expected) {
    CHECK(relative_error(result.values(), expected) <= Storage<T>::bound)
        << context(what) << ": error " << relative_error(result.values(), expected);
    CHECK(result.is_margin_intact()) << context(what) << " wrote behind its result";
  }

  std::string context(const char* what) const {
    std::ostringstream out;
    out << named_ << (algorithm_ == Algorithm::gemm ? ", gemm" : ", direct") << ", limit " << limit_ << ", " << threads_
        << " threads: " << what;
    return out.str();
  }

  const NamedProblem& named_;
  const Problem& problem_;
  std::vector<T> input_, weight_, bias_, grad_output_;
  Reference reference_;
  Algorithm algorithm_ = Algorithm::gemm;
  int64_t limit_ = 0;
  int threads_ = 1;
};

// Problems that the direct algorithm on the CPU cuts: rows and planes into tiles, channels into blocks, and source
// planes that it cannot keep.
std::vector<NamedProblem> large_problems() {
  Problem rows, inputs, outputs;
  rows.in_channels = 2;
  rows.out_channels = 3;
  rows.input = {1, 2, 700};
  rows.kernel = {1, 2, 3};
  rows.stride = {1, 1, 2};
  inputs.in_channels = 70;
  inputs.out_channels = 2;
  inputs.input = {4, 16, 16};
  inputs.kernel = {3, 2, 2};
  inputs.padding = {1, 0, 1};
  outputs.in_channels = 2;
  outputs.out_channels = 37;
  outputs.input = {3, 15, 11};
  outputs.kernel = {2, 3, 3};
  outputs.stride = {1, 2, 2};
  return {{"long rows", rows}, {"many inputs", inputs}, {"many outputs", outputs}};
}

template <class T>
void test_problems() {
  std::vector<NamedProblem> all = problems();
  for (const NamedProblem& large : large_problems()) all.push_back(large);
  for (NamedProblem named : all) {
    for (const Layout layout : {Layout::ncdhw, Layout::ndhwc}) {
      named.problem.layout = layout;
      named.problem.dtype = Storage<T>::dtype;
      named.problem.validate();
      Comparison<T> comparison(named);
      for (const Algorithm algorithm : {Algorithm::gemm, Algorithm::direct}) {
        // Everything at once; pieces of samples, channels, planes and voxels; the smallest pieces there are.
        comparison.run(algorithm, int64_t{1} << 30, 1);
        comparison.run(algorithm, int64_t{1} << 30, 3);
        comparison.run(algorithm, int64_t{1} << 16, 3);
        comparison.run(algorithm, int64_t{1} << 13, 1);
        comparison.run(algorithm, int64_t{1} << 11, 3);
        comparison.run(algorithm, 1, 1);
      }
    }
  }
}

void test_misuse() {
  Problem problem;
  problem.input = {2, 2, 2};
  problem.kernel = {3, 3, 3};
  const Plan plan = make_plan(problem, Operator::forward, Target::cpu(1), 1 << 20);
  const std::vector<float> input(8), weight(27);
  std::vector<float> output(64);
  std::vector<char> workspace(static_cast<size_t>(plan.workspace_bytes));
  CHECK(contains(message_of<std::invalid_argument>([&] {
                   grad_input(plan, output.data(), weight.data(), output.data(), workspace.data(), Execution{});
                 }),
                 "another operator"));
  CHECK(contains(message_of<std::invalid_argument>(
                     [&] { forward(plan, input.data(), weight.data(), nullptr, output.data(), nullptr, Execution{}); }),
                 "workspace"));
}

void test_build_info() {
  const BuildInfo info = build_info();
  CHECK(!info.version.empty());
  CHECK(!info.backends.empty() && info.backends.front() == "cpu");
  CHECK(!info.cblas.empty());
  const bool has_cuda = info.backends.back() == "cuda";
  CHECK(info.cuda_missing.empty() == has_cuda) << info.cuda_missing;
  CHECK(info.cuda_version.empty() != has_cuda) << info.cuda_version;
  CHECK(info.cuda_architectures.empty() != has_cuda);
  if (!has_cuda) CHECK(contains(message_of<std::runtime_error>([] { Target::cuda(0); }), info.cuda_missing));
}

}  // namespace

int main() {
  test_problems<double>();
  test_problems<float>();
  test_problems<Float16>();
  test_problems<BFloat16>();
  test_misuse();
  test_build_info();
  return finish();
}
