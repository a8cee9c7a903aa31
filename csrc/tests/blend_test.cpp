#include "esper/blend.h"

#include <gtest/gtest.h>

#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "blend_contract.h"

namespace esper {
namespace {

struct CpuBlend {
  static std::string skip() { return {}; }
  static void blend(HostBlend& host, DType dtype) {
    const auto deltas = host.delta_addresses();
    esper::blend({address_of(host.h), deltas, address_of(host.alpha), address_of(host.out),
                  host.numel, dtype});
  }
};
INSTANTIATE_TYPED_TEST_SUITE_P(Cpu, BlendContract, CpuBlend);

std::string refusal(const BlendOperands& operands) {
  try {
    blend(operands);
  } catch (const InvalidInput& error) {
    return error.what();
  }
  return "none";
}

TEST(Blend, RefusesWhatItCannotDo) {
  float value = 1;
  const auto at = reinterpret_cast<std::uintptr_t>(&value);
  const std::vector<std::uintptr_t> many(17, at);
  const std::vector<std::uintptr_t> null{0};
  EXPECT_EQ(refusal({at, {}, 0, at, 1, DType::FLOAT64}),
            "dtype must be 'float32', 'float16' or 'bfloat16', got 'float64'");
  EXPECT_EQ(refusal({at, many, at, at, 1, DType::FLOAT32}), "deltas must be at most 16, got 17");
  const std::string no_address = "operands must have an address each, got a null pointer";
  EXPECT_EQ(refusal({0, {}, 0, at, 1, DType::FLOAT32}), no_address);
  EXPECT_EQ(refusal({at, null, at, at, 1, DType::FLOAT32}), no_address);
  EXPECT_EQ(refusal({at, {many.data(), 1}, 0, at, 1, DType::FLOAT32}), no_address);
  EXPECT_EQ(refusal({0, {}, 0, 0, 0, DType::FLOAT32}), "none");
}

// What torch computes: each product and each sum rounded to float32, in order.
std::vector<float> in_order(const std::vector<float>& h,
                            const std::vector<std::vector<float>>& deltas,
                            const std::vector<float>& alphas) {
  std::vector<float> out = h;
  for (std::size_t k = 0; k < deltas.size(); ++k) {
    for (std::size_t i = 0; i < h.size(); ++i) {
      volatile float share = deltas[k][i] * alphas[k];
      out[i] = out[i] + share;
    }
  }
  return out;
}

TEST(BlendChecked, GivesTheSumToTheBitAndSeesOneBadValueAtEveryPlace) {
  std::mt19937 engine(11);
  std::normal_distribution<float> draw;
  for (const std::size_t numel : {1U, 5U, 1023U, 1024U, 1025U, 5000U}) {
    std::vector<float> h(numel), out(numel);
    std::vector<std::vector<float>> deltas(3, std::vector<float>(numel));
    for (float& value : h) value = draw(engine);
    for (auto& delta : deltas) {
      for (float& value : delta) value = draw(engine);
    }
    const std::vector<float> alphas{0.25F, 1.0F, 0.0F};
    const std::vector<WeightedDelta> weighted{{address_of(deltas[0]), address_of(alphas)},
                                              {address_of(deltas[1]), 0},
                                              {address_of(deltas[2]), address_of(alphas) + 8}};
    EXPECT_TRUE(blend_checked(address_of(h), weighted, address_of(out), numel));
    EXPECT_EQ(out, in_order(h, deltas, alphas));
    for (std::size_t place = 0; place < numel; place += place < 8 ? 1 : 211) {
      const float kept = std::exchange(deltas[2][place], std::numeric_limits<float>::infinity());
      EXPECT_FALSE(blend_checked(address_of(h), weighted, address_of(out), numel))
          << "an alpha of 0 hides nothing, at " << place << " of " << numel;
      deltas[2][place] = kept;
    }
  }
}

TEST(BlendChecked, LargeFiniteValuesAreFinite) {
  const std::vector<float> h(3000, std::numeric_limits<float>::max());
  std::vector<float> out(h.size());
  EXPECT_TRUE(blend_checked(address_of(h), {}, address_of(out), h.size()));
  EXPECT_EQ(out, h);
}

TEST(BlendChecked, RefusesNullAddresses) {
  std::vector<float> value{1.0F};
  const auto at = address_of(value);
  const std::vector<WeightedDelta> null{{0, at}};
  EXPECT_TRUE(blend_checked(0, {}, 0, 0));
  EXPECT_THROW((void)blend_checked(0, {}, at, 1), InvalidInput);
  EXPECT_THROW((void)blend_checked(at, {}, 0, 1), InvalidInput);
  EXPECT_THROW((void)blend_checked(at, null, at, 1), InvalidInput);
}

TEST(AllFinite, FindsOneValueAtAnyPlaceOfAnyArray) {
  for (const std::size_t numel : {1U, 7U, 64U, 1023U}) {
    std::vector<std::vector<float>> values(
        3, std::vector<float>(numel, std::numeric_limits<float>::max()));
    std::vector<FloatArray> arrays;
    for (const auto& one : values) arrays.push_back({address_of(one), one.size()});
    EXPECT_TRUE(all_finite(arrays));
    for (auto& one : values) {
      for (std::size_t place = 0; place < numel; place += place < 8 ? 1 : 97) {
        for (const float bad :
             {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
              std::numeric_limits<float>::quiet_NaN()}) {
          const float kept = std::exchange(one[place], bad);
          EXPECT_FALSE(all_finite(arrays)) << bad << " at " << place << " of " << numel;
          one[place] = kept;
        }
      }
    }
  }
}

TEST(AllFinite, OfNothingIsTrueAndNullIsRefused) {
  EXPECT_TRUE(all_finite({}));
  EXPECT_TRUE(all_finite(std::vector<FloatArray>{{0, 0}}));
  EXPECT_THROW((void)all_finite(std::vector<FloatArray>{{0, 1}}), InvalidInput);
}

TEST(Blend, OnADeviceRefusesTheSame) {
  EXPECT_THROW(cuda_blend({0, {}, 0, 0, 1, DType::FLOAT64}, 0, 0), InvalidInput);
  if (cuda_available()) {
    EXPECT_THROW(cuda_blend({0, {}, 0, 0, 0, DType::FLOAT32}, 9999, 0), InvalidInput);
  } else {
    EXPECT_THROW(cuda_blend({0, {}, 0, 0, 0, DType::FLOAT32}, 0, 0), DeviceError);
  }
}

}  // namespace
}  // namespace esper
