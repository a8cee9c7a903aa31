// The floating types that tensors hold, for CPU code: how each is stored, and the way to the type
// that sums are made in and back, rounding to even. Pure functions, safe from any thread.
#pragma once

#include <bit>
#include <cstdint>

namespace esper {

struct Float32 {
  using Storage = float;
  using Value = float;
  static float widen(float stored) noexcept { return stored; }
  static float narrow(float value) noexcept { return value; }
};

struct Float64 {
  using Storage = double;
  using Value = double;
  static double widen(double stored) noexcept { return stored; }
  static double narrow(double value) noexcept { return value; }
};

struct BFloat16 {
  using Storage = std::uint16_t;
  using Value = float;
  static float widen(std::uint16_t stored) noexcept {
    return std::bit_cast<float>(static_cast<std::uint32_t>(stored) << 16U);
  }
  static std::uint16_t narrow(float value) noexcept {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    if ((bits & 0x7FFFFFFFU) > 0x7F800000U) return 0x7FFFU;  // the NaN that the device gives
    const std::uint32_t to_even = 0x7FFFU + (bits >> 16U & 1U);
    return static_cast<std::uint16_t>((bits + to_even) >> 16U);
  }
};

struct Float16 {
  using Storage = std::uint16_t;
  using Value = float;
  static float widen(std::uint16_t stored) noexcept {
    const std::uint32_t sign = (stored & 0x8000U) << 16U;
    const std::uint32_t magnitude = stored & 0x7FFFU;
    if (magnitude >= 0x7C00U) {  // infinity and NaN
      return std::bit_cast<float>(sign | 0x7F800000U | (magnitude & 0x3FFU) << 13U);
    }
    // The half's bits at the place of a float's are 2^112 too small; subnormals come out right as
    // well.
    const float scaled = std::bit_cast<float>(magnitude << 13U) * 0x1p112F;
    return std::bit_cast<float>(std::bit_cast<std::uint32_t>(scaled) | sign);
  }
  static std::uint16_t narrow(float value) noexcept {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    const std::uint32_t sign = bits >> 16U & 0x8000U;
    const std::uint32_t magnitude = bits & 0x7FFFFFFFU;
    if (magnitude > 0x7F800000U) return 0x7FFFU;  // the NaN that the device gives
    if (magnitude >= 0x477FF000U) return static_cast<std::uint16_t>(sign | 0x7C00U);
    if (magnitude < 0x38800000U) {
      // Subnormal: adding 0.5 leaves the unit 2^-24 in the last place and rounds to even.
      const float shifted = std::bit_cast<float>(magnitude) + 0.5F;
      return static_cast<std::uint16_t>(sign |
                                        (std::bit_cast<std::uint32_t>(shifted) - 0x3F000000U));
    }
    const std::uint32_t to_even = 0xFFFU + (magnitude >> 13U & 1U);
    return static_cast<std::uint16_t>(sign | ((magnitude - 0x38000000U + to_even) >> 13U));
  }
};

}  // namespace esper
