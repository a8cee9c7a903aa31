#include "kernel_cache_shard.h"

#include <algorithm>
#include <iterator>

#include "esper/errors.h"

namespace esper {
namespace {

// Newcomers' share of both bounds: a hundredth.
constexpr std::size_t kWindowDivisor = 100;
// Frequencies are halved after so many accesses for every entry.
constexpr std::uint64_t kAccessesPerAging = 25;
constexpr std::size_t kFewestToAge = 16;
// Entries that a victim is the least wanted of; all of them where there are no more than twice as
// many.
constexpr std::size_t kSample = 8;

}  // namespace

void KernelCache::Shard::count_miss(const CacheKey& key, const Clock& now) {
  ++(is_negative(key, now) ? counts_.negative_hits : counts_.misses);
}

bool KernelCache::Shard::contains(const CacheKey& key, const Clock& now, Queue& removed) {
  return find(key, now, removed) != nullptr;
}

KernelCache::PutResult KernelCache::Shard::put(const NewEntry& item, Queue& removed) {
  const Found known = index_.find(item.key.text, item.key.hash);
  const PutResult verdict = admit(item, known != nullptr ? &**known : nullptr);
  if (verdict != PutResult::STORED) {
    ++counts_.rejected;
    return verdict;
  }
  Standing standing{0, 0, Place::WINDOW};
  if (known != nullptr) {
    const Queue::iterator old = *known;
    standing = {old->num_pins, old->frequency, old->place};
    remove(old, CacheRemoval::REPLACED, removed);
    ++counts_.replaced;
  } else {
    standing.frequency = ghosts_.take(item.key.hash);
    ++counts_.inserts;
  }
  if (item.pinned) ++standing.num_pins;
  if (standing.num_pins > 0) standing.place = Place::PINNED;
  if (standing.place == Place::WINDOW) advance_window(item.size_bytes, removed);
  while (!fits(item.size_bytes)) evict(victim(), removed);
  insert(item, standing);
  forget_negative(item.key.text);
  return PutResult::STORED;
}

// STORED where the item has room beside the pinned entries, of which it replaces `old`.
KernelCache::PutResult KernelCache::Shard::admit(const NewEntry& item,
                                                 const CacheEntry* old) const {
  const bool frees_pinned = old != nullptr && old->num_pins > 0;
  const std::size_t pinned_bytes = pinned_bytes_ - (frees_pinned ? old->size_bytes : 0);
  const std::size_t pinned_entries = pinned_list_.size() - (frees_pinned ? 1 : 0);
  if (item.size_bytes > capacity_bytes_) return PutResult::TOO_LARGE;
  const bool fits =
      item.size_bytes <= capacity_bytes_ - pinned_bytes && pinned_entries + 1 <= max_entries_;
  return fits ? PutResult::STORED : PutResult::PINNED_FULL;
}

void KernelCache::Shard::insert(const NewEntry& item, const Standing& standing) {
  Queue fresh;
  const bool to_main = standing.place == Place::MAIN;
  CacheEntry& entry = fresh.emplace_front(item.key, item.handle, item.size_bytes, item.expires_ns);
  entry.main_slot = main_.size();
  entry.num_pins = standing.num_pins;
  entry.frequency = standing.frequency;
  entry.place = standing.place;
  if (to_main && main_.size() == main_.capacity()) main_.reserve(2 * main_.size() + 1);
  index_.insert(item.key.hash, fresh.begin());
  if (to_main) main_.push_back(fresh.begin());
  touch(entry);
  bytes_of(standing.place) += item.size_bytes;
  Queue& list = list_of(standing.place);
  list.splice(list.begin(), fresh);
}

bool KernelCache::Shard::pin(const CacheKey& key, const Clock& now, Queue& removed) {
  const Found found = find(key, now, removed);
  if (found == nullptr) return false;
  const Queue::iterator entry = *found;
  if (entry->num_pins == 0) move_to(entry, Place::PINNED);
  ++entry->num_pins;
  return true;
}

bool KernelCache::Shard::unpin(const CacheKey& key) {
  const Found known = index_.find(key.text, key.hash);
  if (known == nullptr || (*known)->num_pins == 0) return false;
  const Queue::iterator entry = *known;
  if (entry->num_pins == 1) move_to(entry, Place::MAIN);
  --entry->num_pins;
  return true;
}

bool KernelCache::Shard::erase(const CacheKey& key, const Clock& now, Queue& removed) {
  const Found found = find(key, now, removed);
  if (found == nullptr) return false;
  const Queue::iterator entry = *found;
  if (entry->num_pins > 0) {
    throw InvalidState("key must not be pinned when it is erased, got " +
                       std::to_string(entry->num_pins) + " pins");
  }
  remove(entry, CacheRemoval::ERASED, removed);
  return true;
}

void KernelCache::Shard::put_negative(const CacheKey& key, const Clock& now, std::uint64_t expires,
                                      Queue& removed) {
  if (find(key, now, removed) != nullptr) {
    throw InvalidState("key must have no value when it is noted as absent, got a stored key");
  }
  forget_negative(key.text);
  if (negatives_.size() == max_entries_) {
    negatives_.erase(negative_order_.back());
    negative_order_.pop_back();
  }
  negative_order_.emplace_front(key.text);
  negatives_.emplace(negative_order_.front(), Negative{expires, negative_order_.begin()});
}

bool KernelCache::Shard::is_negative(const CacheKey& key, const Clock& now) {
  if (negatives_.empty()) return false;
  const auto note = negatives_.find(key.text);
  if (note == negatives_.end()) return false;
  if (now() < note->second.expires_ns) return true;
  forget_negative(key.text);
  return false;
}

std::size_t KernelCache::Shard::clear(bool pinned_too, Queue& removed) {
  std::size_t count = 0;
  for (const Place place : {Place::WINDOW, Place::MAIN, Place::PINNED}) {
    if (place == Place::PINNED && !pinned_too) continue;
    Queue& list = list_of(place);
    for (; !list.empty(); ++count) remove(list.begin(), CacheRemoval::CLEARED, removed);
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
  total.bytes += window_bytes_ + main_bytes_ + pinned_bytes_;
  total.entries += index_.size();
  total.pinned_entries += pinned_list_.size();
  total.negative_entries += negatives_.size();
}

void KernelCache::Shard::for_each_handle(const std::function<void(CacheHandle)>& visit) const {
  index_.for_each([&](Queue::iterator entry) { visit(entry->handle); });
}

KernelCache::Shard::Queue& KernelCache::Shard::list_of(Place place) noexcept {
  if (place == Place::PINNED) return pinned_list_;
  return place == Place::MAIN ? main_list_ : window_list_;
}

std::size_t& KernelCache::Shard::bytes_of(Place place) noexcept {
  if (place == Place::PINNED) return pinned_bytes_;
  return place == Place::MAIN ? main_bytes_ : window_bytes_;
}

// REQUIRES: the entry is not there yet.
void KernelCache::Shard::move_to(Queue::iterator entry, Place place) {
  if (place == Place::MAIN) {
    main_.push_back(entry);  // the one step that can throw comes first
    entry->main_slot = main_.size() - 1;
  } else if (entry->place == Place::MAIN) {
    leave_main(*entry);
  }
  bytes_of(entry->place) -= entry->size_bytes;
  bytes_of(place) += entry->size_bytes;
  Queue& target = list_of(place);
  target.splice(target.begin(), list_of(entry->place), entry);
  entry->place = place;
}

// The last of main_ takes the entry's slot.
void KernelCache::Shard::leave_main(const CacheEntry& entry) noexcept {
  main_.back()->main_slot = entry.main_slot;
  main_[entry.main_slot] = main_.back();
  main_.pop_back();
}

// The entry, or nullptr after removing one whose time is over.
KernelCache::Shard::Found KernelCache::Shard::unless_expired(Found known, const Clock& now,
                                                             Queue& removed) {
  const CacheEntry& entry = **known;
  if (entry.num_pins > 0 || now() < entry.expires_ns) return known;
  remove(*known, CacheRemoval::EXPIRED, removed);
  ++counts_.expirations;
  return nullptr;
}

void KernelCache::Shard::remove(Queue::iterator entry, CacheRemoval removal,
                                Queue& removed) noexcept {
  index_.erase(entry->key.view(), entry->hash);
  if (entry->place == Place::MAIN) leave_main(*entry);
  bytes_of(entry->place) -= entry->size_bytes;
  entry->removal = removal;
  removed.splice(removed.end(), list_of(entry->place), entry);
}

bool KernelCache::Shard::fits(std::size_t size_bytes) const noexcept {
  return window_bytes_ + main_bytes_ + pinned_bytes_ + size_bytes <= capacity_bytes_ &&
         index_.size() + 1 <= max_entries_;
}

// Whether the window must give way to a newcomer; it always has room for one.
bool KernelCache::Shard::window_overflows(std::size_t size_bytes) const noexcept {
  if (window_list_.empty()) return false;
  return window_bytes_ + size_bytes > capacity_bytes_ / kWindowDivisor ||
         window_list_.size() + 1 > std::max<std::size_t>(1, max_entries_ / kWindowDivisor);
}

// The window's oldest go on to the main part: as they are while there is room, and in the place of
// a less wanted entry otherwise; one that is not more wanted than that leaves the cache.
void KernelCache::Shard::advance_window(std::size_t size_bytes, Queue& removed) {
  while (window_overflows(size_bytes)) {
    const Queue::iterator oldest = std::prev(window_list_.end());
    if (fits(size_bytes)) {
      move_to(oldest, Place::MAIN);
      continue;
    }
    const Queue::iterator least = victim();
    if (least == oldest || oldest->frequency <= least->frequency) {
      evict(oldest, removed);
    } else {
      evict(least, removed);
      move_to(oldest, Place::MAIN);
    }
  }
}

void KernelCache::Shard::evict(Queue::iterator entry, Queue& removed) {
  ghosts_.fit(index_.size());
  if (entry->frequency > 0) ghosts_.remember(entry->hash, entry->frequency);
  remove(entry, CacheRemoval::EVICTED, removed);
  ++counts_.evictions;
}

// The least wanted of a few of the main part, drawn at random; of equals the one not asked for
// longest. REQUIRES: an entry that is not pinned.
KernelCache::Shard::Queue::iterator KernelCache::Shard::victim() noexcept {
  if (main_.empty()) return std::prev(window_list_.end());
  const bool all = main_.size() <= 2 * kSample;
  Queue::iterator least = main_.front();
  for (std::size_t i = 0; i < (all ? main_.size() : kSample); ++i) {
    random_ ^= random_ << 13U;
    random_ ^= random_ >> 7U;
    random_ ^= random_ << 17U;
    const Queue::iterator drawn = main_[all ? i : random_ % main_.size()];
    const bool less = drawn->frequency != least->frequency ? drawn->frequency < least->frequency
                                                           : drawn->last_use < least->last_use;
    if (less) least = drawn;
  }
  return least;
}

// Halves what is held, to no less than 1, so that scans never wear it down; and what is not.
void KernelCache::Shard::age() noexcept {
  next_aging_ = aged_at_ + kAccessesPerAging * std::max(index_.size(), kFewestToAge);
  if (num_accesses_ < next_aging_) return;
  aged_at_ = num_accesses_;
  next_aging_ = num_accesses_ + kAccessesPerAging * std::max(index_.size(), kFewestToAge);
  index_.for_each([](Queue::iterator entry) {
    entry->frequency = static_cast<std::uint8_t>((entry->frequency + 1) / 2);
  });
  ghosts_.halve();
}

bool KernelCache::Shard::forget_negative(std::string_view key) {
  if (negatives_.empty()) return false;
  const auto note = negatives_.find(key);
  if (note == negatives_.end()) return false;
  const auto order = note->second.order;
  negatives_.erase(note);
  negative_order_.erase(order);
  return true;
}

}  // namespace esper
