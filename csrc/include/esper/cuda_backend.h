// Streams of one CUDA device, by raw handles, so that torch.cuda.ExternalStream can wrap them.
//
// The CUDA runtime is linked statically and the driver is looked for at run time: everything here
// can be called on a machine without a driver, or in a build without CUDA; `cuda_available` is
// false there and the constructors throw DeviceError.
//
// Streams and events are made at birth and reused, so forks and joins allocate nothing. They ask
// the device nothing and wait for nothing, so they may be captured into a CUDA graph. Streams come
// from a pool of the process (by device and priority) that never destroys one: an allocator told of
// a stream, or autograd, may need it after the backend is closed. So two backends may have the same
// stream, one after the other.
//
// Backward: autograd replays a node on the stream of its forward and orders streams where a
// gradient passes from one to the other. What a node saved for it may be freed while that stream
// still reads it, which is why inputs must be recorded on the work streams.
//
// Captures and threads: while one thread captures, no other may fork on the same backend (CUDA
// refuses to mix captured and other work on one stream).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>

#include "esper/probe.h"
#include "esper/stream_dispatcher.h"

namespace esper {

// Whether this build has the CUDA parts at all.
[[nodiscard]] bool cuda_built() noexcept;

// Whether this build has CUDA parts, the driver is there and sees at least one device. Starts no
// context.
[[nodiscard]] bool cuda_available() noexcept;

// Thread-safe where StreamDispatcher serialises it.
class CudaBackend {
 public:
  using Stream = std::uintptr_t;  // a cudaStream_t; 0 is the legacy default stream
  using Event = std::size_t;      // valid until 2 * num_streams further ones are recorded

  // `priority` as CUDA has it: 0 is the lowest, negative is higher. Throws InvalidInput for
  // num_streams outside 1 to 256, an unknown device or a priority outside the device's range;
  // DeviceError without CUDA.
  CudaBackend(std::size_t num_streams, int device, int priority);
  ~CudaBackend();
  CudaBackend(const CudaBackend&) = delete;
  CudaBackend& operator=(const CudaBackend&) = delete;

  [[nodiscard]] std::size_t num_streams() const noexcept;
  [[nodiscard]] Stream stream(std::size_t index) const noexcept;
  [[nodiscard]] Event record(Stream stream);
  void wait(Stream stream, const Event& event);

  // Waits for nothing; the streams go back to the pool.
  void close() noexcept;

 private:
  class Pool;
  std::unique_ptr<Pool> pool_;
};
static_assert(Backend<CudaBackend>);

// The probe of a tensor in device memory: a kernel on the caller's stream writes to pinned host
// memory; the figures are collected later, when they are there. Neither call waits for the device.
// The figures equal those of `probe` on the same values, up to the order of additions. Not to be
// launched while a graph is captured. Thread-safe.
class CudaProbe {
 public:
  using Ticket = std::size_t;

  // Up to `num_slots` results may be on their way. Throws as CudaBackend does.
  CudaProbe(std::size_t num_slots, int device);
  ~CudaProbe();
  CudaProbe(const CudaProbe&) = delete;
  CudaProbe& operator=(const CudaProbe&) = delete;

  // Nothing where all slots are on their way (counted by `refused`). Throws InvalidInput as `probe`
  // does, and for numel == 0; DeviceError where the device refuses. The memory must stay allocated
  // in stream order, as for any kernel.
  [[nodiscard]] std::optional<Ticket> launch(std::uintptr_t data, std::size_t numel, DType dtype,
                                             std::size_t max_samples, CudaBackend::Stream stream);

  // The figures, which frees the ticket; nothing while the device is not there yet. Throws
  // InvalidInput for a ticket that is not on its way.
  [[nodiscard]] std::optional<ProbeResult> collect(Ticket ticket);

  [[nodiscard]] std::size_t refused() const;

 private:
  class Slots;
  std::unique_ptr<Slots> slots_;
};

}  // namespace esper
