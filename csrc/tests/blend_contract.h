// What every blend must keep to; the typed suite runs over the CPU's (blend_test.cpp) and the
// device's (cuda_device_test.cpp). Expected bits come from double arithmetic, not from the core.
//
// A fixture gives `skip()` (why it can't run here; empty where it can) and `blend(HostBlend&,
// dtype)`, which leaves the result in `out`.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "esper/blend.h"

namespace esper {

template <class T>
std::uintptr_t address_of(const std::vector<T>& values) {
  return reinterpret_cast<std::uintptr_t>(values.data());
}

// Operands in host memory, as raw bytes of the type.
struct HostBlend {
  std::size_t numel;
  std::vector<std::byte> h;
  std::vector<std::vector<std::byte>> deltas;
  std::vector<float> alpha;
  std::vector<std::byte> out;

  [[nodiscard]] std::vector<std::uintptr_t> delta_addresses() const {
    std::vector<std::uintptr_t> addresses;
    for (const auto& delta : deltas) addresses.push_back(address_of(delta));
    return addresses;
  }
};

// A floating-point type by its shape: `digits` of fraction, exponents down to `lowest` (below it
// values are subnormal).
struct Format {
  DType dtype;
  std::size_t size;
  int digits;
  int lowest;
  double greatest;
};
inline const std::vector<Format> kFormats{
    {DType::FLOAT32, 4, 23, -126, std::numeric_limits<float>::max()},
    {DType::FLOAT16, 2, 10, -14, 65504.0},
    {DType::BFLOAT16, 2, 7, -126, 0x1.FEp127},
};

// The nearest value of the format, ties to even.
inline double rounded(double value, const Format& format) {
  if (!std::isfinite(value) || value == 0) return value;
  const int exponent = std::max(std::ilogb(value), format.lowest);
  const double unit = std::ldexp(1.0, exponent - format.digits);
  const double nearest = std::nearbyint(value / unit) * unit;
  if (std::abs(nearest) > format.greatest) return std::copysign(INFINITY, value);
  return nearest;
}

// Writes a value that the format has.
inline void put(std::vector<std::byte>& to, std::size_t i, double value, const Format& format) {
  const auto wide = static_cast<float>(value);
  auto bits = std::bit_cast<std::uint32_t>(wide);
  if (format.dtype == DType::BFLOAT16) bits >>= 16U;
  if (format.dtype == DType::FLOAT16) {
    const std::uint32_t sign = bits >> 16U & 0x8000U;
    const double magnitude = std::abs(value);
    if (!std::isfinite(value)) {
      bits = sign | (std::isnan(value) ? 0x7E00U : 0x7C00U);
    } else if (magnitude < 0x1p-14) {
      bits = sign | static_cast<std::uint32_t>(magnitude * 0x1p24);
    } else {
      const int exponent = std::ilogb(magnitude);
      const auto fraction = static_cast<std::uint32_t>(std::ldexp(magnitude, 10 - exponent));
      bits = sign | (static_cast<std::uint32_t>(exponent + 15) << 10U) | (fraction & 0x3FFU);
    }
  }
  std::memcpy(to.data() + i * format.size, &bits, format.size);
}

inline double get(const std::vector<std::byte>& from, std::size_t i, const Format& format) {
  std::uint32_t bits = 0;
  std::memcpy(&bits, from.data() + i * format.size, format.size);
  if (format.dtype == DType::FLOAT32) return std::bit_cast<float>(bits);
  if (format.dtype == DType::BFLOAT16) return std::bit_cast<float>(bits << 16U);
  const double sign = (bits & 0x8000U) != 0 ? -1.0 : 1.0;
  const auto exponent = static_cast<int>(bits >> 10U & 0x1FU);
  const double fraction = bits & 0x3FFU;
  if (exponent == 31) return fraction == 0 ? sign * INFINITY : NAN;
  if (exponent == 0) return sign * fraction * 0x1p-24;
  return sign * std::ldexp(1.0 + fraction / 1024.0, exponent - 15);
}

inline HostBlend random_blend(std::size_t numel, std::size_t num_deltas, const Format& format,
                              unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<double> normal;
  const auto values = [&] {
    std::vector<std::byte> bytes(numel * format.size);
    for (std::size_t i = 0; i < numel; ++i) {
      const double scale = std::ldexp(1.0, static_cast<int>(engine() % 40) - 24);
      put(bytes, i, rounded(normal(engine) * scale, format), format);
    }
    return bytes;
  };
  HostBlend host{numel, values(), {}, {}, std::vector<std::byte>(numel * format.size)};
  for (std::size_t k = 0; k < num_deltas; ++k) {
    host.deltas.push_back(values());
    host.alpha.push_back(static_cast<float>(engine() % 1000) / 999.0F);
  }
  return host;
}

// By the header's words: each product and each sum rounded to float32 (a double holds the exact
// product of two, and rounding the exact sum of two floats twice is harmless), then once to the
// format.
inline double expected(const HostBlend& host, std::size_t i, const Format& format) {
  const Format& single = kFormats[0];
  double sum = get(host.h, i, format);
  for (std::size_t k = 0; k < host.deltas.size(); ++k) {
    if (host.alpha[k] == 0) continue;
    sum = rounded(sum + rounded(host.alpha[k] * get(host.deltas[k], i, format), single), single);
  }
  return rounded(sum, format);
}

// Random values may overflow, and infinities cancel to NaN.
inline bool same(double a, double b) {
  return a == b || (std::isnan(a) && std::isnan(b));
}

template <class Fixture>
class BlendContract : public ::testing::Test {
 protected:
  void SetUp() override {
    const std::string reason = Fixture::skip();
    if (!reason.empty()) GTEST_SKIP() << reason;
  }
};

TYPED_TEST_SUITE_P(BlendContract);

TYPED_TEST_P(BlendContract, GivesTheSumToTheBit) {
  unsigned seed = 0;
  for (const Format& format : kFormats) {
    for (const std::size_t numel : {1U, 7U, 8U, 1000U, 4099U}) {
      for (const std::size_t num_deltas : {0U, 1U, 2U, 4U, 16U}) {
        HostBlend host = random_blend(numel, num_deltas, format, ++seed);
        TypeParam::blend(host, format.dtype);
        for (std::size_t i = 0; i < numel; ++i) {
          ASSERT_TRUE(same(get(host.out, i, format), expected(host, i, format)))
              << "value " << i << " of " << numel << ", " << num_deltas << " deltas";
        }
      }
    }
  }
}

TYPED_TEST_P(BlendContract, WithoutAlphaTheHostIsUntouched) {
  for (const Format& format : kFormats) {
    HostBlend host = random_blend(4, 2, format, 1);
    host.alpha = {0.0F, -0.0F};
    put(host.h, 0, -0.0, format);
    put(host.h, 1, INFINITY, format);
    put(host.h, 2, NAN, format);
    for (std::size_t i = 0; i < 4; ++i) put(host.deltas[0], i, NAN, format);
    TypeParam::blend(host, format.dtype);
    EXPECT_EQ(host.out, host.h);
  }
}

TYPED_TEST_P(BlendContract, InfinitiesAndNaNsPassThrough) {
  for (const Format& format : kFormats) {
    HostBlend host = random_blend(3, 1, format, 2);
    host.alpha = {0.5F};
    put(host.deltas[0], 0, INFINITY, format);
    put(host.deltas[0], 1, NAN, format);
    put(host.h, 2, format.greatest, format);
    put(host.deltas[0], 2, format.greatest, format);
    TypeParam::blend(host, format.dtype);
    EXPECT_EQ(get(host.out, 0, format), INFINITY);
    EXPECT_TRUE(std::isnan(get(host.out, 1, format)));
    EXPECT_EQ(get(host.out, 2, format), INFINITY);
  }
}

// Every finite value of a 16-bit type comes back, and the middle between neighbours goes to even.
TYPED_TEST_P(BlendContract, RoundsToNearestEven) {
  for (const Format& format : kFormats) {
    if (format.size != 2) continue;
    constexpr std::size_t kAll = 1U << 15U;
    HostBlend host = random_blend(kAll, 1, format, 3);
    for (std::size_t i = 0; i < kAll; ++i) {
      const auto bits = static_cast<std::uint16_t>(i);
      std::memcpy(host.h.data() + 2 * i, &bits, 2);
      const auto next = static_cast<std::uint16_t>(i + 1);
      std::memcpy(host.deltas[0].data() + 2 * i, &next, 2);
      const double step = get(host.deltas[0], i, format) - get(host.h, i, format);
      put(host.deltas[0], i, std::isfinite(step) ? step : 0.0, format);
    }
    host.alpha = {0.5F};
    TypeParam::blend(host, format.dtype);
    for (std::size_t i = 0; i < kAll; ++i) {
      if (std::isnan(get(host.h, i, format))) continue;
      ASSERT_EQ(get(host.out, i, format), expected(host, i, format)) << "bits " << i;
    }
  }
}

REGISTER_TYPED_TEST_SUITE_P(BlendContract, GivesTheSumToTheBit, WithoutAlphaTheHostIsUntouched,
                            InfinitiesAndNaNsPassThrough, RoundsToNearestEven);

}  // namespace esper
