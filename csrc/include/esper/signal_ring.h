// A bounded queue of health records from the training thread to one publisher thread.
//
// Threads: one producer calls `push`, which never waits and never allocates: a record that finds
// the ring full is dropped and counted. Consumers are serialised by a mutex that the producer never
// touches. The counts may be read from any thread.
#pragma once

#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>
#include <vector>

namespace esper {

// One observation. NaN in a figure means that it was not measured.
struct SignalRecord {
  std::uint64_t step;
  std::uint64_t time_ns;  // Unix time, as fine as the producer's clock
  std::uint32_t layer_id;
  std::int32_t seed;  // index of the seed, or -1 for the layer as a whole
  float mean;
  float variance;
  float entropy;          // nats
  float dead_share;       // in [0, 1]
  float nonfinite_share;  // in [0, 1]
  float gradient_variance;
  float latency_ms;
  std::uint32_t flags;
};
static_assert(sizeof(SignalRecord) == 56);

// Columns to drain into; all of one length.
struct SignalColumns {
  std::span<std::uint32_t> layer_id;
  std::span<std::int32_t> seed;
  std::span<std::uint64_t> step;
  std::span<std::uint64_t> time_ns;
  std::span<float> mean;
  std::span<float> variance;
  std::span<float> entropy;
  std::span<float> dead_share;
  std::span<float> nonfinite_share;
  std::span<float> gradient_variance;
  std::span<float> latency_ms;
  std::span<std::uint32_t> flags;
};

class SignalRing {
 public:
  // Holds `capacity` records, rounded up to a power of two. Throws InvalidInput unless 1 <=
  // capacity <= 2^24.
  explicit SignalRing(std::size_t capacity);

  SignalRing(const SignalRing&) = delete;
  SignalRing& operator=(const SignalRing&) = delete;

  // Producer only. False where the ring was full and the record was dropped.
  bool push(const SignalRecord& record) noexcept {
    const std::uint64_t head = head_.load(std::memory_order_relaxed);
    if (head - cached_tail_ > mask_) {
      cached_tail_ = tail_.load(std::memory_order_acquire);
      if (head - cached_tail_ > mask_) {
        dropped_.store(dropped_.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
        return false;
      }
    }
    records_[head & mask_] = record;
    head_.store(head + 1, std::memory_order_release);
    return true;
  }

  // Moves the oldest records, at most one column's length, into the columns; returns how many.
  std::size_t drain(const SignalColumns& columns);

  [[nodiscard]] std::size_t capacity() const noexcept { return records_.size(); }
  [[nodiscard]] std::size_t size() const noexcept;
  // Records accepted and records dropped since birth.
  [[nodiscard]] std::uint64_t pushed() const noexcept {
    return head_.load(std::memory_order_acquire);
  }
  [[nodiscard]] std::uint64_t dropped() const noexcept {
    return dropped_.load(std::memory_order_relaxed);
  }

 private:
  std::vector<SignalRecord> records_;
  std::uint64_t mask_;  // number of records - 1
  std::mutex consumers_;
  alignas(64) std::atomic<std::uint64_t> head_{0};  // written by the producer
  std::uint64_t cached_tail_ = 0;                   // the producer's last look at tail_
  std::atomic<std::uint64_t> dropped_{0};
  alignas(64) std::atomic<std::uint64_t> tail_{0};  // written by the consumer
};

}  // namespace esper
