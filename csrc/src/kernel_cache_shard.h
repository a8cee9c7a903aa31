// One shard of the KernelCache; private to the cache's sources. Every member function REQUIRES:
// `mutex` held by the caller.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <list>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "esper/kernel_cache.h"
#include "kernel_cache_ghosts.h"
#include "kernel_cache_hash.h"
#include "kernel_cache_index.h"
#include "kernel_cache_key.h"

namespace esper {

// A key and its hash.
struct CacheKey {
  explicit CacheKey(std::string_view text) noexcept : text(text), hash(hash_of_key(text)) {}

  std::string_view text;
  std::size_t hash;
};

struct CacheEntry {
  enum class Place : std::uint8_t { WINDOW, MAIN, PINNED };

  CacheEntry(const CacheKey& key, CacheHandle handle, std::size_t size_bytes,
             std::uint64_t expires_ns)
      : key(key.text),
        hash(key.hash),
        handle(handle),
        expires_ns(expires_ns),
        size_bytes(size_bytes) {}

  StoredKey key;
  std::size_t hash;
  CacheHandle handle;
  std::uint64_t expires_ns;    // 0: never
  std::uint64_t last_use = 0;  // number of the shard's access
  std::uint8_t frequency = 0;  // accesses, aged, at most kMaxFrequency
  Place place = Place::WINDOW;
  CacheRemoval removal = CacheRemoval::CLEARED;  // why it left
  std::uint32_t num_pins = 0;
  std::size_t size_bytes;
  std::size_t main_slot = 0;  // where main_ has it
};
using CacheEntries = std::list<CacheEntry>;  // front is newest

class KernelCache::Shard {
 public:
  // Read only where something may have expired, so that most calls read no clock.
  using Clock = std::function<std::uint64_t()>;

  struct NewEntry {
    CacheKey key;
    CacheHandle handle;
    std::size_t size_bytes;
    bool pinned;
    std::uint64_t expires_ns;  // 0: never
  };

  using Place = CacheEntry::Place;
  using Queue = CacheEntries;

  Shard(std::size_t capacity_bytes, std::size_t max_entries, bool shared)
      : mutex(shared), capacity_bytes_(capacity_bytes), max_entries_(max_entries) {}

  // What leaves is spliced to `removed`: its references have to be released once the lock is
  // dropped.
  // The entry, after counting the access; nullptr where there is none.
  const CacheEntry* get(const CacheKey& key, const Clock& now, Queue& removed) {
    const Found found = find(key, now, removed);
    if (found == nullptr) {
      count_miss(key, now);
      return nullptr;
    }
    CacheEntry& entry = **found;
    touch(entry);
    ++counts_.hits;
    return &entry;
  }
  bool contains(const CacheKey& key, const Clock& now, Queue& removed);
  PutResult put(const NewEntry& item, Queue& removed);
  bool pin(const CacheKey& key, const Clock& now, Queue& removed);
  bool unpin(const CacheKey& key);
  bool erase(const CacheKey& key, const Clock& now, Queue& removed);
  void put_negative(const CacheKey& key, const Clock& now, std::uint64_t expires, Queue& removed);
  bool is_negative(const CacheKey& key, const Clock& now);
  std::size_t clear(bool pinned_too, Queue& removed);
  void add_to(CacheStats& total) const;
  void for_each_handle(const std::function<void(CacheHandle)>& visit) const;

  mutable ShardLock mutex;

 private:
  static constexpr std::uint8_t kMaxFrequency = 15;

  using Found = const Queue::iterator*;  // nullptr: not there; valid until the next change

  struct Negative {
    std::uint64_t expires_ns;
    std::list<std::string>::iterator order;
  };

  // What a new entry takes over from the one it replaces, or from its ghost.
  struct Standing {
    std::uint32_t num_pins;
    std::uint8_t frequency;
    Place place;
  };

  Queue& list_of(Place place) noexcept;
  std::size_t& bytes_of(Place place) noexcept;
  void move_to(Queue::iterator entry, Place place);
  void leave_main(const CacheEntry& entry) noexcept;

  // A live entry; an expired one is removed on the way.
  Found find(const CacheKey& key, const Clock& now, Queue& removed) {
    const Found known = index_.find(key.text, key.hash);
    if (known == nullptr || (*known)->expires_ns == 0) return known;
    return unless_expired(known, now, removed);
  }
  Found unless_expired(Found known, const Clock& now, Queue& removed);

  // Counts an access.
  void touch(CacheEntry& entry) noexcept {
    entry.last_use = ++num_accesses_;
    if (entry.frequency < kMaxFrequency) ++entry.frequency;
    if (num_accesses_ >= next_aging_) age();
  }
  void count_miss(const CacheKey& key, const Clock& now);

  void remove(Queue::iterator entry, CacheRemoval removal, Queue& removed) noexcept;
  PutResult admit(const NewEntry& item, const CacheEntry* old) const;
  void insert(const NewEntry& item, const Standing& standing);
  [[nodiscard]] bool fits(std::size_t size_bytes) const noexcept;
  [[nodiscard]] bool window_overflows(std::size_t size_bytes) const noexcept;
  void advance_window(std::size_t size_bytes, Queue& removed);
  void evict(Queue::iterator entry, Queue& removed);
  Queue::iterator victim() noexcept;
  void age() noexcept;
  bool forget_negative(std::string_view key);

  std::size_t capacity_bytes_;
  std::size_t max_entries_;
  std::size_t window_bytes_ = 0;
  std::size_t main_bytes_ = 0;
  std::size_t pinned_bytes_ = 0;
  Queue window_list_;
  Queue main_list_;
  Queue pinned_list_;
  std::vector<Queue::iterator> main_;  // main_list_ in no order, to draw from
  KeyIndex<Queue::iterator> index_;
  GhostFrequencies ghosts_;
  std::uint64_t num_accesses_ = 0;
  std::uint64_t next_aging_ = 0;                  // num_accesses_ when to look whether it is time
  std::uint64_t aged_at_ = 0;                     // num_accesses_ when frequencies were last halved
  std::uint64_t random_ = 0x9E3779B97F4A7C15ULL;  // state of xorshift64
  std::list<std::string> negative_order_;         // front is newest
  std::unordered_map<std::string_view, Negative> negatives_;
  CacheStats counts_;
};

}  // namespace esper
