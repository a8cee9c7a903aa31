// A machine that runs nothing and knows everything: proves a dispatcher where there is no GPU.
//
// Each stream has a vector clock: how much of every stream's work is certain to be over when its
// next operation starts. Two accesses to the same memory, at least one of them a write, must be
// ordered by it. Memory comes from an allocator that behaves as PyTorch's caching allocator does: a
// freed block goes back to its stream's list at once and is handed out again, last freed first,
// unless other streams were recorded on it; then it comes back only when those are seen to be done.
//
// Not thread-safe. Clocks grow with the number of streams; programs of tests have a handful.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
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
  using Clock = std::vector<std::uint64_t>;
  using Event = Clock;

  enum class OpKind : std::uint8_t {
    RECORD,
    WAIT,
    DROPPED_WAIT,
    ALLOC,
    FREE,
    READ,
    WRITE,
    RECORD_STREAM
  };
  struct Op {
    OpKind kind;
    Stream stream;
    Buffer buffer;  // of ALLOC, FREE, READ, WRITE, RECORD_STREAM; 0 otherwise
  };

  enum class ViolationKind : std::uint8_t {
    RACE,             // nothing orders two accesses to one buffer
    USE_AFTER_REUSE,  // nothing orders an access and one to another buffer in the same memory
    USE_AFTER_FREE,   // the program itself touches a buffer it freed
  };
  struct Violation {
    ViolationKind kind;
    Buffer buffer;
    std::size_t first_op;  // index into operations(); of the earlier access
    std::size_t second_op;
  };

  static constexpr Stream kAmbient = 0;

  // Work streams have the numbers 1 to num_streams; 0 is the ambient one. Throws InvalidInput
  // unless 1 <= num_streams <= 256.
  explicit SimulatedBackend(std::size_t num_streams);

  [[nodiscard]] std::size_t num_streams() const noexcept { return clocks_.size() - 1; }
  [[nodiscard]] Stream stream(std::size_t index) const noexcept { return index + 1; }
  [[nodiscard]] Event record(Stream stream);
  void wait(Stream stream, const Event& event);
  void close() noexcept {}

  // Buffers are counted from 1. All throw InvalidInput for an unknown stream or buffer.
  Buffer alloc(Stream stream);
  void free(Buffer buffer);
  void read(Stream stream, Buffer buffer) { access(stream, buffer, OpKind::READ); }
  void write(Stream stream, Buffer buffer) { access(stream, buffer, OpKind::WRITE); }
  // The buffer is used on this stream too: its memory must not come back before that is over.
  void record_stream(Buffer buffer, Stream stream);

  // Plants a defect: the wait with this number (counted from 0 over the whole run) will not happen.
  void drop_wait(std::size_t number) { dropped_waits_.insert(number); }

  [[nodiscard]] std::size_t num_waits() const noexcept { return num_waits_; }
  [[nodiscard]] const std::vector<Op>& operations() const noexcept { return operations_; }
  [[nodiscard]] const std::vector<Violation>& violations() const noexcept { return violations_; }
  // One sentence that names both operations.
  [[nodiscard]] std::string describe(const Violation& violation) const;
  [[nodiscard]] std::string describe(const Op& op) const;

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
    std::vector<Access> accesses;  // all that a later one may race with
  };
  struct Allocation {
    std::size_t block;
    bool freed;
    std::size_t freed_by;  // operation; of a freed buffer
    std::set<Stream> users;
  };

  void require_stream(Stream stream) const;
  Allocation& allocation_of(Buffer buffer);
  std::uint64_t log(OpKind kind, Stream stream, Buffer buffer);
  void access(Stream stream, Buffer buffer, OpKind kind);
  void check(Block& block, const Access& now);

  std::vector<Clock> clocks_;
  std::vector<Block> blocks_;
  std::vector<Allocation> allocations_;
  // Free blocks of each stream, with what must be over before each is handed out again.
  std::map<Stream, std::vector<std::pair<std::size_t, Clock>>> free_blocks_;
  std::vector<Op> operations_;
  std::vector<Violation> violations_;
  std::set<std::size_t> dropped_waits_;
  std::size_t num_waits_ = 0;
};
static_assert(Backend<SimulatedBackend>);

}  // namespace esper
