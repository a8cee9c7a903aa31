// The state of every seed of a model, as a structure of arrays in one allocation.
//
// Threads: one writer (the training thread), any number of readers, no lock. Each seed has a
// sequence counter that is odd while the writer is inside that seed; `read` retries until it saw
// one even number on both sides, so a record is never torn. All shared words are atomics, so
// readers race with nothing in the sense of the C++ memory model.
//
// Memory: one allocation; columns are aligned to 64 bytes and reserved for `capacity` seeds at
// birth. `add_seeds` never moves them, so a view of a column stays valid as long as the layout
// lives. Growing past the capacity is refused. Large layouts: room that no seed has used yet is
// address space, not memory.
//
// Health figures are kept twice: as exponentially weighted averages, and as plain averages over the
// last complete window of kHealthWindow observations. A figure that nobody has measured is NaN,
// never 0.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <span>
#include <vector>

#include "esper/lifecycle.h"

namespace esper {

// Figures of health; m2s are second central moments of the activations, not sums of squares.
struct HealthColumns {
  std::span<float> means;
  std::span<float> m2s;
  std::span<float> entropies;
  std::span<float> gradient_variances;
  std::span<float> latencies_ms;
};

// The columns, each `capacity` long.
struct StateColumns {
  std::span<std::uint8_t> lifecycle_states;
  std::span<std::uint64_t> kernel_ids;     // 0: no kernel
  std::span<std::uint64_t> blueprint_ids;  // 0: no blueprint
  std::span<float> alpha;                  // in [0, 1]
  std::span<std::uint64_t> last_transition_steps;
  std::span<std::uint64_t> forwards;
  std::span<std::uint64_t> errors;
  std::span<std::uint64_t> fallbacks;
  std::span<std::uint32_t> health_counts;  // stays at 2^32 - 64 or more once there
  HealthColumns health;                    // exponentially weighted
  HealthColumns window;                    // of the last complete window; NaN before the first
  HealthColumns block;                     // of the window in progress
  std::span<std::uint32_t>
      block_counts;  // its samples: mean, entropy, gradient, latency, 8 bits each
};

// One seed at one moment.
struct SeedRecord {
  SeedState state;
  std::uint64_t kernel_id;
  std::uint64_t blueprint_id;
  float alpha;
  std::uint64_t last_transition_step;
  std::uint64_t forwards;
  std::uint64_t errors;
  std::uint64_t fallbacks;
  std::uint32_t health_count;
  float mean;  // this and the following: NaN where not measured yet
  float m2;
  float entropy;
  float gradient_variance;
  float latency_ms;
  float window_mean;
  float window_m2;
  float window_entropy;
  float window_gradient_variance;
  float window_latency_ms;
};

// One observation of a seed's activations; a non-finite member means "not measured" and leaves its
// column alone.
struct HealthSample {
  float mean;
  float variance;
  float entropy;  // nats
  float gradient_variance;
  float latency_ms;
};

class StateLayout {
 public:
  // Averages weigh the newest sample by 1/n for the n-th sample until that falls to this weight,
  // then by this weight.
  static constexpr float kHealthWeight = 0.02F;

  // Observations that make a window.
  static constexpr std::uint32_t kHealthWindow = 64;

  // All seeds start DORMANT. `capacity` 0 stands for `num_seeds` with room to double.
  // Throws InvalidInput unless 1 <= capacity <= 2^32 and num_seeds <= capacity.
  explicit StateLayout(std::size_t num_seeds, std::size_t capacity = 0);

  StateLayout(const StateLayout&) = delete;
  StateLayout& operator=(const StateLayout&) = delete;

  [[nodiscard]] std::size_t num_seeds() const noexcept {
    return num_seeds_.load(std::memory_order_acquire);
  }
  [[nodiscard]] std::size_t capacity() const noexcept { return capacity_; }

  // Bytes of the columns and the sequence counter that one seed takes.
  [[nodiscard]] static std::size_t bytes_per_seed() noexcept;

  // The raw columns. Writing any of them but alpha goes around the rules of this class.
  [[nodiscard]] const StateColumns& columns() const noexcept { return columns_; }

  // --- Writer only ---

  // Returns the index of the first new seed. Throws CapacityExceeded, InvalidInput for n == 0;
  // nothing changes then.
  std::size_t add_seeds(std::size_t n);

  // The one way to change a state. Throws InvalidTransition, InvalidInput.
  void transition(std::size_t seed, SeedState to, std::uint64_t step);

  void set_kernel(std::size_t seed, std::uint64_t kernel_id, std::uint64_t blueprint_id);

  // Throws InvalidInput unless alpha is in [0, 1].
  void set_alpha(std::size_t seed, float alpha);

  void record_health(std::size_t seed, const HealthSample& sample);

  void count_forward(std::size_t seed);
  void count_error(std::size_t seed);
  void count_fallback(std::size_t seed);

  // All seeds, as versioned bytes with a checksum (format: state_layout_snapshot.cpp).
  [[nodiscard]] std::vector<std::byte> snapshot() const;

  // The same into memory of the caller. REQUIRES: bytes.size() == snapshot_size().
  void snapshot_into(std::span<std::byte> bytes) const noexcept;
  [[nodiscard]] std::size_t snapshot_size() const noexcept;

  // Replaces the state of all seeds; grows inside the capacity if the snapshot has more. Throws
  // CorruptData (magic, version, size, checksum, impossible value), InvalidState if it has fewer
  // seeds, CapacityExceeded; nothing changes then.
  void restore(std::span<const std::byte> bytes);

  // --- Any thread ---

  // A record that is consistent in itself. Waits only while the writer is inside this very seed.
  [[nodiscard]] SeedRecord read(std::size_t seed) const;

  // The first records.size() seeds, each consistent in itself. Throws InvalidInput for more than
  // there are.
  void read_all(std::span<SeedRecord> records) const;

  [[nodiscard]] SeedState state(std::size_t seed) const;

 private:
  struct Free {
    void operator()(std::byte* memory) const noexcept { std::free(memory); }
  };

  // Makes the seed's counter odd for its lifetime.
  class Writing;

  void require_seed(std::size_t seed) const;
  [[nodiscard]] SeedRecord read_unchecked(std::size_t seed) const noexcept;
  void fill_defaults(std::size_t first, std::size_t last) noexcept;
  void count(std::span<std::uint64_t> column, std::size_t seed);

  std::size_t capacity_;
  std::atomic<std::size_t> num_seeds_;
  std::unique_ptr<std::byte, Free> memory_;
  std::span<std::uint32_t> sequences_;
  StateColumns columns_;
};

template <class Columns, class Visit>
void for_each_health_column(Columns& columns, Visit&& visit) {
  visit(columns.means);
  visit(columns.m2s);
  visit(columns.entropies);
  visit(columns.gradient_variances);
  visit(columns.latencies_ms);
}

// Calls `visit` with each column, in the order of the snapshot format.
template <class Columns, class Visit>
void for_each_column(Columns& columns, Visit&& visit) {
  visit(columns.lifecycle_states);
  visit(columns.kernel_ids);
  visit(columns.blueprint_ids);
  visit(columns.alpha);
  visit(columns.last_transition_steps);
  visit(columns.forwards);
  visit(columns.errors);
  visit(columns.fallbacks);
  visit(columns.health_counts);
  for_each_health_column(columns.health, visit);
  for_each_health_column(columns.window, visit);
  for_each_health_column(columns.block, visit);
  visit(columns.block_counts);
}

}  // namespace esper
