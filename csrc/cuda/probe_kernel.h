// The launch of the probe kernel (probe.cu). Private to csrc/cuda.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "esper/probe_moments.h"

namespace esper {

// Enqueues the moments of `count` of `numel` device values on the stream; `result` is pinned host
// memory as the device sees it.
cudaError_t launch_probe(const void* data, std::size_t numel, std::size_t count, DType dtype,
                         ProbeMoments* result, cudaStream_t stream) noexcept;

}  // namespace esper
