#include "esper/simulated_backend.h"

#include <algorithm>

#include "esper/errors.h"

namespace esper {
namespace {

using Clock = SimulatedBackend::Clock;

std::uint64_t time_in(const Clock& clock, SimulatedBackend::Stream stream) noexcept {
  return stream < clock.size() ? clock[stream] : 0;
}

std::uint64_t tick(Clock& clock, SimulatedBackend::Stream stream) {
  if (stream >= clock.size()) clock.resize(stream + 1, 0);
  return ++clock[stream];
}

void merge(Clock& into, const Clock& other) {
  if (into.size() < other.size()) into.resize(other.size(), 0);
  for (std::size_t i = 0; i < other.size(); ++i) into[i] = std::max(into[i], other[i]);
}

std::size_t index_of(SimulatedBackend::OpKind kind) noexcept {
  return static_cast<std::size_t>(kind);
}

// Whether a stream does it; allocating, freeing and recording a stream are done by the host at
// once.
bool is_streamed(SimulatedBackend::OpKind kind) noexcept {
  using Kind = SimulatedBackend::OpKind;
  return kind == Kind::RECORD || kind == Kind::WAIT || kind == Kind::READ || kind == Kind::WRITE;
}

}  // namespace

SimulatedBackend::SimulatedBackend(std::size_t num_streams) : num_streams_(num_streams) {
  if (num_streams == 0 || num_streams > 256) {
    throw InvalidInput("num_streams", "be between 1 and 256", std::to_string(num_streams));
  }
  clocks_.resize(num_streams + 1);
  events_.resize(2 * num_streams + 1);
}

SimulatedBackend::Event SimulatedBackend::record(Stream stream) {
  require_stream(stream);
  const Event event = next_event_;
  next_event_ = (next_event_ + 1) % events_.size();
  const bool dropped = is_dropped(OpKind::RECORD);
  const std::size_t op = log(OpKind::RECORD, stream, 0);
  operations_[op].dropped = dropped;
  if (dropped) return event;
  const bool captured = captures(stream);
  events_[event] = {captured ? capture_->streams[stream] : clocks_[stream], op,
                    captured ? capture_->id : 0};
  return event;
}

void SimulatedBackend::wait(Stream stream, Event event) {
  require_stream(stream);
  if (event >= events_.size()) {
    throw InvalidInput("event", "be one that record gave", std::to_string(event));
  }
  const Slot& slot = events_[event];
  const bool dropped = is_dropped(OpKind::WAIT);
  const bool joins = capture_ && slot.op != kNone && slot.capture == capture_->id;
  if (joins && !dropped) capture_->streams.try_emplace(stream);
  const std::size_t op = log(OpKind::WAIT, stream, 0);
  operations_[op].dropped = dropped;
  operations_[op].source = slot.op;
  if (!dropped && slot.op != kNone) take_event(stream, slot, op);
}

void SimulatedBackend::take_event(Stream stream, const Slot& slot, std::size_t op) {
  const bool captured = captures(stream);
  if (slot.capture != (captured ? capture_->id : 0)) {
    violations_.push_back({ViolationKind::ISOLATION, 0, slot.op, op});
    return;
  }
  merge(captured ? capture_->streams[stream] : clocks_[stream], slot.clock);
}

SimulatedBackend::Buffer SimulatedBackend::alloc(Stream stream) {
  require_stream(stream);
  const std::size_t capture = captures(stream) ? capture_->id : 0;
  auto& free_here = free_blocks_[{capture, stream}];
  std::size_t block = blocks_.size();
  if (free_here.empty()) {
    blocks_.push_back({stream, capture, {}});
  } else {
    const auto [found, over] = std::move(free_here.back());
    free_here.pop_back();
    block = found;
    std::erase_if(blocks_[block].accesses, [&over = over](const Access& before) {
      return before.time <= time_in(over, before.stream);
    });
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
  const Block& block = blocks_[allocation.block];
  allocation.freed_by = log(OpKind::FREE, block.owner, buffer);
  allocation.freed = true;
  if (block.capture != 0 && !allocation.users.empty()) return;
  Clock over;
  for (const Stream user : allocation.users) merge(over, clocks_[user]);
  free_blocks_[{block.capture, block.owner}].emplace_back(allocation.block, over);
}

void SimulatedBackend::record_stream(Buffer buffer, Stream stream) {
  require_stream(stream);
  Allocation& allocation = allocation_of(buffer);
  const bool dropped = is_dropped(OpKind::RECORD_STREAM);
  operations_[log(OpKind::RECORD_STREAM, stream, buffer)].dropped = dropped;
  if (!dropped && stream != blocks_[allocation.block].owner) allocation.users.insert(stream);
}

void SimulatedBackend::drop(OpKind kind, std::size_t number) {
  if (kind != OpKind::RECORD && kind != OpKind::WAIT && kind != OpKind::RECORD_STREAM) {
    throw InvalidInput("kind", "be 'record', 'wait' or 'record_stream'",
                       "'" + std::string(name_of(kind)) + "'");
  }
  drops_.emplace(kind, number);
}

std::size_t SimulatedBackend::count(OpKind kind) const noexcept {
  return counts_[index_of(kind)];
}

bool SimulatedBackend::is_dropped(OpKind kind) {
  return drops_.contains({kind, counts_[index_of(kind)]});
}

void SimulatedBackend::require_stream(Stream stream) const {
  if (stream > num_streams_) {
    throw InvalidInput("stream", "be at most " + std::to_string(num_streams_),
                       std::to_string(stream));
  }
}

SimulatedBackend::Allocation& SimulatedBackend::allocation_of(Buffer buffer) {
  if (buffer == 0 || buffer > allocations_.size()) {
    throw InvalidInput("buffer", "be one that alloc gave", std::to_string(buffer));
  }
  return allocations_[buffer - 1];
}

bool SimulatedBackend::captures(Stream stream) const {
  return capture_ && capture_->streams.contains(stream);
}

// What a stream does advances its own time, which is the capture's where it is captured.
std::size_t SimulatedBackend::log(OpKind kind, Stream stream, Buffer buffer) {
  const bool captured = is_streamed(kind) && captures(stream);
  const std::size_t op = operations_.size();
  const std::size_t block = buffer == 0 ? kNone : allocations_[buffer - 1].block;
  operations_.push_back({kind, stream, buffer, block, kNone, false, captured});
  ++counts_[index_of(kind)];
  if (is_streamed(kind)) tick(captured ? capture_->streams[stream] : clocks_[stream], stream);
  if (captured) capture_->ops.push_back(op);
  return op;
}

void SimulatedBackend::access(Stream stream, Buffer buffer, OpKind kind) {
  require_stream(stream);
  (void)allocation_of(buffer);
  const std::size_t op = log(kind, stream, buffer);
  if (captures(stream)) return;
  check({stream, time_in(clocks_[stream], stream), buffer, op, kind == OpKind::WRITE});
}

void SimulatedBackend::check(const Access& now) {
  const Allocation& allocation = allocations_[now.buffer - 1];
  Block& block = blocks_[allocation.block];
  if (allocation.freed && block.capture == 0) {
    violations_.push_back({ViolationKind::USE_AFTER_FREE, now.buffer, allocation.freed_by, now.op});
    return;
  }
  const Clock& clock = clocks_[now.stream];
  const auto ordered = [&](const Access& before) {
    return before.time <= time_in(clock, before.stream);
  };
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

// --- Captures ---

void SimulatedBackend::begin_capture(Stream stream) {
  require_stream(stream);
  if (capture_) throw InvalidState("capture must be the only one, got a second one");
  capture_ = Capture{graphs_.size() + 1, stream, {{stream, {}}}, {}};
}

SimulatedBackend::Graph SimulatedBackend::end_capture(Stream stream) {
  if (!capture_ || capture_->origin != stream) {
    throw InvalidState("stream must be the one a capture began on, got " + std::to_string(stream));
  }
  const std::size_t last = operations_.size() - 1;
  const Clock& end = capture_->streams[stream];
  for (const auto& [joined, clock] : capture_->streams) {
    if (time_in(clock, joined) <= time_in(end, joined)) continue;
    const auto left =
        std::find_if(capture_->ops.rbegin(), capture_->ops.rend(),
                     [&, lane = joined](std::size_t op) { return operations_[op].stream == lane; });
    violations_.push_back({ViolationKind::UNJOINED, 0, *left, last});
  }
  graphs_.push_back(*std::move(capture_));
  capture_.reset();
  return graphs_.size() - 1;
}

void SimulatedBackend::replay(Graph graph, Stream stream) {
  require_stream(stream);
  if (graph >= graphs_.size()) {
    throw InvalidInput("graph", "be one that end_capture gave", std::to_string(graph));
  }
  if (captures(stream)) throw InvalidState("stream must not be capturing when a graph is replayed");
  const auto counts = counts_;
  std::map<Stream, Stream> streams{{graphs_[graph].origin, stream}};
  std::map<std::size_t, std::size_t> records;
  std::map<std::size_t, Clock> events;
  for (const std::size_t op : graphs_[graph].ops) {
    const Op captured = operations_[op];
    const auto [found, is_new] = streams.try_emplace(captured.stream, clocks_.size());
    if (is_new) clocks_.emplace_back();
    replay_op(captured, found->second, records, events);
    if (captured.kind == OpKind::RECORD && !captured.dropped) {
      records[op] = operations_.size() - 1;
      events[op] = clocks_[found->second];
    }
  }
  counts_ = counts;
}

void SimulatedBackend::replay_op(const Op& captured, Stream stream,
                                 std::map<std::size_t, std::size_t>& records,
                                 std::map<std::size_t, Clock>& events) {
  const bool is_access = captured.kind == OpKind::READ || captured.kind == OpKind::WRITE;
  const std::size_t op = log(captured.kind, stream, captured.buffer);
  operations_[op].dropped = captured.dropped;
  if (is_access) {
    check({stream, time_in(clocks_[stream], stream), captured.buffer, op,
           captured.kind == OpKind::WRITE});
  } else if (captured.kind == OpKind::WAIT && events.contains(captured.source)) {
    operations_[op].source = records[captured.source];
    if (!captured.dropped) merge(clocks_[stream], events[captured.source]);
  }
}

// --- Words ---

namespace {

constexpr std::array<std::string_view, SimulatedBackend::kNumOpKinds> kOpNames{
    "record", "wait", "alloc", "free", "read", "write", "record_stream"};

std::string_view name_of(SimulatedBackend::ViolationKind kind) noexcept {
  using Kind = SimulatedBackend::ViolationKind;
  switch (kind) {
    case Kind::RACE:
      return "race";
    case Kind::USE_AFTER_REUSE:
      return "use after reuse";
    case Kind::USE_AFTER_FREE:
      return "use after free";
    case Kind::ISOLATION:
      return "wait across the border of a capture";
    case Kind::UNJOINED:
      return "capture with work that was not joined";
  }
  return "unknown";
}

}  // namespace

std::string_view SimulatedBackend::name_of(OpKind kind) noexcept {
  return kOpNames[index_of(kind)];
}

SimulatedBackend::OpKind SimulatedBackend::kind_of(std::string_view name) {
  const auto found = std::find(kOpNames.begin(), kOpNames.end(), name);
  if (found == kOpNames.end()) {
    throw InvalidInput("kind", "name an operation", "'" + std::string(name) + "'");
  }
  return static_cast<OpKind>(found - kOpNames.begin());
}

std::string SimulatedBackend::describe(const Op& op) const {
  std::string text = op.dropped ? "dropped " : "";
  text += std::string(name_of(op.kind)) + " on stream " + std::to_string(op.stream);
  if (op.buffer != 0) text += " of buffer " + std::to_string(op.buffer);
  return text;
}

std::string SimulatedBackend::describe(const Violation& violation) const {
  return std::string(esper::name_of(violation.kind)) + ": operation " +
         std::to_string(violation.first_op) + " (" + describe(operations_[violation.first_op]) +
         ") and operation " + std::to_string(violation.second_op) + " (" +
         describe(operations_[violation.second_op]) + ")";
}

}  // namespace esper
