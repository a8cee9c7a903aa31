// The core's own costs, without Python: cmake -DESPER_BUILD_BENCH=ON, then esper_bench.

#include <benchmark/benchmark.h>

#include <cstddef>
#include <string>
#include <vector>

#include "esper/cpu_backend.h"
#include "esper/kernel_cache.h"
#include "esper/probe.h"
#include "esper/signal_ring.h"
#include "esper/state_layout.h"

namespace esper {
namespace {

void push_and_drop(benchmark::State& state) {
  SignalRing ring(1 << 16);
  SignalRecord record{};
  for (auto _ : state) {
    ++record.step;
    benchmark::DoNotOptimize(ring.push(record));
  }
}
BENCHMARK(push_and_drop);

void record_health(benchmark::State& state) {
  StateLayout layout(10000);
  std::size_t seed = 0;
  for (auto _ : state) {
    layout.record_health(seed, {0.1F, 0.2F, 0.3F, 0.4F, 0.5F});
    seed = (seed + 1) % 10000;
  }
}
BENCHMARK(record_health);

void read_all(benchmark::State& state) {
  const StateLayout layout(10000);
  for (auto _ : state) {
    for (std::size_t seed = 0; seed < 10000; ++seed) benchmark::DoNotOptimize(layout.read(seed));
  }
  state.SetItemsProcessed(state.iterations() * 10000);
}
BENCHMARK(read_all);

void snapshot(benchmark::State& state) {
  const StateLayout layout(10000);
  for (auto _ : state) benchmark::DoNotOptimize(layout.snapshot());
}
BENCHMARK(snapshot);

// Values without pattern, so that no branch predictor learns them.
std::vector<float> noise(std::size_t count) {
  std::vector<float> values(count);
  std::uint32_t state = 1;
  for (float& value : values) {
    state = state * 1664525U + 1013904223U;
    value = static_cast<float>(state >> 8U) / 16777216.0F;
  }
  return values;
}

void probe_samples(benchmark::State& state) {
  const std::vector<float> values = noise(300000);
  const auto* data = reinterpret_cast<const std::byte*>(values.data());
  const auto samples = static_cast<std::size_t>(state.range(0));
  for (auto _ : state) {
    benchmark::DoNotOptimize(probe(data, values.size(), DType::FLOAT32, samples));
  }
}
BENCHMARK(probe_samples)->Arg(1024)->Arg(4096);

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

void fork_join(benchmark::State& state) {
  StreamDispatcher<CpuBackend> dispatcher(std::make_unique<CpuBackend>(2));
  const std::vector<CpuBackend::Task> tasks(static_cast<std::size_t>(state.range(0)), [] {});
  for (auto _ : state) benchmark::DoNotOptimize(run_all(dispatcher, tasks));
  state.SetItemsProcessed(state.iterations() * state.range(0));
}
BENCHMARK(fork_join)->Arg(1)->Arg(8);

}  // namespace
}  // namespace esper

BENCHMARK_MAIN();
