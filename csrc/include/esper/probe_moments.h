// What the CPU and the CUDA probe have in common: which elements are looked at, how they are
// binned, and what the figures are made of. Everything here compiles for both.
#pragma once

#include <cstddef>
#include <cstdint>

#include "esper/probe.h"

namespace esper {

// Raw figures of one sample; a float is finite here if it is neither infinite nor NaN.
struct ProbeMoments {
  std::uint64_t count;
  std::uint64_t num_finite;
  std::uint64_t num_dead;
  double mean;     // of the finite values; unused without any, as the next
  double squares;  // sum of squared deviations from the mean
  std::uint32_t bins[kProbeBins];
};

// 32 equal bins from `low` to `high`; one bin where the range is empty or too small to divide.
// Halves are taken first because the range of finite values may itself overflow.
struct ProbeBinning {
  double half_low;
  double scale;

  static constexpr ProbeBinning of(double low, double high) noexcept {
    const double half_range = high * 0.5 - low * 0.5;
    constexpr double kSmallestRange = 1e-300;
    return {low * 0.5, half_range > kSmallestRange ? kProbeBins / half_range : 0.0};
  }

  [[nodiscard]] constexpr std::uint32_t bin(double value) const noexcept {
    // Through a signed number: compilers turn only that conversion into vector code.
    const auto at = static_cast<std::int32_t>((value * 0.5 - half_low) * scale);
    constexpr auto kLast = static_cast<std::int32_t>(kProbeBins) - 1;
    return static_cast<std::uint32_t>(at < kLast ? at : kLast);
  }
};

// Where inside a stratum of `width` elements the sample lies: Fibonacci hashing, the top 32 bits of
// number * 2^64/phi, scaled.
[[nodiscard]] constexpr std::size_t probe_offset(std::size_t stratum, std::size_t width) noexcept {
  const std::uint64_t hash = ((stratum + 1) * 0x9E3779B97F4A7C15ULL) >> 32U;
  return static_cast<std::size_t>((hash * width) >> 32U);
}

// The index of the sample's `stratum`-th element. The first numel % count strata have one element
// more than the others.
[[nodiscard]] constexpr std::size_t probe_index(std::size_t stratum, std::size_t count,
                                                std::size_t numel) noexcept {
  const std::size_t length = numel / count;
  const std::size_t longer = numel % count;
  const std::size_t begin = stratum * length + (stratum < longer ? stratum : longer);
  return begin + probe_offset(stratum, length + (stratum < longer ? 1 : 0));
}

// The figures of a sample. REQUIRES: moments.count > 0.
[[nodiscard]] ProbeResult summarize(const ProbeMoments& moments) noexcept;

// Throws InvalidInput as `probe` does; returns how many elements to look at.
[[nodiscard]] std::size_t checked_sample_size(const void* data, std::size_t numel,
                                              std::size_t max_samples);

[[nodiscard]] std::size_t size_of(DType dtype) noexcept;

}  // namespace esper
