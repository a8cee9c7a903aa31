#include "esper/simulated_backend.h"

#include <algorithm>

#include "esper/errors.h"

namespace esper {
namespace {

void merge(SimulatedBackend::Clock& into, const SimulatedBackend::Clock& other) {
  for (std::size_t i = 0; i < into.size(); ++i) into[i] = std::max(into[i], other[i]);
}

std::string_view name_of(SimulatedBackend::OpKind kind) noexcept {
  using Kind = SimulatedBackend::OpKind;
  switch (kind) {
    case Kind::RECORD:
      return "record";
    case Kind::WAIT:
      return "wait";
    case Kind::DROPPED_WAIT:
      return "dropped wait";
    case Kind::ALLOC:
      return "alloc";
    case Kind::FREE:
      return "free";
    case Kind::READ:
      return "read";
    case Kind::WRITE:
      return "write";
    case Kind::RECORD_STREAM:
      return "record_stream";
  }
  return "unknown";
}

std::string_view name_of(SimulatedBackend::ViolationKind kind) noexcept {
  using Kind = SimulatedBackend::ViolationKind;
  switch (kind) {
    case Kind::RACE:
      return "race";
    case Kind::USE_AFTER_REUSE:
      return "use after reuse";
    case Kind::USE_AFTER_FREE:
      return "use after free";
  }
  return "unknown";
}

}  // namespace

SimulatedBackend::SimulatedBackend(std::size_t num_streams) {
  if (num_streams == 0 || num_streams > 256) {
    throw InvalidInput("num_streams", "be between 1 and 256", std::to_string(num_streams));
  }
  clocks_.assign(num_streams + 1, Clock(num_streams + 1, 0));
}

SimulatedBackend::Event SimulatedBackend::record(Stream stream) {
  require_stream(stream);
  log(OpKind::RECORD, stream, 0);
  return clocks_[stream];
}

void SimulatedBackend::wait(Stream stream, const Event& event) {
  require_stream(stream);
  const bool dropped = dropped_waits_.contains(num_waits_++);
  log(dropped ? OpKind::DROPPED_WAIT : OpKind::WAIT, stream, 0);
  if (!dropped) merge(clocks_[stream], event);
}

SimulatedBackend::Buffer SimulatedBackend::alloc(Stream stream) {
  require_stream(stream);
  auto& free_here = free_blocks_[stream];
  std::size_t block = blocks_.size();
  if (free_here.empty()) {
    blocks_.push_back({stream, {}});
  } else {
    block = free_here.back().first;
    merge(clocks_[stream], free_here.back().second);
    free_here.pop_back();
  }
  allocations_.push_back({block, false, 0, {}});
  const Buffer buffer = allocations_.size();
  log(OpKind::ALLOC, stream, buffer);
  return buffer;
}

void SimulatedBackend::free(Buffer buffer) {
  Allocation& allocation = allocation_of(buffer);
  if (allocation.freed) {
    throw InvalidInput("buffer", "be freed once", "buffer " + std::to_string(buffer) + " again");
  }
  const Stream owner = blocks_[allocation.block].owner;
  log(OpKind::FREE, owner, buffer);
  allocation.freed = true;
  allocation.freed_by = operations_.size() - 1;
  Clock must_be_over(clocks_.size(), 0);
  for (const Stream user : allocation.users) merge(must_be_over, clocks_[user]);
  free_blocks_[owner].emplace_back(allocation.block, must_be_over);
}

void SimulatedBackend::record_stream(Buffer buffer, Stream stream) {
  require_stream(stream);
  Allocation& allocation = allocation_of(buffer);
  log(OpKind::RECORD_STREAM, stream, buffer);
  if (stream != blocks_[allocation.block].owner) allocation.users.insert(stream);
}

std::string SimulatedBackend::describe(const Op& op) const {
  std::string text = std::string(name_of(op.kind)) + " on stream " + std::to_string(op.stream);
  if (op.buffer != 0) text += " of buffer " + std::to_string(op.buffer);
  return text;
}

std::string SimulatedBackend::describe(const Violation& violation) const {
  return std::string(name_of(violation.kind)) + ": operation " +
         std::to_string(violation.first_op) + " (" + describe(operations_[violation.first_op]) +
         ") and operation " + std::to_string(violation.second_op) + " (" +
         describe(operations_[violation.second_op]) + ")";
}

void SimulatedBackend::require_stream(Stream stream) const {
  if (stream >= clocks_.size()) {
    throw InvalidInput("stream", "be at most " + std::to_string(clocks_.size() - 1),
                       std::to_string(stream));
  }
}

SimulatedBackend::Allocation& SimulatedBackend::allocation_of(Buffer buffer) {
  if (buffer == 0 || buffer > allocations_.size()) {
    throw InvalidInput("buffer", "be one that alloc gave", std::to_string(buffer));
  }
  return allocations_[buffer - 1];
}

// Every operation advances its stream's own time; returns the new time.
std::uint64_t SimulatedBackend::log(OpKind kind, Stream stream, Buffer buffer) {
  operations_.push_back({kind, stream, buffer});
  return ++clocks_[stream][stream];
}

void SimulatedBackend::access(Stream stream, Buffer buffer, OpKind kind) {
  require_stream(stream);
  const Allocation& allocation = allocation_of(buffer);
  const std::uint64_t time = log(kind, stream, buffer);
  const std::size_t op = operations_.size() - 1;
  if (allocation.freed) {
    violations_.push_back({ViolationKind::USE_AFTER_FREE, buffer, allocation.freed_by, op});
    return;
  }
  check(blocks_[allocation.block], {stream, time, buffer, op, kind == OpKind::WRITE});
}

void SimulatedBackend::check(Block& block, const Access& now) {
  const Clock& clock = clocks_[now.stream];
  const auto ordered = [&](const Access& before) { return before.time <= clock[before.stream]; };
  for (const Access& before : block.accesses) {
    if (ordered(before) || !(before.writes || now.writes)) continue;
    const bool same = before.buffer == now.buffer;
    violations_.push_back({same ? ViolationKind::RACE : ViolationKind::USE_AFTER_REUSE, now.buffer,
                           before.op, now.op});
  }
  // A write that comes after an access stands for it from now on: who is ordered after the write is
  // ordered after both.
  if (now.writes) std::erase_if(block.accesses, ordered);
  block.accesses.push_back(now);
}

}  // namespace esper
