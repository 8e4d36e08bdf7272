// Which problems are accepted, how large their outputs are, and what the others are told.
#include "convt3d/problem.h"

#include "check.h"

namespace {

using namespace convt3d;
using namespace convt3d::test;

// A valid problem with one thing changed.
template <class Change>
std::string rejection(const Change& change) {
  Problem problem;
  problem.batch = 2;
  problem.in_channels = 4;
  problem.out_channels = 6;
  problem.input = {4, 5, 6};
  problem.kernel = {3, 3, 3};
  problem.stride = {2, 2, 2};
  change(problem);
  return message_of<InvalidProblem>([&] { problem.validate(); });
}

// The message names the argument and what was given.
template <class Change>
void check_rejected(const Change& change, const std::string& argument, const std::string& given) {
  const std::string message = rejection(change);
  CHECK(contains(message, argument)) << "\"" << argument << "\" in: " << message;
  CHECK(contains(message, given)) << "\"" << given << "\" in: " << message;
}

void test_rejections() {
  CHECK(rejection([](Problem&) {}) == "(nothing was thrown)");
  CHECK(rejection([](Problem& p) { p.batch = 0; }) == "(nothing was thrown)");
  check_rejected([](Problem& p) { p.batch = -1; }, "batch", "-1");
  check_rejected([](Problem& p) { p.groups = 0; }, "groups", "0");
  check_rejected([](Problem& p) { p.groups = -2; }, "groups", "-2");
  check_rejected([](Problem& p) { p.in_channels = 0; }, "channels", "0");
  check_rejected([](Problem& p) { p.out_channels = 0; }, "output channels", "0");
  check_rejected([](Problem& p) { p.groups = 3; }, "groups=3", "4 channels");
  check_rejected([](Problem& p) { p.groups = 4; }, "groups=4", "6 channels");
  check_rejected([](Problem& p) { p.input = {4, 0, 6}; }, "height", "(4, 0, 6)");
  check_rejected([](Problem& p) { p.kernel = {3, 3, 0}; }, "kernel width", "(3, 3, 0)");
  check_rejected([](Problem& p) { p.stride = {2, 0, 2}; }, "stride", "(2, 0, 2)");
  check_rejected([](Problem& p) { p.stride = {-1, 1, 1}; }, "stride", "(-1, 1, 1)");
  check_rejected([](Problem& p) { p.dilation = {1, 1, 0}; }, "dilation", "(1, 1, 0)");
  check_rejected([](Problem& p) { p.padding = {0, -1, 0}; }, "padding", "(0, -1, 0)");
  check_rejected([](Problem& p) { p.output_padding = {-1, 0, 0}; }, "output_padding", "(-1, 0, 0)");
  check_rejected([](Problem& p) { p.output_padding = {0, 2, 0}; }, "output_padding", "(0, 2, 0)");
  check_rejected([](Problem& p) { p.padding = {0, 6, 0}; }, "height", "-1");
  check_rejected([](Problem& p) { p.padding = {int64_t{1} << 40, 0, 0}; }, "padding", "1099511627776");
}

void test_output_padding_rule() {
  // Smaller than either of stride and dilation is enough.
  const auto with_dilation = [](int64_t dilation, int64_t output_padding) {
    return rejection([=](Problem& p) {
      p.dilation = {dilation, dilation, dilation};
      p.output_padding = {output_padding, output_padding, output_padding};
    });
  };
  CHECK(with_dilation(1, 1) == "(nothing was thrown)");
  CHECK(contains(with_dilation(1, 2), "output_padding"));
  CHECK(with_dilation(4, 3) == "(nothing was thrown)");
  CHECK(contains(with_dilation(4, 4), "output_padding"));
}

void test_overflow() {
  const int64_t large = int64_t{1} << 31;
  CHECK(contains(rejection([=](Problem& p) { p.input = {large, large, 1}; }), "overflows"));
  CHECK(contains(rejection([=](Problem& p) {
                   p.input = {large, large, large};
                   p.batch = 0;
                 }),
                 "overflows"));
  CHECK(contains(rejection([=](Problem& p) { p.batch = int64_t{1} << 62; }), "overflows"));
  CHECK(contains(rejection([=](Problem& p) { p.input = {int64_t{1} << 62, 1, 1}; }), "overflows"));
  CHECK(contains(rejection([=](Problem& p) { p.kernel = {int64_t{1} << 62, 1, 1}; }), "overflows"));
  CHECK(contains(rejection([=](Problem& p) { p.in_channels = p.out_channels = large * large; }), "overflows"));
  // Input, output and weight fit each, but not the columns between them.
  CHECK(contains(rejection([=](Problem& p) {
                   p.input = {1 << 20, 1 << 10, 1};
                   p.kernel = {1 << 20, 1 << 11, 1};
                   p.stride = {1, 1, 1};
                   p.padding = {(1 << 20) - 1, (1 << 10) - 1, 0};
                 }),
                 "column matrix overflows"));
}

void test_output_sizes() {
  Problem problem;
  problem.input = {5, 6, 7};
  problem.kernel = {3, 4, 1};
  problem.stride = {2, 1, 3};
  problem.padding = {1, 0, 2};
  problem.output_padding = {1, 0, 2};
  problem.dilation = {1, 2, 3};
  problem.batch = 2;
  problem.in_channels = 4;
  problem.out_channels = 6;
  problem.groups = 2;
  problem.validate();
  CHECK((problem.output() == Extent{10, 12, 17}));
  CHECK(problem.output_voxels() == 10 * 12 * 17);
  CHECK(problem.taps() == 12);
  CHECK(problem.input_elements() == 2 * 4 * 5 * 6 * 7);
  CHECK(problem.weight_elements() == 4 * 3 * 12);
  CHECK(problem.output_elements() == 2 * 6 * 10 * 12 * 17);
  CHECK(problem.group_in_channels() == 2);
  CHECK(problem.group_out_channels() == 3);

  CHECK(element_size(DataType::float64) == 8);
  CHECK(element_size(DataType::float32) == 4);
  CHECK(element_size(DataType::float16) == 2);
  CHECK(element_size(DataType::bfloat16) == 2);
}

void test_special_cases() {
  Problem problem;
  problem.input = {4, 4, 4};
  CHECK(problem.is_pointwise());
  CHECK(problem.has_single_contributions());
  problem.padding = {0, 0, 1};
  CHECK(!problem.is_pointwise());
  problem = Problem{};
  problem.kernel = problem.stride = {2, 2, 2};
  CHECK(!problem.is_pointwise());
  CHECK(problem.has_single_contributions());
  problem.kernel = {2, 2, 3};
  CHECK(!problem.has_single_contributions());
  // Taps 0 and 1 are 2 apart, as the strides are: they share outputs.
  problem.kernel = {1, 1, 2};
  problem.dilation = {1, 1, 2};
  CHECK(!problem.has_single_contributions());
}

}  // namespace

int main() {
  test_rejections();
  test_output_padding_rule();
  test_overflow();
  test_output_sizes();
  test_special_cases();
  return finish();
}
