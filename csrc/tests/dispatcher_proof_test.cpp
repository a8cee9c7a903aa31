// The dispatcher, proven on the simulated machine: no report on the real code over thousands of
// random programs, every planted defect found, and the machine's own verdict held against a search
// of the whole graph.

#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "dispatcher_programs.h"
#include "race_oracle.h"

namespace esper {
namespace {

using Simulated = SimulatedBackend;
using Dispatcher = StreamDispatcher<SimulatedBackend>;
using Program = std::function<void(Dispatcher&)>;
using OpKind = Simulated::OpKind;
using Drops = std::vector<std::pair<OpKind, std::size_t>>;
using Kinds = std::vector<OpKind>;

const Kinds kOrders{OpKind::RECORD, OpKind::WAIT};
const Kinds kDroppable{OpKind::RECORD, OpKind::WAIT, OpKind::RECORD_STREAM};

std::unique_ptr<Dispatcher> run(std::size_t num_streams, const Program& program,
                                const Drops& drops = {}) {
  auto dispatcher = std::make_unique<Dispatcher>(std::make_unique<Simulated>(num_streams));
  for (const auto& [kind, number] : drops) dispatcher->backend().drop(kind, number);
  program(*dispatcher);
  return dispatcher;
}

std::string first_violation(const Simulated& machine) {
  return machine.violations().empty() ? "none" : machine.describe(machine.violations().front());
}

Program random_program(unsigned seed) {
  return [seed](Dispatcher& dispatcher) { RandomProgram(dispatcher, seed).run(); };
}

bool breaks_a_capture(const Simulated& machine) {
  for (const auto& violation : machine.violations()) {
    if (violation.kind == Simulated::ViolationKind::ISOLATION) return true;
    if (violation.kind == Simulated::ViolationKind::UNJOINED) return true;
  }
  return false;
}

struct Tight {
  std::size_t num_streams;
  Program program;
  Kinds needed;  // of these, none may be missing
};

// Each of two rounds, so that events and memory are met again. In a capture, one recorded stream
// keeps a block from coming back, so a second one is not needed.
std::vector<Tight> tight_programs() {
  std::vector<Tight> programs;
  for (const std::size_t num_streams : {1U, 2U, 3U, 5U}) {
    for (const bool fails : {false, true}) {
      for (std::size_t pieces = 1; pieces <= num_streams; ++pieces) {
        const auto eager = [=](Dispatcher& dispatcher) {
          for (int round = 0; round < 2; ++round) TightLayer{dispatcher}.run(pieces, fails);
        };
        const auto captured = [=](Dispatcher& dispatcher) {
          for (int round = 0; round < 2; ++round) {
            TightLayer{dispatcher}.run_captured(pieces, fails);
          }
        };
        programs.push_back({num_streams, eager, kDroppable});
        programs.push_back({num_streams, captured, pieces == 1 ? kDroppable : kOrders});
      }
      if (num_streams < 2) continue;
      const auto nested = [=](Dispatcher& dispatcher) {
        for (int round = 0; round < 2; ++round) TightLayer{dispatcher}.run_nested(fails);
      };
      programs.push_back({num_streams, nested, kDroppable});
    }
  }
  return programs;
}

TEST(DispatcherProof, NothingIsReportedOnTheRealCode) {
  for (unsigned seed = 0; seed < 5000; ++seed) {
    const auto dispatcher = run(1 + seed % 5, random_program(seed));
    ASSERT_TRUE(dispatcher->backend().violations().empty())
        << "seed " << seed << ": " << first_violation(dispatcher->backend());
  }
}

TEST(DispatcherProof, TightProgramsAreClean) {
  for (const auto& [num_streams, program, needed] : tight_programs()) {
    const auto dispatcher = run(num_streams, program);
    ASSERT_TRUE(dispatcher->backend().violations().empty())
        << first_violation(dispatcher->backend());
  }
}

// The mutation set: one record, one wait or one record_stream of the run is left out, each in turn.
TEST(DispatcherProof, EveryPlantedDefectIsFound) {
  std::size_t num_planted = 0;
  for (const auto& [num_streams, program, needed] : tight_programs()) {
    const auto clean = run(num_streams, program);
    for (const OpKind kind : needed) {
      const std::size_t count = clean->backend().count(kind);
      for (std::size_t number = 0; number < count; ++number, ++num_planted) {
        const auto mutant = run(num_streams, program, {{kind, number}});
        EXPECT_FALSE(mutant->backend().violations().empty())
            << num_streams << " streams, " << Simulated::name_of(kind) << " " << number << " of "
            << count;
      }
    }
  }
  EXPECT_GT(num_planted, 1500U);
}

// Counts the joins of a program and leaves one out, with all its records and waits.
class Joins {
 public:
  explicit Joins(std::size_t left_out) : left_out_(left_out) {}

  void layer(Dispatcher& dispatcher, std::size_t num_pieces) {
    Simulated& machine = dispatcher.backend();
    const auto input = machine.alloc(0);
    machine.write(0, input);
    const auto streams = dispatcher.fork(0, num_pieces);
    for (const auto stream : streams) machine.read(stream, input);
    if (count_++ != left_out_) dispatcher.join(0, streams);
    machine.write(0, input);
    machine.free(input);
  }

  [[nodiscard]] std::size_t count() const { return count_; }

 private:
  std::size_t left_out_;
  std::size_t count_ = 0;
};

TEST(DispatcherProof, EveryMissingJoinIsFound) {
  for (std::size_t left_out = 0; left_out <= 4; ++left_out) {
    Joins joins(left_out);
    const auto dispatcher = run(2, [&](Dispatcher& target) {
      for (std::size_t pieces = 1; pieces <= 4; ++pieces) joins.layer(target, pieces);
    });
    ASSERT_EQ(joins.count(), 4U);
    EXPECT_EQ(dispatcher->backend().violations().empty(), left_out == 4) << "join " << left_out;
  }
}

// The machine's clocks say what the whole graph says: for each random program, with each of its
// operations left out in turn.
TEST(DispatcherProof, TheMachineAgreesWithASearchOfTheGraph) {
  std::size_t num_racy = 0;
  std::size_t num_harmless = 0;
  for (unsigned seed = 0; seed < 60; ++seed) {
    const std::size_t num_streams = 1 + seed % 4;
    const auto clean = run(num_streams, random_program(seed));
    ASSERT_FALSE(RaceOracle(clean->backend().operations()).has_race()) << "seed " << seed;
    if (clean->backend().operations().size() > 400) continue;
    for (const OpKind kind : kDroppable) {
      for (std::size_t number = 0; number < clean->backend().count(kind); ++number) {
        const auto mutant = run(num_streams, random_program(seed), {{kind, number}});
        const Simulated& machine = mutant->backend();
        if (breaks_a_capture(machine)) continue;  // reported; the device would have refused it
        const bool racy = RaceOracle(machine.operations()).has_race();
        ASSERT_EQ(!machine.violations().empty(), racy)
            << "seed " << seed << ", " << Simulated::name_of(kind) << " " << number << ": "
            << first_violation(machine);
        ++(racy ? num_racy : num_harmless);
      }
    }
  }
  EXPECT_GT(num_racy, 300U);
  EXPECT_GT(num_harmless, 100U);
}

// Several defects at once must not hide each other.
TEST(DispatcherProof, ProgramsWithoutAnyOrderAreFound) {
  for (const OpKind kind : {OpKind::RECORD, OpKind::WAIT}) {
    Drops all;
    for (std::size_t number = 0; number < 2000; ++number) all.emplace_back(kind, number);
    for (const auto& [num_streams, program, needed] : tight_programs()) {
      EXPECT_FALSE(run(num_streams, program, all)->backend().violations().empty());
    }
  }
}

// --- A backend that refuses a call in the middle ---

class Refusing {
 public:
  using Stream = Simulated::Stream;
  using Event = Simulated::Event;

  Refusing(std::size_t num_streams, std::size_t refused)
      : machine(num_streams), refused_(refused) {}

  [[nodiscard]] std::size_t num_streams() const { return machine.num_streams(); }
  [[nodiscard]] Stream stream(std::size_t index) const { return machine.stream(index); }
  Event record(Stream stream) { return machine.record(stream); }
  void wait(Stream stream, const Event& event) {
    if (num_waits_++ == refused_) throw DeviceError("cudaStreamWaitEvent failed");
    machine.wait(stream, event);
  }
  void close() noexcept {}

  Simulated machine;

 private:
  std::size_t refused_;
  std::size_t num_waits_ = 0;
};
static_assert(Backend<Refusing>);

TEST(DispatcherFailure, AForkThatFailsLeavesNoCaptureOpen) {
  for (std::size_t refused = 0; refused < 3; ++refused) {
    StreamDispatcher<Refusing> dispatcher(std::make_unique<Refusing>(3, refused));
    Simulated& machine = dispatcher.backend().machine;
    machine.begin_capture(0);
    EXPECT_THROW(dispatcher.fork(0, 3), DeviceError);
    machine.end_capture(0);
    EXPECT_TRUE(machine.violations().empty()) << first_violation(machine);
  }
}

TEST(DispatcherFailure, AJoinThatFailsJoinsTheOthers) {
  StreamDispatcher<Refusing> dispatcher(std::make_unique<Refusing>(3, 3));
  Simulated& machine = dispatcher.backend().machine;
  const auto streams = dispatcher.fork(0, 3);
  std::vector<Simulated::Buffer> buffers;
  for (const auto stream : streams) {
    buffers.push_back(machine.alloc(stream));
    machine.write(stream, buffers.back());
  }
  EXPECT_THROW(dispatcher.join(0, streams), DeviceError);
  machine.read(0, buffers[1]);
  machine.read(0, buffers[2]);
  EXPECT_TRUE(machine.violations().empty());
  machine.read(0, buffers[0]);  // the one that was refused
  EXPECT_EQ(machine.violations().size(), 1U);
}

}  // namespace
}  // namespace esper
