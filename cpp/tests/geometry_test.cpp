// The arithmetic of one axis against trying every input and tap.
#include "geometry.h"

#include <limits>
#include <random>
#include <vector>

#include "check.h"

namespace {

using namespace convt3d;
using namespace convt3d::test;

Problem along_width(int64_t input, int64_t kernel, int64_t stride, int64_t padding, int64_t output_padding,
                    int64_t dilation) {
  Problem problem;
  problem.input[2] = input;
  problem.kernel[2] = kernel;
  problem.stride[2] = stride;
  problem.padding[2] = padding;
  problem.output_padding[2] = output_padding;
  problem.dilation[2] = dilation;
  return problem;
}

std::string text(const Problem& problem) {
  std::ostringstream out;
  out << "input " << problem.input[2] << " kernel " << problem.kernel[2] << " stride " << problem.stride[2]
      << " padding " << problem.padding[2] << " output_padding " << problem.output_padding[2] << " dilation "
      << problem.dilation[2];
  return out.str();
}

struct Pair {
  int64_t tap, index;
};

// The pairs that meet `position`, by trying every tap.
std::vector<Pair> pairs_at(const Problem& problem, int64_t position) {
  std::vector<Pair> pairs;
  for (int64_t tap = 0; tap < problem.kernel[2]; ++tap) {
    const int64_t reach = position + problem.padding[2] - tap * problem.dilation[2];
    if (reach % problem.stride[2] != 0) continue;
    const int64_t index = reach / problem.stride[2];
    if (index >= 0 && index < problem.input[2]) pairs.push_back({tap, index});
  }
  return pairs;
}

template <class Index>
void check_taps_at(const Problem& problem, const Axis<Index>& axis, int64_t position) {
  const std::vector<Pair> pairs = pairs_at(problem, position);
  const TapWalk<Index> walk = axis.taps_at(static_cast<Index>(position));
  CHECK(walk.count == static_cast<Index>(pairs.size())) << text(problem) << " at " << position;
  if (walk.count != static_cast<Index>(pairs.size())) return;
  for (size_t step = 0; step < pairs.size(); ++step) {
    const Index tap = walk.tap + static_cast<Index>(step) * axis.tap_step;
    const Index index = walk.index - static_cast<Index>(step) * axis.index_step;
    CHECK(tap == pairs[step].tap && index == pairs[step].index) << text(problem) << " at " << position;
    CHECK(axis.output_at(index, tap) == position) << text(problem) << " at " << position;
  }
}

template <class Index>
void check_inputs_of(const Problem& problem, const Axis<Index>& axis, int64_t output) {
  for (int64_t tap = 0; tap < problem.kernel[2]; ++tap) {
    const Range<Index> range = axis.inputs_of(static_cast<Index>(tap));
    CHECK(range.begin <= range.end) << text(problem) << " tap " << tap;
    for (int64_t index = 0; index < problem.input[2]; ++index) {
      const int64_t position = index * problem.stride[2] - problem.padding[2] + tap * problem.dilation[2];
      const bool inside = position >= 0 && position < output;
      CHECK((index >= range.begin && index < range.end) == inside) << text(problem) << " tap " << tap;
    }
  }
}

// The range must hold the inputs whose first to last tap spans some of the positions, and no others. Where
// output_padding puts the positions behind every input, it is empty.
template <class Index>
void check_inputs_reaching(const Problem& problem, const Axis<Index>& axis, int64_t output) {
  for (int64_t begin = 0; begin < output; ++begin) {
    for (int64_t end = begin + 1; end <= output; ++end) {
      const Range<Index> range = axis.inputs_reaching(Range<Index>{static_cast<Index>(begin), static_cast<Index>(end)});
      const bool empty = range.begin == range.end;
      CHECK(range.begin >= 0 && (empty || (range.begin < range.end && range.end <= problem.input[2])))
          << text(problem) << " from " << begin << " to " << end;
      for (int64_t index = 0; index < problem.input[2]; ++index) {
        const int64_t first = index * problem.stride[2] - problem.padding[2];
        const int64_t last = first + (problem.kernel[2] - 1) * problem.dilation[2];
        const bool spans = last >= begin && first < end;
        CHECK((index >= range.begin && index < range.end) == spans)
            << text(problem) << " from " << begin << " to " << end << " input " << index;
      }
    }
  }
}

template <class Index>
void check_axis(const Problem& problem) {
  const Axis<Index> axis(problem, 2);
  const int64_t output = problem.output()[2];
  CHECK(axis.output == output) << text(problem);
  for (int64_t position = 0; position < output; ++position) check_taps_at(problem, axis, position);
  check_inputs_of(problem, axis, output);
  if (output <= 24) check_inputs_reaching(problem, axis, output);
}

void test_small_axes() {
  for (int64_t stride = 1; stride <= 6; ++stride) {
    for (int64_t dilation = 1; dilation <= 6; ++dilation) {
      for (int64_t kernel = 1; kernel <= 5; ++kernel) {
        for (const int64_t padding : {0, 1, 2, 5}) {
          for (const int64_t input : {1, 2, 5}) {
            for (const int64_t output_padding : {int64_t{0}, std::max(stride, dilation) - 1}) {
              const Problem problem = along_width(input, kernel, stride, padding, output_padding, dilation);
              if (problem.output()[2] < 1) continue;
              check_axis<int32_t>(problem);
              check_axis<int64_t>(problem);
            }
          }
        }
      }
    }
  }
}

// Sizes up to the largest that are accepted, at a few positions each, in 32 bits as far as Geometry says that they fit.
void test_large_axes() {
  std::mt19937_64 random(20);
  const auto up_to = [&](int64_t limit) {
    // Of every order of magnitude alike.
    int64_t size = limit;
    for (uint64_t halvings = random() % 32; halvings > 0 && size > 1; --halvings) size /= 2;
    return 1 + static_cast<int64_t>(random() % static_cast<uint64_t>(size));
  };
  int narrow = 0, wide = 0;
  for (int i = 0; i < 20000; ++i) {
    const Problem problem = along_width(up_to(int64_t{1} << 31), up_to(64), up_to((int64_t{1} << 31) - 1),
                                        up_to(1 << 20) - 1, 0, up_to((int64_t{1} << 31) - 1));
    // The last condition is validate's, on the bytes of the output.
    if (problem.output()[2] < 1 || problem.output()[2] > std::numeric_limits<int64_t>::max() / 8) continue;
    const bool fits = Geometry<int32_t>::fits(problem);
    (fits ? narrow : wide) += 1;
    for (int sample = 0; sample < 8; ++sample) {
      // Positions that some pair meets, and any others.
      const int64_t index = static_cast<int64_t>(random() % static_cast<uint64_t>(problem.input[2]));
      const int64_t tap = static_cast<int64_t>(random() % static_cast<uint64_t>(problem.kernel[2]));
      const int64_t met = index * problem.stride[2] - problem.padding[2] + tap * problem.dilation[2];
      const int64_t any = static_cast<int64_t>(random() % static_cast<uint64_t>(problem.output()[2]));
      for (const int64_t position : {met, any}) {
        if (position < 0 || position >= problem.output()[2]) continue;
        check_taps_at(problem, Axis<int64_t>(problem, 2), position);
        if (fits) check_taps_at(problem, Axis<int32_t>(problem, 2), position);
      }
    }
  }
  CHECK(narrow > 1000 && wide > 1000) << narrow << " fit in 32 bits, " << wide << " do not";
}

// The product with a reciprocal by which the device divides in 32 bits, at the multiples of the divisor, where it would
// first be wrong, and at the largest numerators.
void test_reciprocals() {
  const auto divide = [](const Divisor<int32_t>& divisor, int32_t numerator) {
    const uint64_t n = static_cast<uint32_t>(numerator);
    const uint32_t high = static_cast<uint32_t>(n * divisor.multiplier >> 32);
    return static_cast<int32_t>((high + static_cast<uint32_t>(n)) >> divisor.shift);
  };
  const int64_t largest = std::numeric_limits<int32_t>::max();
  std::mt19937_64 random(3);
  std::vector<int64_t> divisors;
  for (int64_t divisor = 1; divisor <= 1000; ++divisor) divisors.push_back(divisor);
  for (int shift = 10; shift < 31; ++shift) {
    for (const int64_t offset : {-1, 0, 1}) divisors.push_back((int64_t{1} << shift) + offset);
  }
  for (int i = 0; i < 2000; ++i) divisors.push_back(1 + static_cast<int64_t>(random() % largest));
  divisors.push_back(largest);
  for (const int64_t value : divisors) {
    const Divisor<int32_t> divisor(value);
    for (int i = 0; i < 100; ++i) {
      const int64_t multiple =
          i == 0 ? largest / value * value : static_cast<int64_t>(random() % largest) / value * value;
      for (const int64_t numerator : {multiple - 1, multiple, multiple + value - 1}) {
        if (numerator < 0 || numerator > largest) continue;
        CHECK(divide(divisor, static_cast<int32_t>(numerator)) == numerator / value) << numerator << " / " << value;
        CHECK(divisor.quotient(static_cast<int32_t>(numerator)) == numerator / value) << numerator << " / " << value;
      }
    }
    CHECK(divide(divisor, static_cast<int32_t>(largest)) == largest / value) << largest << " / " << value;
  }
}

}  // namespace

int main() {
  test_small_axes();
  test_large_axes();
  test_reciprocals();
  return finish();
}
