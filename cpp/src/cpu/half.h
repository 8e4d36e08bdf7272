// float16 and bfloat16 as CPUs without arithmetic for them see them: 16 bits to widen and to round to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

namespace convt3d {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

struct Float16 {
  uint16_t bits;

  float widen() const {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
    const uint32_t exponent = (bits >> 10) & 0x1fu, mantissa = bits & 0x3ffu;
    if (exponent == 0x1f) return float_of(sign | 0x7f800000u | mantissa << 13);
    if (exponent != 0) return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign == 0 ? magnitude : -magnitude;
  }

  static Float16 round(float value) {
    const uint32_t sign = bits_of(value) >> 16 & 0x8000u;
    uint32_t magnitude = bits_of(value) & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
      magnitude = 0x7e00u;  // NaN
    } else if (magnitude >= 0x47800000u) {
      magnitude = 0x7c00u;  // 65536 and beyond: infinity
    } else if (magnitude < 0x38800000u) {
      // Subnormal: adding 0.5, whose last place is 2^-24, rounds to the float16's last place.
      magnitude = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    } else {
      magnitude = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
    }
    return {static_cast<uint16_t>(sign | magnitude)};
  }
};

struct BFloat16 {
  uint16_t bits;

  float widen() const { return float_of(static_cast<uint32_t>(bits) << 16); }

  static BFloat16 round(float value) {
    const uint32_t all = bits_of(value);
    if ((all & 0x7fffffffu) > 0x7f800000u) return {0x7fc0u};  // NaN
    return {static_cast<uint16_t>((all + 0x7fffu + (all >> 16 & 1u)) >> 16)};
  }
};

}  // namespace convt3d
