#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "esper/errors.h"
#include "esper/lifecycle.h"
#include "esper/state_layout.h"
#include "fast_method.h"

namespace esper::bindings {
namespace {

SeedState to_state(std::int64_t number) {
  if (number < 0 || number > 8) {
    throw InvalidInput("state", "be the number of a seed state (0 to 8)", std::to_string(number));
  }
  return static_cast<SeedState>(number);
}

std::optional<float> measured(float value) {
  return std::isnan(value) ? std::nullopt : std::optional<float>(value);
}

// A view of the seeds there are now; its base keeps the layout alive.
template <class T>
py::array_t<T> view(const py::object& owner, std::span<T> column, bool writable) {
  const auto size = static_cast<py::ssize_t>(owner.cast<const StateLayout&>().num_seeds());
  py::array_t<T> array({size}, {static_cast<py::ssize_t>(sizeof(T))}, column.data(), owner);
  if (!writable) {
    py::detail::array_proxy(array.ptr())->flags &= ~py::detail::npy_api::NPY_ARRAY_WRITEABLE_;
  }
  return array;
}

using LayoutClass = py::class_<StateLayout>;

template <class Column>
void bind_column(LayoutClass& cls, const char* name, Column column, const char* doc,
                 bool writable = false) {
  cls.def_property_readonly(
      name,
      [column, writable](const py::object& self) {
        return view(self, std::invoke(column, self.cast<const StateLayout&>().columns()), writable);
      },
      doc);
}

void bind_health_columns(LayoutClass& cls, const std::string& prefix,
                         HealthColumns StateColumns::* group, const std::string& what) {
  const auto bind = [&](const char* name, std::span<float> HealthColumns::* column,
                        const char* unit) {
    bind_column(
        cls, (prefix + name).c_str(), [=](const StateColumns& c) { return c.*group.*column; },
        ("Read-only view" + std::string(unit) + ", " + what).c_str());
  };
  bind("means", &HealthColumns::means, "");
  bind("m2s", &HealthColumns::m2s, ", second central moments");
  bind("entropies", &HealthColumns::entropies, ", nats");
  bind("gradient_variances", &HealthColumns::gradient_variances, "");
  bind("latencies_ms", &HealthColumns::latencies_ms, "");
}

void bind_columns(LayoutClass& cls) {
  bind_column(cls, "lifecycle_states", &StateColumns::lifecycle_states,
              "Read-only view: state numbers.");
  bind_column(cls, "kernel_ids", &StateColumns::kernel_ids,
              "Read-only view; 0 stands for no kernel.");
  bind_column(cls, "blueprint_ids", &StateColumns::blueprint_ids,
              "Read-only view; 0 stands for no blueprint.");
  bind_column(cls, "alpha", &StateColumns::alpha,
              "Writable view: each seed's share, in [0, 1]; writes through it are not checked.",
              true);
  bind_column(cls, "last_transition_steps", &StateColumns::last_transition_steps,
              "Read-only view: training step of each seed's last transition.");
  bind_column(cls, "forwards", &StateColumns::forwards, "Read-only view: forward passes.");
  bind_column(cls, "errors", &StateColumns::errors, "Read-only view: failed passes.");
  bind_column(cls, "fallbacks", &StateColumns::fallbacks,
              "Read-only view: passes that kept the host's result alone.");
  bind_column(cls, "health_counts", &StateColumns::health_counts,
              "Read-only view: health samples.");
  bind_health_columns(cls, "", &StateColumns::health,
                      "exponentially weighted; NaN where not measured.");
  bind_health_columns(cls, "window_", &StateColumns::window,
                      "over the last complete window of 64 observations; NaN before the first.");
}

void bind_record(py::module_& module) {
  py::class_<SeedRecord> cls(module, "SeedRecord",
                             "One seed at one moment; a figure nobody measured is None.");
  cls.def_property_readonly("state", [](const SeedRecord& r) { return static_cast<int>(r.state); })
      .def_readonly("kernel_id", &SeedRecord::kernel_id)
      .def_readonly("blueprint_id", &SeedRecord::blueprint_id)
      .def_readonly("alpha", &SeedRecord::alpha)
      .def_readonly("last_transition_step", &SeedRecord::last_transition_step)
      .def_readonly("forwards", &SeedRecord::forwards)
      .def_readonly("errors", &SeedRecord::errors)
      .def_readonly("fallbacks", &SeedRecord::fallbacks)
      .def_readonly("health_count", &SeedRecord::health_count);
  const auto bind_figure = [&](const char* name, float SeedRecord::* figure) {
    cls.def_property_readonly(name, [figure](const SeedRecord& r) { return measured(r.*figure); });
  };
  bind_figure("mean", &SeedRecord::mean);
  bind_figure("m2", &SeedRecord::m2);
  bind_figure("entropy", &SeedRecord::entropy);
  bind_figure("gradient_variance", &SeedRecord::gradient_variance);
  bind_figure("latency_ms", &SeedRecord::latency_ms);
  bind_figure("window_mean", &SeedRecord::window_mean);
  bind_figure("window_m2", &SeedRecord::window_m2);
  bind_figure("window_entropy", &SeedRecord::window_entropy);
  bind_figure("window_gradient_variance", &SeedRecord::window_gradient_variance);
  bind_figure("window_latency_ms", &SeedRecord::window_latency_ms);
}

constexpr FastSignature kTransition{"transition", "seed", "to", "step"};

void transition(StateLayout& layout, const FastArguments& args) {
  const auto to = args.integer<std::int64_t>(1);
  layout.transition(args.integer<std::size_t>(0), to_state(to), args.integer<std::uint64_t>(2));
}

constexpr FastSignature kRecordHealth{
    "record_health", "seed", "mean", "variance", "entropy", "gradient_variance", "latency_ms"};

void record_health(StateLayout& layout, const FastArguments& args) {
  const auto figure = [&](std::size_t i) {
    return static_cast<float>(args.number_or_none(i, std::numeric_limits<double>::quiet_NaN()));
  };
  layout.record_health(args.integer<std::size_t>(0),
                       {figure(1), figure(2), figure(3), figure(4), figure(5)});
}

// Written straight into the bytes object.
py::bytes snapshot_bytes(const StateLayout& layout) {
  const std::size_t size = layout.snapshot_size();
  auto bytes = py::reinterpret_steal<py::bytes>(
      PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(size)));
  if (!bytes) throw py::error_already_set();
  layout.snapshot_into(std::as_writable_bytes(std::span(PyBytes_AS_STRING(bytes.ptr()), size)));
  return bytes;
}

py::array_t<SeedRecord> read_all(const StateLayout& layout) {
  py::array_t<SeedRecord> records(static_cast<py::ssize_t>(layout.num_seeds()));
  const std::span rows(records.mutable_data(), static_cast<std::size_t>(records.size()));
  const py::gil_scoped_release release;
  layout.read_all(rows);
  return records;
}

void bind_methods(LayoutClass& cls) {
  def_fast<transition, kTransition>(
      cls,
      "Move a seed to another state at a training step.\n\n"
      "Raises:\n    InvalidTransitionError: the table forbids it; names the seed, both states "
      "and the allowed ones.");
  def_fast<record_health, kRecordHealth>(
      cls,
      "Average one observation into the seed's health; None or a non-finite figure was not "
      "measured.");
  cls.def("add_seeds", &StateLayout::add_seeds, py::arg("n"),
          "Add n dormant seeds inside the capacity and give the index of the first.\n\n"
          "Raises:\n    CapacityExceededError: the capacity would be exceeded; nothing changed.")
      .def("set_kernel", &StateLayout::set_kernel, py::arg("seed"), py::arg("kernel_id"),
           py::arg("blueprint_id"),
           "Note which kernel and blueprint stand at the seed; 0 for none.")
      .def("set_alpha", &StateLayout::set_alpha, py::arg("seed"), py::arg("alpha"),
           "Set the seed's share, in [0, 1].")
      .def("count_forward", &StateLayout::count_forward, py::arg("seed"), "Count one forward pass.")
      .def("count_error", &StateLayout::count_error, py::arg("seed"), "Count one failed pass.")
      .def("count_fallback", &StateLayout::count_fallback, py::arg("seed"),
           "Count one pass that kept the host's result alone.")
      .def(
          "state",
          [](const StateLayout& self, std::size_t seed) {
            return static_cast<int>(self.state(seed));
          },
          py::arg("seed"), "The number of the seed's state.")
      .def("read", &StateLayout::read, py::arg("seed"),
           "One seed's record, consistent in itself; from any thread.")
      .def("read_all", read_all,
           "All seeds' records as a structured array, each consistent in itself, NaN where not "
           "measured; from any thread,\n"
           "without the GIL.")
      .def("snapshot", snapshot_bytes,
           "All seeds as versioned bytes with a checksum; writer thread only.")
      .def(
          "restore",
          [](StateLayout& self, const py::bytes& snapshot) {
            const std::string_view bytes = snapshot;
            self.restore(std::as_bytes(std::span(bytes.data(), bytes.size())));
          },
          py::arg("snapshot"),
          "Take over all seeds of a snapshot, growing inside the capacity; writer thread only.\n\n"
          "Raises:\n    CorruptDataError: magic, version, size or checksum do not hold.\n"
          "    InvalidStateError: the snapshot has fewer seeds than the layout.\n"
          "    CapacityExceededError: it has more than the capacity. Nothing is changed in each "
          "case.");
}

}  // namespace

void bind_state_layout(py::module_& module) {
  module.def(
      "transition_table",
      [] {
        std::vector<std::pair<int, int>> table;
        for (const Transition& step : kTransitions) {
          table.emplace_back(static_cast<int>(step.from), static_cast<int>(step.to));
        }
        return table;
      },
      "Every allowed step of the seed life cycle, as (from, to) state numbers.");
  module.def(
      "state_name", [](int state) { return std::string(state_name(to_state(state))); },
      py::arg("state"), "The name of a state number, such as 'DORMANT'.");
  PYBIND11_NUMPY_DTYPE(SeedRecord, state, kernel_id, blueprint_id, alpha, last_transition_step,
                       forwards, errors, fallbacks, health_count, mean, m2, entropy,
                       gradient_variance, latency_ms, window_mean, window_m2, window_entropy,
                       window_gradient_variance, window_latency_ms);
  bind_record(module);
  LayoutClass cls(module, "StateLayout",
                  "The state of all seeds of a model: one writer (the training thread), any number "
                  "of readers.\n\n"
                  "Columns are zero-copy views that keep the layout alive and never move.");
  cls.def(py::init([](std::size_t num_seeds, std::optional<std::size_t> capacity) {
            if (capacity == std::size_t{0})
              throw InvalidInput("capacity", "be at least 1 seed", "0");
            return std::make_unique<StateLayout>(num_seeds, capacity.value_or(0));
          }),
          py::arg("num_seeds"), py::arg("capacity") = py::none(),
          "Start with dormant seeds; without a capacity there is room to double.")
      .def_property_readonly("num_seeds", &StateLayout::num_seeds)
      .def("__len__", &StateLayout::num_seeds)
      .def_property_readonly("capacity", &StateLayout::capacity)
      .def_property_readonly_static("bytes_per_seed",
                                    [](const py::object&) { return StateLayout::bytes_per_seed(); })
      .def_property_readonly_static("health_window",
                                    [](const py::object&) { return StateLayout::kHealthWindow; });
  bind_columns(cls);
  bind_methods(cls);
}

}  // namespace esper::bindings
