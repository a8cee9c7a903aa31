// The core's own costs, without Python: cmake -DESPER_BUILD_BENCH=ON, then esper_bench.

#include <benchmark/benchmark.h>

#include <cstddef>
#include <string>
#include <vector>

#include "esper/kernel_cache.h"

namespace esper {
namespace {

void cache_hit(benchmark::State& state) {
  KernelCache cache({1 << 20, 4096, 1, 0}, {});
  cache.put("kernel", 1, 100);
  for (auto _ : state) benchmark::DoNotOptimize(cache.get("kernel"));
}
BENCHMARK(cache_hit);

void cache_insert_evict(benchmark::State& state) {
  KernelCache cache({1000, 4096, 1, 0}, {});
  std::vector<std::string> keys;
  for (int i = 0; i < 1024; ++i) keys.push_back("kernel-" + std::to_string(i));
  std::size_t i = 0;
  for (auto _ : state) benchmark::DoNotOptimize(cache.put(keys[i++ % keys.size()], 1, 10));
}
BENCHMARK(cache_insert_evict);

}  // namespace
}  // namespace esper

BENCHMARK_MAIN();
