// One pass over memory, 16 bytes at a time where all addresses allow it: the blend is bound by
// memory, and everything else is small beside it. Compiled without fused multiply-add (see
// blend_sum.h).

#include <algorithm>
#include <cstdint>

#include "bare_floats.h"
#include "blend_kernel.h"

namespace esper {
namespace {

constexpr unsigned kThreads = 256;
constexpr std::size_t kMaxBlocks = 4096;  // several waves on any device; the rest is in the loop

template <class T, unsigned kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T values[kWidth];
};

template <class T, unsigned kWidth>
__device__ Pack<T, kWidth> load(const void* from, std::size_t pack) {
  return static_cast<const Pack<T, kWidth>*>(from)[pack];
}

// `first` and `count` are in packs.
template <class T, unsigned kWidth>
__global__ void blend_kernel(BlendArguments arguments, std::size_t first, std::size_t count) {
  __shared__ float alpha[kBlendMaxDeltas];
  if (threadIdx.x < arguments.num_deltas) alpha[threadIdx.x] = arguments.alpha[threadIdx.x];
  __syncthreads();
  const std::size_t step = static_cast<std::size_t>(gridDim.x) * blockDim.x;
  std::size_t at = static_cast<std::size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; at < count; at += step) {
    const std::size_t pack = first + at;
    Pack<T, kWidth> out = load<T, kWidth>(arguments.h, pack);
    float sums[kWidth];
    for (unsigned i = 0; i < kWidth; ++i) sums[i] = widen(out.values[i]);
    bool is_changed = false;
    for (std::size_t k = 0; k < arguments.num_deltas; ++k) {
      if (alpha[k] == 0.0F) continue;
      const Pack<T, kWidth> delta = load<T, kWidth>(arguments.deltas[k], pack);
      for (unsigned i = 0; i < kWidth; ++i) {
        const float value = widen(delta.values[i]);
        sums[i] = blend_sum(sums[i], alpha + k, 1, [&](std::size_t) { return value; }, is_changed);
      }
    }
    if (is_changed) {
      for (unsigned i = 0; i < kWidth; ++i) narrow(sums[i], out.values[i]);
    }
    static_cast<Pack<T, kWidth>*>(arguments.out)[pack] = out;
  }
}

template <class T, unsigned kWidth>
cudaError_t launch_packs(const BlendArguments& arguments, std::size_t first, std::size_t count,
                         cudaStream_t stream) noexcept {
  if (count == 0) return cudaSuccess;
  const std::size_t needed = (count + kThreads - 1) / kThreads;
  const auto blocks = static_cast<unsigned>(std::min(needed, kMaxBlocks));
  blend_kernel<T, kWidth><<<blocks, kThreads, 0, stream>>>(arguments, first, count);
  return cudaGetLastError();
}

bool all_aligned(const BlendArguments& arguments) noexcept {
  auto bits = reinterpret_cast<std::uintptr_t>(arguments.h);
  bits |= reinterpret_cast<std::uintptr_t>(arguments.out);
  for (std::size_t k = 0; k < arguments.num_deltas; ++k) {
    bits |= reinterpret_cast<std::uintptr_t>(arguments.deltas[k]);
  }
  return bits % 16 == 0;
}

// Whole packs, then the few values behind them.
template <class T>
cudaError_t launch(const BlendArguments& arguments, cudaStream_t stream) noexcept {
  constexpr unsigned kWidth = 16 / sizeof(T);
  const std::size_t packs = all_aligned(arguments) ? arguments.numel / kWidth : 0;
  const cudaError_t error = launch_packs<T, kWidth>(arguments, 0, packs, stream);
  if (error != cudaSuccess) return error;
  const std::size_t first = packs * kWidth;
  return launch_packs<T, 1>(arguments, first, arguments.numel - first, stream);
}

}  // namespace

cudaError_t launch_blend(const BlendArguments& arguments, DType dtype,
                         cudaStream_t stream) noexcept {
  switch (dtype) {
    case DType::FLOAT32:
      return launch<float>(arguments, stream);
    case DType::FLOAT16:
      return launch<Half>(arguments, stream);
    case DType::BFLOAT16:
      return launch<Brain>(arguments, stream);
    case DType::FLOAT64:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace esper
