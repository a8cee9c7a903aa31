// The sum that a layer with live seeds gives, in one pass over memory:
//
//   out[i] = h[i] + sum_k alpha[k] * delta[k][i]        0 <= i < numel, k in order
//
// Arithmetic: values are widened to float32, each product and each sum is rounded there, and the
// result is rounded once to the type of `out`, to nearest even. The CPU and the GPU therefore give
// the same bits (but for the payload of a NaN). A delta whose alpha is exactly 0 is not read and
// adds nothing, whatever it holds: with all alphas 0, out is h bit for bit.
//
// `out` may be `h` itself or one of the deltas; otherwise it overlaps none of them. Values lie
// without gaps, all in the same order of axes, aligned to their own size.
//
// No backward pass: where gradients are asked for, torch's own operators give the same sum.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "esper/blend_sum.h"
#include "esper/cuda_backend.h"
#include "esper/probe.h"

namespace esper {

// What the two blends have in common; addresses as torch hands them over.
struct BlendOperands {
  std::uintptr_t h;
  std::span<const std::uintptr_t> deltas;
  std::uintptr_t alpha;  // float32, one value for each delta
  std::uintptr_t out;
  std::size_t numel;
  DType dtype;  // of h, deltas and out
};

// In CPU memory, on the calling thread. Throws InvalidInput for float64, for more than
// kBlendMaxDeltas deltas, and for a null address with numel > 0 (alpha's only if there are deltas).
// Thread-safe: the caller keeps the memory alive, and unwritten by others.
void blend(const BlendOperands& operands);

// One delta of `blend_checked`, by addresses of float32 values; a null alpha stands for 1.
struct WeightedDelta {
  std::uintptr_t delta;
  std::uintptr_t alpha;
};

// The same sum of float32 values in CPU memory, with two differences that make it torch's own
// `h + delta * alpha` to the bit: each alpha lies where its owner keeps it, and one that is 0 is no
// reason to leave its delta out. Says whether every value written is finite, in the same pass over
// memory. Throws InvalidInput for a null address (but alpha's) with numel > 0. Thread-safe as
// `blend`; `out` overlaps nothing.
[[nodiscard]] bool blend_checked(std::uintptr_t h, std::span<const WeightedDelta> deltas,
                                 std::uintptr_t out, std::size_t numel);

// So many float32 values at an address.
struct FloatArray {
  std::uintptr_t address;
  std::size_t numel;
};

// Whether every value of the arrays, in CPU memory, is finite. Throws InvalidInput for a null
// address with numel > 0. Thread-safe: the caller keeps the memory alive, and unwritten by others.
[[nodiscard]] bool all_finite(std::span<const FloatArray> arrays);

// In the memory of `device`, alpha included: enqueued on the stream, waits for nothing, may be
// captured (a replay reads alpha anew). The memory must stay allocated in stream order. Throws as
// `blend` does, InvalidInput for an unknown device, DeviceError without CUDA or where the device
// refuses. Thread-safe.
void cuda_blend(const BlendOperands& operands, int device, CudaBackend::Stream stream);

// Throws as `blend` says.
void require_blend(const BlendOperands& operands);

}  // namespace esper
