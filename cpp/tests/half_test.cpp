// The half types' conversions: every bit pattern, and every boundary at which rounding changes its mind.
#include "cpu/half.h"

#include <cmath>
#include <limits>

#include "check.h"

namespace {

using namespace convt3d::test;
using convt3d::BFloat16;
using convt3d::Float16;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The value of a pattern by its definition: sign, exponent and mantissa fields, subnormals at exponent 0.
double value_of(uint32_t bits, int mantissa_bits, int exponent_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const uint32_t mantissa = bits & ((1u << mantissa_bits) - 1);
  const int exponent = static_cast<int>(bits >> mantissa_bits & ((1u << exponent_bits) - 1));
  const double sign = bits >> 15 != 0 ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1) {
    return mantissa == 0 ? sign * HUGE_VAL : std::numeric_limits<double>::quiet_NaN();
  }
  const double fraction = exponent == 0 ? mantissa : mantissa + (1u << mantissa_bits);
  return sign * std::ldexp(fraction, (exponent == 0 ? 1 : exponent) - bias - mantissa_bits);
}

template <class Half>
void test_every_pattern(int mantissa_bits, int exponent_bits) {
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const Half half{static_cast<uint16_t>(bits)};
    const double expected = value_of(bits, mantissa_bits, exponent_bits);
    if (std::isnan(expected)) {
      CHECK(std::isnan(half.widen())) << "pattern " << bits;
      CHECK(std::isnan(Half::round(half.widen()).widen())) << "pattern " << bits;
      continue;
    }
    CHECK(static_cast<double>(half.widen()) == expected) << "pattern " << bits;
    CHECK(std::signbit(half.widen()) == (bits >> 15 != 0)) << "pattern " << bits;
    CHECK(Half::round(half.widen()).bits == bits) << "pattern " << bits;
  }
}

// Halfway between neighbours the even one wins, and a float's last place to either side decides otherwise. Past the
// largest finite value, infinity stands where the next value would have been.
template <class Half>
void test_rounding(int mantissa_bits, int exponent_bits) {
  const uint32_t infinity = ((1u << exponent_bits) - 1) << mantissa_bits;
  for (uint32_t bits = 0; bits < infinity; ++bits) {
    const double below = value_of(bits, mantissa_bits, exponent_bits);
    const double above = bits + 1 < infinity ? value_of(bits + 1, mantissa_bits, exponent_bits)
                                             : 2 * below - value_of(bits - 1, mantissa_bits, exponent_bits);
    const float middle = static_cast<float>((below + above) / 2);
    const uint32_t even = bits % 2 == 0 ? bits : bits + 1;
    for (const float sign : {1.0f, -1.0f}) {
      const uint32_t sign_bit = sign < 0 ? 0x8000u : 0u;
      CHECK(Half::round(sign * middle).bits == (sign_bit | even)) << "above pattern " << bits;
      CHECK(Half::round(sign * std::nextafter(middle, 0.0f)).bits == (sign_bit | bits)) << "above pattern " << bits;
      CHECK(Half::round(sign * std::nextafter(middle, kInfinity)).bits == (sign_bit | (bits + 1)))
          << "above pattern " << bits;
    }
  }
  CHECK(Half::round(kInfinity).bits == infinity);
  CHECK(Half::round(-kInfinity).bits == (infinity | 0x8000u));
  CHECK(std::isnan(Half::round(std::numeric_limits<float>::quiet_NaN()).widen()));
  CHECK(Half::round(std::numeric_limits<float>::max()).bits == infinity);
  CHECK(Half::round(-0.0f).bits == 0x8000u);
}

}  // namespace

int main() {
  test_every_pattern<Float16>(10, 5);
  test_every_pattern<BFloat16>(7, 8);
  test_rounding<Float16>(10, 5);
  test_rounding<BFloat16>(7, 8);
  CHECK(Float16::round(std::numeric_limits<float>::denorm_min()).bits == 0);
  CHECK(Float16::round(65519.996f).bits == 0x7bffu);  // 65504, the largest
  CHECK(Float16::round(65520.0f).bits == 0x7c00u);
  return finish();
}
