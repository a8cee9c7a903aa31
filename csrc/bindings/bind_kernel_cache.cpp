#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_set>
#include <utility>
#include <vector>

#include "bindings.h"
#include "esper/errors.h"
#include "esper/kernel_cache.h"
#include "esper/single_flight.h"
#include "fast_method.h"

namespace esper::bindings {
namespace {

constexpr FastSignature kGet{"get", "key"};
constexpr FastSignature kPut{"put",
                             "key",
                             "value",
                             "size_bytes",
                             FastParameter{"pinned", "False"},
                             FastParameter{"ttl_s", "None"}};
constexpr FastSignature kGetOrLoad{"get_or_load", "key", "loader"};
constexpr FastSignature kContains{"__contains__", "key"};
constexpr FastSignature kPin{"pin", "key"};
constexpr FastSignature kUnpin{"unpin", "key"};
constexpr FastSignature kIsNegative{"is_negative", "key"};

// With a global interpreter lock, every core call is made under it, and no hook lets go of it while
// the core is in its own critical section.
#ifdef Py_GIL_DISABLED
constexpr bool kLockedByPython = false;
#else
constexpr bool kLockedByPython = true;
#endif

// A str key equals its UTF-8 bytes. The view lives as long as the object.
std::string_view key_view(const py::handle& key) {
  constexpr FastParameter kKey{"key"};
  PyObject* const value = key.ptr();
  return FastArguments(&value, 1, &kKey).text_or_bytes(0);
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
// the GIL held and runs no Python code inside a shard.
class PyKernelCache {
 public:
  PyKernelCache(const CacheConfig& config, py::object on_evict)
      : on_evict_(std::move(on_evict)), cache_(config, hooks()) {}

  // A new reference, to None where there is nothing.
  PyObject* get(std::string_view key) {
    CacheHandle handle = 0;
    return cache_.get(key, handle) ? object_of(handle) : Py_NewRef(Py_None);
  }

  bool put(std::string_view key, const py::object& value, std::size_t size_bytes, bool pinned,
           std::uint64_t ttl_ns) {
    switch (store(key, value, size_bytes, pinned, ttl_ns)) {
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

  // `load()` gives what a loader gives. REQUIRES: the key's text outlives the call.
  template <class Load>
  py::object get_or_load(std::string_view key, const Load& load) {
    auto value = py::reinterpret_steal<py::object>(get(key));
    if (!value.is_none()) return value;
    if (cache_.is_negative(key)) {
      throw NotFound("key must not be noted as absent, got '" + std::string(key) + "'");
    }
    auto ticket = flights_.join(key);
    if (!ticket.leads()) return await(ticket);
    if (cache_.contains(key)) {  // stored between the miss and the join
      value = py::reinterpret_steal<py::object>(get(key));
      ticket.complete({value, {}});
      return value;
    }
    return lead(ticket, key, load);
  }

  std::size_t warm(const py::iterable& keys, const py::function& loader) {
    std::vector<py::object> kept;
    for (const py::handle key : keys) kept.push_back(py::reinterpret_borrow<py::object>(key));
    std::vector<std::string_view> names;
    for (const py::object& key : kept) names.push_back(key_view(key));
    for (const std::size_t i : cache_.absent(names)) {
      get_or_load(names[i], [&] { return loader(kept[i]); });
    }
    const std::unordered_set<std::string_view> distinct(names.begin(), names.end());
    return static_cast<std::size_t>(std::ranges::count_if(
        distinct, [&](std::string_view name) { return cache_.contains(name); }));
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
    hooks.release = [this](std::string_view key, CacheHandle handle, CacheRemoval removal) {
      const auto value = py::reinterpret_steal<py::object>(object_of(handle));
      if (!on_evict_.is_none()) tell(key, value, removal);
    };
    return hooks;
  }

  // An exception of the callback can't reach whoever caused the eviction; it goes to
  // sys.unraisablehook.
  void tell(std::string_view key, const py::object& value, CacheRemoval removal) {
    const py::object callback = on_evict_;
    const py::error_scope kept;  // what is being raised just now
    try {
      callback(py::bytes(key.data(), key.size()), value,
               py::str(std::string(removal_name(removal))));
    } catch (py::error_already_set& error) {
      error.discard_as_unraisable(callback);
    }
  }

  KernelCache::PutResult store(std::string_view key, const py::object& value,
                               std::size_t size_bytes, bool pinned, std::uint64_t ttl_ns) {
    if (value.is_none()) throw InvalidInput("value", "be an object", "None");
    py::object ours = value;  // the reference that the cache takes over
    const KernelCache::PutResult result =
        cache_.put(key, handle_of(value), size_bytes, pinned, ttl_ns);
    if (result == KernelCache::PutResult::STORED) ours.release();
    return result;
  }

  template <class Load>
  py::object lead(SingleFlight<Outcome>::Ticket& ticket, std::string_view key, const Load& load) {
    ++num_loads_;
    try {
      const auto [value, size_bytes] = loaded(load());
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

PyObject* get(PyKernelCache& cache, const FastArguments& args) {
  return cache.get(args.text_or_bytes(0));
}

bool put(PyKernelCache& cache, const FastArguments& args) {
  const auto value = py::reinterpret_borrow<py::object>(args.object(1));
  const bool has_ttl = args.has(4) && !args.object(4).is_none();
  return cache.put(args.text_or_bytes(0), value, args.integer<std::size_t>(2),
                   args.truth_or(3, false),
                   ttl_ns_of(has_ttl ? std::optional(args.number(4)) : std::nullopt));
}

PyObject* get_or_load(PyKernelCache& cache, const FastArguments& args) {
  const py::handle loader = args.object(1);
  return cache.get_or_load(args.text_or_bytes(0), [loader] { return loader(); }).release().ptr();
}

bool contains(PyKernelCache& cache, const FastArguments& args) {
  return cache.core().contains(args.text_or_bytes(0));
}

bool pin(PyKernelCache& cache, const FastArguments& args) {
  return cache.core().pin(args.text_or_bytes(0));
}

bool unpin(PyKernelCache& cache, const FastArguments& args) {
  return cache.core().unpin(args.text_or_bytes(0));
}

bool is_negative(PyKernelCache& cache, const FastArguments& args) {
  return cache.core().is_negative(args.text_or_bytes(0));
}

void bind_access(CacheClass& cls) {
  def_fast<get, kGet>(cls, "The value, or None for an unknown, expired or negative key.");
  def_fast<put, kPut>(
      cls,
      "Store a value, evicting as needed; False where all that would have to go is pinned.\n\n"
      "Replaces the key's value and keeps its pins; ends a negative entry.\n\n"
      "Raises:\n    CapacityExceededError: size_bytes is above max_item_bytes, so it can "
      "never fit.");
  def_fast<get_or_load, kGetOrLoad>(
      cls,
      "The value; on a miss loader() -> (value, size_bytes) is called once however many "
      "threads ask.\n\n"
      "Threads that ask meanwhile wait without the GIL and get the same value or the same "
      "exception. A value that does\n"
      "not fit is handed out and not kept. Loaders must not wait for one another in a "
      "circle.\n\n"
      "Raises:\n    NotFoundError: the key is noted as absent.\n"
      "    InvalidStateError: a loader asks for its own key.");
  def_fast<contains, kContains>(cls, "Whether the key has a live entry; counts as no access.");
  cls.def(
      "warm", &PyKernelCache::warm, py::arg("keys"), py::arg("loader"),
      "Load the keys that are neither held nor noted as absent; gives how many of them are held "
      "then.\n\n"
      "loader(key) -> (value, size_bytes) is called key by key, and shares loads with "
      "get_or_load. What it raises ends\n"
      "the call; what was loaded before stays.");
  cls.def("__len__", [](PyKernelCache& self) { return self.core().stats().entries; });
}

void bind_upkeep(CacheClass& cls) {
  def_fast<pin, kPin>(cls, "Keep the entry until each pin is undone; False where there is none.");
  def_fast<unpin, kUnpin>(cls, "Undo one pin; False where there is no entry or no pin.");
  def_fast<is_negative, kIsNegative>(cls, "Whether the key is noted as absent.");
  cls.def(
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
          "clear", [](PyKernelCache& self) { return self.core().clear(); },
          "Drop every entry that is not pinned and all negative ones; gives the number of entries "
          "dropped.")
      .def("stats", &PyKernelCache::stats,
           "Exact counts since birth, and the present fill, by name.");
}

}  // namespace

void bind_kernel_cache(py::module_& module) {
  CacheClass cls(module, "KernelCache", py::custom_type_setup(enable_gc),
                 "Objects by key, bounded by bytes and count (admission by frequency: resists "
                 "scans), with pins, "
                 "TTL, negative entries\n"
                 "and single-flight loading. Thread-safe; no call but get_or_load waits.\n\n"
                 "on_evict(key: bytes, value, reason: str) is told of everything that leaves, "
                 "outside all locks; reason is\n"
                 "'evicted', 'expired', 'replaced', 'erased' or 'cleared'. What it raises goes to "
                 "sys.unraisablehook.");
  cls.def(py::init([](std::size_t capacity_bytes, std::size_t max_entries, std::size_t num_shards,
                      std::optional<double> ttl_s, py::object on_evict) {
            return std::make_unique<PyKernelCache>(
                CacheConfig{capacity_bytes, max_entries, num_shards, ttl_ns_of(ttl_s),
                            kLockedByPython},
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
