// The first cache tier: opaque handles by key, bounded by bytes and by count.
//
// Admission and eviction go by how often keys were asked for (docs/decisions/0006-l1-admission.md):
// - a newcomer enters a window of a hundredth of both bounds, first in, first out;
// - what leaves the window goes on to the main part: while there is no room, only in the place of
//   an entry that was asked for less, the least wanted of eight drawn at random (of all, where
//   there are few). So a scan never gets past the window;
// - keys that left keep their count for a while, so one that comes back is known;
// - counts end at 15 and are halved after 25 accesses for every entry, so old fame fades.
// A hit changes a count and moves nothing. Counts are not weighed by size: a load costs about in
// proportion to its bytes, so the bytes that hits save are what counts.
//
// Pinned entries stand outside of that and are never evicted nor expired. Keys are spread over
// shards, each with its own lock and its own equal part of both bounds. The same calls in the same
// order give the same content, in every process.
//
// Ownership: a handle stands for one counted reference. `put` takes over the caller's reference
// when it returns STORED and leaves it with the caller otherwise. `get` gives the caller a
// reference of its own, made by `Hooks::acquire`. A reference the cache lets go of reaches
// `Hooks::release`, always after the shard's lock is dropped.
//
// Thread-safe, unless it was made `externally_locked`. Nothing here waits for anything but a
// shard's lock.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace esper {

using CacheHandle = std::uint64_t;

enum class CacheRemoval : std::uint8_t { EVICTED, EXPIRED, REPLACED, ERASED, CLEARED };

[[nodiscard]] std::string_view removal_name(CacheRemoval removal) noexcept;

struct CacheHooks {
  // Makes one more reference. Runs under the shard's lock: must be short and must not call the
  // cache.
  std::function<void(CacheHandle)> acquire = [](CacheHandle) {};
  // Takes back the cache's reference. Runs without any lock; must not throw.
  std::function<void(std::string_view key, CacheHandle, CacheRemoval)> release =
      [](std::string_view, CacheHandle, CacheRemoval) {};
  // Monotonic time.
  std::function<std::uint64_t()> now_ns;
};

struct CacheConfig {
  std::size_t capacity_bytes;
  std::size_t max_entries = 4096;
  // 0 chooses by size: one shard for each full 256 MiB and 128 entries, between 1 and 8.
  std::size_t num_shards = 0;
  // Life of entries that `put` gives none of their own; 0: no end.
  std::uint64_t default_ttl_ns = 0;
  // The owner lets one call in at a time and no other while a hook runs under the lock, as Python's
  // global lock does; the cache then takes no locks of its own.
  bool externally_locked = false;
};

// Exact counts since birth, and the present fill. hits + misses + negative_hits = calls of `get`.
struct CacheStats {
  std::uint64_t hits = 0;
  std::uint64_t misses = 0;
  std::uint64_t negative_hits = 0;
  std::uint64_t inserts = 0;   // stored under a new key
  std::uint64_t replaced = 0;  // stored under a key that was there
  std::uint64_t evictions = 0;
  std::uint64_t expirations = 0;
  std::uint64_t rejected = 0;  // puts that found no room
  std::uint64_t bytes = 0;
  std::uint64_t entries = 0;
  std::uint64_t pinned_entries = 0;
  std::uint64_t negative_entries = 0;
};

class KernelCache {
 public:
  enum class PutResult : std::uint8_t {
    STORED,
    TOO_LARGE,    // larger than one shard's part of the bound: can never fit
    PINNED_FULL,  // everything that would have to go is pinned
  };

  // Throws InvalidInput where a bound is 0 or there are fewer entries or bytes than shards.
  KernelCache(const CacheConfig& config, CacheHooks hooks);
  // Releases everything, as CLEARED.
  ~KernelCache();

  KernelCache(const KernelCache&) = delete;
  KernelCache& operator=(const KernelCache&) = delete;

  // The handle, with a reference for the caller; nothing for an unknown, expired or negative key.
  [[nodiscard]] std::optional<CacheHandle> get(std::string_view key) {
    CacheHandle handle = 0;
    return get(key, handle) ? std::optional(handle) : std::nullopt;
  }
  // The same for the path where every nanosecond counts: false for nothing. (An optional that a
  // function with locks to give back returns is put together in memory byte by byte, and reading it
  // waits for that.)
  [[nodiscard]] bool get(std::string_view key, CacheHandle& handle);

  // Whether a live entry stands under the key; counts as no access.
  [[nodiscard]] bool contains(std::string_view key);

  // Places of the keys that have neither a live nor a negative entry, each key once: what is to be
  // loaded to warm the cache. Counts as no access.
  [[nodiscard]] std::vector<std::size_t> absent(std::span<const std::string_view> keys);

  // Stores the handle and ends a negative entry of the key. The old entry of the key, its pins
  // included, is replaced only where the new one fits. `ttl_ns` 0 takes the default. Throws
  // InvalidInput for size_bytes == 0.
  PutResult put(std::string_view key, CacheHandle handle, std::size_t size_bytes,
                bool pinned = false, std::uint64_t ttl_ns = 0);

  // Pins count: an entry stays as long as one `pin` is not undone. False where the key has no live
  // entry.
  bool pin(std::string_view key);
  // False where the key has no entry or no pin.
  bool unpin(std::string_view key);

  // False where the key has no live entry. Throws InvalidState where it is pinned.
  bool erase(std::string_view key);

  // Notes that the key has no value for `ttl_ns`; at most max_entries such notes are kept, the
  // oldest go first. Throws InvalidInput for ttl_ns == 0, InvalidState where the key has a live
  // entry.
  void put_negative(std::string_view key, std::uint64_t ttl_ns);
  [[nodiscard]] bool is_negative(std::string_view key);

  // Removes every entry that is not pinned, or simply every one, and every negative entry; returns
  // how many entries.
  std::size_t clear(bool pinned_too = false);

  [[nodiscard]] CacheStats stats() const;
  [[nodiscard]] std::size_t capacity_bytes() const noexcept { return config_.capacity_bytes; }
  [[nodiscard]] std::size_t max_entries() const noexcept { return config_.max_entries; }
  [[nodiscard]] std::size_t num_shards() const noexcept { return shards_.size(); }
  // The largest size that `put` can take.
  [[nodiscard]] std::size_t max_item_bytes() const noexcept;

  // Calls `visit` with every stored handle, shard by shard, under the shard's lock.
  void for_each_handle(const std::function<void(CacheHandle)>& visit) const;

 private:
  class Shard;

  [[nodiscard]] Shard& shard_of(std::size_t hash) const noexcept;

  CacheConfig config_;
  CacheHooks hooks_;
  std::vector<std::unique_ptr<Shard>> shards_;
};

}  // namespace esper
