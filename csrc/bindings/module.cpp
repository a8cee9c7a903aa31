// The extension module esper.execution._native, and the one place where the core's exceptions
// become Python's.

#include <exception>
#include <optional>
#include <string>

#include "bindings.h"
#include "esper/errors.h"
#include "esper/lifecycle.h"

namespace esper::bindings {
namespace {

// Raises esper.contracts.errors.<name>. Imported here and not at start-up, so that the module
// itself needs no package.
void raise(const char* name, const char* message,
           const std::optional<std::string>& parameter = {}) {
  const py::object cls = py::module_::import("esper.contracts.errors").attr(name);
  const py::object error = cls(message, py::arg("parameter") = parameter);
  PyErr_SetObject(cls.ptr(), error.ptr());
}

// REQUIRES: an exception is being handled, and the GIL is held. A pybind11 translator: what it lets
// through goes to the next.
void translate(std::exception_ptr pending) {
  if (!pending) return;
  try {
    std::rethrow_exception(pending);
  } catch (const InvalidTransition& error) {
    raise("InvalidTransitionError", error.what(), "to");
  } catch (const InvalidInput& error) {
    raise("InvalidInputError", error.what(), error.parameter());
  } catch (const InvalidState& error) {
    raise("InvalidStateError", error.what());
  } catch (const CapacityExceeded& error) {
    raise("CapacityExceededError", error.what());
  } catch (const CorruptData& error) {
    raise("CorruptDataError", error.what());
  } catch (const NotFound& error) {
    raise("NotFoundError", error.what());
  } catch (const DeviceError& error) {
    raise("UnavailableError", error.what());
  }
}

}  // namespace
}  // namespace esper::bindings

PYBIND11_MODULE(_native, module) {
  namespace bindings = esper::bindings;
  module.doc() =
      "The native core: seed state, signal ring, probe, blend, kernel cache and stream dispatcher.";
  pybind11::register_local_exception_translator(bindings::translate);
  bindings::bind_state_layout(module);
  bindings::bind_signal_ring(module);
  bindings::bind_probe(module);
  bindings::bind_blend(module);
  bindings::bind_kernel_cache(module);
  bindings::bind_stream_dispatcher(module);
}
