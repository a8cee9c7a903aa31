// The CUDA parts of a build without a CUDA compiler: each says that it is not there.

#include "esper/blend.h"
#include "esper/cuda_backend.h"

namespace esper {
namespace {

[[noreturn]] void refuse() {
  throw DeviceError("cuda must be part of the build, got a build without a CUDA compiler");
}

}  // namespace

class CudaBackend::Pool {};
class CudaProbe::Slots {};

bool cuda_built() noexcept {
  return false;
}
bool cuda_available() noexcept {
  return false;
}

CudaBackend::CudaBackend(std::size_t, int, int) {
  refuse();
}
CudaBackend::~CudaBackend() = default;
std::size_t CudaBackend::num_streams() const noexcept {
  return 0;
}
CudaBackend::Stream CudaBackend::stream(std::size_t) const noexcept {
  return 0;
}
CudaBackend::Event CudaBackend::record(Stream) {
  refuse();
}
void CudaBackend::wait(Stream, const Event&) {
  refuse();
}
void CudaBackend::close() noexcept {}

CudaProbe::CudaProbe(std::size_t, int) {
  refuse();
}
CudaProbe::~CudaProbe() = default;
std::optional<CudaProbe::Ticket> CudaProbe::launch(std::uintptr_t, std::size_t, DType, std::size_t,
                                                   CudaBackend::Stream) {
  refuse();
}
std::optional<ProbeResult> CudaProbe::collect(Ticket) {
  refuse();
}
std::size_t CudaProbe::refused() const {
  return 0;
}

void cuda_blend(const BlendOperands& operands, int, CudaBackend::Stream) {
  require_blend(operands);
  refuse();
}

}  // namespace esper
