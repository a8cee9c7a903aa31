#include "esper/blend.h"

#include <gtest/gtest.h>

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
