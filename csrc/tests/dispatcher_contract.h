// What every backend must keep to; the typed suite runs over each (dispatcher_test.cpp).
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <vector>

#include "esper/stream_dispatcher.h"

namespace esper {

// A fixture gives `Backend`, `make()` and `ambient()`.
template <class Fixture>
class DispatcherContract : public ::testing::Test {
 protected:
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

REGISTER_TYPED_TEST_SUITE_P(DispatcherContract, GivesOneStreamForEachPieceOfWork,
                            RefusesAnEmptyFork, ClosesOnceAndForGood, RefusesAPoolWithoutStreams);

}  // namespace esper
