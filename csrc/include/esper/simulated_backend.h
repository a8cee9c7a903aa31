// A machine that runs nothing and knows everything: proves a dispatcher where there is no GPU.
//
// Each stream has a vector clock: how much of every stream's work is certain to be over when its
// next operation starts. Two accesses to the same memory, at least one of them a write, must be
// ordered by it. If a run has accesses that nothing orders, at least one of them is reported, and
// nothing else is (dispatcher_proof_test.cpp holds both against a search of the whole graph).
//
// Memory comes from an allocator like PyTorch's caching one, at its worst: a freed block goes back
// to its stream's list at once and is handed out again, last freed first. Streams recorded on it
// were then seen to be done by the host, which protects this block and orders nothing else.
//
// Events come from a pool as small as CudaBackend's: one that is used too late has been recorded
// anew. A record that never happened leaves what the event held before.
//
// Captures: what is given to a capturing stream runs only when the graph is replayed, on streams of
// the graph's own. A stream joins a capture by waiting for an event of it, must be joined again
// before the end, and may wait for no event from outside. Memory allocated in a capture is the
// graph's for good; a block with recorded streams doesn't come back during it.
//
// Not thread-safe. Clocks grow with the number of streams and of replays; programs of tests have a
// handful.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "esper/stream_dispatcher.h"

namespace esper {

class SimulatedBackend {
 public:
  using Stream = std::size_t;
  using Buffer = std::size_t;
  using Event = std::size_t;  // valid until 2 * num_streams further ones are recorded
  using Graph = std::size_t;
  using Clock = std::vector<std::uint64_t>;  // a stream beyond the end has the time 0

  enum class OpKind : std::uint8_t { RECORD, WAIT, ALLOC, FREE, READ, WRITE, RECORD_STREAM };
  static constexpr std::size_t kNumOpKinds = 7;
  static constexpr std::size_t kNone = static_cast<std::size_t>(-1);
  struct Op {
    OpKind kind;
    Stream stream;
    Buffer buffer;       // of ALLOC, FREE, READ, WRITE, RECORD_STREAM; 0 otherwise
    std::size_t block;   // memory of the buffer; kNone otherwise
    std::size_t source;  // of a WAIT: the operation that recorded its event; kNone otherwise
    bool dropped;        // a planted defect: it did not happen
    bool captured;       // it did not run, but its graph has it
  };

  enum class ViolationKind : std::uint8_t {
    RACE,             // nothing orders two accesses to one buffer
    USE_AFTER_REUSE,  // nothing orders an access and one to another buffer in the same memory
    USE_AFTER_FREE,   // the program itself touches a buffer it freed
    ISOLATION,        // a wait across the border of a capture
    UNJOINED,         // a capture ends while a stream that joined it has work nobody waits for
  };
  struct Violation {
    ViolationKind kind;
    Buffer buffer;
    std::size_t first_op;  // index into operations(); of the earlier access
    std::size_t second_op;
  };

  static constexpr Stream kAmbient = 0;

  // Work streams have the numbers 1 to num_streams; 0 is the ambient one, replays use higher ones.
  // Throws InvalidInput unless 1 <= num_streams <= 256.
  explicit SimulatedBackend(std::size_t num_streams);

  [[nodiscard]] std::size_t num_streams() const noexcept { return num_streams_; }
  [[nodiscard]] Stream stream(std::size_t index) const noexcept { return index + 1; }
  [[nodiscard]] Event record(Stream stream);
  void wait(Stream stream, Event event);
  void close() noexcept {}

  // Buffers are counted from 1. All throw InvalidInput for an unknown stream or buffer.
  Buffer alloc(Stream stream);
  void free(Buffer buffer);
  void read(Stream stream, Buffer buffer) { access(stream, buffer, OpKind::READ); }
  void write(Stream stream, Buffer buffer) { access(stream, buffer, OpKind::WRITE); }
  // The buffer is used on this stream too: its memory must not come back before that is over.
  void record_stream(Buffer buffer, Stream stream);

  // Throws InvalidState while a capture is under way.
  void begin_capture(Stream stream);
  // Throws InvalidState unless `stream` is the one the capture began on.
  Graph end_capture(Stream stream);
  // Throws InvalidInput for an unknown graph, InvalidState on a capturing stream.
  void replay(Graph graph, Stream stream);

  // Plants a defect: the operation of this kind with this number, counted from 0 over the whole run
  // without those of replays, will not happen. Throws InvalidInput for a kind other than RECORD,
  // WAIT and RECORD_STREAM.
  void drop(OpKind kind, std::size_t number);
  // How many operations of a kind there were, replays left out.
  [[nodiscard]] std::size_t count(OpKind kind) const noexcept;

  [[nodiscard]] const std::vector<Op>& operations() const noexcept { return operations_; }
  [[nodiscard]] const std::vector<Violation>& violations() const noexcept { return violations_; }
  // One sentence that names both operations.
  [[nodiscard]] std::string describe(const Violation& violation) const;
  [[nodiscard]] std::string describe(const Op& op) const;

  [[nodiscard]] static std::string_view name_of(OpKind kind) noexcept;
  // Throws InvalidInput for any other word.
  [[nodiscard]] static OpKind kind_of(std::string_view name);

 private:
  struct Access {
    Stream stream;
    std::uint64_t time;  // of the stream's own clock
    Buffer buffer;
    std::size_t op;
    bool writes;
  };
  struct Block {
    Stream owner;
    std::size_t capture;           // whose pool it belongs to; 0 outside
    std::vector<Access> accesses;  // all that a later one may race with
  };
  struct Allocation {
    std::size_t block;
    bool freed;
    std::size_t freed_by;  // operation; of a freed buffer
    std::set<Stream> users;
  };
  struct Slot {  // of the event pool; never recorded where `op` is kNone
    Clock clock;
    std::size_t op = kNone;
    std::size_t capture = 0;
  };
  struct Capture {
    std::size_t id;
    Stream origin;
    std::map<Stream, Clock> streams;  // those that joined, with clocks of this capture alone
    std::vector<std::size_t> ops;
  };
  using Pool = std::pair<std::size_t, Stream>;  // capture, owner

  void require_stream(Stream stream) const;
  Allocation& allocation_of(Buffer buffer);
  [[nodiscard]] bool captures(Stream stream) const;
  std::size_t log(OpKind kind, Stream stream, Buffer buffer);
  [[nodiscard]] bool is_dropped(OpKind kind);
  void take_event(Stream stream, const Slot& slot, std::size_t op);
  void access(Stream stream, Buffer buffer, OpKind kind);
  void check(const Access& now);
  void replay_op(const Op& captured, Stream stream, std::map<std::size_t, std::size_t>& records,
                 std::map<std::size_t, Clock>& events);

  std::size_t num_streams_;
  std::vector<Clock> clocks_;
  std::vector<Slot> events_;
  std::size_t next_event_ = 0;
  std::vector<Block> blocks_;
  std::vector<Allocation> allocations_;
  // Free blocks of each pool, with what was over before each came back.
  std::map<Pool, std::vector<std::pair<std::size_t, Clock>>> free_blocks_;
  std::optional<Capture> capture_;
  std::vector<Capture> graphs_;
  std::vector<Op> operations_;
  std::vector<Violation> violations_;
  std::set<std::pair<OpKind, std::size_t>> drops_;
  std::array<std::size_t, kNumOpKinds> counts_{};
};
static_assert(Backend<SimulatedBackend>);

}  // namespace esper
