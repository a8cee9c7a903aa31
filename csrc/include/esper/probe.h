// Statistics of one tensor's values from a bounded sample.
//
// The sample: [0, numel) is cut into `count` strata of equal length (one stratum per element where
// numel <= max_samples, so that the figures are exact), and one element is taken from each, at an
// offset that a fixed hash of the stratum's number chooses. Unlike a constant stride it can't fall
// into step with channels or rows, and the same tensor gives the same figures bit for bit.
//
// Error of the figures for n samples of N values (one standard deviation, at most, for values in no
// special order):
//   mean      sigma / sqrt(n) * sqrt(1 - n/N)
//   variance  sigma^2 * sqrt((kurtosis - 1) / n) * sqrt(1 - n/N)
//   shares    sqrt(p (1 - p) / n) * sqrt(1 - n/N)      <= 0.0079 for n = 4096
//   entropy   about 1 / sqrt(n); its bias is O(1/n^2) after the Miller-Madow correction (occupied
//   bins - 1) / (2n)
//
// Thread-safe (no shared state). The caller keeps the memory alive and unwritten during the call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace esper {

enum class DType : std::uint8_t { FLOAT32, FLOAT16, BFLOAT16, FLOAT64 };

// Throws InvalidInput for any name but 'float32', 'float16', 'bfloat16', 'float64'.
[[nodiscard]] DType dtype_of(std::string_view name);

struct ProbeResult {
  std::size_t count;  // values looked at
  float mean;         // of the finite values; NaN without any, as the next two
  float variance;     // population variance of the finite values
  float entropy;  // nats, of a histogram of 32 equal bins from their minimum to their maximum, at
                  // most ln 32
  float dead_share;  // share of values that are exactly zero; NaN for an empty tensor, as the next
  float nonfinite_share;
};

inline constexpr std::size_t kProbeBins = 32;
inline constexpr std::size_t kProbeDefaultSamples = 4096;
inline constexpr std::size_t kProbeMaxSamples = std::size_t{1} << 20U;

// `data` holds `numel` values without gaps, in any order of axes. Throws InvalidInput for a null
// pointer with numel > 0 and unless 1 <= max_samples <= 2^20.
[[nodiscard]] ProbeResult probe(const std::byte* data, std::size_t numel, DType dtype,
                                std::size_t max_samples = kProbeDefaultSamples);

}  // namespace esper
