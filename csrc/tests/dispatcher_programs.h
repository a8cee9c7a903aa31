// Random programs for a dispatcher on the simulated machine: layers with seeds that run side by
// side, nested, that fail in the middle, are replayed backward as autograd does it, or are captured
// into a graph. The order of everything comes from the dispatcher and from autograd's own rules;
// the allocator is told what the executor tells it (esper/execution/dispatch.py).
#pragma once

#include <cstddef>
#include <random>
#include <span>
#include <vector>

#include "esper/simulated_backend.h"

namespace esper {

// A layer in which every record, wait, join and record_stream is needed: what each protects is used
// at once, and memory comes back as early as it may. `fails` ends the pieces in the middle.
struct TightLayer {
  StreamDispatcher<SimulatedBackend>& dispatcher;
  SimulatedBackend& machine = dispatcher.backend();
  SimulatedBackend::Stream ambient = SimulatedBackend::kAmbient;

  using Streams = std::vector<SimulatedBackend::Stream>;
  using Buffers = std::vector<SimulatedBackend::Buffer>;

  // Autograd's order between the node that made a gradient and the one that takes it.
  void order(SimulatedBackend::Stream before, SimulatedBackend::Stream after) const {
    machine.wait(after, machine.record(before));
  }

  void scratch(SimulatedBackend::Stream stream) const {
    const auto buffer = machine.alloc(stream);
    machine.write(stream, buffer);
    machine.free(buffer);
  }

  // Forward, then backward on the streams of the forward. With `fails`, the last piece ends after
  // it read its input. REQUIRES: no more pieces than streams.
  void run(std::size_t num_pieces, bool fails) const {
    const auto input = machine.alloc(ambient);
    machine.write(ambient, input);
    const Streams streams = dispatcher.fork(ambient, num_pieces);
    Buffers outputs;
    for (std::size_t i = 0; i < num_pieces; ++i) {
      machine.record_stream(input, streams[i]);
      machine.read(streams[i], input);
      if (fails && i + 1 == num_pieces) break;
      outputs.push_back(machine.alloc(streams[i]));
      machine.write(streams[i], outputs.back());
    }
    dispatcher.join(ambient, streams);
    machine.write(ambient, input);  // as an operation in place does
    for (const auto output : outputs) {
      machine.record_stream(output, ambient);
      machine.write(ambient, output);
    }
    replay_and_free(input, streams, outputs);
  }

  // A layer whose last piece is a layer of its own. REQUIRES: at least 2 streams.
  void run_nested(bool fails) const {
    const std::size_t num_streams = machine.num_streams();
    const auto input = machine.alloc(ambient);
    machine.write(ambient, input);
    const Streams streams = dispatcher.fork(ambient, num_streams);
    for (const auto stream : streams) machine.read(stream, input);
    TightLayer{dispatcher, machine, streams.back()}.run(num_streams - 1, fails);
    for (const auto stream : streams) machine.read(stream, input);
    dispatcher.join(ambient, streams);
    machine.write(ambient, input);
    machine.free(input);
  }

  void run_captured(std::size_t num_pieces, bool fails) const {
    machine.begin_capture(ambient);
    run(num_pieces, fails);
    const auto graph = machine.end_capture(ambient);
    machine.replay(graph, ambient);
    machine.replay(graph, ambient);
  }

 private:
  // Every piece reads the saved input again, which is freed before anything waits for that; then
  // each stream allocates where its output was while the ambient one may still be at it.
  void replay_and_free(SimulatedBackend::Buffer input, const Streams& streams,
                       const Buffers& outputs) const {
    const auto gradient = machine.alloc(ambient);
    machine.write(ambient, gradient);
    for (const auto stream : streams) {
      order(ambient, stream);
      machine.read(stream, gradient);
      machine.read(stream, input);
    }
    for (const auto output : outputs) machine.write(ambient, output);
    for (const auto output : outputs) machine.free(output);
    for (std::size_t i = 0; i < outputs.size(); ++i) scratch(streams[i]);
    machine.free(input);
    scratch(ambient);
    for (const auto stream : streams) order(stream, ambient);
    machine.write(ambient, gradient);
    machine.free(gradient);
  }
};

class RandomProgram {
 public:
  using Dispatcher = StreamDispatcher<SimulatedBackend>;
  using Stream = SimulatedBackend::Stream;
  using Buffer = SimulatedBackend::Buffer;

  RandomProgram(Dispatcher& dispatcher, unsigned seed)
      : dispatcher_(dispatcher), machine_(dispatcher.backend()), engine_(seed) {}

  // Everything, from the ambient stream on.
  void run() {
    const unsigned num_sections = 1 + draw(3);
    for (unsigned section = 0; section < num_sections; ++section) {
      if (draw(4) == 0) {
        capture();
      } else {
        layer(SimulatedBackend::kAmbient, 2);
      }
    }
  }

  // Forks alone, without captures. With `depth` 0 nothing is nested.
  void layer(Stream ambient, int depth) {
    const Buffer input = written(ambient);
    const auto streams = dispatcher_.fork(ambient, 1 + draw(5));
    const std::size_t failing = draw(5) == 0 ? draw(5) : streams.size();
    std::vector<Buffer> outputs;
    for (std::size_t i = 0; i < streams.size() && i <= failing; ++i) {
      machine_.record_stream(input, streams[i]);
      if (draw(4) != 0) machine_.read(streams[i], input);
      if (depth > 0 && draw(4) == 0) layer(streams[i], depth - 1);
      outputs.push_back(written(streams[i]));
      if (draw(4) == 0) scratch(streams[i]);
    }
    dispatcher_.join(ambient, streams);
    if (failing < streams.size()) {
      for (const Buffer output : outputs) machine_.free(output);
    } else {
      consume(ambient, outputs);
      if (draw(2) == 0) backward(ambient, input, streams);
    }
    machine_.free(input);
    if (draw(2) == 0) scratch(ambient);
  }

  // A layer in a graph, replayed with new inputs.
  void capture() {
    const Stream ambient = SimulatedBackend::kAmbient;
    const Buffer input = written(ambient);
    const Buffer result = written(ambient);
    machine_.begin_capture(ambient);
    const auto streams = dispatcher_.fork(ambient, 1 + draw(4));
    for (const Stream stream : streams) machine_.read(stream, input);
    layer(draw(3) == 0 ? streams[0] : ambient, 1);
    dispatcher_.join(ambient, streams);
    machine_.write(ambient, result);
    const auto graph = machine_.end_capture(ambient);
    for (unsigned replay = 0; replay < 1 + draw(3) % 2; ++replay) {
      machine_.write(ambient, input);
      machine_.replay(graph, ambient);
      machine_.read(ambient, result);
    }
    machine_.free(input);
    machine_.free(result);
  }

 private:
  Buffer written(Stream stream) {
    const Buffer buffer = machine_.alloc(stream);
    machine_.write(stream, buffer);
    return buffer;
  }

  void scratch(Stream stream) { machine_.free(written(stream)); }

  void order(Stream before, Stream after) { machine_.wait(after, machine_.record(before)); }

  void consume(Stream ambient, std::span<const Buffer> outputs) {
    for (const Buffer output : outputs) {
      machine_.record_stream(output, ambient);
      machine_.read(ambient, output);
      machine_.free(output);
    }
  }

  // Autograd replays each node on the stream of its forward and orders streams where a gradient
  // goes from one to the other; the saved input may be gone before that is over.
  void backward(Stream ambient, Buffer input, std::span<const Stream> streams) {
    const Buffer gradient = written(ambient);
    std::vector<Buffer> gradients;
    for (std::size_t i = streams.size(); i-- > 0;) {
      order(ambient, streams[i]);
      machine_.record_stream(gradient, streams[i]);
      machine_.read(streams[i], gradient);
      machine_.read(streams[i], input);
      gradients.push_back(written(streams[i]));
    }
    machine_.free(gradient);
    if (draw(2) == 0) scratch(ambient);
    for (std::size_t i = 0; i < streams.size(); ++i) {
      order(streams[streams.size() - 1 - i], ambient);
    }
    consume(ambient, gradients);
  }

  unsigned draw(unsigned below) { return static_cast<unsigned>(engine_()) % below; }

  Dispatcher& dispatcher_;
  SimulatedBackend& machine_;
  std::mt19937 engine_;
};

}  // namespace esper
