// Fork and join without Python: the CPU's streams against std::async and against a thread a task,
// for tasks that do nothing and for a probe each; and the calls alone, on the simulated machine.

#include <benchmark/benchmark.h>

#include <cstddef>
#include <future>
#include <memory>
#include <thread>
#include <vector>

#include "esper/cpu_backend.h"
#include "esper/probe.h"
#include "esper/simulated_backend.h"

namespace esper {
namespace {

using Tasks = std::vector<CpuBackend::Task>;

std::size_t count_of(const benchmark::State& state) {
  return static_cast<std::size_t>(state.range(0));
}

void give_items(benchmark::State& state) {
  state.SetItemsProcessed(state.iterations() * state.range(0));
}

Tasks empty_tasks(std::size_t count) {
  return Tasks(count, [] {});
}

Tasks probe_tasks(std::size_t count) {
  static const std::vector<float> values(65536, 1.0F);
  return Tasks(count, [] {
    const auto* data = reinterpret_cast<const std::byte*>(values.data());
    benchmark::DoNotOptimize(probe(data, values.size(), DType::FLOAT32));
  });
}

void on_streams(benchmark::State& state, const Tasks& tasks) {
  StreamDispatcher<CpuBackend> dispatcher(std::make_unique<CpuBackend>(2));
  for (auto _ : state) benchmark::DoNotOptimize(run_all(dispatcher, tasks));
  give_items(state);
}

void with_async(benchmark::State& state, const Tasks& tasks) {
  for (auto _ : state) {
    std::vector<std::future<void>> futures;
    for (const auto& task : tasks) futures.push_back(std::async(std::launch::async, task));
    for (auto& future : futures) future.get();
  }
  give_items(state);
}

void in_order(benchmark::State& state, const Tasks& tasks) {
  for (auto _ : state) {
    for (const auto& task : tasks) task();
  }
  give_items(state);
}

void fork_join_streams(benchmark::State& state) {
  on_streams(state, empty_tasks(count_of(state)));
}
void fork_join_async(benchmark::State& state) {
  with_async(state, empty_tasks(count_of(state)));
}
void probes_on_streams(benchmark::State& state) {
  on_streams(state, probe_tasks(count_of(state)));
}
void probes_async(benchmark::State& state) {
  with_async(state, probe_tasks(count_of(state)));
}
void probes_in_order(benchmark::State& state) {
  in_order(state, probe_tasks(count_of(state)));
}
BENCHMARK(fork_join_streams)->Arg(1)->Arg(4)->Arg(8)->UseRealTime();
BENCHMARK(fork_join_async)->Arg(1)->Arg(4)->Arg(8)->UseRealTime();
BENCHMARK(probes_on_streams)->Arg(4)->Arg(8)->UseRealTime();
BENCHMARK(probes_async)->Arg(4)->Arg(8)->UseRealTime();
BENCHMARK(probes_in_order)->Arg(4)->Arg(8)->UseRealTime();

// What the dispatcher itself costs: its lock, and the calls it makes.
void fork_join_calls(benchmark::State& state) {
  StreamDispatcher<SimulatedBackend> dispatcher(std::make_unique<SimulatedBackend>(4));
  const std::size_t count = count_of(state);
  std::size_t rounds = 0;
  for (auto _ : state) {
    dispatcher.join(0, dispatcher.fork(0, count));
    if (++rounds % 4096 == 0) {  // the machine writes everything down
      state.PauseTiming();
      dispatcher.backend() = SimulatedBackend(4);
      state.ResumeTiming();
    }
  }
  give_items(state);
}
BENCHMARK(fork_join_calls)->Arg(1)->Arg(4)->Arg(8);

}  // namespace
}  // namespace esper
