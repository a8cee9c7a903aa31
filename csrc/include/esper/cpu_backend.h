// Streams of the CPU: each is a queue with a thread of its own, started with its first piece of
// work. The ambient stream is the calling thread: its work is done when the call returns, so
// recording it costs nothing and waiting on it blocks the caller.
//
// For native work only; Python code can't run on these threads side by side (the GIL), so the
// bindings run it in order on the calling thread. Thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "esper/stream_dispatcher.h"

namespace esper {

class CpuBackend {
 public:
  using Stream = std::size_t;
  using Task = std::function<void()>;

  // The point after the first `ticket` tasks of a stream.
  struct Event {
    Stream stream;
    std::uint64_t ticket;
  };

  static constexpr Stream kAmbient = static_cast<Stream>(-1);

  // Throws InvalidInput unless 1 <= num_streams <= 256.
  explicit CpuBackend(std::size_t num_streams);
  ~CpuBackend();
  CpuBackend(const CpuBackend&) = delete;
  CpuBackend& operator=(const CpuBackend&) = delete;

  [[nodiscard]] std::size_t num_streams() const noexcept;
  [[nodiscard]] Stream stream(std::size_t index) const noexcept { return index; }
  [[nodiscard]] Event record(Stream stream);
  void wait(Stream stream, const Event& event);

  // Appends a task that must not throw. Throws InvalidState when closed. REQUIRES: stream is not
  // kAmbient.
  void submit(Stream stream, Task task);

  // Whether the calling thread belongs to any CpuBackend's streams: such a thread must not wait for
  // a stream.
  [[nodiscard]] static bool on_worker_thread() noexcept;

  // Finishes what was submitted and ends the threads.
  void close() noexcept;

 private:
  class Worker;

  std::vector<std::unique_ptr<Worker>> workers_;
};
static_assert(Backend<CpuBackend>);

// Runs every task, side by side, and waits for all; gives each one's exception, or null. A call
// from inside a task runs its tasks in order on that thread.
std::vector<std::exception_ptr> run_all(StreamDispatcher<CpuBackend>& dispatcher,
                                        std::span<const CpuBackend::Task> tasks);

}  // namespace esper
