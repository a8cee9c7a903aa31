#include "kernel_cache_shard.h"

#include <algorithm>
#include <iterator>

#include "esper/errors.h"

namespace esper {
namespace {

constexpr std::uint8_t kMaxFrequency = 3;
// The small queue's share of what may be evicted: a tenth.
constexpr std::size_t kSmallDivisor = 10;
constexpr std::size_t kMinGhosts = 16;

}  // namespace

std::optional<CacheHandle> KernelCache::Shard::get(std::string_view key, const Clock& now,
                                                   std::vector<Removed>& removed) {
  const Queue::iterator entry = find(key, now, removed);
  if (entry != none_.end()) {
    touch(*entry);
    ++counts_.hits;
    return entry->handle;
  }
  ++(is_negative(key, now) ? counts_.negative_hits : counts_.misses);
  return std::nullopt;
}

bool KernelCache::Shard::contains(std::string_view key, const Clock& now,
                                  std::vector<Removed>& removed) {
  return find(key, now, removed) != none_.end();
}

KernelCache::PutResult KernelCache::Shard::put(const NewEntry& item,
                                               std::vector<Removed>& removed) {
  const auto known = index_.find(item.key);
  const Entry* old = known != index_.end() ? &*known->second : nullptr;
  const PutResult verdict = admit(item, old);
  if (verdict != PutResult::STORED) {
    ++counts_.rejected;
    return verdict;
  }
  const std::uint32_t num_pins = (old != nullptr ? old->num_pins : 0) + (item.pinned ? 1 : 0);
  Place place = forget_ghost(item.hash) ? Place::MAIN : Place::SMALL;
  if (old != nullptr) {
    if (old->place != Place::SMALL) place = Place::MAIN;
    remove(known->second, CacheRemoval::REPLACED, removed);
  }
  ++(old != nullptr ? counts_.replaced : counts_.inserts);
  make_room(item.size_bytes, removed);
  insert(item, num_pins, num_pins > 0 ? Place::PINNED : place);
  forget_negative(item.key);
  return PutResult::STORED;
}

// STORED where the item has room beside the pinned entries, of which it replaces `old`.
KernelCache::PutResult KernelCache::Shard::admit(const NewEntry& item, const Entry* old) const {
  const bool frees_pinned = old != nullptr && old->num_pins > 0;
  const std::size_t pinned_bytes = pinned_bytes_ - (frees_pinned ? old->size_bytes : 0);
  const std::size_t pinned_entries = pinned_.size() - (frees_pinned ? 1 : 0);
  if (item.size_bytes > capacity_bytes_) return PutResult::TOO_LARGE;
  const bool fits =
      item.size_bytes <= capacity_bytes_ - pinned_bytes && pinned_entries + 1 <= max_entries_;
  return fits ? PutResult::STORED : PutResult::PINNED_FULL;
}

void KernelCache::Shard::insert(const NewEntry& item, std::uint32_t num_pins, Place place) {
  Queue fresh;
  fresh.push_front(Entry{std::string(item.key), item.hash, item.handle, item.size_bytes,
                         item.expires_ns, num_pins, 0, place});
  index_.emplace(fresh.front().key, fresh.begin());
  Queue& queue = queue_of(place);
  queue.splice(queue.begin(), fresh);
  bytes_ += item.size_bytes;
  if (place == Place::SMALL) small_bytes_ += item.size_bytes;
  if (place == Place::PINNED) pinned_bytes_ += item.size_bytes;
}

bool KernelCache::Shard::pin(std::string_view key, const Clock& now,
                             std::vector<Removed>& removed) {
  const Queue::iterator entry = find(key, now, removed);
  if (entry == none_.end()) return false;
  if (entry->num_pins++ == 0) move_to(entry, Place::PINNED);
  return true;
}

bool KernelCache::Shard::unpin(std::string_view key) {
  const auto known = index_.find(key);
  if (known == index_.end() || known->second->num_pins == 0) return false;
  if (--known->second->num_pins == 0) move_to(known->second, Place::MAIN);
  return true;
}

bool KernelCache::Shard::erase(std::string_view key, const Clock& now,
                               std::vector<Removed>& removed) {
  const Queue::iterator entry = find(key, now, removed);
  if (entry == none_.end()) return false;
  if (entry->num_pins > 0) {
    throw InvalidState("key must not be pinned when it is erased, got " +
                       std::to_string(entry->num_pins) + " pins");
  }
  remove(entry, CacheRemoval::ERASED, removed);
  return true;
}

void KernelCache::Shard::put_negative(std::string_view key, const Clock& now, std::uint64_t expires,
                                      std::vector<Removed>& removed) {
  if (find(key, now, removed) != none_.end()) {
    throw InvalidState("key must have no value when it is noted as absent, got a stored key");
  }
  forget_negative(key);
  if (negatives_.size() == max_entries_) {
    negatives_.erase(negative_order_.back());
    negative_order_.pop_back();
  }
  negative_order_.emplace_front(key);
  negatives_.emplace(negative_order_.front(), Negative{expires, negative_order_.begin()});
}

bool KernelCache::Shard::is_negative(std::string_view key, const Clock& now) {
  const auto note = negatives_.find(key);
  if (note == negatives_.end()) return false;
  if (now() < note->second.expires_ns) return true;
  forget_negative(key);
  return false;
}

std::size_t KernelCache::Shard::clear(bool pinned_too, std::vector<Removed>& removed) {
  std::size_t count = 0;
  for (Queue* queue : {&small_, &main_, pinned_too ? &pinned_ : &none_}) {
    for (; !queue->empty(); ++count) remove(queue->begin(), CacheRemoval::CLEARED, removed);
  }
  negatives_.clear();
  negative_order_.clear();
  return count;
}

void KernelCache::Shard::add_to(CacheStats& total) const {
  total.hits += counts_.hits;
  total.misses += counts_.misses;
  total.negative_hits += counts_.negative_hits;
  total.inserts += counts_.inserts;
  total.replaced += counts_.replaced;
  total.evictions += counts_.evictions;
  total.expirations += counts_.expirations;
  total.rejected += counts_.rejected;
  total.bytes += bytes_;
  total.entries += index_.size();
  total.pinned_entries += pinned_.size();
  total.negative_entries += negatives_.size();
}

void KernelCache::Shard::for_each_handle(const std::function<void(CacheHandle)>& visit) const {
  for (const auto& [key, entry] : index_) visit(entry->handle);
}

KernelCache::Shard::Queue& KernelCache::Shard::queue_of(Place place) noexcept {
  return place == Place::SMALL ? small_ : place == Place::MAIN ? main_ : pinned_;
}

void KernelCache::Shard::move_to(Queue::iterator entry, Place place) {
  if (entry->place == Place::SMALL) small_bytes_ -= entry->size_bytes;
  if (entry->place == Place::PINNED) pinned_bytes_ -= entry->size_bytes;
  Queue& target = queue_of(place);
  target.splice(target.begin(), queue_of(entry->place), entry);
  entry->place = place;
  entry->frequency = 0;
  if (place == Place::SMALL) small_bytes_ += entry->size_bytes;
  if (place == Place::PINNED) pinned_bytes_ += entry->size_bytes;
}

// The live entry, or none_.end(); an expired one is removed on the way.
KernelCache::Shard::Queue::iterator KernelCache::Shard::find(std::string_view key, const Clock& now,
                                                             std::vector<Removed>& removed) {
  const auto known = index_.find(key);
  if (known == index_.end()) return none_.end();
  const Queue::iterator entry = known->second;
  const bool expired = entry->expires_ns != 0 && entry->num_pins == 0 && now() >= entry->expires_ns;
  if (!expired) return entry;
  remove(entry, CacheRemoval::EXPIRED, removed);
  ++counts_.expirations;
  return none_.end();
}

void KernelCache::Shard::remove(Queue::iterator entry, CacheRemoval removal,
                                std::vector<Removed>& removed) {
  // The one step that can throw comes first.
  if (removed.size() == removed.capacity()) removed.reserve(2 * removed.size() + 1);
  index_.erase(entry->key);
  bytes_ -= entry->size_bytes;
  if (entry->place == Place::SMALL) small_bytes_ -= entry->size_bytes;
  if (entry->place == Place::PINNED) pinned_bytes_ -= entry->size_bytes;
  removed.push_back({std::move(entry->key), entry->handle, removal});
  queue_of(entry->place).erase(entry);
}

// REQUIRES: admitted, so that what is not pinned suffices.
void KernelCache::Shard::make_room(std::size_t size_bytes, std::vector<Removed>& removed) {
  while (bytes_ + size_bytes > capacity_bytes_) evict_one(true, removed);
  while (index_.size() + 1 > max_entries_) evict_one(false, removed);
}

// The small queue gives way while it holds more than its share, measured in what is short.
// REQUIRES: an entry that is not pinned.
void KernelCache::Shard::evict_one(bool by_bytes, std::vector<Removed>& removed) {
  while (true) {
    const std::size_t small = by_bytes ? small_bytes_ : small_.size();
    const std::size_t all = by_bytes ? bytes_ - pinned_bytes_ : small_.size() + main_.size();
    const bool small_first = main_.empty() || small * kSmallDivisor > all;
    if (small_first ? evict_from_small(removed) : evict_from_main(removed)) return;
  }
}

// Looks at the oldest newcomer: evicts it, or moves it to the main queue if it was asked for again.
bool KernelCache::Shard::evict_from_small(std::vector<Removed>& removed) {
  const Queue::iterator oldest = std::prev(small_.end());
  if (oldest->frequency > 0) {
    move_to(oldest, Place::MAIN);
    return false;
  }
  remember_ghost(oldest->hash);
  remove(oldest, CacheRemoval::EVICTED, removed);
  ++counts_.evictions;
  return true;
}

bool KernelCache::Shard::evict_from_main(std::vector<Removed>& removed) {
  const Queue::iterator oldest = std::prev(main_.end());
  if (oldest->frequency > 0) {
    --oldest->frequency;
    main_.splice(main_.begin(), main_, oldest);
    return false;
  }
  remove(oldest, CacheRemoval::EVICTED, removed);
  ++counts_.evictions;
  return true;
}

// As many ghosts as there are entries: older ones are forgotten.
void KernelCache::Shard::remember_ghost(std::size_t hash) {
  ghost_order_.push_back({hash, ++num_ghosts_});
  ghosts_[hash] = num_ghosts_;
  while (ghost_order_.size() > std::max<std::size_t>(index_.size(), kMinGhosts)) {
    const auto known = ghosts_.find(ghost_order_.front().hash);
    if (known != ghosts_.end() && known->second == ghost_order_.front().number)
      ghosts_.erase(known);
    ghost_order_.pop_front();
  }
}

bool KernelCache::Shard::forget_ghost(std::size_t hash) {
  return ghosts_.erase(hash) > 0;
}

bool KernelCache::Shard::forget_negative(std::string_view key) {
  const auto note = negatives_.find(key);
  if (note == negatives_.end()) return false;
  const auto order = note->second.order;
  negatives_.erase(note);
  negative_order_.erase(order);
  return true;
}

void KernelCache::Shard::touch(Entry& entry) noexcept {
  entry.frequency =
      std::min<std::uint8_t>(kMaxFrequency, static_cast<std::uint8_t>(entry.frequency + 1));
}

}  // namespace esper
