#include "esper/cuda_backend.h"

#include <string>
#include <vector>

#include "cuda_try.h"
#include "stream_pool.h"

namespace esper {
namespace {

cudaStream_t raw(CudaBackend::Stream stream) noexcept {
  return reinterpret_cast<cudaStream_t>(stream);  // NOLINT: a handle, as torch hands it over
}

void require_priority(int priority) {
  int least = 0;
  int greatest = 0;
  CUDA_TRY(cudaDeviceGetStreamPriorityRange(&least, &greatest));
  if (priority > least || priority < greatest) {
    throw InvalidInput("priority",
                       "be between " + std::to_string(greatest) + " and " + std::to_string(least),
                       std::to_string(priority));
  }
}

}  // namespace

class CudaBackend::Pool {
 public:
  Pool(std::size_t num_streams, int device, int priority) : device_(device) {
    if (num_streams == 0 || num_streams > 256) {
      throw InvalidInput("num_streams", "be between 1 and 256", std::to_string(num_streams));
    }
    require_device(device);
    const DeviceGuard guard(device);
    require_priority(priority);
    streams_.reserve(num_streams);
    for (std::size_t i = 0; i < num_streams; ++i) streams_.emplace_back(device, priority);
    events_ = std::vector<OwnedEvent>(2 * num_streams + 1);
  }

  [[nodiscard]] std::size_t num_streams() const noexcept { return streams_.size(); }
  [[nodiscard]] cudaStream_t stream(std::size_t index) const noexcept {
    return streams_[index].get();
  }

  std::size_t record(cudaStream_t stream) {
    const DeviceGuard guard(device_);
    const std::size_t event = next_event_;
    CUDA_TRY(cudaEventRecord(events_[event].get(), stream));
    next_event_ = (event + 1) % events_.size();
    return event;
  }

  void wait(cudaStream_t stream, std::size_t event) {
    const DeviceGuard guard(device_);
    // Takes the event's present record, so that the event may be recorded anew at once.
    CUDA_TRY(cudaStreamWaitEvent(stream, events_[event].get(), 0));
  }

 private:
  int device_;
  std::vector<LentStream> streams_;
  std::vector<OwnedEvent> events_;
  std::size_t next_event_ = 0;
};

bool cuda_built() noexcept {
  return true;
}

bool cuda_available() noexcept {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count > 0;
  (void)cudaGetLastError();  // no driver or no device is an answer here, not an error
  return false;
}

CudaBackend::CudaBackend(std::size_t num_streams, int device, int priority)
    : pool_(std::make_unique<Pool>(num_streams, device, priority)) {}

CudaBackend::~CudaBackend() = default;

std::size_t CudaBackend::num_streams() const noexcept {
  return pool_ ? pool_->num_streams() : 0;
}

CudaBackend::Stream CudaBackend::stream(std::size_t index) const noexcept {
  return reinterpret_cast<Stream>(pool_->stream(index));
}

CudaBackend::Event CudaBackend::record(Stream stream) {
  return pool_->record(raw(stream));
}

void CudaBackend::wait(Stream stream, const Event& event) {
  pool_->wait(raw(stream), event);
}

void CudaBackend::close() noexcept {
  pool_.reset();
}

}  // namespace esper
