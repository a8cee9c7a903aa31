#include <chrono>
#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "bindings.h"
#include "esper/errors.h"
#include "esper/kernel_cache.h"
#include "esper/single_flight.h"

namespace esper::bindings {
namespace {

// A str key equals its UTF-8 bytes. The view lives as long as the object.
std::string_view key_view(const py::handle& key) {
  Py_ssize_t size = 0;
  if (PyUnicode_Check(key.ptr())) {
    const char* text = PyUnicode_AsUTF8AndSize(key.ptr(), &size);
    if (text == nullptr) throw py::error_already_set();
    return {text, static_cast<std::size_t>(size)};
  }
  char* text = nullptr;
  if (!PyBytes_Check(key.ptr())) {
    throw py::type_error("key must be str or bytes, got " +
                         std::string(py::str(py::type::handle_of(key).attr("__name__"))));
  }
  if (PyBytes_AsStringAndSize(key.ptr(), &text, &size) != 0) throw py::error_already_set();
  return {text, static_cast<std::size_t>(size)};
}

std::uint64_t ttl_ns_of(std::optional<double> ttl_s) {
  if (!ttl_s) return 0;
  if (!(*ttl_s > 0) || *ttl_s > 1e9) {
    throw InvalidInput("ttl_s", "be above 0 and at most 1e9 seconds", std::to_string(*ttl_s));
  }
  return std::max<std::uint64_t>(1, static_cast<std::uint64_t>(std::llround(*ttl_s * 1e9)));
}

CacheHandle handle_of(const py::handle& value) {
  return static_cast<CacheHandle>(reinterpret_cast<std::uintptr_t>(value.ptr()));
}

PyObject* object_of(CacheHandle handle) {
  return reinterpret_cast<PyObject*>(static_cast<std::uintptr_t>(handle));
}

// What a load came to, for everybody who waits: a value or an exception. Touched with the GIL held
// only.
struct Outcome {
  py::object value;
  py::object error;
};

// A KernelCache of Python objects: a handle is a counted reference. Every core call is made with
// the GIL held and runs no Python code under a shard's lock, so the lock is never waited for.
class PyKernelCache {
 public:
  PyKernelCache(const CacheConfig& config, py::object on_evict)
      : on_evict_(std::move(on_evict)), cache_(config, hooks()) {}

  py::object get(const py::handle& key) {
    const std::optional<CacheHandle> handle = cache_.get(key_view(key));
    if (!handle) return py::none();
    return py::reinterpret_steal<py::object>(object_of(*handle));
  }

  bool put(const py::handle& key, const py::object& value, std::size_t size_bytes, bool pinned,
           std::optional<double> ttl_s) {
    switch (store(key, value, size_bytes, pinned, ttl_ns_of(ttl_s))) {
      case KernelCache::PutResult::STORED:
        return true;
      case KernelCache::PutResult::PINNED_FULL:
        return false;
      case KernelCache::PutResult::TOO_LARGE:
        break;
    }
    throw CapacityExceeded(
        "size_bytes must be at most max_item_bytes = " + std::to_string(cache_.max_item_bytes()) +
        ", got " + std::to_string(size_bytes));
  }

  py::object get_or_load(const py::handle& key, const py::function& loader) {
    py::object value = get(key);
    if (!value.is_none()) return value;
    const std::string_view name = key_view(key);
    if (cache_.is_negative(name)) {
      throw NotFound("key must not be noted as absent, got '" + std::string(name) + "'");
    }
    auto ticket = flights_.join(name);
    if (!ticket.leads()) return await(ticket);
    if (cache_.contains(name)) {  // stored between the miss and the join
      value = get(key);
      ticket.complete({value, {}});
      return value;
    }
    return lead(ticket, key, loader);
  }

  py::dict stats() const {
    const CacheStats s = cache_.stats();
    using py::literals::operator""_a;
    return py::dict("hits"_a = s.hits, "misses"_a = s.misses, "negative_hits"_a = s.negative_hits,
                    "inserts"_a = s.inserts, "replaced"_a = s.replaced, "evictions"_a = s.evictions,
                    "expirations"_a = s.expirations, "rejected"_a = s.rejected, "bytes"_a = s.bytes,
                    "entries"_a = s.entries, "pinned_entries"_a = s.pinned_entries,
                    "negative_entries"_a = s.negative_entries, "loads"_a = num_loads_,
                    "load_failures"_a = num_load_failures_, "load_waits"_a = num_load_waits_);
  }

  KernelCache& core() noexcept { return cache_; }

  int traverse(visitproc visit, void* arg) const {
    int result = on_evict_ ? visit(on_evict_.ptr(), arg) : 0;
    cache_.for_each_handle([&](CacheHandle handle) {
      if (result == 0) result = visit(object_of(handle), arg);
    });
    return result;
  }

  // For the garbage collector: lets everything go, tells nobody.
  void drop_all() {
    on_evict_ = py::none();
    cache_.clear(true);
  }

  ~PyKernelCache() { drop_all(); }
  PyKernelCache(const PyKernelCache&) = delete;
  PyKernelCache& operator=(const PyKernelCache&) = delete;

 private:
  CacheHooks hooks() {
    CacheHooks hooks;
    hooks.acquire = [](CacheHandle handle) { Py_INCREF(object_of(handle)); };
    hooks.release = [this](const std::string& key, CacheHandle handle, CacheRemoval removal) {
      const auto value = py::reinterpret_steal<py::object>(object_of(handle));
      if (!on_evict_.is_none()) tell(key, value, removal);
    };
    return hooks;
  }

  // An exception of the callback can't reach whoever caused the eviction; it goes to
  // sys.unraisablehook.
  void tell(const std::string& key, const py::object& value, CacheRemoval removal) {
    const py::object callback = on_evict_;
    const py::error_scope kept;  // what is being raised just now
    try {
      callback(py::bytes(key), value, py::str(std::string(removal_name(removal))));
    } catch (py::error_already_set& error) {
      error.discard_as_unraisable(callback);
    }
  }

  KernelCache::PutResult store(const py::handle& key, const py::object& value,
                               std::size_t size_bytes, bool pinned, std::uint64_t ttl_ns) {
    if (value.is_none()) throw InvalidInput("value", "be an object", "None");
    py::object ours = value;  // the reference that the cache takes over
    const KernelCache::PutResult result =
        cache_.put(key_view(key), handle_of(value), size_bytes, pinned, ttl_ns);
    if (result == KernelCache::PutResult::STORED) ours.release();
    return result;
  }

  py::object lead(SingleFlight<Outcome>::Ticket& ticket, const py::handle& key,
                  const py::function& loader) {
    ++num_loads_;
    try {
      const auto [value, size_bytes] = loaded(loader());
      store(key, value, size_bytes, false, 0);
      ticket.complete({value, {}});
      return value;
    } catch (py::error_already_set& error) {
      ++num_load_failures_;
      ticket.complete({{}, error.value()});
      throw;
    } catch (...) {
      ++num_load_failures_;
      ticket.fail(std::current_exception());
      throw;
    }
  }

  static std::pair<py::object, std::size_t> loaded(const py::object& result) {
    try {
      return result.cast<std::pair<py::object, std::size_t>>();
    } catch (const py::cast_error&) {
      throw InvalidInput("loader", "return (value, size_bytes)",
                         py::repr(result).cast<std::string>());
    }
  }

  py::object await(SingleFlight<Outcome>::Ticket& ticket) {
    ++num_load_waits_;
    bool landed = false;
    while (!landed) {
      {
        const py::gil_scoped_release release;
        landed = ticket.wait_for(std::chrono::milliseconds(50));
      }
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    }
    const Outcome outcome = ticket.wait();
    if (!outcome.error) return outcome.value;
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(outcome.error.ptr())), outcome.error.ptr());
    throw py::error_already_set();
  }

  py::object on_evict_;
  std::uint64_t num_loads_ = 0;
  std::uint64_t num_load_failures_ = 0;
  std::uint64_t num_load_waits_ = 0;
  KernelCache cache_;
  SingleFlight<Outcome> flights_;
};

// Lets Python's collector see through the cache: a cached kernel or callback may well refer back to
// it.
void enable_gc(PyHeapTypeObject* heap_type) {
  PyTypeObject* type = &heap_type->ht_type;
  type->tp_flags |= Py_TPFLAGS_HAVE_GC;
  type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) -> int {
    Py_VISIT(Py_TYPE(self));
    if (!py::detail::is_holder_constructed(self)) return 0;
    return py::cast<PyKernelCache&>(py::handle(self)).traverse(visit, arg);
  };
  type->tp_clear = [](PyObject* self) -> int {
    if (py::detail::is_holder_constructed(self))
      py::cast<PyKernelCache&>(py::handle(self)).drop_all();
    return 0;
  };
}

using CacheClass = py::class_<PyKernelCache>;

void bind_access(CacheClass& cls) {
  cls.def("get", &PyKernelCache::get, py::arg("key"),
          "The value, or None for an unknown, expired or negative key.")
      .def("put", &PyKernelCache::put, py::arg("key"), py::arg("value"), py::arg("size_bytes"),
           py::arg("pinned") = false, py::arg("ttl_s") = py::none(),
           "Store a value, evicting as needed; False where all that would have to go is pinned.\n\n"
           "Replaces the key's value and keeps its pins; ends a negative entry.\n\n"
           "Raises:\n    CapacityExceededError: size_bytes is above max_item_bytes, so it can "
           "never fit.")
      .def("get_or_load", &PyKernelCache::get_or_load, py::arg("key"), py::arg("loader"),
           "The value; on a miss loader() -> (value, size_bytes) is called once however many "
           "threads ask.\n\n"
           "Threads that ask meanwhile wait without the GIL and get the same value or the same "
           "exception. A value that does\n"
           "not fit is handed out and not kept. Loaders must not wait for one another in a "
           "circle.\n\n"
           "Raises:\n    NotFoundError: the key is noted as absent.\n"
           "    InvalidStateError: a loader asks for its own key.")
      .def(
          "__contains__",
          [](PyKernelCache& self, const py::handle& key) {
            return self.core().contains(key_view(key));
          },
          py::arg("key"))
      .def("__len__", [](PyKernelCache& self) { return self.core().stats().entries; });
}

void bind_upkeep(CacheClass& cls) {
  cls.def(
         "pin",
         [](PyKernelCache& self, const py::handle& key) { return self.core().pin(key_view(key)); },
         py::arg("key"), "Keep the entry until each pin is undone; False where there is none.")
      .def(
          "unpin",
          [](PyKernelCache& self, const py::handle& key) {
            return self.core().unpin(key_view(key));
          },
          py::arg("key"), "Undo one pin; False where there is no entry or no pin.")
      .def(
          "erase",
          [](PyKernelCache& self, const py::handle& key) {
            return self.core().erase(key_view(key));
          },
          py::arg("key"),
          "Drop the entry; False where there is none.\n\nRaises:\n    InvalidStateError: it is "
          "pinned.")
      .def(
          "put_negative",
          [](PyKernelCache& self, const py::handle& key, double ttl_s) {
            self.core().put_negative(key_view(key), ttl_ns_of(ttl_s));
          },
          py::arg("key"), py::arg("ttl_s"),
          "Note that the key has no value for a while.\n\nRaises:\n    InvalidStateError: it has "
          "one.")
      .def(
          "is_negative",
          [](PyKernelCache& self, const py::handle& key) {
            return self.core().is_negative(key_view(key));
          },
          py::arg("key"), "Whether the key is noted as absent.")
      .def(
          "clear", [](PyKernelCache& self) { return self.core().clear(); },
          "Drop every entry that is not pinned and all negative ones; gives the number of entries "
          "dropped.")
      .def("stats", &PyKernelCache::stats,
           "Exact counts since birth, and the present fill, by name.");
}

}  // namespace

void bind_kernel_cache(py::module_& module) {
  CacheClass cls(module, "KernelCache", py::custom_type_setup(enable_gc),
                 "Objects by key, bounded by bytes and count (S3-FIFO: resists scans), with pins, "
                 "TTL, negative entries\n"
                 "and single-flight loading. Thread-safe; no call but get_or_load waits.\n\n"
                 "on_evict(key: bytes, value, reason: str) is told of everything that leaves, "
                 "outside all locks; reason is\n"
                 "'evicted', 'expired', 'replaced', 'erased' or 'cleared'. What it raises goes to "
                 "sys.unraisablehook.");
  cls.def(py::init([](std::size_t capacity_bytes, std::size_t max_entries, std::size_t num_shards,
                      std::optional<double> ttl_s, py::object on_evict) {
            return std::make_unique<PyKernelCache>(
                CacheConfig{capacity_bytes, max_entries, num_shards, ttl_ns_of(ttl_s)},
                std::move(on_evict));
          }),
          py::arg("capacity_bytes"), py::arg("max_entries") = 4096, py::arg("num_shards") = 0,
          py::arg("ttl_s") = py::none(), py::arg("on_evict") = py::none(),
          "num_shards 0 chooses by size: one shard for each full 256 MiB and 128 entries, 1 to 8.")
      .def_property_readonly("capacity_bytes",
                             [](PyKernelCache& self) { return self.core().capacity_bytes(); })
      .def_property_readonly("max_entries",
                             [](PyKernelCache& self) { return self.core().max_entries(); })
      .def_property_readonly("num_shards",
                             [](PyKernelCache& self) { return self.core().num_shards(); })
      .def_property_readonly("max_item_bytes",
                             [](PyKernelCache& self) { return self.core().max_item_bytes(); });
  bind_access(cls);
  bind_upkeep(cls);
}

}  // namespace esper::bindings
