#include <cmath>
#include <cstdint>
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

template <class T>
void bind_column(LayoutClass& cls, const char* name, std::span<T> StateColumns::* column,
                 const char* doc, bool writable = false) {
  cls.def_property_readonly(
      name,
      [column, writable](const py::object& self) {
        return view(self, self.cast<const StateLayout&>().columns().*column, writable);
      },
      doc);
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
  bind_column(cls, "means", &StateColumns::means, "Read-only view; NaN where not measured.");
  bind_column(cls, "m2s", &StateColumns::m2s,
              "Read-only view: second central moments; NaN where not measured.");
  bind_column(cls, "entropies", &StateColumns::entropies,
              "Read-only view, nats; NaN where not measured.");
  bind_column(cls, "gradient_variances", &StateColumns::gradient_variances,
              "Read-only view; NaN where not measured.");
  bind_column(cls, "latencies_ms", &StateColumns::latencies_ms,
              "Read-only view; NaN where not measured.");
}

void bind_record(py::module_& module) {
  py::class_<SeedRecord>(module, "SeedRecord",
                         "One seed at one moment; a figure nobody measured is None.")
      .def_property_readonly("state", [](const SeedRecord& r) { return static_cast<int>(r.state); })
      .def_readonly("kernel_id", &SeedRecord::kernel_id)
      .def_readonly("blueprint_id", &SeedRecord::blueprint_id)
      .def_readonly("alpha", &SeedRecord::alpha)
      .def_readonly("last_transition_step", &SeedRecord::last_transition_step)
      .def_readonly("forwards", &SeedRecord::forwards)
      .def_readonly("errors", &SeedRecord::errors)
      .def_readonly("fallbacks", &SeedRecord::fallbacks)
      .def_readonly("health_count", &SeedRecord::health_count)
      .def_property_readonly("mean", [](const SeedRecord& r) { return measured(r.mean); })
      .def_property_readonly("m2", [](const SeedRecord& r) { return measured(r.m2); })
      .def_property_readonly("entropy", [](const SeedRecord& r) { return measured(r.entropy); })
      .def_property_readonly("gradient_variance",
                             [](const SeedRecord& r) { return measured(r.gradient_variance); })
      .def_property_readonly("latency_ms",
                             [](const SeedRecord& r) { return measured(r.latency_ms); });
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

py::bytes snapshot_bytes(const StateLayout& layout) {
  const std::vector<std::byte> bytes = layout.snapshot();
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
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
      .def_property_readonly_static(
          "bytes_per_seed", [](const py::object&) { return StateLayout::bytes_per_seed(); });
  bind_columns(cls);
  bind_methods(cls);
}

}  // namespace esper::bindings
