// One shard of the KernelCache; private to the cache's sources. Every member function REQUIRES:
// `mutex` held by the caller.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <list>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "esper/kernel_cache.h"

namespace esper {

// A reference that left the cache and has to be released once the lock is dropped.
struct Removed {
  std::string key;
  CacheHandle handle;
  CacheRemoval removal;
};

class KernelCache::Shard {
 public:
  // Read only where something may have expired, so that most calls read no clock.
  using Clock = std::function<std::uint64_t()>;

  struct NewEntry {
    std::string_view key;
    std::size_t hash;
    CacheHandle handle;
    std::size_t size_bytes;
    bool pinned;
    std::uint64_t expires_ns;  // 0: never
  };

  Shard(std::size_t capacity_bytes, std::size_t max_entries)
      : capacity_bytes_(capacity_bytes), max_entries_(max_entries) {}

  std::optional<CacheHandle> get(std::string_view key, const Clock& now,
                                 std::vector<Removed>& removed);
  bool contains(std::string_view key, const Clock& now, std::vector<Removed>& removed);
  PutResult put(const NewEntry& item, std::vector<Removed>& removed);
  bool pin(std::string_view key, const Clock& now, std::vector<Removed>& removed);
  bool unpin(std::string_view key);
  bool erase(std::string_view key, const Clock& now, std::vector<Removed>& removed);
  void put_negative(std::string_view key, const Clock& now, std::uint64_t expires,
                    std::vector<Removed>& removed);
  bool is_negative(std::string_view key, const Clock& now);
  std::size_t clear(bool pinned_too, std::vector<Removed>& removed);
  void add_to(CacheStats& total) const;
  void for_each_handle(const std::function<void(CacheHandle)>& visit) const;

  [[nodiscard]] std::size_t capacity_bytes() const noexcept { return capacity_bytes_; }

  mutable std::mutex mutex;

 private:
  enum class Place : std::uint8_t { SMALL, MAIN, PINNED };

  struct Entry {
    std::string key;
    std::size_t hash;
    CacheHandle handle;
    std::size_t size_bytes;
    std::uint64_t expires_ns;  // 0: never
    std::uint32_t num_pins;
    std::uint8_t frequency;  // accesses since the entry entered its queue, at most kMaxFrequency
    Place place;
  };
  using Queue = std::list<Entry>;  // front is newest

  struct Negative {
    std::uint64_t expires_ns;
    std::list<std::string>::iterator order;
  };

  Queue& queue_of(Place place) noexcept;
  void move_to(Queue::iterator entry, Place place);
  Queue::iterator find(std::string_view key, const Clock& now, std::vector<Removed>& removed);
  void remove(Queue::iterator entry, CacheRemoval removal, std::vector<Removed>& removed);
  PutResult admit(const NewEntry& item, const Entry* old) const;
  void insert(const NewEntry& item, std::uint32_t num_pins, Place place);
  void make_room(std::size_t size_bytes, std::vector<Removed>& removed);
  void evict_one(bool by_bytes, std::vector<Removed>& removed);
  bool evict_from_small(std::vector<Removed>& removed);
  bool evict_from_main(std::vector<Removed>& removed);
  void remember_ghost(std::size_t hash);
  bool forget_ghost(std::size_t hash);
  bool forget_negative(std::string_view key);
  void touch(Entry& entry) noexcept;

  std::size_t capacity_bytes_;
  std::size_t max_entries_;
  std::size_t bytes_ = 0;
  std::size_t small_bytes_ = 0;
  std::size_t pinned_bytes_ = 0;
  Queue small_;
  Queue main_;
  Queue pinned_;
  Queue none_;  // always empty; its end() is "not found"
  // Keys are views of the entries' own strings, which list nodes never move.
  std::unordered_map<std::string_view, Queue::iterator> index_;
  struct Ghost {
    std::size_t hash;
    std::uint64_t number;
  };
  std::deque<Ghost> ghost_order_;
  std::unordered_map<std::size_t, std::uint64_t> ghosts_;  // hash -> number of its latest Ghost
  std::uint64_t num_ghosts_ = 0;
  std::list<std::string> negative_order_;  // front is newest
  std::unordered_map<std::string_view, Negative> negatives_;
  CacheStats counts_;
};

}  // namespace esper
