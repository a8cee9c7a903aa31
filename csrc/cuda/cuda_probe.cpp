#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda_try.h"
#include "esper/cuda_backend.h"
#include "probe_kernel.h"

namespace esper {
namespace {

struct PinnedDeleter {
  // As for OwnedEvent: at process exit the driver may be gone already.
  void operator()(ProbeMoments* memory) const noexcept { (void)cudaFreeHost(memory); }
};
using PinnedMoments = std::unique_ptr<ProbeMoments[], PinnedDeleter>;

PinnedMoments pinned(std::size_t count) {
  ProbeMoments* memory = nullptr;
  const cudaError_t error =
      cudaHostAlloc(reinterpret_cast<void**>(&memory), count * sizeof(ProbeMoments),
                    cudaHostAllocMapped | cudaHostAllocPortable);
  if (error != cudaSuccess) {
    const std::string call =
        "cudaHostAlloc of " + std::to_string(count * sizeof(ProbeMoments)) + " bytes";
    throw_device_error(error, call.c_str(), __FILE__, __LINE__);
  }
  return PinnedMoments(memory);
}

}  // namespace

class CudaProbe::Slots {
 public:
  Slots(std::size_t num_slots, int device) : device_(device) {
    if (num_slots == 0 || num_slots > 65536) {
      throw InvalidInput("num_slots", "be between 1 and 65536", std::to_string(num_slots));
    }
    require_device(device);
    const DeviceGuard guard(device);
    results_ = pinned(num_slots);
    CUDA_TRY(
        cudaHostGetDevicePointer(reinterpret_cast<void**>(&device_results_), results_.get(), 0));
    events_ = std::vector<OwnedEvent>(num_slots);
    under_way_.assign(num_slots, false);
    for (std::size_t slot = 0; slot < num_slots; ++slot) free_.push_back(slot);
  }

  // A kernel may still write to the pinned memory, so this waits for each one under way.
  ~Slots() {
    for (std::size_t slot = 0; slot < under_way_.size(); ++slot) {
      if (under_way_[slot]) (void)cudaEventSynchronize(events_[slot].get());
    }
  }
  Slots(const Slots&) = delete;
  Slots& operator=(const Slots&) = delete;

  std::optional<Ticket> launch(const void* data, std::size_t numel, std::size_t count, DType dtype,
                               cudaStream_t stream) {
    const std::lock_guard lock(mutex_);
    if (free_.empty()) {
      ++refused_;
      return std::nullopt;
    }
    const DeviceGuard guard(device_);
    const Ticket slot = free_.front();
    CUDA_TRY(launch_probe(data, numel, count, dtype, device_results_ + slot, stream));
    CUDA_TRY(cudaEventRecord(events_[slot].get(), stream));
    free_.pop_front();
    under_way_[slot] = true;
    return slot;
  }

  std::optional<ProbeResult> collect(Ticket ticket) {
    const std::lock_guard lock(mutex_);
    if (ticket >= under_way_.size() || !under_way_[ticket]) {
      throw InvalidInput("ticket", "be one that is under way", std::to_string(ticket));
    }
    const cudaError_t error = cudaEventQuery(events_[ticket].get());
    if (error == cudaErrorNotReady) return std::nullopt;
    CUDA_TRY(error);
    under_way_[ticket] = false;
    free_.push_back(ticket);
    return summarize(results_[ticket]);
  }

  std::size_t refused() const {
    const std::lock_guard lock(mutex_);
    return refused_;
  }

 private:
  mutable std::mutex mutex_;
  int device_;
  PinnedMoments results_;
  ProbeMoments* device_results_ = nullptr;
  std::vector<OwnedEvent> events_;
  std::vector<bool> under_way_;
  std::deque<Ticket> free_;
  std::size_t refused_ = 0;
};

CudaProbe::CudaProbe(std::size_t num_slots, int device)
    : slots_(std::make_unique<Slots>(num_slots, device)) {}

CudaProbe::~CudaProbe() = default;

std::optional<CudaProbe::Ticket> CudaProbe::launch(std::uintptr_t data, std::size_t numel,
                                                   DType dtype, std::size_t max_samples,
                                                   CudaBackend::Stream stream) {
  if (numel == 0) throw InvalidInput("numel", "be at least 1 value", "0");
  const auto* values =
      reinterpret_cast<const void*>(data);  // NOLINT: an address, as torch hands it over
  const std::size_t count = checked_sample_size(values, numel, max_samples);
  return slots_->launch(values, numel, count, dtype, reinterpret_cast<cudaStream_t>(stream));
}

std::optional<ProbeResult> CudaProbe::collect(Ticket ticket) {
  return slots_->collect(ticket);
}

std::size_t CudaProbe::refused() const {
  return slots_->refused();
}

}  // namespace esper
