#include "esper/simulated_backend.h"

#include <gtest/gtest.h>

#include <random>

#include "dispatcher_contract.h"

namespace esper {
namespace {

using Simulated = SimulatedBackend;
using Dispatcher = StreamDispatcher<SimulatedBackend>;
using Kind = Simulated::ViolationKind;
constexpr Simulated::Stream kAmbient = Simulated::kAmbient;

std::unique_ptr<Dispatcher> make_dispatcher(std::size_t num_streams) {
  return std::make_unique<Dispatcher>(std::make_unique<Simulated>(num_streams));
}

struct SimulatedFixture {
  static std::unique_ptr<Dispatcher> make(std::size_t num_streams) {
    return make_dispatcher(num_streams);
  }
  static Simulated::Stream ambient() { return kAmbient; }
};
INSTANTIATE_TYPED_TEST_SUITE_P(Simulated, DispatcherContract, SimulatedFixture);

TEST(Simulated, OrderWithinAStreamIsEnough) {
  Simulated machine(1);
  const auto buffer = machine.alloc(1);
  machine.write(1, buffer);
  machine.read(1, buffer);
  machine.write(1, buffer);
  EXPECT_TRUE(machine.violations().empty());
}

TEST(Simulated, TwoReadersNeedNoOrder) {
  Simulated machine(2);
  const auto buffer = machine.alloc(kAmbient);
  machine.write(kAmbient, buffer);
  const auto written = machine.record(kAmbient);
  for (const Simulated::Stream stream : {1U, 2U}) {
    machine.wait(stream, written);
    machine.read(stream, buffer);
  }
  EXPECT_TRUE(machine.violations().empty());
}

TEST(Simulated, FindsAnUnorderedWrite) {
  Simulated machine(2);
  const auto buffer = machine.alloc(kAmbient);
  machine.write(1, buffer);
  machine.write(2, buffer);
  ASSERT_EQ(machine.violations().size(), 1U);
  const auto& violation = machine.violations().front();
  EXPECT_EQ(violation.kind, Kind::RACE);
  EXPECT_EQ(machine.describe(violation),
            "race: operation 1 (write on stream 1 of buffer 1) and operation 2 (write on stream 2 "
            "of buffer 1)");
}

TEST(Simulated, AnEventOrdersOnlyWhatCameBeforeIt) {
  Simulated machine(1);
  const auto buffer = machine.alloc(kAmbient);
  const auto early = machine.record(kAmbient);
  machine.write(kAmbient, buffer);
  machine.wait(1, early);
  machine.read(1, buffer);
  EXPECT_EQ(machine.violations().size(), 1U);
}

TEST(Simulated, FindsMemoryThatCameBackTooEarly) {
  Simulated machine(1);
  const auto input = machine.alloc(kAmbient);
  machine.write(kAmbient, input);
  machine.wait(1, machine.record(kAmbient));
  machine.read(1, input);
  machine.free(input);
  machine.write(kAmbient, machine.alloc(kAmbient));
  ASSERT_EQ(machine.violations().size(), 1U);
  EXPECT_EQ(machine.violations().front().kind, Kind::USE_AFTER_REUSE);
}

TEST(Simulated, RecordStreamKeepsMemoryUntilItsUsersAreDone) {
  Simulated machine(1);
  const auto input = machine.alloc(kAmbient);
  machine.write(kAmbient, input);
  machine.wait(1, machine.record(kAmbient));
  machine.record_stream(input, 1);
  machine.read(1, input);
  machine.free(input);
  machine.write(kAmbient, machine.alloc(kAmbient));
  EXPECT_TRUE(machine.violations().empty());
}

TEST(Simulated, FindsAUseAfterFree) {
  Simulated machine(1);
  const auto buffer = machine.alloc(kAmbient);
  machine.free(buffer);
  machine.read(kAmbient, buffer);
  ASSERT_EQ(machine.violations().size(), 1U);
  EXPECT_EQ(machine.violations().front().kind, Kind::USE_AFTER_FREE);
  EXPECT_THROW(machine.free(buffer), InvalidInput);
  EXPECT_THROW(machine.read(5, buffer), InvalidInput);
  EXPECT_THROW(machine.read(kAmbient, 99), InvalidInput);
}

// --- The dispatcher, proven on the machine ---

enum class Hygiene : std::uint8_t { CLEAN, NO_RECORD_STREAM };

// One layer with live seeds, as the executor runs it: read the input side by side, add up on the
// ambient stream, free, repeat.
void run_layer(Dispatcher& dispatcher, std::size_t num_seeds, Hygiene hygiene) {
  Simulated& machine = dispatcher.backend();
  const auto input = machine.alloc(kAmbient);
  machine.write(kAmbient, input);
  const auto streams = dispatcher.fork(kAmbient, num_seeds);
  std::vector<Simulated::Buffer> outputs;
  for (const auto stream : streams) {
    if (hygiene == Hygiene::CLEAN) machine.record_stream(input, stream);
    machine.read(stream, input);
    outputs.push_back(machine.alloc(stream));
    machine.write(stream, outputs.back());
  }
  dispatcher.join(kAmbient, streams);
  for (const auto output : outputs) {
    if (hygiene == Hygiene::CLEAN) machine.record_stream(output, kAmbient);
    machine.read(kAmbient, output);
    machine.free(output);
  }
  machine.free(input);
}

TEST(SimulatedDispatch, ACorrectForkAndJoinIsClean) {
  for (const std::size_t num_seeds : {1U, 2U, 3U, 7U}) {
    auto dispatcher = make_dispatcher(3);
    for (int step = 0; step < 5; ++step) run_layer(*dispatcher, num_seeds, Hygiene::CLEAN);
    EXPECT_TRUE(dispatcher->backend().violations().empty());
  }
}

// The mutation set: each single wait of a run is left out in turn, and each is missed.
TEST(SimulatedDispatch, EveryMissingWaitIsCaught) {
  auto reference = make_dispatcher(3);
  for (int step = 0; step < 2; ++step) run_layer(*reference, 3, Hygiene::CLEAN);
  const std::size_t num_waits = reference->backend().num_waits();
  ASSERT_EQ(num_waits, 12U);
  for (std::size_t dropped = 0; dropped < num_waits; ++dropped) {
    auto dispatcher = make_dispatcher(3);
    dispatcher->backend().drop_wait(dropped);
    for (int step = 0; step < 2; ++step) run_layer(*dispatcher, 3, Hygiene::CLEAN);
    EXPECT_FALSE(dispatcher->backend().violations().empty()) << "wait " << dropped;
  }
}

// Backward: autograd replays a node on its forward's stream while the ambient stream goes on, so
// only record_stream protects.
TEST(SimulatedDispatch, AReplayWithoutForkNeedsRecordStream) {
  for (const Hygiene hygiene : {Hygiene::CLEAN, Hygiene::NO_RECORD_STREAM}) {
    auto dispatcher = make_dispatcher(1);
    Simulated& machine = dispatcher->backend();
    const auto saved = machine.alloc(kAmbient);
    machine.write(kAmbient, saved);
    const auto streams = dispatcher->fork(kAmbient, 1);
    if (hygiene == Hygiene::CLEAN) machine.record_stream(saved, streams[0]);
    machine.read(streams[0], saved);
    dispatcher->join(kAmbient, streams);
    machine.read(streams[0], saved);  // the replay
    machine.free(saved);
    machine.write(kAmbient, machine.alloc(kAmbient));
    EXPECT_EQ(machine.violations().empty(), hygiene == Hygiene::CLEAN);
  }
}

// Random programs of forks (nested ones too), work, joins, allocations and frees.
class RandomProgram {
 public:
  RandomProgram(Dispatcher& dispatcher, unsigned seed) : dispatcher_(dispatcher), engine_(seed) {}

  void run(Simulated::Stream ambient, int depth) {
    Simulated& machine = dispatcher_.backend();
    for (unsigned section = 0; section < 1 + draw(3); ++section) {
      const auto input = machine.alloc(ambient);
      machine.write(ambient, input);
      const auto streams = dispatcher_.fork(ambient, 1 + draw(5));
      std::vector<Simulated::Buffer> outputs;
      for (const auto stream : streams) {
        machine.record_stream(input, stream);
        if (draw(2) == 0) machine.read(stream, input);
        if (depth > 0 && draw(3) == 0) run(stream, depth - 1);
        outputs.push_back(machine.alloc(stream));
        machine.write(stream, outputs.back());
        if (draw(4) == 0) scratch(stream);
      }
      dispatcher_.join(ambient, streams);
      for (const auto output : outputs) {
        machine.record_stream(output, ambient);
        machine.read(ambient, output);
        machine.free(output);
      }
      machine.free(input);
      if (draw(2) == 0) scratch(ambient);
    }
  }

 private:
  void scratch(Simulated::Stream stream) {
    Simulated& machine = dispatcher_.backend();
    const auto buffer = machine.alloc(stream);
    machine.write(stream, buffer);
    machine.free(buffer);
  }

  unsigned draw(unsigned below) { return static_cast<unsigned>(engine_()) % below; }

  Dispatcher& dispatcher_;
  std::mt19937 engine_;
};

TEST(SimulatedDispatch, RandomProgramsAreClean) {
  for (unsigned seed = 0; seed < 200; ++seed) {
    auto dispatcher = make_dispatcher(1 + seed % 4);
    RandomProgram(*dispatcher, seed).run(kAmbient, 2);
    const Simulated& machine = dispatcher->backend();
    ASSERT_TRUE(machine.violations().empty())
        << "seed " << seed << ": " << machine.describe(machine.violations().front());
  }
}

// A machine on which no wait works at all must show races in every program that has work on two
// streams.
TEST(SimulatedDispatch, RandomProgramsWithoutWaitsAreNot) {
  for (unsigned seed = 0; seed < 50; ++seed) {
    auto dispatcher = make_dispatcher(2);
    for (std::size_t wait = 0; wait < 10000; ++wait) dispatcher->backend().drop_wait(wait);
    RandomProgram(*dispatcher, seed).run(kAmbient, 1);
    EXPECT_FALSE(dispatcher->backend().violations().empty()) << "seed " << seed;
  }
}

}  // namespace
}  // namespace esper
