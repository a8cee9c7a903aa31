// The kernel cache without Python: hits, misses and inserts of a full cache, alone and from two
// threads.

#include <benchmark/benchmark.h>

#include <cstddef>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "esper/kernel_cache.h"

namespace esper {
namespace {

constexpr std::size_t kEntries = 1024;
constexpr std::size_t kItemBytes = 4096;

// Ids of 33 characters, as kernels have them.
std::vector<std::string> ids(std::size_t first, std::size_t count) {
  std::vector<std::string> keys;
  for (std::size_t i = first; i < first + count; ++i) {
    std::string key(34, '\0');
    std::snprintf(key.data(), key.size(), "k%032llx", i * 0x9E3779B97F4A7C15ULL);
    key.pop_back();
    keys.push_back(std::move(key));
  }
  return keys;
}

std::unique_ptr<KernelCache> full_cache(std::size_t num_shards, std::uint64_t ttl_ns = 0) {
  auto cache = std::make_unique<KernelCache>(
      CacheConfig{kEntries * kItemBytes, kEntries, num_shards, ttl_ns}, CacheHooks{});
  for (const std::string& key : ids(0, kEntries)) cache->put(key, 1, kItemBytes);
  return cache;
}

void cache_hit(benchmark::State& state) {
  const auto cache = full_cache(1, static_cast<std::uint64_t>(state.range(0)));
  const std::vector<std::string> keys = ids(0, kEntries);
  std::size_t i = 0;
  for (auto _ : state) benchmark::DoNotOptimize(cache->get(keys[i++ % kEntries]));
}
BENCHMARK(cache_hit)->ArgName("ttl_ns")->Arg(0)->Arg(1'000'000'000'000);

void cache_miss(benchmark::State& state) {
  const auto cache = full_cache(1);
  const std::vector<std::string> keys = ids(kEntries, kEntries);
  std::size_t i = 0;
  for (auto _ : state) benchmark::DoNotOptimize(cache->get(keys[i++ % kEntries]));
}
BENCHMARK(cache_miss);

void cache_insert_evict(benchmark::State& state) {
  const auto cache = full_cache(1);
  const std::vector<std::string> keys = ids(kEntries, 64 * kEntries);
  std::size_t i = 0;
  for (auto _ : state) benchmark::DoNotOptimize(cache->put(keys[i++ % keys.size()], 1, kItemBytes));
}
BENCHMARK(cache_insert_evict);

// Two threads on one cache: with one shard they meet at its lock, with eight seldom.
void cache_hit_shared(benchmark::State& state) {
  static std::unique_ptr<KernelCache> shared;
  if (state.thread_index() == 0) shared = full_cache(static_cast<std::size_t>(state.range(0)));
  const std::vector<std::string> keys = ids(0, kEntries / 2);
  std::size_t i = static_cast<std::size_t>(state.thread_index()) * 7;
  for (auto _ : state) benchmark::DoNotOptimize(shared->get(keys[i++ % keys.size()]));
}
BENCHMARK(cache_hit_shared)->ArgName("shards")->Arg(1)->Arg(8)->Threads(2)->UseRealTime();

}  // namespace
}  // namespace esper
