#include "esper/kernel_cache.h"

#include <gtest/gtest.h>

#include <atomic>
#include <map>
#include <mutex>
#include <random>
#include <thread>

#include "esper/errors.h"

namespace esper {
namespace {

using PutResult = KernelCache::PutResult;

// A cache with a clock set by hand and a book of references per handle.
class KernelCacheTest : public ::testing::Test {
 protected:
  KernelCache make(std::size_t bytes, std::size_t entries = 1000, std::size_t shards = 1,
                   std::uint64_t ttl_ns = 0) {
    CacheHooks hooks;
    hooks.acquire = [this](CacheHandle handle) { ++references_[handle]; };
    hooks.release = [this](std::string_view key, CacheHandle handle, CacheRemoval removal) {
      --references_[handle];
      removals_.emplace_back(key, removal);
    };
    hooks.now_ns = [this] { return now_ns_; };
    return KernelCache({bytes, entries, shards, ttl_ns}, std::move(hooks));
  }

  PutResult put(KernelCache& cache, const std::string& key, std::size_t size, bool pinned = false,
                std::uint64_t ttl_ns = 0) {
    ++references_[next_];
    const PutResult result = cache.put(key, next_, size, pinned, ttl_ns);
    if (result != PutResult::STORED) --references_[next_];
    ++next_;
    return result;
  }

  // Gets and gives the reference back at once.
  bool touch(KernelCache& cache, const std::string& key) {
    const auto handle = cache.get(key);
    if (handle) --references_[*handle];
    return handle.has_value();
  }

  std::uint64_t now_ns_ = 1000;
  CacheHandle next_ = 1;
  std::map<CacheHandle, int> references_;
  std::vector<std::pair<std::string, CacheRemoval>> removals_;
};

TEST_F(KernelCacheTest, GivesBackWhatWasPut) {
  KernelCache cache = make(100);
  EXPECT_EQ(put(cache, "a", 10), PutResult::STORED);
  const auto handle = cache.get("a");
  ASSERT_TRUE(handle);
  EXPECT_EQ(references_[*handle], 2);
  EXPECT_FALSE(cache.get("b"));
  const CacheStats stats = cache.stats();
  EXPECT_EQ(stats.hits, 1U);
  EXPECT_EQ(stats.misses, 1U);
  EXPECT_EQ(stats.bytes, 10U);
  EXPECT_EQ(stats.entries, 1U);
}

TEST_F(KernelCacheTest, EvictsToStayWithinBothBounds) {
  KernelCache cache = make(100, 3);
  for (int i = 0; i < 20; ++i) {
    put(cache, std::to_string(i), 30);
    EXPECT_LE(cache.stats().bytes, 100U);
    EXPECT_LE(cache.stats().entries, 3U);
  }
  EXPECT_EQ(cache.stats().evictions, 17U);
  EXPECT_EQ(removals_.size(), 17U);
}

TEST_F(KernelCacheTest, RefusesWhatCanNeverFit) {
  KernelCache cache = make(100);
  put(cache, "a", 60);
  EXPECT_EQ(put(cache, "b", 101), PutResult::TOO_LARGE);
  EXPECT_TRUE(cache.contains("a"));
  EXPECT_EQ(cache.stats().rejected, 1U);
  EXPECT_THROW(put(cache, "c", 0), InvalidInput);
}

TEST_F(KernelCacheTest, AScanDoesNotFlushWhatIsUsed) {
  KernelCache cache = make(1000, 10000);
  for (int round = 0; round < 3; ++round) {
    for (int i = 0; i < 50; ++i) {
      const std::string key = "hot" + std::to_string(i);
      if (!touch(cache, key)) put(cache, key, 10);
    }
  }
  for (int i = 0; i < 5000; ++i) put(cache, "scan" + std::to_string(i), 10);
  int kept = 0;
  for (int i = 0; i < 50; ++i) kept += cache.contains("hot" + std::to_string(i)) ? 1 : 0;
  EXPECT_EQ(kept, 50);
}

TEST_F(KernelCacheTest, AScanDoesNotFlushWhenTheCountIsShort) {
  KernelCache cache = make(1 << 20, 100);
  for (int round = 0; round < 2; ++round) {
    for (int i = 0; i < 50; ++i) {
      const std::string key = "hot" + std::to_string(i);
      if (!touch(cache, key)) put(cache, key, 10);
    }
  }
  for (int i = 0; i < 1000; ++i) put(cache, "scan" + std::to_string(i), 10);
  int kept = 0;
  for (int i = 0; i < 50; ++i) kept += cache.contains("hot" + std::to_string(i)) ? 1 : 0;
  EXPECT_EQ(kept, 50);
}

TEST_F(KernelCacheTest, AKeyThatComesBackIsKnownAndGetsPastTheWindow) {
  KernelCache cache = make(100, 1000);
  for (int i = 0; i < 10; ++i) put(cache, "x" + std::to_string(i), 10);
  put(cache, "back", 10);
  put(cache, "other", 10);
  ASSERT_FALSE(cache.contains("back"));
  put(cache, "back", 10);
  for (int i = 0; i < 100; ++i) put(cache, "y" + std::to_string(i), 10);
  EXPECT_TRUE(cache.contains("back"));
  EXPECT_FALSE(cache.contains("other"));
}

TEST_F(KernelCacheTest, PinnedEntriesStay) {
  KernelCache cache = make(100);
  put(cache, "kept", 40, true);
  for (int i = 0; i < 50; ++i) put(cache, std::to_string(i), 30);
  EXPECT_TRUE(cache.contains("kept"));
  EXPECT_EQ(put(cache, "large", 70), PutResult::PINNED_FULL);
  EXPECT_THROW(cache.erase("kept"), InvalidState);
  EXPECT_TRUE(cache.pin("kept"));
  EXPECT_TRUE(cache.unpin("kept"));
  EXPECT_EQ(put(cache, "large", 70), PutResult::PINNED_FULL);
  EXPECT_TRUE(cache.unpin("kept"));
  EXPECT_FALSE(cache.unpin("kept"));
  EXPECT_EQ(put(cache, "large", 70), PutResult::STORED);
  EXPECT_FALSE(cache.pin("absent"));
}

TEST_F(KernelCacheTest, ReplacingKeepsPinsAndFitsOrChangesNothing) {
  KernelCache cache = make(100);
  put(cache, "a", 40, true);
  put(cache, "b", 40, true);
  EXPECT_EQ(put(cache, "a", 70), PutResult::PINNED_FULL);
  EXPECT_EQ(*cache.get("a"), 1U);
  EXPECT_EQ(put(cache, "a", 60), PutResult::STORED);
  EXPECT_EQ(cache.stats().bytes, 100U);
  EXPECT_EQ(cache.stats().pinned_entries, 2U);
  EXPECT_EQ(cache.stats().replaced, 1U);
  EXPECT_EQ(removals_.back().second, CacheRemoval::REPLACED);
}

TEST_F(KernelCacheTest, EntriesExpireUnlessPinned) {
  KernelCache cache = make(100, 10, 1, 50);
  put(cache, "a", 10);
  put(cache, "long", 10, false, 500);
  put(cache, "pinned", 10, true);
  now_ns_ += 50;
  EXPECT_FALSE(touch(cache, "a"));
  EXPECT_TRUE(touch(cache, "long"));
  EXPECT_TRUE(touch(cache, "pinned"));
  EXPECT_EQ(cache.stats().expirations, 1U);
  EXPECT_EQ(removals_.back(), (std::pair<std::string, CacheRemoval>("a", CacheRemoval::EXPIRED)));
}

TEST_F(KernelCacheTest, NegativeEntriesLiveShortlyAndBounded) {
  KernelCache cache = make(100, 2);
  cache.put_negative("x", 10);
  EXPECT_TRUE(cache.is_negative("x"));
  EXPECT_FALSE(cache.get("x"));
  EXPECT_EQ(cache.stats().negative_hits, 1U);
  EXPECT_EQ(cache.stats().misses, 0U);
  now_ns_ += 10;
  EXPECT_FALSE(cache.is_negative("x"));
  for (const char* key : {"1", "2", "3"}) cache.put_negative(key, 10);
  EXPECT_FALSE(cache.is_negative("1"));
  EXPECT_EQ(cache.stats().negative_entries, 2U);
  put(cache, "3", 10);
  EXPECT_FALSE(cache.is_negative("3"));
  EXPECT_THROW(cache.put_negative("3", 10), InvalidState);
  EXPECT_THROW(cache.put_negative("4", 0), InvalidInput);
}

TEST_F(KernelCacheTest, EraseAndClearReleaseEverythingOnce) {
  {
    KernelCache cache = make(1000);
    put(cache, "a", 10);
    put(cache, "b", 10);
    put(cache, "c", 10, true);
    EXPECT_TRUE(cache.erase("a"));
    EXPECT_FALSE(cache.erase("a"));
    EXPECT_EQ(cache.clear(), 1U);
    EXPECT_EQ(cache.stats().entries, 1U);
  }
  for (const auto& [handle, count] : references_) EXPECT_EQ(count, 0) << handle;
}

TEST_F(KernelCacheTest, ReleaseRunsOutsideTheLock) {
  KernelCache* inner = nullptr;
  int reentered = 0;
  CacheHooks hooks;
  hooks.release = [&](std::string_view, CacheHandle, CacheRemoval) {
    reentered += inner->contains("b") ? 1 : 0;  // would deadlock under the lock
  };
  KernelCache cache({10, 10, 1, 0}, hooks);
  inner = &cache;
  cache.put("a", 1, 10);
  cache.put("b", 2, 10);
  EXPECT_EQ(reentered, 1);
}

TEST_F(KernelCacheTest, ChoosesShardsBySizeAndSplitsItsBounds) {
  EXPECT_EQ(make(1 << 20, 4096, 0).num_shards(), 1U);
  EXPECT_EQ(make(std::size_t{1} << 30U, 4096, 0).num_shards(), 4U);
  KernelCache cache = make(100, 10, 4);
  EXPECT_EQ(cache.max_item_bytes(), 25U);
  EXPECT_EQ(put(cache, "a", 26), PutResult::TOO_LARGE);
  EXPECT_THROW(make(100, 2, 3), InvalidInput);
  EXPECT_THROW(make(0), InvalidInput);
}

// Random operations; `pins` is the model.
class RandomUse {
 public:
  explicit RandomUse(unsigned seed) : engine_(seed) {}

  unsigned draw(unsigned below) { return static_cast<unsigned>(engine_()) % below; }

  void change_pins(KernelCache& cache, const std::string& key) {
    if (draw(2) == 0) {
      if (pins.size() < 4 && cache.pin(key)) ++pins[key];
    } else if (!pins.empty()) {
      const auto first = pins.begin();
      EXPECT_TRUE(cache.unpin(first->first));
      if (--first->second == 0) pins.erase(first);
    }
  }

  std::map<std::string, int> pins;

 private:
  std::mt19937 engine_;
};

void expect_invariants(KernelCache& cache, const RandomUse& use, std::uint64_t gets) {
  const CacheStats stats = cache.stats();
  EXPECT_LE(stats.bytes, 500U);
  EXPECT_LE(stats.entries, 20U);
  EXPECT_EQ(stats.pinned_entries, use.pins.size());
  EXPECT_EQ(stats.hits + stats.misses + stats.negative_hits, gets);
  for (const auto& [pinned, count] : use.pins) EXPECT_TRUE(cache.contains(pinned));
}

// Bounds, counts and pins hold after every operation, and references balance in the end.
TEST_F(KernelCacheTest, RandomOperationsKeepTheInvariants) {
  RandomUse use(11);
  {
    KernelCache cache = make(500, 20, 2);
    std::uint64_t gets = 0;
    for (int i = 0; i < 20000 && !HasFailure(); ++i) {
      const std::string key = std::to_string(use.draw(60));
      const unsigned operation = use.draw(5);
      now_ns_ += use.draw(5);
      if (operation < 2) {
        ++gets;
        touch(cache, key);
      } else if (operation == 2) {
        put(cache, key, 1 + use.draw(80), false, use.draw(3) == 0 ? 20 : 0);
      } else if (operation == 3) {
        use.change_pins(cache, key);
      } else if (!use.pins.contains(key)) {
        cache.erase(key);
      }
      expect_invariants(cache, use, gets);
    }
  }
  for (const auto& [handle, count] : references_) EXPECT_EQ(count, 0) << handle;
}

TEST(KernelCacheThreads, ReferencesBalanceUnderContention) {
  std::atomic<std::int64_t> references{0};
  CacheHooks hooks;
  hooks.acquire = [&](CacheHandle) { ++references; };
  hooks.release = [&](std::string_view, CacheHandle, CacheRemoval) { --references; };
  {
    KernelCache cache({1000, 100, 4, 0}, hooks);
    std::vector<std::thread> threads;
    for (unsigned id = 0; id < 4; ++id) {
      threads.emplace_back([&cache, &references, id] {
        std::mt19937 engine(id);
        for (int i = 0; i < 3000; ++i) {
          const std::string key = std::to_string(static_cast<unsigned>(engine()) % 200);
          if (const auto handle = cache.get(key)) {
            --references;
            continue;
          }
          ++references;
          if (cache.put(key, 1, 10) != PutResult::STORED) --references;
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(references.load(), static_cast<std::int64_t>(cache.stats().entries));
    EXPECT_LE(cache.stats().bytes, 1000U);
  }
  EXPECT_EQ(references.load(), 0);
}

}  // namespace
}  // namespace esper
