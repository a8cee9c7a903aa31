// Whether a run of the simulated machine has a race, found the slow way: all orders are drawn as
// one graph, and every pair of accesses is looked up in its closure. Shares nothing with the
// machine's clocks but the log of operations.
#pragma once

#include <cstddef>
#include <map>
#include <vector>

#include "esper/simulated_backend.h"

namespace esper {

class RaceOracle {
 public:
  using Op = SimulatedBackend::Op;
  using Kind = SimulatedBackend::OpKind;

  // Takes the log of a whole run. Captured operations did not run, so they are no part of it.
  explicit RaceOracle(const std::vector<Op>& log) : log_(log), before_(log.size()) {
    std::map<SimulatedBackend::Stream, std::size_t> last;
    for (std::size_t at = 0; at < log.size(); ++at) {
      before_[at].assign(log.size(), false);
      if (log[at].captured) continue;
      note_reuse(at, last);
      if (!is_streamed(log[at].kind)) continue;
      if (const auto found = last.find(log[at].stream); found != last.end()) add(found->second, at);
      const bool waits = log[at].kind == Kind::WAIT && !log[at].dropped;
      if (waits && log[at].source != SimulatedBackend::kNone) add(log[at].source, at);
      last[log[at].stream] = at;
    }
  }

  [[nodiscard]] bool has_race() const {
    for (std::size_t later = 0; later < log_.size(); ++later) {
      for (std::size_t earlier = 0; earlier < later; ++earlier) {
        if (conflict(earlier, later) && !before_[later][earlier] && !is_over(earlier, later)) {
          return true;
        }
      }
    }
    return false;
  }

 private:
  struct Reuse {
    std::size_t at;  // the allocation that handed the block out again
    std::vector<bool> over;
  };

  // Allocating, freeing and recording a stream are done by the host at once.
  static bool is_streamed(Kind kind) {
    return kind != Kind::ALLOC && kind != Kind::FREE && kind != Kind::RECORD_STREAM;
  }

  void add(std::size_t from, std::size_t to) {
    before_[to][from] = true;
    for (std::size_t i = 0; i < from; ++i) {
      if (before_[from][i]) before_[to][i] = true;
    }
  }

  // What the host saw to be over when a block came back: all that came before the end of what its
  // recorded streams had been given when it was freed.
  void note_reuse(std::size_t at, const std::map<SimulatedBackend::Stream, std::size_t>& last) {
    const Op& op = log_[at];
    if (op.kind == Kind::RECORD_STREAM && !op.dropped) users_[op.buffer].push_back(op.stream);
    if (op.kind == Kind::FREE) {
      std::vector<bool> over(log_.size(), false);
      for (const SimulatedBackend::Stream user : users_[op.buffer]) {
        if (user == op.stream || !last.contains(user)) continue;
        const std::size_t end = last.at(user);
        over[end] = true;
        for (std::size_t i = 0; i < end; ++i) over[i] = over[i] || before_[end][i];
      }
      freed_[op.block] = over;
    }
    if (op.kind == Kind::ALLOC && freed_.contains(op.block)) {
      reuses_[op.block].push_back({at, freed_[op.block]});
    }
  }

  [[nodiscard]] bool accesses(std::size_t at) const {
    return !log_[at].captured && (log_[at].kind == Kind::READ || log_[at].kind == Kind::WRITE);
  }

  [[nodiscard]] bool conflict(std::size_t earlier, std::size_t later) const {
    return accesses(earlier) && accesses(later) && log_[earlier].block == log_[later].block &&
           (log_[earlier].kind == Kind::WRITE || log_[later].kind == Kind::WRITE);
  }

  [[nodiscard]] bool is_over(std::size_t earlier, std::size_t later) const {
    const auto found = reuses_.find(log_[earlier].block);
    if (found == reuses_.end()) return false;
    for (const Reuse& reuse : found->second) {
      if (earlier < reuse.at && reuse.at < later && reuse.over[earlier]) return true;
    }
    return false;
  }

  const std::vector<Op>& log_;
  std::vector<std::vector<bool>> before_;  // [later][earlier]
  std::map<SimulatedBackend::Buffer, std::vector<SimulatedBackend::Stream>> users_;
  std::map<std::size_t, std::vector<bool>> freed_;  // by block: over when it comes back
  std::map<std::size_t, std::vector<Reuse>> reuses_;
};

}  // namespace esper
