// How often keys were asked for that the cache no longer holds; private to the cache's sources.
//
// A table of sets of eight, one cache line each; a full set forgets the key that was asked for the
// least. A key is known by 56 bits of its hash: two of them may, rarely, share a count.
// Not thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace esper {

class GhostFrequencies {
 public:
  // Makes room for four ghosts an entry. Throws std::bad_alloc, and has then changed nothing.
  void fit(std::size_t num_entries);

  // Notes a key's frequency. REQUIRES: fit() was called, frequency > 0.
  void remember(std::size_t hash, std::uint8_t frequency) noexcept;

  // The frequency, which is then forgotten; 0 for an unknown key.
  std::uint8_t take(std::size_t hash) noexcept;

  // Halves every frequency; what comes to 0 is forgotten.
  void halve() noexcept;

 private:
  static constexpr std::size_t kSetSize = 8;

  [[nodiscard]] std::uint64_t* set_of(std::uint64_t hash) noexcept;

  std::vector<std::uint64_t> slots_;  // 56 bits of the hash, 8 of frequency; frequency 0: free
  std::size_t next_ = 0;              // where the search for a slot to give up begins
};

}  // namespace esper
