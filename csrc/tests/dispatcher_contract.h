// What every backend must keep to; the typed suite runs over each (cpu_backend_test.cpp,
// simulated_backend_test.cpp, cuda_device_test.cpp).
//
// A fixture gives the types `Dispatcher` and `Cell` (a byte of the machine's memory), and
//   skip()                       why it can't run here; empty where it can
//   make(num_streams)            a dispatcher; throws as the backend's constructor does
//   ambient()
//   cell(dispatcher)             a new one, on the ambient stream
//   fill(dispatcher, stream, cell, value), copy(dispatcher, stream, from, to)
//                                enqueued on the stream
//   delay(dispatcher, stream)    makes the stream late, so that a missing order shows
//   value(dispatcher, cell)      after everything on the ambient stream; fails the test where the
//                                machine knows of a race
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "esper/stream_dispatcher.h"

namespace esper {

template <class Fixture>
class DispatcherContract : public ::testing::Test {
 protected:
  void SetUp() override {
    const std::string reason = Fixture::skip();
    if (!reason.empty()) GTEST_SKIP() << reason;
  }

  Fixture fixture;
};

TYPED_TEST_SUITE_P(DispatcherContract);

TYPED_TEST_P(DispatcherContract, GivesOneStreamForEachPieceOfWork) {
  auto dispatcher = this->fixture.make(2);
  const auto streams = dispatcher->fork(this->fixture.ambient(), 5);
  ASSERT_EQ(streams.size(), 5U);
  EXPECT_FALSE(streams[0] == streams[1]);
  EXPECT_TRUE(streams[0] == streams[2]);
  dispatcher->join(this->fixture.ambient(), streams);
}

TYPED_TEST_P(DispatcherContract, RefusesAnEmptyFork) {
  auto dispatcher = this->fixture.make(2);
  EXPECT_THROW(dispatcher->fork(this->fixture.ambient(), 0), InvalidInput);
}

TYPED_TEST_P(DispatcherContract, ClosesOnceAndForGood) {
  auto dispatcher = this->fixture.make(2);
  const auto streams = dispatcher->fork(this->fixture.ambient(), 2);
  EXPECT_FALSE(dispatcher->closed());
  dispatcher->close();
  dispatcher->close();
  EXPECT_TRUE(dispatcher->closed());
  EXPECT_THROW(dispatcher->fork(this->fixture.ambient(), 1), InvalidState);
  EXPECT_THROW(dispatcher->join(this->fixture.ambient(), streams), InvalidState);
}

TYPED_TEST_P(DispatcherContract, RefusesAPoolWithoutStreams) {
  EXPECT_THROW((void)this->fixture.make(0), InvalidInput);
}

TYPED_TEST_P(DispatcherContract, WorkComesAfterTheAmbientStream) {
  auto& f = this->fixture;
  auto dispatcher = f.make(3);
  auto input = f.cell(*dispatcher);
  std::vector<decltype(input)> outputs;
  for (int i = 0; i < 3; ++i) outputs.push_back(f.cell(*dispatcher));
  f.delay(*dispatcher, f.ambient());
  f.fill(*dispatcher, f.ambient(), input, 7);
  const auto streams = dispatcher->fork(f.ambient(), 3);
  for (std::size_t i = 0; i < 3; ++i) f.copy(*dispatcher, streams[i], input, outputs[i]);
  dispatcher->join(f.ambient(), streams);
  for (auto& output : outputs) EXPECT_EQ(f.value(*dispatcher, output), 7);
}

TYPED_TEST_P(DispatcherContract, TheAmbientStreamComesAfterTheWork) {
  auto& f = this->fixture;
  auto dispatcher = f.make(2);
  auto total = f.cell(*dispatcher);
  auto made = f.cell(*dispatcher);
  const auto streams = dispatcher->fork(f.ambient(), 2);
  f.delay(*dispatcher, streams[1]);
  f.fill(*dispatcher, streams[1], made, 9);
  dispatcher->join(f.ambient(), streams);
  f.copy(*dispatcher, f.ambient(), made, total);
  EXPECT_EQ(f.value(*dispatcher, total), 9);
}

TYPED_TEST_P(DispatcherContract, PiecesThatShareAStreamRunInOrder) {
  auto& f = this->fixture;
  auto dispatcher = f.make(2);
  auto cell = f.cell(*dispatcher);
  const auto streams = dispatcher->fork(f.ambient(), 5);
  f.delay(*dispatcher, streams[0]);
  f.fill(*dispatcher, streams[0], cell, 1);
  f.fill(*dispatcher, streams[2], cell, 2);
  f.fill(*dispatcher, streams[4], cell, 3);
  dispatcher->join(f.ambient(), streams);
  EXPECT_EQ(f.value(*dispatcher, cell), 3);
}

// Many more records than there are events.
TYPED_TEST_P(DispatcherContract, EventsMayBeReused) {
  auto& f = this->fixture;
  auto dispatcher = f.make(2);
  auto there = f.cell(*dispatcher);
  auto back = f.cell(*dispatcher);
  for (unsigned char round = 1; round <= 100; ++round) {
    f.fill(*dispatcher, f.ambient(), there, round);
    const auto streams = dispatcher->fork(f.ambient(), 2);
    f.copy(*dispatcher, streams[round % 2], there, back);
    dispatcher->join(f.ambient(), streams);
    ASSERT_EQ(f.value(*dispatcher, back), round);
  }
}

TYPED_TEST_P(DispatcherContract, StreamsAreLentAgainAfterClose) {
  auto& f = this->fixture;
  for (unsigned char round = 1; round <= 20; ++round) {
    auto dispatcher = f.make(2);
    auto cell = f.cell(*dispatcher);
    const auto streams = dispatcher->fork(f.ambient(), 2);
    f.fill(*dispatcher, streams[1], cell, round);
    dispatcher->join(f.ambient(), streams);
    EXPECT_EQ(f.value(*dispatcher, cell), round);
    dispatcher->close();
  }
}

REGISTER_TYPED_TEST_SUITE_P(DispatcherContract, GivesOneStreamForEachPieceOfWork,
                            RefusesAnEmptyFork, ClosesOnceAndForGood, RefusesAPoolWithoutStreams,
                            WorkComesAfterTheAmbientStream, TheAmbientStreamComesAfterTheWork,
                            PiecesThatShareAStreamRunInOrder, EventsMayBeReused,
                            StreamsAreLentAgainAfterClose);

// Keeps a thread busy for a moment, so that a stream is late without a clock being asked.
inline void keep_busy() {
  for (int i = 0; i < 200; ++i) std::this_thread::yield();
}

}  // namespace esper
