// Runs pieces of work side by side on streams: fork from an ambient stream, work, join back to it.
//
// A stream is a queue of work that runs in order; an event marks a point in a stream; a stream that
// waits for an event starts nothing before that point is reached. `fork` makes every work stream
// wait for what the ambient stream has been given so far; `join` makes the ambient stream wait for
// what the work streams have been given so far. Neither waits on the host, except where the ambient
// stream is the calling thread itself (CpuBackend).
//
// Memory: what is allocated on the ambient stream and read by a work stream, or the other way
// round, may be freed by the host long before the device is done with it. A stream-ordered
// allocator has to be told (`record_stream`): inputs for the work streams, outputs for the ambient
// stream. SimulatedBackend finds out where that was forgotten.
//
// Failure: what a piece of work throws is the caller's; it must still join. A backend that refuses
// a call in the middle leaves no stream forked that could be joined: `fork` undoes what it began,
// and `join` goes on with the other streams before it throws.
//
// Thread-safe: forks and joins of several threads are serialised while they are enqueued.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <exception>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "esper/errors.h"

namespace esper {

// What a machine must offer. An event need only stay valid until 2 * num_streams further ones were
// recorded; `close` is idempotent and waits for work that was submitted.
template <class B>
concept Backend = requires(B& backend, typename B::Stream stream, const typename B::Event& event) {
  requires std::equality_comparable<typename B::Stream>;
  { std::as_const(backend).num_streams() } -> std::same_as<std::size_t>;
  { backend.stream(std::size_t{}) } -> std::same_as<typename B::Stream>;
  { backend.record(stream) } -> std::same_as<typename B::Event>;
  backend.wait(stream, event);
  { backend.close() } noexcept;
};

template <Backend B>
class StreamDispatcher {
 public:
  using Stream = typename B::Stream;

  // REQUIRES: backend is not null.
  explicit StreamDispatcher(std::unique_ptr<B> backend) : backend_(std::move(backend)) {}
  ~StreamDispatcher() { close(); }
  StreamDispatcher(const StreamDispatcher&) = delete;
  StreamDispatcher& operator=(const StreamDispatcher&) = delete;

  // One stream for each of `count` pieces of work, ordered after the ambient stream's work so far.
  // With more pieces than streams some share one and run one after the other. Throws InvalidInput
  // for count == 0, InvalidState when closed.
  std::vector<Stream> fork(Stream ambient, std::size_t count) {
    if (count == 0) throw InvalidInput("count", "be at least 1 piece of work", "0");
    const std::lock_guard lock(mutex_);
    require_open();
    const auto begun = backend_->record(ambient);
    std::vector<Stream> streams;
    streams.reserve(count);
    try {
      for (std::size_t i = 0; i < count; ++i) {
        const Stream stream = backend_->stream(i % backend_->num_streams());
        if (i < backend_->num_streams()) backend_->wait(stream, begun);
        streams.push_back(stream);
      }
    } catch (...) {
      (void)join_all(ambient, streams);  // the first failure tells more than those that follow it
      throw;
    }
    return streams;
  }

  // Orders the ambient stream after the work of `streams` (as `fork` gave them) so far. Throws
  // InvalidState when closed; what a backend throws, after all streams were tried.
  void join(Stream ambient, std::span<const Stream> streams) {
    const std::lock_guard lock(mutex_);
    require_open();
    if (const std::exception_ptr failure = join_all(ambient, streams)) {
      std::rethrow_exception(failure);
    }
  }

  [[nodiscard]] B& backend() noexcept { return *backend_; }

  [[nodiscard]] bool closed() const {
    const std::lock_guard lock(mutex_);
    return closed_;
  }

  // Waits for submitted work and gives the streams back. Idempotent.
  void close() noexcept {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    backend_->close();
  }

 private:
  void require_open() const {
    if (closed_) throw InvalidState("dispatcher must be open, got a closed one");
  }

  // Joins every stream once; gives the first failure. REQUIRES: the lock is held.
  std::exception_ptr join_all(Stream ambient, std::span<const Stream> streams) noexcept {
    std::exception_ptr failure;
    for (std::size_t i = 0; i < streams.size(); ++i) {
      const auto earlier = streams.first(i);
      if (std::find(earlier.begin(), earlier.end(), streams[i]) != earlier.end()) continue;
      try {
        backend_->wait(ambient, backend_->record(streams[i]));
      } catch (...) {
        if (!failure) failure = std::current_exception();
      }
    }
    return failure;
  }

  mutable std::mutex mutex_;
  std::unique_ptr<B> backend_;
  bool closed_ = false;
};

}  // namespace esper
