#include "esper/lifecycle.h"

namespace esper {

std::string allowed_targets(SeedState from) {
  std::string targets;
  for (const Transition& step : kTransitions) {
    if (step.from != from) continue;
    if (!targets.empty()) targets += ", ";
    targets += state_name(step.to);
  }
  return targets.empty() ? "nothing" : targets;
}

InvalidTransition::InvalidTransition(std::size_t seed, SeedState from, SeedState to)
    : std::invalid_argument("seed " + std::to_string(seed) + " cannot go from " +
                            std::string(state_name(from)) + " to " + std::string(state_name(to)) +
                            "; allowed: " + allowed_targets(from)),
      seed_(seed),
      from_(from),
      to_(to) {}

}  // namespace esper
