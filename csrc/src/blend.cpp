#include "esper/blend.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <string>

#include "esper/errors.h"
#include "float_types.h"

namespace esper {
namespace {

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

constexpr std::size_t kBlock = 1024;  // float32 values: sum and one delta's share fit the L1 cache

void add_share(const float* delta, float alpha, std::size_t count, float* sum) noexcept {
  for (std::size_t i = 0; i < count; ++i) sum[i] = sum[i] + delta[i] * alpha;
}

// Without a branch inside, so that it becomes vector code: adding one unit to the exponent reaches
// the sign's place only where all its bits are set, as in infinity and NaN.
bool is_finite(const float* values, std::size_t count) noexcept {
  constexpr std::uint32_t kExponent = 0x7F800000U;
  constexpr std::uint32_t kUnit = 0x00800000U;
  std::uint32_t found = 0;
  for (std::size_t i = 0; i < count; ++i) {
    found |= (std::bit_cast<std::uint32_t>(values[i]) & kExponent) + kUnit;
  }
  return (found & 0x80000000U) == 0;
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

bool blend_checked(std::uintptr_t h, std::span<const WeightedDelta> deltas, std::uintptr_t out,
                   std::size_t numel) {
  if (numel == 0) return true;
  const bool is_null = h == 0 || out == 0 ||
                       std::ranges::any_of(deltas, [](const auto& one) { return one.delta == 0; });
  if (is_null) throw InvalidInput("operands", "have an address each", "a null pointer");
  // NOLINTBEGIN: addresses, as torch hands them over
  std::array<float, kBlock> sum;
  bool all_finite = true;
  for (std::size_t first = 0; first < numel; first += kBlock) {
    const std::size_t count = std::min(kBlock, numel - first);
    std::memcpy(sum.data(), reinterpret_cast<const float*>(h) + first, count * sizeof(float));
    for (const auto& [delta, alpha] : deltas) {
      const float weight = alpha == 0 ? 1.0F : *reinterpret_cast<const float*>(alpha);
      add_share(reinterpret_cast<const float*>(delta) + first, weight, count, sum.data());
    }
    all_finite = is_finite(sum.data(), count) && all_finite;
    std::memcpy(reinterpret_cast<float*>(out) + first, sum.data(), count * sizeof(float));
  }
  // NOLINTEND
  return all_finite;
}

bool all_finite(std::span<const FloatArray> arrays) {
  return std::ranges::all_of(arrays, [](const FloatArray& array) {
    if (array.numel == 0) return true;
    if (array.address == 0) throw InvalidInput("arrays", "have an address each", "a null pointer");
    // NOLINTNEXTLINE: an address, as torch hands it over
    return is_finite(reinterpret_cast<const float*>(array.address), array.numel);
  });
}

}  // namespace esper
