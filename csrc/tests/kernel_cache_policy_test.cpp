// What the cache keeps: admission, keys of every length, shards, warming. Deterministic.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "esper/errors.h"
#include "esper/kernel_cache.h"

namespace esper {
namespace {

KernelCache make(std::size_t bytes, std::size_t entries = 1000, std::size_t shards = 1) {
  return KernelCache({bytes, entries, shards, 0}, {});
}

// Asks for the key, stores it where it is not there; says whether it was.
bool request(KernelCache& cache, const std::string& key, std::size_t size_bytes = 1) {
  if (cache.get(key)) return true;
  cache.put(key, 1, size_bytes);
  return false;
}

// Ranks drawn in proportion to 1 / rank.
std::vector<std::size_t> zipf(std::size_t num_keys, std::size_t num_requests) {
  std::vector<double> shares(num_keys);
  for (std::size_t rank = 0; rank < num_keys; ++rank) {
    shares[rank] = 1.0 / static_cast<double>(rank + 1);
  }
  std::mt19937_64 engine(5);
  std::discrete_distribution<std::size_t> draw(shares.begin(), shares.end());
  std::vector<std::size_t> ranks(num_requests);
  for (std::size_t& rank : ranks) rank = draw(engine);
  return ranks;
}

double hit_ratio(KernelCache& cache, const std::vector<std::size_t>& ranks, bool scans) {
  std::size_t hits = 0;
  std::size_t fresh = 1 << 20;
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    hits += request(cache, std::to_string(ranks[i])) ? 1 : 0;
    if (!scans || i % 1000 != 999) continue;
    for (int scanned = 0; scanned < 200; ++scanned) request(cache, std::to_string(fresh++));
  }
  return static_cast<double>(hits) / static_cast<double>(ranks.size());
}

// The hundred most wanted of 1,000 keys have 0.693 of the requests: no fixed set can answer more.
TEST(KernelCachePolicy, KeepsWhatIsWantedMostOnZipf) {
  const auto ranks = zipf(1000, 100000);
  KernelCache plain = make(100, 100);
  EXPECT_GT(hit_ratio(plain, ranks, false), 0.66);
  KernelCache scanned = make(100, 100);
  EXPECT_GT(hit_ratio(scanned, ranks, true), 0.65);
}

TEST(KernelCachePolicy, OldFameFades) {
  KernelCache cache = make(100, 100);
  for (int round = 0; round < 200; ++round) {
    for (int i = 0; i < 80; ++i) request(cache, "old" + std::to_string(i));
  }
  int hits = 0;
  for (int round = 0; round < 200; ++round) {
    hits = 0;
    for (int i = 0; i < 80; ++i) hits += request(cache, "new" + std::to_string(i)) ? 1 : 0;
  }
  EXPECT_GT(hits, 72);
}

TEST(KernelCachePolicy, TheSameCallsKeepTheSameKeys) {
  const auto ranks = zipf(500, 5000);
  KernelCache first = make(50, 50, 2);
  KernelCache second = make(50, 50, 2);
  EXPECT_EQ(hit_ratio(first, ranks, true), hit_ratio(second, ranks, true));
  for (std::size_t rank = 0; rank < 500; ++rank) {
    const std::string key = std::to_string(rank);
    EXPECT_EQ(first.contains(key), second.contains(key)) << key;
  }
}

TEST(KernelCachePolicy, KeysOfEveryLengthAreToldApart) {
  constexpr std::size_t kLongest = 120;
  KernelCache cache = make(1 << 20, 10000);
  const std::string text(kLongest, 'x');
  for (std::size_t length = 0; length <= kLongest; ++length) {
    ASSERT_EQ(cache.put(text.substr(0, length), length, 1), KernelCache::PutResult::STORED);
  }
  for (std::size_t length = 0; length <= kLongest; ++length) {
    const std::string key = text.substr(0, length);
    EXPECT_EQ(cache.get(key), CacheHandle{length});
    for (std::size_t at = 0; at < length; ++at) {
      std::string other = key;
      other[at] = 'y';
      EXPECT_FALSE(cache.contains(other)) << length << " at " << at;
    }
  }
}

TEST(KernelCachePolicy, KeysGoToAllShards) {
  constexpr std::size_t kShards = 8;
  KernelCache cache = make(kShards * 100, kShards * 100, kShards);
  for (int i = 0; i < 400; ++i) cache.put("k" + std::to_string(i), 1, 1);
  // Half full on average: a shard of 100 entries that got twice its part would have evicted.
  EXPECT_EQ(cache.stats().entries, 400U);
  EXPECT_EQ(cache.stats().evictions, 0U);
  for (int i = 400; i < 4000; ++i) cache.put("k" + std::to_string(i), 1, 1);
  EXPECT_EQ(cache.stats().entries, kShards * 100);
}

TEST(KernelCachePolicy, ManyErasesLeaveEveryOtherKeyFindable) {
  KernelCache cache = make(1 << 20, 5000);
  for (int i = 0; i < 3000; ++i) cache.put(std::to_string(i), static_cast<CacheHandle>(i), 1);
  for (int i = 0; i < 3000; i += 3) ASSERT_TRUE(cache.erase(std::to_string(i)));
  for (int i = 0; i < 3000; ++i) {
    EXPECT_EQ(cache.contains(std::to_string(i)), i % 3 != 0) << i;
  }
}

TEST(KernelCachePolicy, AbsentNamesWhatIsToBeLoaded) {
  KernelCache cache = make(100);
  cache.put("held", 1, 1);
  cache.put_negative("gone", 1'000'000'000'000);
  const std::vector<std::string_view> keys{"held", "a", "gone", "b", "a"};
  EXPECT_EQ(cache.absent(keys), (std::vector<std::size_t>{1, 3}));
  EXPECT_EQ(cache.stats().hits + cache.stats().misses + cache.stats().negative_hits, 0U);
}

}  // namespace
}  // namespace esper
