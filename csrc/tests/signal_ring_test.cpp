#include "esper/signal_ring.h"

#include <gtest/gtest.h>

#include <thread>

#include "esper/errors.h"

namespace esper {
namespace {

// Columns with memory of their own.
struct Drained {
  explicit Drained(std::size_t rows)
      : layer_id(rows), flags(rows), seed(rows), step(rows), time_ns(rows), figures(7 * rows) {}

  SignalColumns columns() {
    const std::size_t rows = step.size();
    const auto figure = [&](std::size_t i) { return std::span(figures).subspan(i * rows, rows); };
    return {layer_id,  seed,      step,      time_ns,   figure(0), figure(1),
            figure(2), figure(3), figure(4), figure(5), figure(6), flags};
  }

  std::vector<std::uint32_t> layer_id, flags;
  std::vector<std::int32_t> seed;
  std::vector<std::uint64_t> step, time_ns;
  std::vector<float> figures;
};

SignalRecord record_of(std::uint64_t step) {
  SignalRecord record{};
  record.step = step;
  record.time_ns = step + 1;
  record.mean = static_cast<float>(step % 1000);
  record.latency_ms = record.mean;
  return record;
}

TEST(SignalRing, RoundsItsCapacityUpAndRefusesNonsense) {
  EXPECT_EQ(SignalRing(5).capacity(), 8U);
  EXPECT_THROW(SignalRing(0), InvalidInput);
  EXPECT_THROW(SignalRing((std::size_t{1} << 24U) + 1), InvalidInput);
}

TEST(SignalRing, KeepsOrderAndEveryField) {
  SignalRing ring(4);
  const SignalRecord record{.step = 1,
                            .time_ns = 2,
                            .layer_id = 3,
                            .seed = -1,
                            .mean = 5,
                            .variance = 6,
                            .entropy = 7,
                            .dead_share = 8,
                            .nonfinite_share = 9,
                            .gradient_variance = 10,
                            .latency_ms = 11,
                            .flags = 12};
  ring.push(record);
  ring.push(record_of(100));
  Drained out(4);
  ASSERT_EQ(ring.drain(out.columns()), 2U);
  EXPECT_EQ(out.step, (std::vector<std::uint64_t>{1, 100, 0, 0}));
  EXPECT_EQ(out.time_ns[0], 2U);
  EXPECT_EQ(out.layer_id[0], 3U);
  EXPECT_EQ(out.seed[0], -1);
  for (std::size_t i = 0; i < 7; ++i) EXPECT_EQ(out.figures[4 * i], static_cast<float>(5 + i));
  EXPECT_EQ(out.flags[0], 12U);
}

TEST(SignalRing, DropsTheNewestWhenFullAndCounts) {
  SignalRing ring(2);
  EXPECT_TRUE(ring.push(record_of(1)));
  EXPECT_TRUE(ring.push(record_of(2)));
  EXPECT_FALSE(ring.push(record_of(3)));
  EXPECT_EQ(ring.pushed(), 2U);
  EXPECT_EQ(ring.dropped(), 1U);
  EXPECT_EQ(ring.size(), 2U);
  Drained out(1);
  EXPECT_EQ(ring.drain(out.columns()), 1U);
  EXPECT_EQ(out.step[0], 1U);
  EXPECT_TRUE(ring.push(record_of(4)));
}

TEST(SignalRing, DrainsNothingFromAnEmptyRing) {
  SignalRing ring(2);
  Drained out(8);
  EXPECT_EQ(ring.drain(out.columns()), 0U);
}

TEST(SignalRing, LosesNothingItDoesNotCount) {
  SignalRing ring(64);
  constexpr std::uint64_t kPushes = 20000;
  std::atomic<bool> done{false};
  std::thread producer([&] {
    for (std::uint64_t step = 0; step < kPushes; ++step) ring.push(record_of(step));
    done = true;
  });
  Drained out(16);
  std::uint64_t received = 0;
  std::uint64_t last = 0;
  bool ordered = true;
  bool whole = true;
  while (true) {
    const bool finished = done.load();
    const std::size_t rows = ring.drain(out.columns());
    for (std::size_t row = 0; row < rows; ++row) {
      ordered = ordered && (received + row == 0 || out.step[row] > last);
      last = out.step[row];
      whole = whole && out.time_ns[row] == last + 1 &&
              out.figures[row] == static_cast<float>(last % 1000);
    }
    received += rows;
    if (finished && rows == 0) break;
  }
  producer.join();
  EXPECT_TRUE(ordered);
  EXPECT_TRUE(whole);
  EXPECT_EQ(received, ring.pushed());
  EXPECT_EQ(received + ring.dropped(), kPushes);
}

TEST(SignalRing, SeveralConsumersTakeTurns) {
  SignalRing ring(1 << 14);
  for (std::uint64_t step = 0; step < 10000; ++step) ring.push(record_of(step));
  std::atomic<std::uint64_t> received{0};
  std::atomic<std::uint64_t> sum{0};
  std::vector<std::thread> consumers;
  for (int i = 0; i < 3; ++i) {
    consumers.emplace_back([&] {
      Drained out(64);
      while (const std::size_t rows = ring.drain(out.columns())) {
        received += rows;
        for (std::size_t row = 0; row < rows; ++row) sum += out.step[row];
      }
    });
  }
  for (std::thread& consumer : consumers) consumer.join();
  EXPECT_EQ(received.load(), 10000U);
  EXPECT_EQ(sum.load(), 10000U * 9999U / 2U);
}

}  // namespace
}  // namespace esper
