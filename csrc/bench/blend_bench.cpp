// The checked blend's own cost, without Python, beside what it is made of; part of esper_bench.
//
// The floor is a copy of h to out: each blend must at least read the one and write the other. The
// reference is the plain loop over the whole tensor, one delta after the other, and a second pass
// for the finite values: what blend_checked does block by block.

#include <benchmark/benchmark.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "esper/blend.h"

namespace esper {
namespace {

constexpr std::size_t kDeltas = 2;
constexpr float kAlpha = 0.25F;

std::uintptr_t address_of(const std::vector<float>& values) {
  return reinterpret_cast<std::uintptr_t>(values.data());
}

struct Tensors {
  explicit Tensors(std::size_t numel)
      : h(numel, 0.5F), deltas(kDeltas, std::vector<float>(numel, 0.125F)), out(numel) {}

  std::vector<float> h;
  std::vector<std::vector<float>> deltas;
  std::vector<float> out;
};

Tensors tensors_of(const benchmark::State& state) {
  return Tensors(static_cast<std::size_t>(state.range(0)));
}

void give_items(benchmark::State& state) {
  state.SetItemsProcessed(state.iterations() * state.range(0));
}

void blend_checked_sum(benchmark::State& state) {
  Tensors tensors = tensors_of(state);
  const float alpha = kAlpha;
  std::vector<WeightedDelta> weighted;
  for (const auto& delta : tensors.deltas) {
    weighted.push_back({address_of(delta), reinterpret_cast<std::uintptr_t>(&alpha)});
  }
  for (auto _ : state) {
    benchmark::DoNotOptimize(blend_checked(address_of(tensors.h), weighted, address_of(tensors.out),
                                           tensors.out.size()));
    benchmark::ClobberMemory();
  }
  give_items(state);
}

bool sum_and_look(Tensors& tensors) {
  tensors.out = tensors.h;
  for (const auto& delta : tensors.deltas) {
    for (std::size_t i = 0; i < delta.size(); ++i) tensors.out[i] += delta[i] * kAlpha;
  }
  bool all_finite = true;
  for (const float value : tensors.out) all_finite &= std::isfinite(value);  // no branch
  return all_finite;
}

void blend_plain_loops(benchmark::State& state) {
  Tensors tensors = tensors_of(state);
  for (auto _ : state) {
    benchmark::DoNotOptimize(sum_and_look(tensors));
    benchmark::ClobberMemory();
  }
  give_items(state);
}

void blend_floor_copy(benchmark::State& state) {
  Tensors tensors = tensors_of(state);
  for (auto _ : state) {
    std::memcpy(tensors.out.data(), tensors.h.data(), tensors.h.size() * sizeof(float));
    benchmark::ClobberMemory();
  }
  give_items(state);
}

// Four tensors of 4 KiB, of 256 KiB and of 16 MiB: within an L1 cache, within an L2 cache, in
// neither.
BENCHMARK(blend_checked_sum)->ArgName("numel")->Arg(1024)->Arg(65536)->Arg(4194304);
BENCHMARK(blend_plain_loops)->ArgName("numel")->Arg(1024)->Arg(65536)->Arg(4194304);
BENCHMARK(blend_floor_copy)->ArgName("numel")->Arg(1024)->Arg(65536)->Arg(4194304);

}  // namespace
}  // namespace esper
