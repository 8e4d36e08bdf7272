// The convolutions that plans and operators are tested on.
#pragma once

#include <initializer_list>
#include <ostream>
#include <random>
#include <string>
#include <vector>

#include "convt3d/problem.h"

namespace convt3d::test {

struct NamedProblem {
  std::string name;
  Problem problem;  // float32, NCDHW, unless a test changes that
};

inline const char* name_of(DataType dtype) {
  static const char* const kDataTypes[] = {"float64", "float32", "float16", "bfloat16"};
  return kDataTypes[static_cast<int>(dtype)];
}

inline std::ostream& operator<<(std::ostream& out, const NamedProblem& named) {
  return out << named.name << (named.problem.layout == Layout::ncdhw ? " ncdhw " : " ndhwc ")
             << name_of(named.problem.dtype);
}

inline Problem problem_of(int64_t batch, int64_t in_channels, int64_t out_channels, int64_t groups, Extent input,
                          Extent kernel, Extent stride, Extent padding, Extent output_padding, Extent dilation) {
  Problem problem;
  problem.batch = batch;
  problem.in_channels = in_channels;
  problem.out_channels = out_channels;
  problem.groups = groups;
  problem.input = input;
  problem.kernel = kernel;
  problem.stride = stride;
  problem.padding = padding;
  problem.output_padding = output_padding;
  problem.dilation = dilation;
  return problem;
}

inline std::vector<NamedProblem> problems() {
  constexpr auto make = problem_of;
  const Extent zero{0, 0, 0}, one{1, 1, 1}, two{2, 2, 2}, three{3, 3, 3};
  return {
      {"one voxel", make(1, 1, 1, 1, one, one, one, zero, zero, one)},
      {"plain", make(2, 3, 5, 1, {4, 5, 6}, three, one, zero, zero, one)},
      {"stride 2, padded", make(2, 8, 6, 1, {5, 4, 6}, three, two, one, one, one)},
      {"kernel 4, stride 2", make(1, 4, 4, 1, {4, 6, 5}, {4, 4, 4}, two, one, zero, one)},
      {"groups", make(3, 8, 12, 4, {3, 4, 5}, three, two, one, zero, one)},
      {"depthwise", make(2, 6, 6, 6, {4, 4, 4}, three, two, one, one, one)},
      {"depthwise, doubled", make(1, 5, 10, 5, {4, 3, 5}, two, {1, 2, 3}, zero, zero, one)},
      {"pointwise", make(2, 5, 7, 1, {3, 4, 5}, one, one, zero, zero, one)},
      {"pointwise groups", make(2, 6, 4, 2, {3, 4, 5}, one, one, zero, zero, one)},
      {"kernel 1, strided", make(2, 3, 4, 1, {3, 4, 5}, one, {2, 3, 2}, zero, {1, 2, 0}, one)},
      {"kernel 1, padded", make(1, 3, 4, 1, {4, 5, 6}, one, one, one, zero, one)},
      {"kernel = stride", make(2, 6, 5, 1, {3, 4, 5}, two, two, zero, zero, one)},
      {"kernel = stride, anisotropic", make(1, 4, 3, 1, {3, 4, 5}, {1, 2, 4}, {1, 2, 4}, zero, zero, one)},
      {"kernel < stride", make(1, 3, 4, 1, {3, 3, 4}, two, {3, 4, 5}, zero, {2, 1, 4}, one)},
      {"dilated", make(1, 3, 4, 1, {4, 5, 6}, three, one, two, zero, {2, 1, 3})},
      {"dilation with stride", make(2, 4, 6, 2, {5, 4, 6}, three, {2, 3, 4}, one, zero, {3, 2, 6})},
      {"output padding by dilation", make(1, 2, 3, 1, {3, 3, 3}, two, two, zero, {2, 1, 2}, three)},
      {"cropped to the middle", make(1, 3, 2, 1, {4, 4, 4}, {5, 5, 5}, two, {5, 4, 3}, zero, one)},
      {"wide channels", make(1, 40, 72, 1, {2, 3, 4}, {1, 3, 3}, {1, 2, 2}, {0, 1, 1}, {0, 1, 1}, one)},
      {"many samples", make(9, 2, 3, 1, {2, 2, 3}, two, one, zero, zero, one)},
      {"long reduction", make(1, 3, 2, 1, {16, 16, 16}, two, two, zero, zero, one)},
      {"empty batch", make(0, 3, 4, 1, {3, 3, 3}, three, two, one, zero, one)},
  };
}

inline bool is_valid(const Problem& problem) {
  try {
    problem.validate();
    return true;
  } catch (const InvalidProblem&) {
    return false;
  }
}

// A valid problem of a size as networks have them.
inline NamedProblem draw(std::mt19937& random) {
  const auto pick = [&random](std::initializer_list<int> values) { return values.begin()[random() % values.size()]; };
  NamedProblem drawn = problems()[0];
  Problem& problem = drawn.problem;
  do {
    problem = Problem();
    problem.groups = pick({1, 1, 1, 2, 4});
    problem.batch = pick({1, 2, 4});
    problem.in_channels = problem.groups * pick({3, 8, 16, 32, 48, 64, 128, 256});
    problem.out_channels = problem.groups * pick({1, 3, 8, 16, 24, 32, 48, 64, 128});
    const bool is_cubic = random() % 2 == 0;
    for (int axis = 0; axis < 3; ++axis) {
      problem.stride[axis] = is_cubic && axis > 0 ? problem.stride[0] : pick({1, 1, 2, 2, 2, 3, 4});
      problem.kernel[axis] = is_cubic && axis > 0 ? problem.kernel[0] : pick({1, 2, 3, 3, 4, 5});
      problem.dilation[axis] = pick({1, 1, 1, 2});
      problem.padding[axis] = pick({0, 1});
      problem.input[axis] = pick({4, 7, 8, 16, 31, 32, 64});
    }
    problem.dtype = pick({0, 0, 1}) != 0 ? DataType::bfloat16 : DataType::float32;
    problem.precision = random() % 2 == 0 ? Precision::ieee : Precision::tf32;
    problem.layout = random() % 2 == 0 ? Layout::ndhwc : Layout::ncdhw;
  } while (!is_valid(problem));
  return drawn;
}

}  // namespace convt3d::test
