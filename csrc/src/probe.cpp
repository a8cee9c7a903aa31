#include "esper/probe.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "esper/errors.h"
#include "esper/probe_moments.h"
#include "float_types.h"

namespace esper {
namespace {

constexpr float kNotMeasured = std::numeric_limits<float>::quiet_NaN();

// One buffer per thread and type, so that probing allocates once.
template <class Value>
std::vector<Value>& buffer(std::size_t count) {
  thread_local std::vector<Value> values;
  if (values.size() < count) values.resize(count);
  return values;
}

// Copies strata [first, last), which lie side by side from `data` on, all of one width.
template <class Type>
void take_strata(const std::byte* data, std::size_t first, std::size_t last, std::size_t width,
                 typename Type::Value* values) {
  using Storage = typename Type::Storage;
  for (std::size_t i = first; i < last; ++i, data += width * sizeof(Storage)) {
    Storage stored;
    std::memcpy(&stored, data + probe_offset(i, width) * sizeof(Storage), sizeof stored);
    values[i] = Type::widen(stored);
  }
}

template <class Value>
bool is_finite(Value value) noexcept {
  return std::abs(value) <= std::numeric_limits<Value>::max();
}

// The finite values of the sample (the elements that probe_index names); counts the others and the
// zeros.
template <class Type>
std::span<const typename Type::Value> gather(const std::byte* data, std::size_t numel,
                                             ProbeMoments& moments) {
  using Value = typename Type::Value;
  const std::span<Value> values(buffer<Value>(moments.count).data(), moments.count);
  const std::size_t length = numel / moments.count;
  const std::size_t longer = numel % moments.count;
  const std::byte* rest = data + longer * (length + 1) * sizeof(typename Type::Storage);
  take_strata<Type>(data, 0, longer, length + 1, values.data());
  take_strata<Type>(rest, longer, moments.count, length, values.data());

  for (const Value value : values) {
    moments.num_finite += is_finite(value) ? 1U : 0U;
    moments.num_dead += value == Value{0} ? 1U : 0U;
  }
  if (moments.num_finite < moments.count) {
    std::copy_if(values.begin(), values.end(), values.begin(), is_finite<Value>);
  }
  return values.first(moments.num_finite);
}

// Independent sums hide the latency of one addition; their order is fixed, so the figure is too.
template <class Value, class Term>
double sum_of(std::span<const Value> values, Term&& term) {
  constexpr std::size_t kLanes = 8;
  std::array<double, kLanes> sums{};
  std::size_t i = 0;
  for (; i + kLanes <= values.size(); i += kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) sums[lane] += term(values[i + lane]);
  }
  for (; i < values.size(); ++i) sums[0] += term(values[i]);
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

// The least and the greatest value, in lanes as above.
template <class Value>
std::pair<Value, Value> range_of(std::span<const Value> values) {
  constexpr std::size_t kLanes = 8;
  std::array<Value, kLanes> low;
  low.fill(values.front());
  std::array<Value, kLanes> high = low;
  std::size_t i = 0;
  for (; i + kLanes <= values.size(); i += kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      low[lane] = values[i + lane] < low[lane] ? values[i + lane] : low[lane];
      high[lane] = values[i + lane] > high[lane] ? values[i + lane] : high[lane];
    }
  }
  for (; i < values.size(); ++i) {
    low[0] = std::min(low[0], values[i]);
    high[0] = std::max(high[0], values[i]);
  }
  return {*std::min_element(low.begin(), low.end()), *std::max_element(high.begin(), high.end())};
}

template <class Value>
void fill_bins(std::span<const Value> values, ProbeMoments& moments) {
  const auto [low, high] = range_of(values);
  const ProbeBinning binning =
      ProbeBinning::of(static_cast<double>(low), static_cast<double>(high));
  // A chunk's bins are found first, in vector code; then counted in four histograms, since
  // neighbours often share a bin and the second increment would wait for the first.
  constexpr std::size_t kChunk = 64;
  std::array<std::array<std::uint32_t, kProbeBins>, 4> counts{};
  std::array<std::uint32_t, kChunk> bins;
  for (std::size_t begin = 0; begin < values.size(); begin += kChunk) {
    const auto chunk = values.subspan(begin, std::min(kChunk, values.size() - begin));
    for (std::size_t i = 0; i < chunk.size(); ++i) {
      bins[i] = binning.bin(static_cast<double>(chunk[i]));
    }
    for (std::size_t i = 0; i < chunk.size(); ++i) ++counts[i % counts.size()][bins[i]];
  }
  for (std::size_t bin = 0; bin < kProbeBins; ++bin) {
    for (const auto& histogram : counts) moments.bins[bin] += histogram[bin];
  }
}

template <class Type>
ProbeResult measure(const std::byte* data, std::size_t numel, std::size_t count) {
  ProbeMoments moments{};
  moments.count = count;
  const auto values = gather<Type>(data, numel, moments);
  if (!values.empty()) {
    using Value = typename Type::Value;
    const double mean = sum_of(values, [](Value value) { return static_cast<double>(value); }) /
                        static_cast<double>(values.size());
    moments.mean = mean;
    moments.squares = sum_of(values, [mean](Value value) {
      const double deviation = static_cast<double>(value) - mean;
      return deviation * deviation;
    });
    fill_bins(values, moments);
  }
  return summarize(moments);
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

std::size_t size_of(DType dtype) noexcept {
  return dtype == DType::FLOAT64 ? 8 : dtype == DType::FLOAT32 ? 4 : 2;
}

std::size_t checked_sample_size(const void* data, std::size_t numel, std::size_t max_samples) {
  if (max_samples == 0 || max_samples > kProbeMaxSamples) {
    throw InvalidInput("max_samples", "be between 1 and 2^20", std::to_string(max_samples));
  }
  if (data == nullptr && numel > 0)
    throw InvalidInput("data_ptr", "not be null for numel > 0", "0");
  return std::min(numel, max_samples);
}

ProbeResult summarize(const ProbeMoments& moments) noexcept {
  const auto count = static_cast<float>(moments.count);
  ProbeResult result{
      .count = moments.count,
      .mean = kNotMeasured,
      .variance = kNotMeasured,
      .entropy = kNotMeasured,
      .dead_share = static_cast<float>(moments.num_dead) / count,
      .nonfinite_share = static_cast<float>(moments.count - moments.num_finite) / count,
  };
  if (moments.num_finite == 0) return result;
  const auto n = static_cast<double>(moments.num_finite);
  double entropy = 0;
  double occupied = 0;
  for (const std::uint32_t in_bin : moments.bins) {
    if (in_bin == 0) continue;
    entropy -= in_bin / n * std::log(in_bin / n);
    occupied += 1;
  }
  entropy += (occupied - 1) / (2 * n);
  result.mean = static_cast<float>(moments.mean);
  result.variance = static_cast<float>(moments.squares / n);
  result.entropy = static_cast<float>(std::min(entropy, std::log(static_cast<double>(kProbeBins))));
  return result;
}

ProbeResult probe(const std::byte* data, std::size_t numel, DType dtype, std::size_t max_samples) {
  const std::size_t count = checked_sample_size(data, numel, max_samples);
  if (count == 0) {
    return {0, kNotMeasured, kNotMeasured, kNotMeasured, kNotMeasured, kNotMeasured};
  }
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
