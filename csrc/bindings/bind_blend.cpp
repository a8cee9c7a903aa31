#include <cstdint>
#include <string>
#include <vector>

#include "bindings.h"
#include "esper/blend.h"

namespace esper::bindings {
namespace {

using Addresses = std::vector<std::uintptr_t>;

void blend_on_cpu(std::uintptr_t h, const Addresses& deltas, std::uintptr_t alpha,
                  std::uintptr_t out, std::size_t numel, const std::string& dtype) {
  blend({h, deltas, alpha, out, numel, dtype_of(dtype)});
}

void blend_on_device(std::uintptr_t h, const Addresses& deltas, std::uintptr_t alpha,
                     std::uintptr_t out, std::size_t numel, const std::string& dtype,
                     std::uintptr_t stream, int device) {
  cuda_blend({h, deltas, alpha, out, numel, dtype_of(dtype)}, device, stream);
}

}  // namespace

void bind_blend(py::module_& module) {
  module.def(
      "blend", blend_on_cpu, py::arg("h_ptr"), py::arg("delta_ptrs"), py::arg("alpha_ptr"),
      py::arg("out_ptr"), py::arg("numel"), py::arg("dtype"),
      py::call_guard<py::gil_scoped_release>(),
      "Write h + sum_k alpha[k] * delta[k] to out, element by element, in CPU memory.\n\n"
      "Summed in float32 in order, rounded once; a delta whose alpha is exactly 0 is not read. out "
      "may be h or a delta.\n"
      "alpha is float32, one value a delta, at most 16. The GIL is released: the caller keeps the "
      "memory alive.\n\n"
      "Args:\n    dtype: 'float32', 'float16' or 'bfloat16', of h, the deltas and out.");
  module.def("cuda_blend", blend_on_device, py::arg("h_ptr"), py::arg("delta_ptrs"),
             py::arg("alpha_ptr"), py::arg("out_ptr"), py::arg("numel"), py::arg("dtype"),
             py::arg("stream"), py::arg("device") = 0, py::call_guard<py::gil_scoped_release>(),
             "The same in the memory of a CUDA device, alpha included: enqueued on a raw stream, "
             "waits for "
             "nothing.\n\n"
             "May be captured; a replay reads alpha anew.\n\n"
             "Raises:\n    UnavailableError: there is no CUDA in this build or on this machine.");
}

}  // namespace esper::bindings
