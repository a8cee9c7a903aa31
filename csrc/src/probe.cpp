#include "esper/probe.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "esper/errors.h"

namespace esper {
namespace {

struct Float32 {
  using Storage = float;
  using Value = float;
  static float widen(float stored) noexcept { return stored; }
};

struct Float64 {
  using Storage = double;
  using Value = double;
  static double widen(double stored) noexcept { return stored; }
};

struct BFloat16 {
  using Storage = std::uint16_t;
  using Value = float;
  static float widen(std::uint16_t stored) noexcept {
    return std::bit_cast<float>(static_cast<std::uint32_t>(stored) << 16U);
  }
};

struct Float16 {
  using Storage = std::uint16_t;
  using Value = float;
  static float widen(std::uint16_t stored) noexcept {
    const std::uint32_t sign = (stored & 0x8000U) << 16U;
    const std::uint32_t magnitude = stored & 0x7FFFU;
    if (magnitude >= 0x7C00U) {  // infinity and NaN
      return std::bit_cast<float>(sign | 0x7F800000U | (magnitude & 0x3FFU) << 13U);
    }
    // The half's bits at the place of a float's are 2^112 too small; subnormals come out right as
    // well.
    const float scaled = std::bit_cast<float>(magnitude << 13U) * 0x1p112F;
    return std::bit_cast<float>(std::bit_cast<std::uint32_t>(scaled) | sign);
  }
};

template <class Value>
struct Gathered {
  std::vector<Value>& finite;
  std::size_t num_dead = 0;
};

// One buffer per thread and type, so that probing allocates once.
template <class Value>
std::vector<Value>& buffer(std::size_t count) {
  thread_local std::vector<Value> values;
  values.resize(count);
  return values;
}

template <class Type>
Gathered<typename Type::Value> gather(const std::byte* data, std::size_t numel, std::size_t count) {
  using Storage = typename Type::Storage;
  using Value = typename Type::Value;
  std::vector<Value>& finite = buffer<Value>(count);
  std::size_t num_finite = 0;
  std::size_t num_dead = 0;
  for (std::size_t i = 0; i < count; ++i) {
    Storage stored;
    std::memcpy(&stored, data + probe_index(i, count, numel) * sizeof(Storage), sizeof stored);
    const Value value = Type::widen(stored);
    finite[num_finite] = value;
    num_finite += std::isfinite(value) ? 1 : 0;
    num_dead += value == Value{0} ? 1 : 0;
  }
  finite.resize(num_finite);
  return {finite, num_dead};
}

template <class Value>
double entropy_of(const std::vector<Value>& values, Value low, Value high) {
  // Halved before subtracting: the range of finite values may itself overflow.
  const double half_range = static_cast<double>(high) / 2 - static_cast<double>(low) / 2;
  if (!(half_range > 0)) return 0;
  std::array<std::uint32_t, kProbeBins> bins{};
  const double scale = static_cast<double>(kProbeBins) / 2 / half_range;
  if (!std::isfinite(scale)) return 0;
  const double offset = static_cast<double>(low) * scale;
  for (const Value value : values) {
    const auto bin = static_cast<std::size_t>(
        std::clamp(static_cast<double>(value) * scale - offset, 0.0, kProbeBins - 1.0));
    ++bins[bin];
  }
  const auto n = static_cast<double>(values.size());
  double entropy = 0;
  double occupied = 0;
  for (const std::uint32_t in_bin : bins) {
    if (in_bin == 0) continue;
    const double share = in_bin / n;
    entropy -= share * std::log(share);
    occupied += 1;
  }
  return std::min(entropy + (occupied - 1) / (2 * n), std::log(static_cast<double>(kProbeBins)));
}

template <class Type>
ProbeResult measure(const std::byte* data, std::size_t numel, std::size_t count) {
  using Value = typename Type::Value;
  const auto [values, num_dead] = gather<Type>(data, numel, count);
  constexpr float kNotMeasured = std::numeric_limits<float>::quiet_NaN();
  const auto n = static_cast<float>(count);
  ProbeResult result{
      .count = count,
      .mean = kNotMeasured,
      .variance = kNotMeasured,
      .entropy = kNotMeasured,
      .dead_share = static_cast<float>(num_dead) / n,
      .nonfinite_share = static_cast<float>(count - values.size()) / n,
  };
  if (values.empty()) return result;

  double sum = 0;
  Value low = values.front();
  Value high = values.front();
  for (const Value value : values) {
    sum += static_cast<double>(value);
    low = std::min(low, value);
    high = std::max(high, value);
  }
  const double mean = sum / static_cast<double>(values.size());
  double squares = 0;
  for (const Value value : values) {
    const double deviation = static_cast<double>(value) - mean;
    squares += deviation * deviation;
  }
  result.mean = static_cast<float>(mean);
  result.variance = static_cast<float>(squares / static_cast<double>(values.size()));
  result.entropy = static_cast<float>(entropy_of(values, low, high));
  return result;
}

}  // namespace

DType dtype_of(std::string_view name) {
  if (name == "float32") return DType::FLOAT32;
  if (name == "float16") return DType::FLOAT16;
  if (name == "bfloat16") return DType::BFLOAT16;
  if (name == "float64") return DType::FLOAT64;
  throw InvalidInput("dtype", "be one of 'float32', 'float16', 'bfloat16', 'float64'",
                     "'" + std::string(name) + "'");
}

ProbeResult probe(const std::byte* data, std::size_t numel, DType dtype, std::size_t max_samples) {
  if (max_samples == 0 || max_samples > kProbeMaxSamples) {
    throw InvalidInput("max_samples", "be between 1 and 2^20", std::to_string(max_samples));
  }
  constexpr float kNotMeasured = std::numeric_limits<float>::quiet_NaN();
  if (numel == 0) {
    return {0, kNotMeasured, kNotMeasured, kNotMeasured, kNotMeasured, kNotMeasured};
  }
  if (data == nullptr) {
    throw InvalidInput("data_ptr", "not be null for numel > 0", "0");
  }
  const std::size_t count = std::min(numel, max_samples);
  switch (dtype) {
    case DType::FLOAT32:
      return measure<Float32>(data, numel, count);
    case DType::FLOAT16:
      return measure<Float16>(data, numel, count);
    case DType::BFLOAT16:
      return measure<BFloat16>(data, numel, count);
    case DType::FLOAT64:
      return measure<Float64>(data, numel, count);
  }
  throw InvalidInput("dtype", "be a known DType", std::to_string(static_cast<unsigned>(dtype)));
}

}  // namespace esper
