#include "esper/state_layout.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "esper/checksum.h"
#include "esper/errors.h"

namespace esper {
namespace {

std::span<const std::byte> bytes_of(const std::string& text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

TEST(Checksum, MatchesPublishedVectors) {
  EXPECT_EQ(xxh64(bytes_of("")), 0xEF46DB3751D8E999ULL);
  EXPECT_EQ(xxh64(bytes_of("a")), 0xD24EC4F1A98C6E5BULL);
  EXPECT_EQ(xxh64(bytes_of("abc")), 0x44BC2CF5AD770999ULL);
  EXPECT_EQ(xxh64(bytes_of("Nobody inspects the spammish repetition")), 0xFBCEA83C8A378BF1ULL);
}

TEST(Checksum, FoldSeesEveryBitAndTheLength) {
  std::vector<std::byte> data(201);
  for (std::size_t i = 0; i < data.size(); ++i) data[i] = static_cast<std::byte>(i * 37);
  for (const std::size_t size : {1UL, 8UL, 63UL, 64UL, 65UL, 128UL, 201UL}) {
    const std::span<const std::byte> part = std::span(data).first(size);
    const std::uint64_t sum = fold64(part);
    for (std::size_t bit = 0; bit < 8 * size; ++bit) {
      data[bit / 8] ^= static_cast<std::byte>(1U << (bit % 8));
      EXPECT_NE(fold64(part), sum) << size << " bytes, bit " << bit;
      data[bit / 8] ^= static_cast<std::byte>(1U << (bit % 8));
    }
    EXPECT_EQ(fold64(part), sum);
  }
  const std::vector<std::byte> zeros(130);
  std::vector<std::uint64_t> sums;
  for (std::size_t size = 0; size <= zeros.size(); ++size) {
    sums.push_back(fold64(std::span(zeros).first(size)));
  }
  std::sort(sums.begin(), sums.end());
  EXPECT_EQ(std::adjacent_find(sums.begin(), sums.end()), sums.end()) << "zeros at the end count";
}

TEST(Checksum, FoldSeesBlocksThatChangePlaces) {
  std::vector<std::byte> data(256);
  for (std::size_t i = 0; i < data.size(); ++i) data[i] = static_cast<std::byte>(i);
  std::vector<std::byte> swapped = data;
  std::swap_ranges(swapped.begin(), swapped.begin() + 64, swapped.begin() + 128);
  EXPECT_NE(fold64(data), fold64(swapped));
}

TEST(Checksum, FoldStaysWhatItIs) {  // snapshots on disk depend on it
  EXPECT_EQ(fold64(bytes_of("")), 0x6628F09E59CCEE70ULL);
  EXPECT_EQ(fold64(bytes_of("abc")), 0x6C69C8D3355372F8ULL);
  EXPECT_EQ(fold64(bytes_of(std::string(100, 'x'))), 0xFD8A94A2E8A0DCA7ULL);
}

TEST(StateLayout, StartsDormantAndUnmeasured) {
  const StateLayout layout(3);
  EXPECT_EQ(layout.num_seeds(), 3U);
  EXPECT_EQ(layout.capacity(), 6U);
  const SeedRecord record = layout.read(2);
  EXPECT_EQ(record.state, SeedState::DORMANT);
  EXPECT_EQ(record.health_count, 0U);
  EXPECT_TRUE(std::isnan(record.mean));
  EXPECT_TRUE(std::isnan(record.latency_ms));
}

TEST(StateLayout, AlignsColumnsTo64Bytes) {
  const StateLayout layout(5, 13);
  for_each_column(layout.columns(), []<class T>(std::span<T> column) {
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(column.data()) % 64, 0U);
    EXPECT_EQ(column.size(), 13U);
  });
}

TEST(StateLayout, WalksALifeAndRefusesAShortcut) {
  StateLayout layout(2);
  layout.transition(1, SeedState::LOADING, 10);
  layout.transition(1, SeedState::ACTIVE, 11);
  EXPECT_EQ(layout.state(1), SeedState::ACTIVE);
  EXPECT_EQ(layout.read(1).last_transition_step, 11U);
  EXPECT_THROW(layout.transition(1, SeedState::DORMANT, 12), InvalidTransition);
  EXPECT_THROW(layout.transition(1, static_cast<SeedState>(99), 12), InvalidInput);
  EXPECT_EQ(layout.read(1).last_transition_step, 11U);
  EXPECT_EQ(layout.state(0), SeedState::DORMANT);
}

TEST(StateLayout, RefusesUnknownSeedsAndBadValues) {
  StateLayout layout(2);
  EXPECT_THROW((void)layout.read(2), InvalidInput);
  EXPECT_THROW(layout.count_forward(2), InvalidInput);
  EXPECT_THROW(layout.set_alpha(0, 1.5F), InvalidInput);
  EXPECT_THROW(layout.set_alpha(0, std::nanf("")), InvalidInput);
  EXPECT_THROW(StateLayout(5, 4), InvalidInput);
  EXPECT_THROW(StateLayout(1, (std::size_t{1} << 32U) + 1), InvalidInput);
}

TEST(StateLayout, GrowsWithoutMovingAndThenRefuses) {
  StateLayout layout(2, 4);
  const std::uint8_t* before = layout.columns().lifecycle_states.data();
  layout.transition(0, SeedState::LOADING, 1);
  EXPECT_EQ(layout.add_seeds(2), 2U);
  EXPECT_EQ(layout.columns().lifecycle_states.data(), before);
  EXPECT_EQ(layout.state(0), SeedState::LOADING);
  EXPECT_EQ(layout.state(3), SeedState::DORMANT);
  EXPECT_THROW(layout.add_seeds(1), CapacityExceeded);
  EXPECT_EQ(layout.num_seeds(), 4U);
}

TEST(StateLayout, AveragesHealthExponentially) {
  StateLayout layout(1);
  const float not_measured = std::nanf("");
  layout.record_health(0, {1.0F, 4.0F, 2.0F, not_measured, 5.0F});
  layout.record_health(0, {3.0F, 4.0F, not_measured, not_measured, 7.0F});
  const SeedRecord record = layout.read(0);
  EXPECT_EQ(record.health_count, 2U);
  EXPECT_FLOAT_EQ(record.mean, 2.0F);
  EXPECT_FLOAT_EQ(record.m2, 5.0F);  // 4 within + 1 between the two means
  EXPECT_FLOAT_EQ(record.entropy, 2.0F);
  EXPECT_TRUE(std::isnan(record.gradient_variance));
  EXPECT_FLOAT_EQ(record.latency_ms, 6.0F);
}

TEST(StateLayout, HealthForgetsWithItsWeight) {
  StateLayout layout(1);
  for (int i = 0; i < 1000; ++i) layout.record_health(0, {0.0F, 1.0F, 1.0F, 1.0F, 1.0F});
  layout.record_health(0, {1.0F, 1.0F, 1.0F, 1.0F, 1.0F});
  EXPECT_NEAR(layout.read(0).mean, StateLayout::kHealthWeight, 1e-6F);
}

TEST(StateLayout, SnapshotRestoresEverything) {
  StateLayout layout(3, 8);
  layout.transition(1, SeedState::LOADING, 42);
  layout.set_kernel(1, 77, 88);
  layout.set_alpha(1, 0.25F);
  layout.count_error(2);
  layout.record_health(2, {1.0F, 2.0F, 3.0F, 4.0F, 5.0F});
  StateLayout other(1, 4);
  other.restore(layout.snapshot());
  EXPECT_EQ(other.num_seeds(), 3U);
  EXPECT_EQ(other.snapshot(), layout.snapshot());
  EXPECT_EQ(other.read(1).blueprint_id, 88U);
}

TEST(StateLayout, RestoreRefusesEveryFlippedBit) {
  StateLayout layout(2);
  layout.transition(0, SeedState::LOADING, 3);
  const std::vector<std::byte> good = layout.snapshot();
  StateLayout target(2);
  const std::vector<std::byte> before = target.snapshot();
  for (std::size_t i = 0; i < good.size() * 8; ++i) {
    std::vector<std::byte> bad = good;
    bad[i / 8] ^= std::byte{1} << static_cast<int>(i % 8);
    EXPECT_THROW(target.restore(bad), CorruptData) << "bit " << i;
  }
  for (std::size_t size = 0; size < good.size(); ++size) {
    EXPECT_THROW(target.restore(std::span(good).first(size)), CorruptData);
  }
  EXPECT_EQ(target.snapshot(), before);
}

// Version 2 differs in the checksum of what follows the header of 32 bytes: XXH64.
TEST(StateLayout, RestoreTakesTheVersionBefore) {
  StateLayout layout(3);
  layout.transition(1, SeedState::LOADING, 42);
  std::vector<std::byte> older = layout.snapshot();
  const auto put = [&older](std::size_t at, auto value) {
    std::memcpy(older.data() + at, &value, sizeof value);
  };
  put(8, std::uint32_t{2});
  put(24, xxh64(std::span(older).subspan(32)));
  put(24, xxh64(std::span(older).first(32)));
  StateLayout other(3);
  other.restore(older);
  EXPECT_EQ(other.snapshot(), layout.snapshot());
  older.back() ^= std::byte{1};
  EXPECT_THROW(other.restore(older), CorruptData);
  for (const std::uint32_t version : {1U, 4U}) {
    put(8, version);
    EXPECT_THROW(other.restore(older), CorruptData);
  }
}

TEST(StateLayout, RestoreRefusesOtherSizes) {
  const StateLayout big(5);
  StateLayout narrow(1, 4);
  EXPECT_THROW(narrow.restore(big.snapshot()), CapacityExceeded);
  StateLayout longer(6);
  EXPECT_THROW(longer.restore(big.snapshot()), InvalidState);
}

// The writer keeps four fields of a seed equal; no reader may ever see two of them differ.
TEST(StateLayout, ReadersNeverSeeATornRecord) {
  StateLayout layout(1, 1);
  std::atomic<bool> done{false};
  std::atomic<std::uint64_t> torn{0};
  std::vector<std::thread> readers;
  for (int i = 0; i < 3; ++i) {
    readers.emplace_back([&] {
      while (!done.load()) {
        const SeedRecord record = layout.read(0);
        if (record.kernel_id != record.blueprint_id) ++torn;
      }
    });
  }
  for (std::uint64_t i = 1; i <= 20000; ++i) {
    layout.set_kernel(0, i, i);
    layout.count_forward(0);
  }
  done = true;
  for (std::thread& reader : readers) reader.join();
  EXPECT_EQ(torn.load(), 0U);
  EXPECT_EQ(layout.read(0).forwards, 20000U);
}

TEST(StateLayout, ReadersMayWatchGrowthAndRestore) {
  StateLayout layout(1, 64);
  StateLayout source(64, 64);
  for (std::size_t seed = 0; seed < 64; ++seed) source.set_kernel(seed, 5, 5);
  const std::vector<std::byte> snapshot = source.snapshot();
  std::atomic<bool> done{false};
  std::atomic<std::uint64_t> torn{0};
  std::thread reader([&] {
    while (!done.load()) {
      const SeedRecord record = layout.read(layout.num_seeds() - 1);
      if (record.kernel_id != record.blueprint_id) ++torn;
    }
  });
  while (layout.num_seeds() < 64) {
    const std::size_t seed = layout.add_seeds(1);
    layout.set_kernel(seed, seed, seed);
  }
  for (int i = 0; i < 50; ++i) {
    layout.restore(snapshot);
    layout.set_kernel(63, 9, 9);
  }
  done = true;
  reader.join();
  EXPECT_EQ(torn.load(), 0U);
}

TEST(StateLayout, KeepsAllColumnsInOneAllocation) {
  const StateLayout layout(5, 13);
  std::uintptr_t lowest = ~std::uintptr_t{0};
  std::uintptr_t highest = 0;
  std::size_t bytes = 0;
  for_each_column(layout.columns(), [&]<class T>(std::span<T> column) {
    const auto first = reinterpret_cast<std::uintptr_t>(column.data());
    lowest = std::min(lowest, first);
    highest = std::max(highest, first + column.size_bytes());
    bytes += (column.size_bytes() + 63) / 64 * 64;
  });
  EXPECT_LE(highest - lowest, bytes);
  EXPECT_LE(StateLayout::bytes_per_seed(), 128U);
}

TEST(StateLayout, WindowsAverageWholeWindowsOnly) {
  StateLayout layout(1);
  const float not_measured = std::nanf("");
  for (std::uint32_t i = 1; i < StateLayout::kHealthWindow; ++i) {
    layout.record_health(0, {1.0F, 2.0F, i % 2 == 0 ? 4.0F : not_measured, not_measured, 8.0F});
  }
  EXPECT_TRUE(std::isnan(layout.read(0).window_mean));
  layout.record_health(0, {65.0F, 2.0F, 4.0F, not_measured, 8.0F});
  const SeedRecord full = layout.read(0);
  EXPECT_FLOAT_EQ(full.window_mean, 2.0F);
  EXPECT_NEAR(full.window_m2, 2.0F + 64.0F * 64.0F * 63.0F / (64.0F * 64.0F), 1e-3F);
  EXPECT_FLOAT_EQ(full.window_entropy, 4.0F);
  EXPECT_TRUE(std::isnan(full.window_gradient_variance));
  EXPECT_FLOAT_EQ(full.window_latency_ms, 8.0F);
  for (std::uint32_t i = 1; i < StateLayout::kHealthWindow; ++i) {
    layout.record_health(0, {9.0F, 1.0F, 9.0F, 9.0F, 9.0F});
  }
  EXPECT_FLOAT_EQ(layout.read(0).window_mean, 2.0F);
  layout.record_health(0, {9.0F, 1.0F, 9.0F, 9.0F, 9.0F});
  EXPECT_FLOAT_EQ(layout.read(0).window_mean, 9.0F);
  EXPECT_FLOAT_EQ(layout.read(0).window_m2, 1.0F);
}

TEST(StateLayout, HealthCountsNeverWrapToNothing) {
  StateLayout layout(1);
  layout.columns().health_counts[0] = std::numeric_limits<std::uint32_t>::max();
  layout.record_health(0, {1.0F, 1.0F, 1.0F, 1.0F, 1.0F});
  EXPECT_EQ(layout.read(0).health_count, std::numeric_limits<std::uint32_t>::max() - 63);
}

TEST(StateLayout, ReadsAllRecords) {
  StateLayout layout(3);
  layout.set_kernel(2, 7, 7);
  std::vector<SeedRecord> records(3);
  layout.read_all(records);
  EXPECT_EQ(records[2].kernel_id, 7U);
  EXPECT_EQ(records[1].state, SeedState::DORMANT);
  std::vector<SeedRecord> many(4);
  EXPECT_THROW(layout.read_all(many), InvalidInput);
}

// Whatever the writer does keeps these figures equal to one another.
bool is_whole(const SeedRecord& record) {
  const auto same = [](float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); };
  return record.kernel_id == record.blueprint_id && same(record.mean, record.entropy) &&
         same(record.mean, record.latency_ms) && same(record.mean, record.gradient_variance) &&
         same(record.window_mean, record.window_entropy) &&
         same(record.window_mean, record.window_latency_ms) &&
         record.errors == record.fallbacks / 2;
}

TEST(StateLayout, OneWriterAndManyReadersOfEverything) {
  constexpr std::size_t kSeeds = 4;
  StateLayout layout(kSeeds);
  std::atomic<bool> done{false};
  std::atomic<std::uint64_t> torn{0};
  std::vector<std::thread> readers;
  for (std::size_t i = 0; i < 4; ++i) {
    readers.emplace_back([&, i] {
      std::vector<SeedRecord> records(kSeeds);
      while (!done.load()) {
        if (!is_whole(layout.read(i % kSeeds))) ++torn;
        layout.read_all(records);
        for (const SeedRecord& record : records) torn += is_whole(record) ? 0 : 1;
      }
    });
  }
  constexpr std::array kLife{SeedState::LOADING,    SeedState::ACTIVE, SeedState::EVALUATING,
                             SeedState::FOSSILIZED, SeedState::CULLED, SeedState::EMBARGOED,
                             SeedState::DORMANT};
  for (std::uint64_t i = 1; i <= 4000; ++i) {
    const std::size_t seed = i % kSeeds;
    const auto value = static_cast<float>(i);
    layout.record_health(seed, {value, 1.0F, value, value, value});
    layout.set_kernel(seed, i, i);
    for (const SeedState state : kLife) layout.transition(seed, state, i);
    if (i % 500 == 0) layout.restore(layout.snapshot());
  }
  done = true;
  for (std::thread& reader : readers) reader.join();
  EXPECT_EQ(torn.load(), 0U);
  EXPECT_EQ(layout.read(0).last_transition_step, 4000U);
}

}  // namespace
}  // namespace esper
