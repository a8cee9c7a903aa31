#include <array>
#include <chrono>
#include <cstdint>
#include <limits>

#include "bindings.h"
#include "esper/signal_ring.h"

namespace esper::bindings {
namespace {

constexpr Py_ssize_t kPushArguments = 11;

std::uint64_t unix_time_ns() {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  return static_cast<std::uint64_t>(std::chrono::nanoseconds(now).count());
}

// None stands for "not measured". A failed conversion leaves a Python error set.
float figure(PyObject* value) {
  if (value == Py_None) return std::numeric_limits<float>::quiet_NaN();
  return static_cast<float>(PyFloat_AsDouble(value));
}

template <class Integer, class Wide>
Integer narrowed(Wide value, const char* name) {
  if (!PyErr_Occurred() && (value < static_cast<Wide>(std::numeric_limits<Integer>::min()) ||
                            value > static_cast<Wide>(std::numeric_limits<Integer>::max()))) {
    PyErr_Format(PyExc_OverflowError, "%s must fit its field's width", name);
  }
  return static_cast<Integer>(value);
}

// The one call on the training step's path, so it takes the interpreter's vector call straight
// (METH_FASTCALL) and is some three times cheaper than a pybind11 function of eleven arguments.
PyObject* push(PyObject* self, PyObject* const* args, Py_ssize_t num_args) {
  if (num_args != kPushArguments && num_args != kPushArguments - 1) {
    PyErr_Format(PyExc_TypeError, "push() takes 10 or 11 positional arguments, got %zd", num_args);
    return nullptr;
  }
  auto* instance = reinterpret_cast<py::detail::instance*>(self);
  auto* ring = static_cast<SignalRing*>(instance->get_value_and_holder().value_ptr());
  if (ring == nullptr) {
    PyErr_SetString(PyExc_TypeError, "SignalRing.__init__() was not called");
    return nullptr;
  }
  const SignalRecord record{
      .step = PyLong_AsUnsignedLongLong(args[2]),
      .time_ns = unix_time_ns(),
      .layer_id = narrowed<std::uint32_t>(PyLong_AsLongLong(args[0]), "layer_id"),
      .seed = narrowed<std::int32_t>(PyLong_AsLongLong(args[1]), "seed"),
      .mean = figure(args[3]),
      .variance = figure(args[4]),
      .entropy = figure(args[5]),
      .dead_share = figure(args[6]),
      .nonfinite_share = figure(args[7]),
      .gradient_variance = figure(args[8]),
      .latency_ms = figure(args[9]),
      .flags = num_args == kPushArguments
                   ? narrowed<std::uint32_t>(PyLong_AsLongLong(args[10]), "flags")
                   : 0U,
  };
  if (PyErr_Occurred() != nullptr) return nullptr;
  return PyBool_FromLong(ring->push(record) ? 1 : 0);
}

PyMethodDef push_method{"push", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(push)),
                        METH_FASTCALL,
                        "push(layer_id, seed, step, mean, variance, entropy, dead_share, "
                        "nonfinite_share, gradient_variance, latency_ms, flags=0)\n"
                        "--\n\n"
                        "Append one record, stamped with the time; False where the ring was full "
                        "and the record was dropped.\n\n"
                        "Producer thread only, positional only. None or NaN: not measured. seed "
                        "-1: the layer as a whole."};

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
  const auto push_descriptor = py::reinterpret_steal<py::object>(
      PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(cls.ptr()), &push_method));
  if (!push_descriptor) throw py::error_already_set();
  cls.attr("push") = push_descriptor;
}

}  // namespace esper::bindings
