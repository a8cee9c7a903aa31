// The arithmetic of a blend, once, for the CPU and the CUDA kernel. Both compile it without fused
// multiply-add, so both round alike.
#pragma once

#include <cstddef>

namespace esper {

inline constexpr std::size_t kBlendMaxDeltas = 16;

// h + sum over k of alpha[k] * delta(k), in float32; says by `is_changed` whether any alpha counts.
template <class DeltaAt>
constexpr float blend_sum(float h, const float* alpha, std::size_t num_deltas, DeltaAt&& delta,
                          bool& is_changed) {
  float sum = h;
  for (std::size_t k = 0; k < num_deltas; ++k) {
    if (alpha[k] == 0.0F) continue;
    const float product = alpha[k] * delta(k);
    sum = sum + product;
    is_changed = true;
  }
  return sum;
}

}  // namespace esper
