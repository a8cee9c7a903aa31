#include "kernel_cache_ghosts.h"

#include <algorithm>
#include <bit>

namespace esper {
namespace {

constexpr std::size_t kGhostsPerEntry = 4;
constexpr std::uint64_t kFrequency = 0xFF;

}  // namespace

void GhostFrequencies::fit(std::size_t num_entries) {
  const std::size_t wanted = std::bit_ceil(std::max(kSetSize, kGhostsPerEntry * num_entries));
  if (wanted <= slots_.size()) return;
  std::vector<std::uint64_t> old(wanted);
  old.swap(slots_);
  for (const std::uint64_t slot : old) {
    const auto frequency = static_cast<std::uint8_t>(slot & kFrequency);
    if (frequency > 0) remember(slot & ~kFrequency, frequency);
  }
}

void GhostFrequencies::remember(std::size_t hash, std::uint8_t frequency) noexcept {
  std::uint64_t* const set = set_of(hash);
  std::uint64_t* least = nullptr;
  ++next_;
  for (std::size_t i = 0; i < kSetSize; ++i) {
    std::uint64_t* const slot = set + (next_ + i) % kSetSize;
    if (least == nullptr || (*slot & kFrequency) < (*least & kFrequency)) least = slot;
  }
  *least = (std::uint64_t{hash} & ~kFrequency) | frequency;
}

std::uint8_t GhostFrequencies::take(std::size_t hash) noexcept {
  if (slots_.empty()) return 0;
  std::uint64_t* const set = set_of(hash);
  for (std::uint64_t* slot = set; slot < set + kSetSize; ++slot) {
    const std::uint64_t frequency = *slot & kFrequency;
    if (frequency == 0 || ((*slot ^ hash) & ~kFrequency) != 0) continue;
    *slot = 0;
    return static_cast<std::uint8_t>(frequency);
  }
  return 0;
}

void GhostFrequencies::halve() noexcept {
  for (std::uint64_t& slot : slots_) {
    slot = (slot & ~kFrequency) | ((slot & kFrequency) >> 1U);
  }
}

std::uint64_t* GhostFrequencies::set_of(std::uint64_t hash) noexcept {
  const std::size_t num_sets = slots_.size() / kSetSize;
  return slots_.data() + kSetSize * ((hash >> 8U) & (num_sets - 1));
}

}  // namespace esper
