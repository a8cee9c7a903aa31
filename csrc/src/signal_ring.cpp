#include "esper/signal_ring.h"

#include <algorithm>
#include <string>

#include "esper/errors.h"

namespace esper {
namespace {

constexpr std::size_t kMaxCapacity = std::size_t{1} << 24U;

std::size_t checked_capacity(std::size_t capacity) {
  if (capacity == 0 || capacity > kMaxCapacity) {
    throw InvalidInput("capacity", "be between 1 and 2^24 records", std::to_string(capacity));
  }
  return std::bit_ceil(capacity);
}

void scatter(const SignalRecord& record, const SignalColumns& columns, std::size_t row) noexcept {
  columns.layer_id[row] = record.layer_id;
  columns.seed[row] = record.seed;
  columns.step[row] = record.step;
  columns.time_ns[row] = record.time_ns;
  columns.mean[row] = record.mean;
  columns.variance[row] = record.variance;
  columns.entropy[row] = record.entropy;
  columns.dead_share[row] = record.dead_share;
  columns.nonfinite_share[row] = record.nonfinite_share;
  columns.gradient_variance[row] = record.gradient_variance;
  columns.latency_ms[row] = record.latency_ms;
  columns.flags[row] = record.flags;
}

}  // namespace

SignalRing::SignalRing(std::size_t capacity)
    : records_(checked_capacity(capacity)), mask_(records_.size() - 1) {}

std::size_t SignalRing::drain(const SignalColumns& columns) {
  const std::lock_guard lock(consumers_);
  const std::uint64_t tail = tail_.load(std::memory_order_relaxed);
  const std::uint64_t head = head_.load(std::memory_order_acquire);
  const std::size_t count = std::min<std::size_t>(head - tail, columns.step.size());
  for (std::size_t row = 0; row < count; ++row) {
    scatter(records_[(tail + row) & mask_], columns, row);
  }
  tail_.store(tail + count, std::memory_order_release);
  return count;
}

std::size_t SignalRing::size() const noexcept {
  const std::uint64_t tail = tail_.load(std::memory_order_acquire);
  return head_.load(std::memory_order_acquire) - tail;
}

}  // namespace esper
