#include "esper/cpu_backend.h"

#include <gtest/gtest.h>

#include <atomic>
#include <latch>
#include <mutex>
#include <string>
#include <thread>

#include "dispatcher_contract.h"

namespace esper {
namespace {

using Dispatcher = StreamDispatcher<CpuBackend>;
using Task = CpuBackend::Task;

std::unique_ptr<Dispatcher> make_dispatcher(std::size_t num_streams) {
  return std::make_unique<Dispatcher>(std::make_unique<CpuBackend>(num_streams));
}

// Work of the ambient stream is the calling thread's own. Cells are plain memory: TSan sees a
// missing order.
struct CpuFixture {
  using Cell = std::shared_ptr<unsigned char>;

  static std::string skip() { return {}; }
  static std::unique_ptr<Dispatcher> make(std::size_t num_streams) {
    return make_dispatcher(num_streams);
  }
  static CpuBackend::Stream ambient() { return CpuBackend::kAmbient; }
  static Cell cell(Dispatcher&) { return std::make_shared<unsigned char>(0); }
  static void fill(Dispatcher& target, CpuBackend::Stream stream, const Cell& to,
                   unsigned char value) {
    give(target, stream, [to, value] { *to = value; });
  }
  static void copy(Dispatcher& target, CpuBackend::Stream stream, const Cell& from,
                   const Cell& to) {
    give(target, stream, [from, to] { *to = *from; });
  }
  static void delay(Dispatcher& target, CpuBackend::Stream stream) {
    give(target, stream, keep_busy);
  }
  static unsigned char value(Dispatcher&, const Cell& cell) { return *cell; }

 private:
  static void give(Dispatcher& target, CpuBackend::Stream stream, Task task) {
    if (stream == CpuBackend::kAmbient) return task();
    target.backend().submit(stream, std::move(task));
  }
};
INSTANTIATE_TYPED_TEST_SUITE_P(Cpu, DispatcherContract, CpuFixture);

TEST(CpuBackend, RunsTasksSideBySide) {
  auto dispatcher = make_dispatcher(2);
  std::latch both(2);
  // Each waits for the other: only two streams at once can finish this.
  const std::vector<Task> tasks(2, [&] { both.arrive_and_wait(); });
  for (const std::exception_ptr& error : run_all(*dispatcher, tasks)) EXPECT_FALSE(error);
}

TEST(CpuBackend, JoinSeesEverythingTheTasksWrote) {
  auto dispatcher = make_dispatcher(3);
  for (int round = 0; round < 200; ++round) {
    std::vector<int> results(7, 0);  // plain memory: TSan sees a missing order
    std::vector<Task> tasks;
    for (int& result : results) tasks.emplace_back([&result, round] { result = round; });
    (void)run_all(*dispatcher, tasks);
    EXPECT_EQ(results, std::vector<int>(7, round));
  }
}

TEST(CpuBackend, OneTasksExceptionLosesNoOther) {
  auto dispatcher = make_dispatcher(2);
  int done = 0;
  const std::vector<Task> tasks{[&] { ++done; }, [] { throw std::out_of_range("second"); },
                                [&] { ++done; }};
  const auto errors = run_all(*dispatcher, tasks);
  EXPECT_FALSE(errors[0]);
  EXPECT_THROW(std::rethrow_exception(errors[1]), std::out_of_range);
  EXPECT_FALSE(errors[2]);
  EXPECT_EQ(done, 2);
}

TEST(CpuBackend, ATaskMayRunTasks) {
  auto dispatcher = make_dispatcher(1);
  int inner = 0;
  const std::vector<Task> leaves(3, [&] { ++inner; });
  const std::vector<Task> roots{[&] { (void)run_all(*dispatcher, leaves); }};
  (void)run_all(*dispatcher, roots);
  EXPECT_EQ(inner, 3);
}

TEST(CpuBackend, AStreamWaitsForAnother) {
  CpuBackend backend(2);
  std::latch gate(1);
  std::string order;  // plain memory: the events alone order the accesses
  backend.submit(0, [&] {
    gate.wait();
    order += 'a';
  });
  backend.wait(1, backend.record(0));
  backend.submit(1, [&] { order += 'b'; });
  gate.count_down();
  backend.wait(CpuBackend::kAmbient, backend.record(1));
  EXPECT_EQ(order, "ab");
}

TEST(CpuBackend, CloseFinishesWhatWasSubmittedAndRefusesMore) {
  CpuBackend backend(1);
  int done = 0;
  for (int i = 0; i < 100; ++i) backend.submit(0, [&] { ++done; });
  backend.close();
  EXPECT_EQ(done, 100);
  EXPECT_THROW(backend.submit(0, [] {}), InvalidState);
}

TEST(CpuBackend, SeveralThreadsMayDispatchAtOnce) {
  auto dispatcher = make_dispatcher(2);
  std::atomic<int> done{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      const std::vector<Task> tasks(3, [&] { ++done; });
      for (int round = 0; round < 50; ++round) (void)run_all(*dispatcher, tasks);
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(done.load(), 600);
}

}  // namespace
}  // namespace esper
