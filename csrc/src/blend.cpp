#include "esper/blend.h"

#include <bit>
#include <string>

#include "esper/errors.h"

namespace esper {
namespace {

struct Float32 {
  using Storage = float;
  static float widen(float stored) noexcept { return stored; }
  static float narrow(float value) noexcept { return value; }
};

struct BFloat16 {
  using Storage = std::uint16_t;
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
  static float widen(std::uint16_t stored) noexcept {
    const std::uint32_t sign = (stored & 0x8000U) << 16U;
    const std::uint32_t magnitude = stored & 0x7FFFU;
    if (magnitude >= 0x7C00U) {  // infinity and NaN
      return std::bit_cast<float>(sign | 0x7F800000U | (magnitude & 0x3FFU) << 13U);
    }
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

template <class Type>
void blend_values(const BlendOperands& operands) {
  using Storage = typename Type::Storage;
  // NOLINTBEGIN: addresses, as torch hands them over
  const auto* h = reinterpret_cast<const Storage*>(operands.h);
  const auto* alpha = reinterpret_cast<const float*>(operands.alpha);
  auto* out = reinterpret_cast<Storage*>(operands.out);
  const auto value = [&](std::size_t k, std::size_t i) {
    return Type::widen(reinterpret_cast<const Storage*>(operands.deltas[k])[i]);
  };
  // NOLINTEND
  for (std::size_t i = 0; i < operands.numel; ++i) {
    bool is_changed = false;
    const float sum = blend_sum(
        Type::widen(h[i]), alpha, operands.deltas.size(),
        [&](std::size_t k) { return value(k, i); }, is_changed);
    out[i] = is_changed ? Type::narrow(sum) : h[i];
  }
}

}  // namespace

void require_blend(const BlendOperands& operands) {
  if (operands.dtype == DType::FLOAT64) {
    throw InvalidInput("dtype", "be 'float32', 'float16' or 'bfloat16'", "'float64'");
  }
  if (operands.deltas.size() > kBlendMaxDeltas) {
    throw InvalidInput("deltas", "be at most " + std::to_string(kBlendMaxDeltas),
                       std::to_string(operands.deltas.size()));
  }
  if (operands.numel == 0) return;
  bool is_null = operands.h == 0 || operands.out == 0;
  is_null = is_null || (operands.alpha == 0 && !operands.deltas.empty());
  for (const std::uintptr_t delta : operands.deltas) is_null = is_null || delta == 0;
  if (is_null) throw InvalidInput("operands", "have an address each", "a null pointer");
}

void blend(const BlendOperands& operands) {
  require_blend(operands);
  switch (operands.dtype) {
    case DType::FLOAT32:
      return blend_values<Float32>(operands);
    case DType::FLOAT16:
      return blend_values<Float16>(operands);
    case DType::BFLOAT16:
      return blend_values<BFloat16>(operands);
    case DType::FLOAT64:
      return;  // refused above
  }
}

}  // namespace esper
