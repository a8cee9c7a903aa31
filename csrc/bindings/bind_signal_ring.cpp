#include <time.h>

#include <array>
#include <chrono>
#include <cstdint>
#include <limits>

#include "bindings.h"
#include "esper/signal_ring.h"
#include "fast_method.h"

namespace esper::bindings {
namespace {

constexpr FastSignature kPush{"push",
                              "layer_id",
                              "seed",
                              "step",
                              "mean",
                              "variance",
                              "entropy",
                              "dead_share",
                              "nonfinite_share",
                              "gradient_variance",
                              "latency_ms",
                              FastParameter{"flags", "0"}};

// Unix time as of the kernel's last tick: never ahead, behind by 1 to 10 ms at most. The exact
// clock costs as much as the whole push.
std::uint64_t unix_time_ns() noexcept {
#ifdef CLOCK_REALTIME_COARSE
  timespec now{};
  clock_gettime(CLOCK_REALTIME_COARSE, &now);
  return static_cast<std::uint64_t>(now.tv_sec) * 1'000'000'000U +
         static_cast<std::uint64_t>(now.tv_nsec);
#else
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  return static_cast<std::uint64_t>(std::chrono::nanoseconds(now).count());
#endif
}

// The one call on the training step's path. All arguments are converted before the ring is touched:
// a conversion may run Python code, and with it another push.
bool push(SignalRing& ring, const FastArguments& args) {
  const auto figure = [&](std::size_t i) {
    return static_cast<float>(args.number_or_none(i, std::numeric_limits<double>::quiet_NaN()));
  };
  const SignalRecord record{
      .step = args.integer<std::uint64_t>(2),
      .time_ns = unix_time_ns(),
      .layer_id = args.integer<std::uint32_t>(0),
      .seed = args.integer<std::int32_t>(1),
      .mean = figure(3),
      .variance = figure(4),
      .entropy = figure(5),
      .dead_share = figure(6),
      .nonfinite_share = figure(7),
      .gradient_variance = figure(8),
      .latency_ms = figure(9),
      .flags = args.integer_or<std::uint32_t>(10, 0),
  };
  return ring.push(record);
}

// Columns are made with the GIL held, filled without it.
py::dict drain(SignalRing& ring, std::size_t max_records) {
  const auto rows = static_cast<py::ssize_t>(std::min(max_records, ring.size()));
  py::array_t<std::uint32_t> layer_id(rows), flags(rows);
  py::array_t<std::int32_t> seed(rows);
  py::array_t<std::uint64_t> step(rows), time_ns(rows);
  std::array<py::array_t<float>, 7> figures;
  for (auto& column : figures) column = py::array_t<float>(rows);
  const auto span = []<class T>(py::array_t<T>& column) {
    return std::span<T>(column.mutable_data(), static_cast<std::size_t>(column.size()));
  };
  const SignalColumns columns{span(layer_id),   span(seed),       span(step),
                              span(time_ns),    span(figures[0]), span(figures[1]),
                              span(figures[2]), span(figures[3]), span(figures[4]),
                              span(figures[5]), span(figures[6]), span(flags)};
  std::size_t count = 0;
  {
    const py::gil_scoped_release release;
    count = ring.drain(columns);
  }
  const py::slice filled(0, static_cast<py::ssize_t>(count), 1);
  const auto cut = [&](const py::array& column) -> py::object {
    return static_cast<py::ssize_t>(count) == rows ? py::object(column)
                                                   : py::object(column[filled]);
  };
  using py::literals::operator""_a;
  return py::dict("layer_id"_a = cut(layer_id), "seed"_a = cut(seed), "step"_a = cut(step),
                  "time_ns"_a = cut(time_ns), "mean"_a = cut(figures[0]),
                  "variance"_a = cut(figures[1]), "entropy"_a = cut(figures[2]),
                  "dead_share"_a = cut(figures[3]), "nonfinite_share"_a = cut(figures[4]),
                  "gradient_variance"_a = cut(figures[5]), "latency_ms"_a = cut(figures[6]),
                  "flags"_a = cut(flags));
}

}  // namespace

void bind_signal_ring(py::module_& module) {
  py::class_<SignalRing> cls(module, "SignalRing",
                             "A bounded queue of health records: the training thread pushes and "
                             "never waits, a publisher thread drains.");
  cls.def(py::init<std::size_t>(), py::arg("capacity") = std::size_t{1} << 16U,
          "Hold `capacity` records (56 bytes each), rounded up to a power of two, at most 2^24.")
      .def("drain", drain, py::arg("max_records") = std::size_t{1} << 16U,
           "Take the oldest records, at most `max_records`, as a dict of equally long columns by "
           "field "
           "name.\n\n"
           "Copies without the GIL; several draining threads take turns.")
      .def_property_readonly("pushed", &SignalRing::pushed, "Records accepted since birth.")
      .def_property_readonly("dropped", &SignalRing::dropped,
                             "Records refused by a full ring since birth.")
      .def_property_readonly("capacity", &SignalRing::capacity)
      .def("__len__", &SignalRing::size);
  def_fast<push, kPush>(
      cls,
      "Append one record, stamped with the time of the kernel's last tick (at most 10 ms "
      "ago); False where the ring was full "
      "and the record was dropped.\n\n"
      "Producer thread only. None or NaN: not measured. seed -1: the layer as a "
      "whole.\n\n"
      "Raises:\n    InvalidInputError: a whole number does not fit its field; "
      "nothing was pushed.");
}

}  // namespace esper::bindings
