// The state layout's own costs, without Python; part of esper_bench.

#include <benchmark/benchmark.h>

#include <cstddef>
#include <cstring>
#include <vector>

#include "esper/state_layout.h"

namespace esper {
namespace {

constexpr std::size_t kSeeds = 10000;

void transition(benchmark::State& state) {
  StateLayout layout(kSeeds);
  for (auto _ : state) {
    for (const SeedState to : {SeedState::LOADING, SeedState::ACTIVE, SeedState::CULLED,
                               SeedState::EMBARGOED, SeedState::DORMANT}) {
      layout.transition(5, to, 1);
    }
  }
  state.SetItemsProcessed(state.iterations() * 5);
}
BENCHMARK(transition);

void record_health(benchmark::State& state) {
  StateLayout layout(kSeeds);
  std::size_t seed = 0;
  for (auto _ : state) {
    layout.record_health(seed, {0.1F, 0.2F, 0.3F, 0.4F, 0.5F});
    seed = (seed + 1) % kSeeds;
  }
}
BENCHMARK(record_health);

void read_all(benchmark::State& state) {
  const StateLayout layout(kSeeds);
  std::vector<SeedRecord> records(kSeeds);
  for (auto _ : state) {
    layout.read_all(records);
    benchmark::ClobberMemory();
  }
  state.SetItemsProcessed(state.iterations() * kSeeds);
}
BENCHMARK(read_all);

// The reference of the next two.
void copy_of_as_many_bytes(benchmark::State& state) {
  const std::vector<std::byte> from = StateLayout(kSeeds).snapshot();
  std::vector<std::byte> to(from.size());
  for (auto _ : state) {
    std::memcpy(to.data(), from.data(), from.size());
    benchmark::ClobberMemory();
  }
}
BENCHMARK(copy_of_as_many_bytes);

void snapshot(benchmark::State& state) {
  const StateLayout layout(kSeeds);
  std::vector<std::byte> bytes(layout.snapshot_size());
  for (auto _ : state) {
    layout.snapshot_into(bytes);
    benchmark::ClobberMemory();
  }
}
BENCHMARK(snapshot);

void restore(benchmark::State& state) {
  StateLayout layout(kSeeds);
  const std::vector<std::byte> bytes = layout.snapshot();
  for (auto _ : state) layout.restore(bytes);
}
BENCHMARK(restore);

}  // namespace
}  // namespace esper
