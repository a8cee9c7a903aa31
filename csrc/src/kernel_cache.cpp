#include "esper/kernel_cache.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <mutex>
#include <unordered_set>
#include <utility>

#include "esper/errors.h"
#include "kernel_cache_shard.h"

namespace esper {
namespace {

std::uint64_t steady_now_ns() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return static_cast<std::uint64_t>(std::chrono::nanoseconds(now).count());
}

std::size_t chosen_shards(const CacheConfig& config) {
  if (config.capacity_bytes == 0) throw InvalidInput("capacity_bytes", "be at least 1", "0");
  if (config.max_entries == 0) throw InvalidInput("max_entries", "be at least 1", "0");
  const std::size_t smaller = std::min(config.capacity_bytes, config.max_entries);
  if (config.num_shards > std::min<std::size_t>(smaller, 256)) {
    throw InvalidInput("num_shards", "be at most 256, max_entries and capacity_bytes",
                       std::to_string(config.num_shards));
  }
  if (config.num_shards > 0) return config.num_shards;
  const std::size_t wanted =
      std::min(config.capacity_bytes / (std::size_t{256} << 20U), config.max_entries / 128);
  return std::clamp<std::size_t>(wanted, 1, 8);
}

std::uint64_t deadline(std::uint64_t now, std::uint64_t ttl_ns) noexcept {
  const std::uint64_t room = std::numeric_limits<std::uint64_t>::max() - now;
  return now + std::min(ttl_ns, room);
}

// Collects what leaves the cache under a lock and releases it when the lock is gone: declare before
// the lock.
class Removals {
 public:
  explicit Removals(const CacheHooks& hooks) : hooks_(hooks) {}
  Removals(const Removals&) = delete;
  Removals& operator=(const Removals&) = delete;
  ~Removals() {
    for (const auto& item : list) hooks_.release(item.key.view(), item.handle, item.removal);
  }

  CacheEntries list;

 private:
  const CacheHooks& hooks_;
};

}  // namespace

std::string_view removal_name(CacheRemoval removal) noexcept {
  switch (removal) {
    case CacheRemoval::EVICTED:
      return "evicted";
    case CacheRemoval::EXPIRED:
      return "expired";
    case CacheRemoval::REPLACED:
      return "replaced";
    case CacheRemoval::ERASED:
      return "erased";
    case CacheRemoval::CLEARED:
      return "cleared";
  }
  return "unknown";
}

KernelCache::KernelCache(const CacheConfig& config, CacheHooks hooks)
    : config_(config), hooks_(std::move(hooks)) {
  if (!hooks_.now_ns) hooks_.now_ns = steady_now_ns;
  const std::size_t num_shards = chosen_shards(config);
  shards_.reserve(num_shards);
  for (std::size_t i = 0; i < num_shards; ++i) {
    shards_.push_back(std::make_unique<Shard>(config.capacity_bytes / num_shards,
                                              config.max_entries / num_shards,
                                              !config.externally_locked));
  }
}

KernelCache::~KernelCache() {
  clear(true);
}

bool KernelCache::get(std::string_view key, CacheHandle& handle) {
  Removals removals(hooks_);
  const CacheKey hashed(key);
  Shard& shard = shard_of(hashed.hash);
  const std::lock_guard lock(shard.mutex);
  const CacheEntry* entry = shard.get(hashed, hooks_.now_ns, removals.list);
  if (entry == nullptr) return false;
  handle = entry->handle;
  hooks_.acquire(handle);
  return true;
}

bool KernelCache::contains(std::string_view key) {
  Removals removals(hooks_);
  const CacheKey hashed(key);
  Shard& shard = shard_of(hashed.hash);
  const std::lock_guard lock(shard.mutex);
  return shard.contains(hashed, hooks_.now_ns, removals.list);
}

std::vector<std::size_t> KernelCache::absent(std::span<const std::string_view> keys) {
  std::vector<std::size_t> places;
  std::unordered_set<std::string_view> seen;
  for (std::size_t i = 0; i < keys.size(); ++i) {
    if (!seen.insert(keys[i]).second) continue;
    if (!contains(keys[i]) && !is_negative(keys[i])) places.push_back(i);
  }
  return places;
}

KernelCache::PutResult KernelCache::put(std::string_view key, CacheHandle handle,
                                        std::size_t size_bytes, bool pinned, std::uint64_t ttl_ns) {
  if (size_bytes == 0) throw InvalidInput("size_bytes", "be at least 1", "0");
  const std::uint64_t ttl = ttl_ns != 0 ? ttl_ns : config_.default_ttl_ns;
  Removals removals(hooks_);
  const CacheKey hashed(key);
  Shard& shard = shard_of(hashed.hash);
  const std::uint64_t expires = ttl == 0 ? 0 : deadline(hooks_.now_ns(), ttl);
  const std::lock_guard lock(shard.mutex);
  return shard.put({hashed, handle, size_bytes, pinned, expires}, removals.list);
}

bool KernelCache::pin(std::string_view key) {
  Removals removals(hooks_);
  const CacheKey hashed(key);
  Shard& shard = shard_of(hashed.hash);
  const std::lock_guard lock(shard.mutex);
  return shard.pin(hashed, hooks_.now_ns, removals.list);
}

bool KernelCache::unpin(std::string_view key) {
  const CacheKey hashed(key);
  Shard& shard = shard_of(hashed.hash);
  const std::lock_guard lock(shard.mutex);
  return shard.unpin(hashed);
}

bool KernelCache::erase(std::string_view key) {
  Removals removals(hooks_);
  const CacheKey hashed(key);
  Shard& shard = shard_of(hashed.hash);
  const std::lock_guard lock(shard.mutex);
  return shard.erase(hashed, hooks_.now_ns, removals.list);
}

void KernelCache::put_negative(std::string_view key, std::uint64_t ttl_ns) {
  if (ttl_ns == 0) throw InvalidInput("ttl_ns", "be at least 1 ns", "0");
  Removals removals(hooks_);
  const CacheKey hashed(key);
  Shard& shard = shard_of(hashed.hash);
  const std::lock_guard lock(shard.mutex);
  shard.put_negative(hashed, hooks_.now_ns, deadline(hooks_.now_ns(), ttl_ns), removals.list);
}

bool KernelCache::is_negative(std::string_view key) {
  const CacheKey hashed(key);
  Shard& shard = shard_of(hashed.hash);
  const std::lock_guard lock(shard.mutex);
  return shard.is_negative(hashed, hooks_.now_ns);
}

std::size_t KernelCache::clear(bool pinned_too) {
  std::size_t count = 0;
  for (const std::unique_ptr<Shard>& shard : shards_) {
    Removals removals(hooks_);
    const std::lock_guard lock(shard->mutex);
    count += shard->clear(pinned_too, removals.list);
  }
  return count;
}

CacheStats KernelCache::stats() const {
  CacheStats total;
  for (const std::unique_ptr<Shard>& shard : shards_) {
    const std::lock_guard lock(shard->mutex);
    shard->add_to(total);
  }
  return total;
}

std::size_t KernelCache::max_item_bytes() const noexcept {
  return config_.capacity_bytes / shards_.size();
}

void KernelCache::for_each_handle(const std::function<void(CacheHandle)>& visit) const {
  for (const std::unique_ptr<Shard>& shard : shards_) {
    const std::lock_guard lock(shard->mutex);
    shard->for_each_handle(visit);
  }
}

KernelCache::Shard& KernelCache::shard_of(std::size_t hash) const noexcept {
  if (shards_.size() == 1) return *shards_.front();
  // The high bits: the shard's own table uses the low ones.
  return *shards_[(hash >> 48U) % shards_.size()];
}

}  // namespace esper
