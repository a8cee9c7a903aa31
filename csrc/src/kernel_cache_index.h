// Where the entry of each key is; private to the cache's sources. Open addressing with linear
// probing over stored hashes, at most half full, so that a lookup reads one line of the table and
// the entry itself. Not thread-safe.
#pragma once

#include <cstddef>
#include <string_view>
#include <utility>
#include <vector>

namespace esper {

// `Place` points at something with a `key` that compares with std::string_view.
template <class Place>
class KeyIndex {
 public:
  // The place, or nullptr; valid until the next change.
  [[nodiscard]] const Place* find(std::string_view key, std::size_t hash) const noexcept {
    const std::size_t tag = hash | kUsed;
    for (std::size_t i = hash & mask(); slots_[i].tag != 0; i = (i + 1) & mask()) {
      if (slots_[i].tag == tag && slots_[i].place->key == key) return &slots_[i].place;
    }
    return nullptr;
  }

  // REQUIRES: the key is not there. Throws std::bad_alloc, and has then changed nothing.
  void insert(std::size_t hash, Place place) {
    if (2 * (size_ + 1) > slots_.size()) grow();
    add({hash | kUsed, std::move(place)});
    ++size_;
  }

  // REQUIRES: the key is there.
  void erase(std::string_view key, std::size_t hash) noexcept {
    const std::size_t tag = hash | kUsed;
    std::size_t hole = hash & mask();
    while (slots_[hole].tag != tag || slots_[hole].place->key != key) hole = (hole + 1) & mask();
    // Whatever was pushed past the hole moves back, so that no search ends too soon.
    for (std::size_t i = (hole + 1) & mask(); slots_[i].tag != 0; i = (i + 1) & mask()) {
      const std::size_t pushed = (i - (slots_[i].tag & mask())) & mask();
      if (pushed < ((i - hole) & mask())) continue;
      slots_[hole] = slots_[i];
      hole = i;
    }
    slots_[hole].tag = 0;
    --size_;
  }

  [[nodiscard]] std::size_t size() const noexcept { return size_; }

  template <class Visit>
  void for_each(Visit&& visit) const {
    for (const Slot& slot : slots_) {
      if (slot.tag != 0) visit(slot.place);
    }
  }

 private:
  struct Slot {
    std::size_t tag = 0;  // the hash with its highest bit set; 0: free
    Place place;
  };
  static constexpr std::size_t kUsed = std::size_t{1} << (8 * sizeof(std::size_t) - 1);
  static constexpr std::size_t kFewest = 16;

  [[nodiscard]] std::size_t mask() const noexcept { return slots_.size() - 1; }

  void add(const Slot& slot) noexcept {
    std::size_t i = slot.tag & mask();
    while (slots_[i].tag != 0) i = (i + 1) & mask();
    slots_[i] = slot;
  }

  void grow() {
    std::vector<Slot> old(2 * slots_.size());
    old.swap(slots_);
    for (const Slot& slot : old) {
      if (slot.tag != 0) add(slot);
    }
  }

  std::vector<Slot> slots_ = std::vector<Slot>(kFewest);
  std::size_t size_ = 0;
};

}  // namespace esper
