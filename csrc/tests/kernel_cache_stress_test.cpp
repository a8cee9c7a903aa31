// Many threads on one cache, every operation: references balance, bounds and counts hold. Meant for
// the sanitizer builds above all.

#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <latch>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "esper/errors.h"
#include "esper/kernel_cache.h"

namespace esper {
namespace {

constexpr std::size_t kBytes = 4000;
constexpr std::size_t kEntries = 64;
constexpr int kThreads = 8;
constexpr int kRounds = 4000;

class Stress {
 public:
  explicit Stress(std::size_t num_shards) : cache_({kBytes, kEntries, num_shards, 0}, hooks()) {}

  void run() {
    std::latch start(kThreads);
    std::vector<std::thread> threads;
    for (unsigned id = 0; id < kThreads; ++id) {
      threads.emplace_back([this, &start, id] {
        start.arrive_and_wait();
        work(id);
      });
    }
    for (std::thread& thread : threads) thread.join();
  }

  void expect_balance() {
    const CacheStats stats = cache_.stats();
    EXPECT_EQ(broken_bounds_.load(), 0);
    EXPECT_EQ(stats.hits + stats.misses + stats.negative_hits, gets_.load());
    EXPECT_EQ(stats.inserts + stats.replaced + stats.rejected, puts_.load());
    EXPECT_EQ(stats.evictions + stats.expirations + stats.replaced + erased_.load(),
              released_.load());
    EXPECT_EQ(stats.inserts + stats.replaced, released_.load() + stats.entries);
    EXPECT_EQ(references_.load(), static_cast<std::int64_t>(stats.entries));
    cache_.clear(true);
    EXPECT_EQ(references_.load(), 0);
  }

 private:
  CacheHooks hooks() {
    CacheHooks hooks;
    hooks.acquire = [this](CacheHandle) { ++references_; };
    hooks.release = [this](std::string_view key, CacheHandle, CacheRemoval) {
      --references_;
      ++released_;
      (void)cache_.contains(key);  // would wait for ever under the shard's lock
    };
    hooks.now_ns = [this] { return now_ns_.load(); };
    return hooks;
  }

  void work(unsigned id) {
    std::mt19937 engine(id);
    for (int i = 0; i < kRounds; ++i) {
      const auto draw = static_cast<unsigned>(engine());
      const std::string key = "a key longer than any that lies inside " + std::to_string(draw % 97);
      act((draw >> 8U) % 8, key, 1 + (draw >> 12U) % 200);
      now_ns_ += 1;
    }
  }

  void act(unsigned operation, const std::string& key, std::size_t size_bytes) {
    if (operation < 3) {
      ++gets_;
      if (cache_.get(key)) --references_;
    } else if (operation == 3 || operation == 4) {
      put(key, size_bytes, operation == 4);
    } else if (operation == 5) {
      if (cache_.pin(key)) expect_unpinned(key);
    } else if (operation == 6) {
      remove(key);
    } else {
      look(key);
    }
  }

  // Others only pin and unpin in pairs, so this pin keeps the entry (put keeps the pins of a key).
  void expect_unpinned(const std::string& key) { EXPECT_TRUE(cache_.unpin(key)); }

  void put(const std::string& key, std::size_t size_bytes, bool fades) {
    ++puts_;
    ++references_;
    const auto result = cache_.put(key, 1, size_bytes, false, fades ? 100 : 0);
    if (result != KernelCache::PutResult::STORED) --references_;
  }

  // Either may find that another thread changed the key's state: that is an answer as well.
  void remove(const std::string& key) {
    try {
      if (cache_.erase(key)) {
        ++erased_;
      } else {
        cache_.put_negative(key, 50);
      }
    } catch (const InvalidState&) {
      ++refused_;
    }
  }

  void look(const std::string& key) {
    (void)cache_.is_negative(key);
    const CacheStats stats = cache_.stats();
    if (stats.bytes > kBytes || stats.entries > kEntries) ++broken_bounds_;
    cache_.for_each_handle([](CacheHandle handle) { EXPECT_EQ(handle, 1U); });
  }

  std::atomic<std::int64_t> references_{0};
  std::atomic<std::uint64_t> now_ns_{1};
  std::atomic<std::uint64_t> gets_{0}, puts_{0}, erased_{0}, released_{0}, refused_{0};
  std::atomic<int> broken_bounds_{0};
  KernelCache cache_;
};

class KernelCacheStress : public ::testing::TestWithParam<std::size_t> {};

TEST_P(KernelCacheStress, EveryOperationFromManyThreads) {
  Stress stress(GetParam());
  stress.run();
  stress.expect_balance();
}

INSTANTIATE_TEST_SUITE_P(Shards, KernelCacheStress, ::testing::Values(1, 4));

}  // namespace
}  // namespace esper
