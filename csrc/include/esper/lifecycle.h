// The life cycle of a seed: its states and the one table of allowed transitions, as data.
// The numbers equal those of esper.v1.SeedState in proto/; a test holds them together.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>

namespace esper {

enum class SeedState : std::uint8_t {
  UNSPECIFIED = 0,
  DORMANT = 1,
  LOADING = 2,
  ACTIVE = 3,
  EVALUATING = 4,
  FOSSILIZED = 5,
  ERROR = 6,
  CULLED = 7,
  EMBARGOED = 8,
};

inline constexpr std::size_t kNumSeedStates = 9;

inline constexpr std::array<std::string_view, kNumSeedStates> kSeedStateNames{
    "UNSPECIFIED", "DORMANT", "LOADING", "ACTIVE",   "EVALUATING",
    "FOSSILIZED",  "ERROR",   "CULLED",  "EMBARGOED"};

struct Transition {
  SeedState from;
  SeedState to;
};

// Every step a seed may take; whatever is not listed is forbidden.
inline constexpr std::array<Transition, 14> kTransitions{{
    {SeedState::DORMANT, SeedState::LOADING},
    {SeedState::LOADING, SeedState::ACTIVE},
    {SeedState::LOADING, SeedState::ERROR},
    {SeedState::ACTIVE, SeedState::EVALUATING},
    {SeedState::ACTIVE, SeedState::CULLED},
    {SeedState::ACTIVE, SeedState::ERROR},
    {SeedState::EVALUATING, SeedState::FOSSILIZED},
    {SeedState::EVALUATING, SeedState::CULLED},
    {SeedState::EVALUATING, SeedState::ERROR},
    {SeedState::FOSSILIZED, SeedState::CULLED},
    {SeedState::FOSSILIZED, SeedState::ERROR},
    {SeedState::ERROR, SeedState::CULLED},
    {SeedState::CULLED, SeedState::EMBARGOED},
    {SeedState::EMBARGOED, SeedState::DORMANT},
}};

[[nodiscard]] constexpr bool is_allowed(SeedState from, SeedState to) noexcept {
  return std::any_of(kTransitions.begin(), kTransitions.end(),
                     [=](const Transition& step) { return step.from == from && step.to == to; });
}

[[nodiscard]] constexpr bool is_seed_state(std::uint8_t number) noexcept {
  return number < kSeedStateNames.size();
}

// REQUIRES: is_seed_state(number of `state`).
[[nodiscard]] constexpr std::string_view state_name(SeedState state) noexcept {
  return kSeedStateNames[static_cast<std::size_t>(state)];
}

// "CULLED, ERROR" for ACTIVE's neighbours; "nothing" where a state has none.
[[nodiscard]] std::string allowed_targets(SeedState from);

// The table forbids this step; the message names the seed, both states and the allowed targets.
class InvalidTransition : public std::invalid_argument {
 public:
  InvalidTransition(std::size_t seed, SeedState from, SeedState to);

  [[nodiscard]] std::size_t seed() const noexcept { return seed_; }
  [[nodiscard]] SeedState from() const noexcept { return from_; }
  [[nodiscard]] SeedState to() const noexcept { return to_; }

 private:
  std::size_t seed_;
  SeedState from_;
  SeedState to_;
};

}  // namespace esper
