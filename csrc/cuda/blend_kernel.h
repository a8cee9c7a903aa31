// The launch of the blend kernel (blend.cu). Private to csrc/cuda.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "esper/blend_sum.h"
#include "esper/probe.h"

namespace esper {

// The operands as the kernel takes them, by value: a graph keeps them, and no copy is enqueued.
struct BlendArguments {
  const void* h;
  const void* deltas[kBlendMaxDeltas];
  const float* alpha;
  void* out;
  std::size_t num_deltas;
  std::size_t numel;
};

// Enqueues the blend of `numel` > 0 values on the stream.
cudaError_t launch_blend(const BlendArguments& arguments, DType dtype,
                         cudaStream_t stream) noexcept;

}  // namespace esper
