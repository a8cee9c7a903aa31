// A stored key, a shard's lock: what a lookup touches first; private to the cache's sources.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string_view>
#include <thread>

namespace esper {

// A key's own copy. Up to 40 bytes (an id has 33) lie in the object itself, so that comparing one
// follows no further pointer. Neither copied nor moved.
class StoredKey {
 public:
  explicit StoredKey(std::string_view text) : size_(text.size()) {
    if (size_ > inside_.size()) outside_ = std::make_unique<char[]>(size_);
    if (size_ > 0) std::memcpy(outside_ ? outside_.get() : inside_.data(), text.data(), size_);
  }
  StoredKey(const StoredKey&) = delete;
  StoredKey& operator=(const StoredKey&) = delete;

  [[nodiscard]] std::string_view view() const noexcept { return {data(), size_}; }

  [[nodiscard]] bool operator==(std::string_view other) const noexcept {
    if (other.size() != size_) return false;
    if (size_ < kWord) return view() == other;
    // Equal lengths and hashes are nearly always equal keys: no early exit, no call.
    const char* mine = data();
    std::uint64_t difference = word(mine + size_ - kWord) ^ word(other.data() + size_ - kWord);
    for (std::size_t i = 0; i + kWord < size_; i += kWord) {
      difference |= word(mine + i) ^ word(other.data() + i);
    }
    return difference == 0;
  }

 private:
  static constexpr std::size_t kWord = sizeof(std::uint64_t);

  static std::uint64_t word(const char* from) noexcept {
    std::uint64_t value = 0;
    std::memcpy(&value, from, kWord);
    return value;
  }

  [[nodiscard]] const char* data() const noexcept {
    return size_ > inside_.size() ? outside_.get() : inside_.data();
  }

  std::size_t size_;
  std::array<char, 40> inside_;
  std::unique_ptr<char[]> outside_;
};

// A lock held for tens of nanoseconds and nearly never contended: taken with one atomic exchange,
// given back with a plain store, where std::mutex takes two exchanges in two calls. Who has to wait
// lets other threads run. One that is not `shared` does nothing: its users take turns anyway.
class ShardLock {
 public:
  explicit ShardLock(bool shared) noexcept : shared_(shared) {}

  void lock() noexcept {
    if (!shared_) return;
    while (held_.exchange(true, std::memory_order_acquire)) {
      while (held_.load(std::memory_order_relaxed)) std::this_thread::yield();
    }
  }
  void unlock() noexcept {
    if (shared_) held_.store(false, std::memory_order_release);
  }

 private:
  std::atomic<bool> held_{false};
  const bool shared_;
};

}  // namespace esper
