// The signal ring's own costs, without Python; part of esper_bench.

#include <benchmark/benchmark.h>

#include <cstddef>
#include <vector>

#include "esper/signal_ring.h"

namespace esper {
namespace {

struct Columns {
  explicit Columns(std::size_t rows)
      : words(2 * rows), longs(2 * rows), seeds(rows), figures(7 * rows), rows(rows) {}

  SignalColumns view() {
    const auto part = [&]<class T>(std::vector<T>& all, std::size_t i) {
      return std::span<T>(all).subspan(i * rows, rows);
    };
    return {part(words, 0),   seeds,
            part(longs, 0),   part(longs, 1),
            part(figures, 0), part(figures, 1),
            part(figures, 2), part(figures, 3),
            part(figures, 4), part(figures, 5),
            part(figures, 6), part(words, 1)};
  }

  std::vector<std::uint32_t> words;
  std::vector<std::uint64_t> longs;
  std::vector<std::int32_t> seeds;
  std::vector<float> figures;
  std::size_t rows;
};

// 1,024 pushes and one drain of them all.
void push_and_drain(benchmark::State& state) {
  SignalRing ring(1024);
  Columns columns(1024);
  SignalRecord record{};
  for (auto _ : state) {
    for (std::size_t i = 0; i < 1024; ++i) {
      ++record.step;
      benchmark::DoNotOptimize(ring.push(record));
    }
    benchmark::DoNotOptimize(ring.drain(columns.view()));
  }
  state.SetItemsProcessed(state.iterations() * 1024);
}
BENCHMARK(push_and_drain);

void push_into_a_full_ring(benchmark::State& state) {
  SignalRing ring(1);
  const SignalRecord record{};
  ring.push(record);
  for (auto _ : state) benchmark::DoNotOptimize(ring.push(record));
}
BENCHMARK(push_into_a_full_ring);

}  // namespace
}  // namespace esper
