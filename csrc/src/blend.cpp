#include "esper/blend.h"

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
