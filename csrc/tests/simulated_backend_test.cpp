#include "esper/simulated_backend.h"

#include <gtest/gtest.h>

#include <map>
#include <string>

#include "dispatcher_contract.h"

namespace esper {
namespace {

using Simulated = SimulatedBackend;
using Dispatcher = StreamDispatcher<SimulatedBackend>;
using Kind = Simulated::ViolationKind;
using OpKind = Simulated::OpKind;
constexpr Simulated::Stream kAmbient = Simulated::kAmbient;

std::unique_ptr<Dispatcher> make_dispatcher(std::size_t num_streams) {
  return std::make_unique<Dispatcher>(std::make_unique<Simulated>(num_streams));
}

// The machine runs nothing, so what a cell would hold is written down in the order of the calls;
// that this order is the only one is what the machine says.
struct SimulatedFixture {
  using Cell = Simulated::Buffer;

  static std::string skip() { return {}; }
  static std::unique_ptr<Dispatcher> make(std::size_t num_streams) {
    return make_dispatcher(num_streams);
  }
  static Simulated::Stream ambient() { return kAmbient; }
  static Cell cell(Dispatcher& target) { return target.backend().alloc(kAmbient); }
  void fill(Dispatcher& target, Simulated::Stream stream, Cell to, unsigned char value) {
    target.backend().write(stream, to);
    held[to] = value;
  }
  void copy(Dispatcher& target, Simulated::Stream stream, Cell from, Cell to) {
    target.backend().read(stream, from);
    target.backend().write(stream, to);
    held[to] = held[from];
  }
  static void delay(Dispatcher&, Simulated::Stream) {}
  unsigned char value(Dispatcher& target, Cell cell) {
    target.backend().read(kAmbient, cell);
    EXPECT_TRUE(target.backend().violations().empty());
    return held[cell];
  }

  std::map<Cell, unsigned char> held;
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

// Another stream that was not recorded is not protected by one that was, and the host's looking at
// one stream orders nothing else.
TEST(Simulated, RecordStreamProtectsOnlyItsOwnBlock) {
  Simulated machine(2);
  const auto seen = machine.alloc(kAmbient);
  const auto other = machine.alloc(kAmbient);
  machine.write(kAmbient, seen);
  const auto written = machine.record(kAmbient);
  for (const Simulated::Stream stream : {1U, 2U}) machine.wait(stream, written);
  machine.read(1, seen);
  machine.write(1, other);
  machine.record_stream(seen, 1);
  machine.free(seen);
  machine.write(kAmbient, machine.alloc(kAmbient));
  EXPECT_TRUE(machine.violations().empty());
  machine.read(kAmbient, other);
  ASSERT_EQ(machine.violations().size(), 1U);
  EXPECT_EQ(machine.violations().front().kind, Kind::RACE);
}

TEST(Simulated, RecordStreamOfOneUserDoesNotProtectAnother) {
  Simulated machine(2);
  const auto input = machine.alloc(kAmbient);
  machine.write(kAmbient, input);
  const auto written = machine.record(kAmbient);
  for (const Simulated::Stream stream : {1U, 2U}) {
    machine.wait(stream, written);
    machine.read(stream, input);
  }
  machine.record_stream(input, 1);
  machine.free(input);
  machine.write(kAmbient, machine.alloc(kAmbient));
  ASSERT_EQ(machine.violations().size(), 1U);
  EXPECT_EQ(machine.operations()[machine.violations().front().first_op].stream, 2U);
}

TEST(Simulated, AnEventUsedTooLateHasBeenRecordedAnew) {
  Simulated machine(1);
  const auto buffer = machine.alloc(1);
  machine.write(1, buffer);
  const auto event = machine.record(1);
  for (int further = 0; further < 3; ++further) (void)machine.record(kAmbient);
  machine.wait(kAmbient, event);
  machine.read(kAmbient, buffer);
  EXPECT_EQ(machine.violations().size(), 1U);
}

TEST(Simulated, ADroppedRecordLeavesTheEventAsItWas) {
  Simulated machine(1);
  machine.drop(OpKind::RECORD, 0);
  const auto buffer = machine.alloc(kAmbient);
  machine.write(kAmbient, buffer);
  machine.wait(1, machine.record(kAmbient));
  machine.read(1, buffer);
  EXPECT_EQ(machine.violations().size(), 1U);
  EXPECT_EQ(machine.describe(machine.operations()[2]), "dropped record on stream 0");
}

TEST(Simulated, OnlyOrdersAndRecordStreamsCanBeDropped) {
  Simulated machine(1);
  EXPECT_THROW(machine.drop(OpKind::WRITE, 0), InvalidInput);
  EXPECT_THROW((void)Simulated::kind_of("join"), InvalidInput);
  EXPECT_EQ(Simulated::kind_of("record_stream"), OpKind::RECORD_STREAM);
  EXPECT_THROW(machine.wait(1, 99), InvalidInput);
}

// --- Captures ---

TEST(SimulatedCapture, RunsOnlyWhenReplayed) {
  Simulated machine(1);
  const auto buffer = machine.alloc(kAmbient);
  machine.begin_capture(kAmbient);
  machine.write(kAmbient, buffer);
  const auto graph = machine.end_capture(kAmbient);
  machine.write(1, buffer);
  EXPECT_TRUE(machine.violations().empty());
  machine.replay(graph, kAmbient);
  EXPECT_EQ(machine.violations().size(), 1U);
}

TEST(SimulatedCapture, AReplayIsOrderedInItsStream) {
  Simulated machine(2);
  const auto input = machine.alloc(kAmbient);
  machine.begin_capture(kAmbient);
  machine.wait(1, machine.record(kAmbient));
  machine.read(1, input);
  machine.wait(kAmbient, machine.record(1));
  const auto graph = machine.end_capture(kAmbient);
  for (int step = 0; step < 3; ++step) {
    machine.write(kAmbient, input);
    machine.replay(graph, kAmbient);
  }
  EXPECT_TRUE(machine.violations().empty());
  machine.replay(graph, 2);  // nothing orders this stream after the last write
  EXPECT_FALSE(machine.violations().empty());
}

TEST(SimulatedCapture, FindsAStreamThatIsNotJoined) {
  Simulated machine(1);
  machine.begin_capture(kAmbient);
  machine.wait(1, machine.record(kAmbient));
  (void)machine.end_capture(kAmbient);
  ASSERT_EQ(machine.violations().size(), 1U);
  EXPECT_EQ(machine.violations().front().kind, Kind::UNJOINED);
}

TEST(SimulatedCapture, FindsAWaitAcrossItsBorder) {
  Simulated machine(1);
  const auto outside = machine.record(1);
  machine.begin_capture(kAmbient);
  machine.wait(kAmbient, outside);
  const auto inside = machine.record(kAmbient);
  (void)machine.end_capture(kAmbient);
  machine.wait(1, inside);
  ASSERT_EQ(machine.violations().size(), 2U);
  for (const auto& violation : machine.violations()) EXPECT_EQ(violation.kind, Kind::ISOLATION);
  EXPECT_EQ(machine.describe(machine.violations().front()).substr(0, 35),
            "wait across the border of a capture");
}

TEST(SimulatedCapture, RefusesCallsOutOfOrder) {
  Simulated machine(1);
  EXPECT_THROW((void)machine.end_capture(kAmbient), InvalidState);
  EXPECT_THROW(machine.replay(0, kAmbient), InvalidInput);
  machine.begin_capture(kAmbient);
  EXPECT_THROW(machine.begin_capture(1), InvalidState);
  EXPECT_THROW((void)machine.end_capture(1), InvalidState);
  const auto graph = machine.end_capture(kAmbient);
  machine.begin_capture(kAmbient);
  EXPECT_THROW(machine.replay(graph, kAmbient), InvalidState);
}

}  // namespace
}  // namespace esper
