#include "esper/probe.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "esper/errors.h"
#include "esper/probe_moments.h"

namespace esper {
namespace {

template <class T>
ProbeResult probe_of(const std::vector<T>& values, DType dtype,
                     std::size_t max_samples = kProbeDefaultSamples) {
  return probe(reinterpret_cast<const std::byte*>(values.data()), values.size(), dtype,
               max_samples);
}

std::vector<float> normal(std::size_t count, float mean, float deviation) {
  std::mt19937 engine(7);
  std::normal_distribution<float> draw(mean, deviation);
  std::vector<float> values(count);
  for (float& value : values) value = draw(engine);
  return values;
}

TEST(Probe, IsExactWithoutSampling) {
  const ProbeResult r = probe_of(std::vector<float>{0, 1, 2, 3}, DType::FLOAT32);
  EXPECT_EQ(r.count, 4U);
  EXPECT_FLOAT_EQ(r.mean, 1.5F);
  EXPECT_FLOAT_EQ(r.variance, 1.25F);
  EXPECT_FLOAT_EQ(r.dead_share, 0.25F);
  EXPECT_FLOAT_EQ(r.nonfinite_share, 0.0F);
  // Four occupied bins of four values: ln 4, corrected by 3 / 8.
  EXPECT_FLOAT_EQ(r.entropy, std::log(4.0F) + 0.375F);
}

TEST(Probe, SaysNothingAboutNothing) {
  const ProbeResult r = probe(nullptr, 0, DType::FLOAT32);
  EXPECT_EQ(r.count, 0U);
  EXPECT_TRUE(std::isnan(r.mean));
  EXPECT_TRUE(std::isnan(r.dead_share));
}

TEST(Probe, CountsNonFiniteApart) {
  const float inf = std::numeric_limits<float>::infinity();
  const ProbeResult r =
      probe_of(std::vector<float>{1, inf, std::nanf(""), 3, -inf}, DType::FLOAT32);
  EXPECT_FLOAT_EQ(r.nonfinite_share, 0.6F);
  EXPECT_FLOAT_EQ(r.mean, 2.0F);
  EXPECT_FLOAT_EQ(r.variance, 1.0F);
  const ProbeResult none = probe_of(std::vector<float>{inf, inf}, DType::FLOAT32);
  EXPECT_FLOAT_EQ(none.nonfinite_share, 1.0F);
  EXPECT_TRUE(std::isnan(none.mean));
  EXPECT_TRUE(std::isnan(none.entropy));
}

TEST(Probe, AConstantHasNoEntropy) {
  const ProbeResult r = probe_of(std::vector<float>(100, 2.5F), DType::FLOAT32);
  EXPECT_FLOAT_EQ(r.entropy, 0.0F);
  EXPECT_FLOAT_EQ(r.variance, 0.0F);
}

TEST(Probe, SurvivesTheWholeRangeOfAType) {
  const float most = std::numeric_limits<float>::max();
  const float least = std::numeric_limits<float>::denorm_min();
  EXPECT_TRUE(std::isfinite(probe_of(std::vector<float>{-most, most}, DType::FLOAT32).entropy));
  EXPECT_TRUE(std::isfinite(probe_of(std::vector<float>{0, least}, DType::FLOAT32).entropy));
  const double edge = std::numeric_limits<double>::max();
  EXPECT_TRUE(std::isfinite(probe_of(std::vector<double>{-edge, edge}, DType::FLOAT64).entropy));
}

TEST(Probe, SampledFiguresKeepTheirDocumentedError) {
  const std::vector<float> values = normal(1000000, 0.5F, 2.0F);
  const ProbeResult r = probe_of(values, DType::FLOAT32);
  const float n = 4096;
  EXPECT_EQ(r.count, 4096U);
  EXPECT_NEAR(r.mean, 0.5F, 4 * 2 / std::sqrt(n));
  EXPECT_NEAR(r.variance, 4.0F, 4 * 4 * std::sqrt(2 / n));
  const ProbeResult exact = probe_of(values, DType::FLOAT32, kProbeMaxSamples);
  EXPECT_EQ(exact.count, values.size());
}

TEST(Probe, EntropyOfAUniformTensorIsLog32) {
  std::vector<float> values(100000);
  std::iota(values.begin(), values.end(), 0.0F);
  EXPECT_NEAR(probe_of(values, DType::FLOAT32).entropy, std::log(32.0F), 4 / 64.0);
}

// A constant stride of 256 over rows of 256 would look at one column for ever.
TEST(Probe, DoesNotFallIntoStepWithColumns) {
  std::vector<float> values(4096 * 256, 0.0F);
  for (std::size_t i = 0; i < values.size(); i += 2) values[i] = 1.0F;
  EXPECT_NEAR(probe_of(values, DType::FLOAT32).dead_share, 0.5F, 4 * 0.0079F);
  std::vector<float> one_column(4096 * 256, 1.0F);
  for (std::size_t i = 0; i < one_column.size(); i += 256) one_column[i] = 0.0F;
  EXPECT_NEAR(probe_of(one_column, DType::FLOAT32).dead_share, 1.0F / 256, 4 * 0.001F);
}

TEST(Probe, StrataCoverEveryElementOnce) {
  const std::size_t numel = 10007;
  const std::size_t count = 100;
  std::size_t previous = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t index = probe_index(i, count, numel);
    const std::size_t begin = i * (numel / count) + std::min(i, numel % count);
    EXPECT_GE(index, begin);
    EXPECT_LT(index, begin + numel / count + (i < numel % count ? 1 : 0));
    EXPECT_TRUE(i == 0 || index > previous);
    previous = index;
  }
  EXPECT_EQ(probe_index(5, 9, 9), 5U);
}

TEST(Probe, LooksAtTheElementsThatItsDefinitionNames) {
  const std::vector<float> values = normal(100003, 1.0F, 1.0F);
  double sum = 0;
  for (std::size_t i = 0; i < 1000; ++i) {
    sum += static_cast<double>(values[probe_index(i, 1000, values.size())]);
  }
  EXPECT_FLOAT_EQ(probe_of(values, DType::FLOAT32, 1000).mean, static_cast<float>(sum / 1000));
}

TEST(Probe, ReadsHalfPrecision) {
  // 1, -2, 65504 (the largest), 2^-24 (the smallest), -0, infinity.
  const std::vector<std::uint16_t> halves{0x3C00, 0xC000, 0x7BFF, 0x0001, 0x8000, 0x7C00};
  const ProbeResult r = probe_of(halves, DType::FLOAT16);
  EXPECT_FLOAT_EQ(r.nonfinite_share, 1.0F / 6);
  EXPECT_FLOAT_EQ(r.dead_share, 1.0F / 6);
  EXPECT_FLOAT_EQ(r.mean, (1 - 2 + 65504 + std::ldexp(1.0F, -24)) / 5);
  // 1, -2, NaN in bfloat16.
  const std::vector<std::uint16_t> brains{0x3F80, 0xC000, 0x7FC0};
  EXPECT_FLOAT_EQ(probe_of(brains, DType::BFLOAT16).mean, -0.5F);
  EXPECT_FLOAT_EQ(probe_of(brains, DType::BFLOAT16).nonfinite_share, 1.0F / 3);
}

TEST(Probe, RefusesBadInput) {
  EXPECT_THROW((void)probe(nullptr, 1, DType::FLOAT32), InvalidInput);
  EXPECT_THROW((void)probe_of(std::vector<float>{1}, DType::FLOAT32, 0), InvalidInput);
  EXPECT_THROW((void)probe_of(std::vector<float>{1}, DType::FLOAT32, kProbeMaxSamples + 1),
               InvalidInput);
  EXPECT_THROW((void)dtype_of("int8"), InvalidInput);
}

}  // namespace
}  // namespace esper
