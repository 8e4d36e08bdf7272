// Plans over many limits: they keep the limit, cover the problem in sensible pieces, and say so when nothing fits.
#include <algorithm>

#include "check.h"
#include "convt3d/convt3d.h"
#include "geometry.h"
#include "problems.h"

namespace {

using namespace convt3d;
using namespace convt3d::test;

constexpr Operator kOperators[] = {Operator::forward, Operator::grad_input, Operator::grad_weight,
                                   Operator::grad_input_weight, Operator::grad_bias};
constexpr DataType kDataTypes[] = {DataType::float64, DataType::float32, DataType::float16, DataType::bfloat16};

// The most input voxels of one sample that a depth slab of forward reads.
int64_t voxels_of_slabs(const Plan& plan) {
  const Problem& problem = plan.problem;
  if (plan.samples > 1) return problem.input_voxels();
  const Axis<int64_t> depth(problem, 0);
  int64_t most = 0;
  for (int64_t begin = 0; begin < depth.output; begin += plan.output_planes) {
    const Range<int64_t> inputs =
        depth.inputs_reaching(Range<int64_t>{begin, std::min(begin + plan.output_planes, depth.output)});
    most = std::max(most, (inputs.end - inputs.begin) * problem.input[1] * problem.input[2]);
  }
  return most;
}

void check_plan(const NamedProblem& named, const Plan& plan, int64_t limit) {
  const Problem& problem = plan.problem;
  const auto context = [&] {
    std::ostringstream out;
    out << named << " operator " << static_cast<int>(plan.op) << " backend " << static_cast<int>(plan.target.backend)
        << " limit " << limit;
    return out.str();
  };

  CHECK(plan.workspace_bytes == plan.column_bytes + plan.partial_bytes + plan.conversion_bytes + plan.library_bytes)
      << context();
  CHECK(plan.workspace_bytes % 256 == 0) << context();
  CHECK(std::min({plan.column_bytes, plan.partial_bytes, plan.conversion_bytes, plan.library_bytes}) >= 0) << context();
  if (plan.fits) CHECK(plan.column_bytes + plan.partial_bytes <= limit) << context();

  if (plan.op == Operator::grad_bias) {
    CHECK(plan.column_bytes == 0) << context();
    CHECK(plan.partials >= 1) << context();
    return;
  }
  if (problem.batch > 0) CHECK(plan.samples >= 1 && plan.samples <= problem.batch) << context();
  CHECK(plan.channels >= 1 && plan.channels <= problem.out_channels) << context();
  CHECK(plan.channels < problem.group_out_channels() || plan.channels % problem.group_out_channels() == 0) << context();
  CHECK(plan.output_planes >= 1 && plan.output_planes <= problem.output()[0]) << context();
  CHECK(plan.voxels >= 1 && plan.voxels <= problem.input_voxels()) << context();
  if (plan.op != Operator::forward) {
    CHECK(plan.channels == problem.out_channels && plan.output_planes == problem.output()[0]) << context();
  } else if (plan.samples > 1) {
    CHECK(plan.channels == problem.out_channels && plan.output_planes == problem.output()[0]) << context();
  }
  if (problem.is_pointwise()) {
    CHECK(plan.column_bytes == 0) << context();
  } else {
    const int64_t voxels = plan.op == Operator::forward ? voxels_of_slabs(plan) : plan.voxels;
    CHECK(voxels <= plan.voxels) << context();
    CHECK(plan.column_bytes >= plan.samples * plan.channels * problem.taps() * voxels * element_size(plan.column_dtype))
        << context();
  }
  if (plan.op == Operator::grad_weight || plan.op == Operator::grad_input_weight) {
    CHECK(plan.splits >= 1 && plan.partials >= 1) << context();
    const int64_t accumulator = problem.dtype == DataType::float64 ? 8 : 4;
    CHECK(plan.partial_bytes == 0 || plan.partial_bytes >= plan.partials * problem.weight_elements() * accumulator)
        << context();
  } else {
    CHECK(plan.partial_bytes == 0) << context();
  }
  const bool widens = plan.target.backend == Backend::cpu && element_size(problem.dtype) == 2;
  CHECK((plan.conversion_bytes > 0) == widens) << context();
}

void check_limits(const NamedProblem& named, Operator op, const Target& target) {
  const Problem& problem = named.problem;
  bool fitted = false;
  for (int64_t limit = 1; limit < int64_t{1} << 36; limit += (limit + 2) / 3) {
    const Plan plan = make_plan(problem, op, target, limit);
    check_plan(named, plan, limit);
    CHECK(plan.fits || !fitted) << named << ": fits a smaller limit, but not " << limit;
    fitted = plan.fits;
    if (!plan.fits && op == Operator::forward && problem.batch > 0) {
      CHECK(plan.samples == 1 && plan.channels == 1 && plan.output_planes == 1)
          << named << ": smaller pieces than at limit " << limit << " exist";
    }
  }
  CHECK(fitted) << named;
}

void test_limits() {
  const Target targets[] = {Target::cpu(1), Target::cpu(16), {Backend::cuda, 132}};
  for (NamedProblem named : problems()) {
    for (const Layout layout : {Layout::ncdhw, Layout::ndhwc}) {
      for (const DataType dtype : kDataTypes) {
        named.problem.layout = layout;
        named.problem.dtype = dtype;
        for (const Operator op : kOperators) {
          for (const Target& target : targets) check_limits(named, op, target);
        }
      }
    }
  }
}

// KernelBench's largest transposed convolution, 80 GB of columns, at the default limit of 1 GiB.
void test_large_problem() {
  NamedProblem named{"kb68", {}};
  named.problem.batch = 16;
  named.problem.in_channels = 32;
  named.problem.out_channels = 64;
  named.problem.input = {64, 64, 64};
  named.problem.kernel = {3, 5, 5};
  constexpr int64_t kLimit = int64_t{1} << 30;
  for (const Operator op : kOperators) {
    for (const Target& target : {Target::cpu(8), Target{Backend::cuda, 132}}) {
      const Plan plan = make_plan(named.problem, op, target, kLimit);
      CHECK(plan.fits) << "operator " << static_cast<int>(op);
      check_plan(named, plan, kLimit);
    }
  }
}

void test_whole_problems() {
  // A GPU with memory to spare takes everything at once.
  for (const NamedProblem& named : problems()) {
    for (const Operator op : {Operator::forward, Operator::grad_input, Operator::grad_weight}) {
      const Plan plan = make_plan(named.problem, op, {Backend::cuda, 132}, int64_t{1} << 40);
      CHECK(plan.samples == named.problem.batch) << named;
      CHECK(plan.channels == named.problem.out_channels) << named;
      CHECK(plan.output_planes == named.problem.output()[0]) << named;
      CHECK(plan.voxels == named.problem.input_voxels()) << named;
    }
  }
}

void test_unaddressable() {
  // CBLAS takes 32-bit sizes: such a problem is refused on the CPU, and only there.
  Problem problem;
  problem.input = {1 << 11, 1 << 11, 1 << 10};
  problem.kernel = problem.stride = {2, 1, 1};
  CHECK(!make_plan(problem, Operator::forward, Target::cpu(8), int64_t{1} << 40).fits);
  CHECK(make_plan(problem, Operator::forward, {Backend::cuda, 132}, int64_t{1} << 40).fits);
}

// Of the direct kernels that have a model of them, for all that run.
void test_expected_cycles() {
  const Target target = Target::cuda(90, 132, 228 << 10);
  constexpr Operator operators[] = {Operator::forward, Operator::grad_input, Operator::grad_weight,
                                    Operator::grad_input_weight};
  Problem problem;
  problem.in_channels = 64;
  problem.out_channels = 32;
  problem.input = {32, 32, 32};
  problem.kernel = {3, 3, 3};
  problem.stride = {2, 2, 2};
  problem.padding = {1, 1, 1};
  problem.precision = Precision::tf32;
  const auto cycles = [&](int64_t batch, Operator op, Algorithm algorithm) {
    problem.batch = batch;
    return make_plan(problem, op, target, int64_t{1} << 30, algorithm).expected_cycles;
  };
  for (const Operator op : operators) {
    const double one = cycles(1, op, Algorithm::direct), eight = cycles(8, op, Algorithm::direct);
    CHECK(one > 0 && eight > 2 * one && eight <= 8 * one) << one << " cycles, of eight samples " << eight;
    CHECK(cycles(8, op, Algorithm::gemm) == 0);
  }
  const double apart =
      cycles(8, Operator::grad_input, Algorithm::direct) + cycles(8, Operator::grad_weight, Algorithm::direct);
  CHECK(cycles(8, Operator::grad_input_weight, Algorithm::direct) == apart);
  problem.groups = problem.out_channels = problem.in_channels;
  for (const Operator op : operators) CHECK(cycles(8, op, Algorithm::direct) == 0) << "depthwise";
  problem.groups = 1;
  problem.dtype = DataType::float64;
  for (const Operator op : operators) CHECK(cycles(8, op, Algorithm::direct) == 0) << "simt";
  problem.dtype = DataType::float32;
  problem.precision = Precision::ieee;  // of few voxels, whose sum float32 arithmetic makes
  problem.input = {4, 4, 4};
  CHECK(cycles(1, Operator::grad_input, Algorithm::direct) > 0);
  CHECK(cycles(1, Operator::grad_weight, Algorithm::direct) == 0);
  CHECK(cycles(1, Operator::grad_input_weight, Algorithm::direct) == 0);
}

void test_invalid_target() {
  const auto message = [](int capability, int multiprocessors, int shared_memory) {
    return message_of<std::invalid_argument>([&] { Target::cuda(capability, multiprocessors, shared_memory); });
  };
  CHECK(message(0, 132, 1) == "compute_capability must be positive, got 0");
  CHECK(message(90, -1, 1) == "multiprocessors must be positive, got -1");
  CHECK(message(90, 132, 0) == "shared_memory must be positive, got 0");
  CHECK(message_of<std::invalid_argument>([] { Target::cpu(0); }) == "threads must be positive, got 0");
}

// No piece has columns that a grid of blocks has no room for, however high the limit.
void test_unlimited_workspace() {
  const Extent one{1, 1, 1};
  Problem problem = problem_of(int64_t{1} << 33, 1, 1, 1, one, one, {1, 1, 2}, {0, 0, 0}, {0, 0, 0}, one);
  problem.dtype = DataType::float16;
  const Target gpu{Backend::cuda, 132, 90, 228 << 10};
  for (const int64_t limit : {int64_t{1} << 34, (int64_t{1} << 62) - 1}) {
    for (const Operator op : {Operator::forward, Operator::grad_input, Operator::grad_weight}) {
      const Plan plan = make_plan(problem, op, gpu, limit);
      CHECK(plan.fits && plan.samples <= int64_t{1} << 30) << plan.samples << " samples at once";
    }
  }
}

// All samples of a pointwise convolution in NDHWC are rows of one matrix, of which CBLAS counts in 32 bits.
void test_rows_of_all_samples() {
  const Extent one{1, 1, 1}, none{0, 0, 0};
  Problem problem = problem_of(2, 2, 2, 1, {1, 32768, 32768}, one, one, none, none, one);
  CHECK(make_plan(problem, Operator::grad_weight, Target::cpu(2), 1 << 30).fits);
  problem.layout = Layout::ndhwc;
  CHECK(!make_plan(problem, Operator::grad_weight, Target::cpu(2), 1 << 30).fits);
  problem.batch = 1;
  CHECK(make_plan(problem, Operator::grad_weight, Target::cpu(2), 1 << 30).fits);
}

void test_invalid_problem() {
  Problem problem;
  problem.stride = {0, 1, 1};
  CHECK(contains(message_of<InvalidProblem>([&] { make_plan(problem, Operator::forward, Target::cpu(1), 1 << 20); }),
                 "stride"));
}

}  // namespace

int main() {
  test_limits();
  test_large_problem();
  test_whole_problems();
  test_unaddressable();
  test_expected_cycles();
  test_invalid_target();
  test_unlimited_workspace();
  test_rows_of_all_samples();
  test_invalid_problem();
  return finish();
}
