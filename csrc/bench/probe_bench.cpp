// The probe's own cost by type and size of the sample; part of esper_bench.

#include <benchmark/benchmark.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "esper/probe.h"

namespace esper {
namespace {

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

// Halves of the same noise: its upper 16 bits are a bfloat16, and some float16 or other.
void probe_halves(benchmark::State& state) {
  const std::vector<float> values = noise(150000);
  const auto* data = reinterpret_cast<const std::byte*>(values.data());
  const auto dtype = static_cast<DType>(state.range(0));
  for (auto _ : state) {
    benchmark::DoNotOptimize(probe(data, 2 * values.size(), dtype, 1024));
  }
}
BENCHMARK(probe_halves)
    ->Arg(static_cast<int>(DType::FLOAT16))
    ->Arg(static_cast<int>(DType::BFLOAT16));

}  // namespace
}  // namespace esper
