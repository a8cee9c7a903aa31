#include "esper/state_layout.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <string>

#include "esper/errors.h"

namespace esper {
namespace {

constexpr std::size_t kMaxCapacity = std::size_t{1} << 32U;
constexpr std::size_t kLineBytes = 64;
constexpr float kNotMeasured = std::numeric_limits<float>::quiet_NaN();

// Data words are stored with release and loaded with acquire, so that the sequence counter brackets
// them without a fence (fences are invisible to TSan); on x86 both are plain moves.
template <class T>
void put(T& word, T value) noexcept {
  std::atomic_ref<T>(word).store(value, std::memory_order_release);
}

template <class T>
T take(T& word) noexcept {
  return std::atomic_ref<T>(word).load(std::memory_order_acquire);
}

std::size_t checked_capacity(std::size_t num_seeds, std::size_t capacity) {
  if (capacity == 0) capacity = num_seeds == 0 ? 1 : 2 * num_seeds;
  if (capacity > kMaxCapacity) {
    throw InvalidInput("capacity", "be at most 2^32 seeds", std::to_string(capacity));
  }
  if (num_seeds > capacity) {
    throw InvalidInput("num_seeds", "be at most the capacity of " + std::to_string(capacity),
                       std::to_string(num_seeds));
  }
  return capacity;
}

template <class T>
std::size_t lines_of(std::size_t count) noexcept {
  return (count * sizeof(T) + kLineBytes - 1) / kLineBytes;
}

// Weights of one sample in the four averages of a health record.
struct Weights {
  float mean;
  float entropy;
  float gradient_variance;
  float latency_ms;
};

// Moves `average` towards `sample`; the first sample is taken as it is, a non-finite one is not
// taken.
void average_in(float& average, float sample, float weight) noexcept {
  if (!std::isfinite(sample)) return;
  const float old = take(average);
  put(average, std::isfinite(old) ? old + weight * (sample - old) : sample);
}

// The second moment becomes that of the mixture of the old distribution and the sample's, in these
// weights: variance within plus variance between.
void mix_in(const HealthColumns& into, std::size_t seed, const HealthSample& sample,
            const Weights& weights) noexcept {
  if (std::isfinite(sample.mean) && std::isfinite(sample.variance)) {
    const float old_mean = take(into.means[seed]);
    const float old_m2 = take(into.m2s[seed]);
    const float weight = weights.mean;
    const float shift = std::isfinite(old_mean) ? sample.mean - old_mean : 0.0F;
    const float within =
        std::isfinite(old_m2) ? old_m2 + weight * (sample.variance - old_m2) : sample.variance;
    put(into.m2s[seed], within + weight * (1.0F - weight) * shift * shift);
  }
  average_in(into.means[seed], sample.mean, weights.mean);
  average_in(into.entropies[seed], sample.entropy, weights.entropy);
  average_in(into.gradient_variances[seed], sample.gradient_variance, weights.gradient_variance);
  average_in(into.latencies_ms[seed], sample.latency_ms, weights.latency_ms);
}

// Counts the sample in the 8 bits at `shift` of `counts` if it is finite; its weight in a plain
// average.
float counted(std::uint32_t& counts, unsigned shift, float sample) noexcept {
  if (std::isfinite(sample)) counts += 1U << shift;
  return 1.0F / static_cast<float>(std::max(1U, (counts >> shift) & 0xFFU));
}

// Averages the sample into the window in progress. `number` counts observations from 1.
void add_to_window(const StateColumns& columns, std::size_t seed, const HealthSample& sample,
                   std::uint32_t number) noexcept {
  constexpr std::uint32_t kWindow = StateLayout::kHealthWindow;
  const bool is_first = number % kWindow == 1;
  if (is_first) {
    for_each_health_column(columns.block, [=](std::span<float> c) { put(c[seed], kNotMeasured); });
  }
  std::uint32_t counts = is_first ? 0 : take(columns.block_counts[seed]);
  const Weights weights{.mean = counted(counts, 0, sample.mean),
                        .entropy = counted(counts, 8, sample.entropy),
                        .gradient_variance = counted(counts, 16, sample.gradient_variance),
                        .latency_ms = counted(counts, 24, sample.latency_ms)};
  mix_in(columns.block, seed, sample, weights);
  put(columns.block_counts[seed], counts);
  if (number % kWindow != 0) return;
  const HealthColumns &from = columns.block, &to = columns.window;
  put(to.means[seed], take(from.means[seed]));
  put(to.m2s[seed], take(from.m2s[seed]));
  put(to.entropies[seed], take(from.entropies[seed]));
  put(to.gradient_variances[seed], take(from.gradient_variances[seed]));
  put(to.latencies_ms[seed], take(from.latencies_ms[seed]));
}

// After the last number come again those of the window that it ends.
std::uint32_t number_after(std::uint32_t number) noexcept {
  constexpr std::uint32_t kLast = std::numeric_limits<std::uint32_t>::max();
  static_assert((std::uint64_t{kLast} + 1) % StateLayout::kHealthWindow == 0);
  return number == kLast ? kLast - StateLayout::kHealthWindow + 1 : number + 1;
}

}  // namespace

class StateLayout::Writing {
 public:
  Writing(StateLayout& layout, std::size_t seed) noexcept : sequence_(layout.sequences_[seed]) {
    value_ = sequence_.load(std::memory_order_relaxed);
    sequence_.store(value_ + 1, std::memory_order_relaxed);
  }
  Writing(const Writing&) = delete;
  Writing& operator=(const Writing&) = delete;
  ~Writing() { sequence_.store(value_ + 2, std::memory_order_release); }

 private:
  std::atomic_ref<std::uint32_t> sequence_;
  std::uint32_t value_;
};

StateLayout::StateLayout(std::size_t num_seeds, std::size_t capacity)
    : capacity_(checked_capacity(num_seeds, capacity)), num_seeds_(0) {
  std::size_t num_lines = lines_of<std::uint32_t>(capacity_);
  for_each_column(columns_, [&]<class T>(std::span<T>) { num_lines += lines_of<T>(capacity_); });
  // calloc: the system hands out zeroed pages when they are first written. One line to align with.
  memory_.reset(static_cast<std::byte*>(std::calloc(num_lines + 1, kLineBytes)));
  if (memory_ == nullptr) throw std::bad_alloc();

  const auto start = reinterpret_cast<std::uintptr_t>(memory_.get());
  std::byte* next = memory_.get() + (kLineBytes - start % kLineBytes) % kLineBytes;
  const auto place = [&]<class T>(std::span<T>& column) {
    column = std::span<T>(reinterpret_cast<T*>(next), capacity_);
    next += lines_of<T>(capacity_) * kLineBytes;
  };
  place(sequences_);
  for_each_column(columns_, place);
  fill_defaults(0, num_seeds);
  num_seeds_.store(num_seeds, std::memory_order_release);
}

std::size_t StateLayout::bytes_per_seed() noexcept {
  StateColumns columns;
  std::size_t bytes = sizeof(std::uint32_t);
  for_each_column(columns, [&]<class T>(std::span<T>) { bytes += sizeof(T); });
  return bytes;
}

std::size_t StateLayout::add_seeds(std::size_t n) {
  if (n == 0) throw InvalidInput("n", "be at least 1 seed", "0");
  const std::size_t first = num_seeds();
  if (n > capacity_ - first) {
    throw CapacityExceeded("n must leave num_seeds within the capacity of " +
                           std::to_string(capacity_) + " seeds, got " + std::to_string(n) +
                           " on top of " + std::to_string(first));
  }
  fill_defaults(first, first + n);
  num_seeds_.store(first + n, std::memory_order_release);
  return first;
}

void StateLayout::transition(std::size_t seed, SeedState to, std::uint64_t step) {
  const SeedState from = state(seed);
  if (!is_seed_state(static_cast<std::uint8_t>(to))) {
    throw InvalidInput("to", "be the number of a seed state (0 to 8)",
                       std::to_string(static_cast<unsigned>(to)));
  }
  if (!is_allowed(from, to)) throw InvalidTransition(seed, from, to);
  const Writing writing(*this, seed);
  put(columns_.lifecycle_states[seed], static_cast<std::uint8_t>(to));
  put(columns_.last_transition_steps[seed], step);
}

void StateLayout::set_kernel(std::size_t seed, std::uint64_t kernel_id,
                             std::uint64_t blueprint_id) {
  require_seed(seed);
  const Writing writing(*this, seed);
  put(columns_.kernel_ids[seed], kernel_id);
  put(columns_.blueprint_ids[seed], blueprint_id);
}

void StateLayout::set_alpha(std::size_t seed, float alpha) {
  require_seed(seed);
  if (!(alpha >= 0.0F && alpha <= 1.0F)) {
    throw InvalidInput("alpha", "be in [0, 1]", std::to_string(alpha));
  }
  const Writing writing(*this, seed);
  put(columns_.alpha[seed], alpha);
}

void StateLayout::record_health(std::size_t seed, const HealthSample& sample) {
  require_seed(seed);
  const std::uint32_t number = number_after(take(columns_.health_counts[seed]));
  const float weight = std::max(kHealthWeight, 1.0F / static_cast<float>(number));
  const Writing writing(*this, seed);
  put(columns_.health_counts[seed], number);
  mix_in(columns_.health, seed, sample, {weight, weight, weight, weight});
  add_to_window(columns_, seed, sample, number);
}

void StateLayout::count_forward(std::size_t seed) {
  count(columns_.forwards, seed);
}
void StateLayout::count_error(std::size_t seed) {
  count(columns_.errors, seed);
}
void StateLayout::count_fallback(std::size_t seed) {
  count(columns_.fallbacks, seed);
}

SeedRecord StateLayout::read(std::size_t seed) const {
  require_seed(seed);
  return read_unchecked(seed);
}

void StateLayout::read_all(std::span<SeedRecord> records) const {
  if (!records.empty()) require_seed(records.size() - 1);
  for (std::size_t seed = 0; seed < records.size(); ++seed) records[seed] = read_unchecked(seed);
}

SeedRecord StateLayout::read_unchecked(std::size_t seed) const noexcept {
  const std::atomic_ref<std::uint32_t> sequence(sequences_[seed]);
  const StateColumns& c = columns_;
  while (true) {
    const std::uint32_t before = sequence.load(std::memory_order_acquire);
    const SeedRecord record{
        .state = static_cast<SeedState>(take(c.lifecycle_states[seed])),
        .kernel_id = take(c.kernel_ids[seed]),
        .blueprint_id = take(c.blueprint_ids[seed]),
        .alpha = take(c.alpha[seed]),
        .last_transition_step = take(c.last_transition_steps[seed]),
        .forwards = take(c.forwards[seed]),
        .errors = take(c.errors[seed]),
        .fallbacks = take(c.fallbacks[seed]),
        .health_count = take(c.health_counts[seed]),
        .mean = take(c.health.means[seed]),
        .m2 = take(c.health.m2s[seed]),
        .entropy = take(c.health.entropies[seed]),
        .gradient_variance = take(c.health.gradient_variances[seed]),
        .latency_ms = take(c.health.latencies_ms[seed]),
        .window_mean = take(c.window.means[seed]),
        .window_m2 = take(c.window.m2s[seed]),
        .window_entropy = take(c.window.entropies[seed]),
        .window_gradient_variance = take(c.window.gradient_variances[seed]),
        .window_latency_ms = take(c.window.latencies_ms[seed]),
    };
    const std::uint32_t after = sequence.load(std::memory_order_relaxed);
    if (before == after && before % 2 == 0) return record;
  }
}

SeedState StateLayout::state(std::size_t seed) const {
  require_seed(seed);
  return static_cast<SeedState>(take(columns_.lifecycle_states[seed]));
}

void StateLayout::require_seed(std::size_t seed) const {
  const std::size_t size = num_seeds();
  if (seed >= size) {
    throw InvalidInput("seed", "be below num_seeds = " + std::to_string(size),
                       std::to_string(seed));
  }
}

void StateLayout::fill_defaults(std::size_t first, std::size_t last) noexcept {
  for (std::size_t seed = first; seed < last; ++seed) {
    put(columns_.lifecycle_states[seed], static_cast<std::uint8_t>(SeedState::DORMANT));
    const auto not_measured = [=](std::span<float> column) { put(column[seed], kNotMeasured); };
    for_each_health_column(columns_.health, not_measured);
    for_each_health_column(columns_.window, not_measured);
    for_each_health_column(columns_.block, not_measured);
  }
}

void StateLayout::count(std::span<std::uint64_t> column, std::size_t seed) {
  require_seed(seed);
  const Writing writing(*this, seed);
  put(column[seed], take(column[seed]) + 1);
}

}  // namespace esper
