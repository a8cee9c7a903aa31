#include <cstdint>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "bindings.h"
#include "esper/cpu_backend.h"
#include "esper/cuda_backend.h"
#include "esper/errors.h"
#include "esper/probe.h"
#include "esper/simulated_backend.h"
#include "esper/stream_dispatcher.h"

namespace esper::bindings {
namespace {

using CpuDispatcher = StreamDispatcher<CpuBackend>;
using CudaDispatcher = StreamDispatcher<CudaBackend>;
using SimulatedDispatcher = StreamDispatcher<SimulatedBackend>;
using RawStreams = std::vector<std::uintptr_t>;
using Probed = std::tuple<std::uintptr_t, std::size_t, std::string>;  // address, numel, dtype

// One Python face for the three; which one it is never changes.
class PyDispatcher {
 public:
  PyDispatcher(const std::string& backend, std::size_t num_streams, int device, int priority)
      : name_(backend), num_streams_(num_streams) {
    if (backend == "cpu") {
      dispatcher_ = std::make_unique<CpuDispatcher>(std::make_unique<CpuBackend>(num_streams));
    } else if (backend == "cuda") {
      dispatcher_ = std::make_unique<CudaDispatcher>(
          std::make_unique<CudaBackend>(num_streams, device, priority));
    } else if (backend == "simulated") {
      dispatcher_ =
          std::make_unique<SimulatedDispatcher>(std::make_unique<SimulatedBackend>(num_streams));
    } else {
      throw InvalidInput("backend", "be one of 'cpu', 'cuda', 'simulated'", "'" + backend + "'");
    }
  }

  [[nodiscard]] const std::string& name() const noexcept { return name_; }
  [[nodiscard]] std::size_t num_streams() const noexcept { return num_streams_; }

  [[nodiscard]] bool closed() const {
    return std::visit([](const auto& dispatcher) { return dispatcher->closed(); }, dispatcher_);
  }

  void close() noexcept {
    std::visit([](const auto& dispatcher) { dispatcher->close(); }, dispatcher_);
  }

  // Python code runs in order on the calling thread; each call's exception is kept beside the
  // others' results.
  py::list dispatch(const py::sequence& callables) const {
    if (name_ == "cuda") {
      throw InvalidState(
          "backend must be 'cpu' or 'simulated' for dispatch, got 'cuda': use fork and join");
    }
    if (closed()) throw InvalidState("dispatcher must be open, got a closed one");
    py::list outcomes;
    for (const py::handle callable : callables) outcomes.append(outcome_of(callable));
    return outcomes;
  }

  // The GIL is held only while Python objects are read and made.
  py::list probe_all(const std::vector<Probed>& tensors, std::size_t max_samples) {
    std::vector<ProbeResult> results(tensors.size());
    {
      const py::gil_scoped_release release;
      for (const std::exception_ptr& error : probe_each(tensors, max_samples, results)) {
        if (error) std::rethrow_exception(error);
      }
    }
    py::list figures;
    for (const ProbeResult& r : results) {
      figures.append(
          py::make_tuple(r.count, r.mean, r.variance, r.entropy, r.dead_share, r.nonfinite_share));
    }
    return figures;
  }

  RawStreams fork(std::uintptr_t ambient, std::size_t count) {
    if (auto* cuda = std::get_if<std::unique_ptr<CudaDispatcher>>(&dispatcher_)) {
      return (*cuda)->fork(ambient, count);
    }
    return simulated().fork(ambient, count);
  }

  void join(std::uintptr_t ambient, const RawStreams& streams) {
    if (auto* cuda = std::get_if<std::unique_ptr<CudaDispatcher>>(&dispatcher_)) {
      return (*cuda)->join(ambient, streams);
    }
    simulated().join(ambient, streams);
  }

  SimulatedBackend& simulation() { return simulated().backend(); }

 private:
  static py::tuple outcome_of(const py::handle& callable) {
    try {
      return py::make_tuple(true, callable());
    } catch (py::error_already_set& error) {
      // An interrupt or an exit is not this piece's own failure.
      if (!error.matches(PyExc_Exception)) throw;
      return py::make_tuple(false, error.value());
    }
  }

  std::vector<std::exception_ptr> probe_each(const std::vector<Probed>& tensors,
                                             std::size_t max_samples,
                                             std::vector<ProbeResult>& results) {
    auto* cpu = std::get_if<std::unique_ptr<CpuDispatcher>>(&dispatcher_);
    if (cpu == nullptr) {
      throw InvalidState("backend must be 'cpu' for probe_all, got '" + name_ + "'");
    }
    if (closed()) throw InvalidState("dispatcher must be open, got a closed one");
    std::vector<CpuBackend::Task> tasks;
    tasks.reserve(tensors.size());
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      tasks.emplace_back([&tensor = tensors[i], &result = results[i], max_samples] {
        const auto& [address, numel, dtype] = tensor;
        result =
            probe(reinterpret_cast<const std::byte*>(address), numel, dtype_of(dtype), max_samples);
      });
    }
    return run_all(**cpu, tasks);
  }

  SimulatedDispatcher& simulated() {
    if (auto* found = std::get_if<std::unique_ptr<SimulatedDispatcher>>(&dispatcher_))
      return **found;
    throw InvalidState("backend must be one with streams of its own for this call, got '" + name_ +
                       "'");
  }

  std::string name_;
  std::size_t num_streams_;
  std::variant<std::unique_ptr<CpuDispatcher>, std::unique_ptr<CudaDispatcher>,
               std::unique_ptr<SimulatedDispatcher>>
      dispatcher_;
};

std::vector<std::string> violations_of(const SimulatedBackend& machine) {
  std::vector<std::string> sentences;
  for (const auto& violation : machine.violations())
    sentences.push_back(machine.describe(violation));
  return sentences;
}

std::vector<std::string> operations_of(const SimulatedBackend& machine) {
  std::vector<std::string> sentences;
  for (const auto& op : machine.operations()) sentences.push_back(machine.describe(op));
  return sentences;
}

// (kind, stream, buffer, block, source, dropped, captured); None where there is none.
using LoggedOp = std::tuple<std::string_view, std::size_t, std::size_t, std::optional<std::size_t>,
                            std::optional<std::size_t>, bool, bool>;

std::vector<LoggedOp> log_of(const SimulatedBackend& machine) {
  const auto known = [](std::size_t index) {
    return index == SimulatedBackend::kNone ? std::nullopt : std::optional<std::size_t>(index);
  };
  std::vector<LoggedOp> log;
  for (const auto& op : machine.operations()) {
    log.emplace_back(SimulatedBackend::name_of(op.kind), op.stream, op.buffer, known(op.block),
                     known(op.source), op.dropped, op.captured);
  }
  return log;
}

using SimulationClass = py::class_<SimulatedBackend, py::smart_holder>;

void bind_simulated_calls(SimulationClass& cls) {
  cls.def("alloc", &SimulatedBackend::alloc, py::arg("stream"),
          "Allocate a buffer as PyTorch's caching allocator would: the stream's last freed memory "
          "first.")
      .def("free", &SimulatedBackend::free, py::arg("buffer"),
           "Free it on the host, whatever the device is doing.")
      .def("read", &SimulatedBackend::read, py::arg("stream"), py::arg("buffer"), "Enqueue a read.")
      .def("write", &SimulatedBackend::write, py::arg("stream"), py::arg("buffer"),
           "Enqueue a write.")
      .def("record_stream", &SimulatedBackend::record_stream, py::arg("buffer"), py::arg("stream"),
           "Tell the allocator that the stream uses the buffer too.")
      .def("record", &SimulatedBackend::record, py::arg("stream"),
           "Record an event of the pool; it holds until 2 * num_streams further ones were.")
      .def("wait", &SimulatedBackend::wait, py::arg("stream"), py::arg("event"),
           "Make the stream wait for what the event holds.")
      .def("begin_capture", &SimulatedBackend::begin_capture, py::arg("stream"),
           "From here on, what the stream and those that join it are given goes into a graph.")
      .def("end_capture", &SimulatedBackend::end_capture, py::arg("stream"), "The graph's number.")
      .def("replay", &SimulatedBackend::replay, py::arg("graph"), py::arg("stream"),
           "Run a graph in the order of a stream.");
}

void bind_simulation(py::module_& module) {
  SimulationClass cls(
      module, "Simulation",
      "A machine that runs nothing, records every operation and reports what nothing orders. "
      "Stream 0 is the ambient one.");
  bind_simulated_calls(cls);
  cls.def(
         "drop",
         [](SimulatedBackend& self, const std::string& kind, std::size_t number) {
           self.drop(SimulatedBackend::kind_of(kind), number);
         },
         py::arg("kind"), py::arg("number"),
         "Plant a defect: the 'record', 'wait' or 'record_stream' with this number, from 0 on, "
         "will "
         "not happen.")
      .def(
          "count",
          [](const SimulatedBackend& self, const std::string& kind) {
            return self.count(SimulatedBackend::kind_of(kind));
          },
          py::arg("kind"), "How many operations of a kind there were, replays left out.")
      .def("operations", operations_of, "Every operation so far, in words.")
      .def("log", log_of,
           "Every operation so far: (kind, stream, buffer, block of memory, recording operation of "
           "a wait, dropped,\ncaptured).")
      .def("violations", violations_of,
           "Every race, use after reuse, use after free and broken capture so far, in words.");
}

using DispatcherClass = py::class_<PyDispatcher, py::smart_holder>;

void bind_dispatcher_calls(DispatcherClass& cls) {
  cls.def("dispatch", &PyDispatcher::dispatch, py::arg("callables"),
          "Call each without arguments: a list of (True, result) or (False, exception), in "
          "order.\n\n"
          "Python code can't run side by side on CPU threads, so the calls are made in order on "
          "the calling thread;\n"
          "an exception ends no other call. KeyboardInterrupt and SystemExit end all.\n\n"
          "Raises:\n    InvalidStateError: the backend is 'cuda' (use fork and join), or the "
          "dispatcher is closed.")
      .def(
          "probe_all", &PyDispatcher::probe_all, py::arg("tensors"),
          py::arg("max_samples") = kProbeDefaultSamples,
          "probe() of each (data_ptr, numel, dtype), side by side on the streams' own threads, "
          "without the GIL.\n\n"
          "Raises:\n    InvalidStateError: the backend is not 'cpu', or the dispatcher is closed.\n"
          "    InvalidInputError: as probe() does, after all were run.")
      .def("fork", &PyDispatcher::fork, py::arg("ambient_stream"), py::arg("count"),
           py::call_guard<py::gil_scoped_release>(),
           "A raw stream for each of `count` pieces of work, ordered after the ambient stream's "
           "work so far.\n\n"
           "For torch.cuda.ExternalStream. Call x.record_stream(s) on every tensor that work on s "
           "reads. The host does\n"
           "not wait. Streams are shared where count is above num_streams.\n\n"
           "Raises:\n    InvalidStateError: the backend is 'cpu', or the dispatcher is closed.")
      .def(
          "join", &PyDispatcher::join, py::arg("ambient_stream"), py::arg("streams"),
          py::call_guard<py::gil_scoped_release>(),
          "Order the ambient stream after the work of `streams` so far; the host does not wait.\n\n"
          "Call y.record_stream(ambient) on every tensor that was made on one of them and lives "
          "on.")
      .def("close", &PyDispatcher::close, py::call_guard<py::gil_scoped_release>(),
           "Finish what was submitted and give the streams back; may be called again.")
      .def("__enter__", [](py::object self) { return self; })
      .def("__exit__", [](PyDispatcher& self, const py::args&) {
        const py::gil_scoped_release release;
        self.close();
      });
}

}  // namespace

void bind_stream_dispatcher(py::module_& module) {
  module.def("cuda_built", cuda_built, "Whether this build has the CUDA parts.");
  module.def("cuda_available", cuda_available, py::call_guard<py::gil_scoped_release>(),
             "Whether this build has the CUDA parts and the driver sees a device.");
  bind_simulation(module);
  DispatcherClass cls(module, "StreamDispatcher", py::release_gil_before_calling_cpp_dtor(),
                      "Runs pieces of work side by side: forks streams from an ambient one and "
                      "joins them again.\n\n"
                      "Thread-safe; close it, or use it in a with statement.");
  cls.def(py::init<const std::string&, std::size_t, int, int>(), py::arg("backend") = "cpu",
          py::arg("num_streams") = 4, py::arg("device") = 0, py::arg("priority") = 0,
          "backend is 'cpu', 'cuda' or 'simulated'; device and priority (0 lowest, negative "
          "higher) are CUDA's.\n\n"
          "Raises:\n    UnavailableError: 'cuda' without CUDA in this build or on this machine.")
      .def_property_readonly("backend", &PyDispatcher::name)
      .def_property_readonly("num_streams", &PyDispatcher::num_streams)
      .def_property_readonly("closed", &PyDispatcher::closed)
      .def_property_readonly(
          "simulation", &PyDispatcher::simulation, py::return_value_policy::reference_internal,
          "The simulated machine.\n\nRaises:\n    InvalidStateError: the backend is another.");
  bind_dispatcher_calls(cls);
}

}  // namespace esper::bindings
