// Checked calls of the CUDA runtime, and the owners of what they make. Private to csrc/cuda.
#pragma once

#include <cuda_runtime_api.h>

#include <string>
#include <utility>

#include "esper/errors.h"

// Throws DeviceError with the call, its place and the error's name.
#define CUDA_TRY(call)                                                        \
  do {                                                                        \
    const cudaError_t cuda_try_error = (call);                                \
    if (cuda_try_error != cudaSuccess) {                                      \
      ::esper::throw_device_error(cuda_try_error, #call, __FILE__, __LINE__); \
    }                                                                         \
  } while (false)

namespace esper {

[[noreturn]] inline void throw_device_error(cudaError_t error, const char* call, const char* file,
                                            int line) {
  (void)cudaGetLastError();  // the runtime keeps it otherwise, and the next innocent caller would
                             // get it
  const std::string path(file);
  throw DeviceError(std::string(call) + " failed with " + cudaGetErrorName(error) + " (" +
                    cudaGetErrorString(error) + ") at " + path.substr(path.rfind('/') + 1) + ":" +
                    std::to_string(line));
}

// Throws InvalidInput for an unknown device, DeviceError without a driver.
inline void require_device(int device) {
  int count = 0;
  CUDA_TRY(cudaGetDeviceCount(&count));
  if (device < 0 || device >= count) {
    throw InvalidInput("device", "be below the number of CUDA devices, " + std::to_string(count),
                       std::to_string(device));
  }
}

// Makes a device current for the life of the guard.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    CUDA_TRY(cudaGetDevice(&before_));
    if (device == before_) return;
    CUDA_TRY(cudaSetDevice(device));
    changed_ = true;
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard() {
    if (changed_)
      (void)cudaSetDevice(before_);  // it was current a moment ago, and a destructor can't report
  }

 private:
  int before_ = 0;
  bool changed_ = false;
};

// An event without timing: what one may wait for, and record while a graph is captured.
class OwnedEvent {
 public:
  OwnedEvent() { CUDA_TRY(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming)); }
  OwnedEvent(OwnedEvent&& other) noexcept : event_(std::exchange(other.event_, nullptr)) {}
  OwnedEvent(const OwnedEvent&) = delete;
  OwnedEvent& operator=(const OwnedEvent&) = delete;
  OwnedEvent& operator=(OwnedEvent&&) = delete;
  // At process exit the driver may be gone already, and the event with it; there is nothing left to
  // do then.
  ~OwnedEvent() {
    if (event_ != nullptr) (void)cudaEventDestroy(event_);
  }

  [[nodiscard]] cudaEvent_t get() const noexcept { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

}  // namespace esper
