#include "esper/lifecycle.h"

#include <gtest/gtest.h>

namespace esper {
namespace {

constexpr std::array kAll{SeedState::DORMANT,    SeedState::LOADING,    SeedState::ACTIVE,
                          SeedState::EVALUATING, SeedState::FOSSILIZED, SeedState::ERROR,
                          SeedState::CULLED,     SeedState::EMBARGOED};

TEST(Lifecycle, AllowsExactlyTheTable) {
  int allowed = 0;
  for (const SeedState from : kAll) {
    for (const SeedState to : kAll) allowed += is_allowed(from, to) ? 1 : 0;
  }
  EXPECT_EQ(allowed, static_cast<int>(kTransitions.size()));
  EXPECT_TRUE(is_allowed(SeedState::DORMANT, SeedState::LOADING));
  EXPECT_FALSE(is_allowed(SeedState::DORMANT, SeedState::ACTIVE));
  EXPECT_FALSE(is_allowed(SeedState::CULLED, SeedState::DORMANT));
}

TEST(Lifecycle, NeverTouchesUnspecified) {
  for (const SeedState state : kAll) {
    EXPECT_FALSE(is_allowed(SeedState::UNSPECIFIED, state));
    EXPECT_FALSE(is_allowed(state, SeedState::UNSPECIFIED));
  }
}

TEST(Lifecycle, EveryStateLeadsBackToDormant) {
  for (const SeedState start : kAll) {
    std::array<bool, kNumSeedStates> reached{};
    reached[static_cast<std::size_t>(start)] = true;
    for (std::size_t round = 0; round < kAll.size(); ++round) {
      for (const Transition& step : kTransitions) {
        if (reached[static_cast<std::size_t>(step.from)])
          reached[static_cast<std::size_t>(step.to)] = true;
      }
    }
    EXPECT_TRUE(reached[static_cast<std::size_t>(SeedState::DORMANT)]) << state_name(start);
  }
}

TEST(Lifecycle, ErrorNamesBothStatesTheSeedAndTheTargets) {
  const InvalidTransition error(7, SeedState::ACTIVE, SeedState::DORMANT);
  EXPECT_STREQ(error.what(),
               "seed 7 cannot go from ACTIVE to DORMANT; allowed: EVALUATING, CULLED, ERROR");
  EXPECT_EQ(error.seed(), 7U);
}

}  // namespace
}  // namespace esper
