#include "blend_kernel.h"
#include "cuda_try.h"
#include "esper/blend.h"

namespace esper {

void cuda_blend(const BlendOperands& operands, int device, CudaBackend::Stream stream) {
  require_blend(operands);
  require_device(device);
  if (operands.numel == 0) return;
  // NOLINTBEGIN: addresses, as torch hands them over
  BlendArguments arguments{};
  arguments.h = reinterpret_cast<const void*>(operands.h);
  arguments.alpha = reinterpret_cast<const float*>(operands.alpha);
  arguments.out = reinterpret_cast<void*>(operands.out);
  arguments.num_deltas = operands.deltas.size();
  arguments.numel = operands.numel;
  for (std::size_t k = 0; k < operands.deltas.size(); ++k) {
    arguments.deltas[k] = reinterpret_cast<const void*>(operands.deltas[k]);
  }
  // NOLINTEND
  const DeviceGuard guard(device);
  CUDA_TRY(launch_blend(arguments, operands.dtype, reinterpret_cast<cudaStream_t>(stream)));
}

}  // namespace esper
