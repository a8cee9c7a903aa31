#include <cstdint>
#include <string>
#include <vector>

#include "bindings.h"
#include "esper/blend.h"
#include "esper/errors.h"

namespace esper::bindings {
namespace {

using Addresses = std::vector<std::uintptr_t>;

void blend_on_cpu(std::uintptr_t h, const Addresses& deltas, std::uintptr_t alpha,
                  std::uintptr_t out, std::size_t numel, const std::string& dtype) {
  blend({h, deltas, alpha, out, numel, dtype_of(dtype)});
}

bool blend_checked_on_cpu(std::uintptr_t h, const Addresses& deltas, const Addresses& alphas,
                          std::uintptr_t out, std::size_t numel) {
  if (deltas.size() != alphas.size()) {
    throw InvalidInput("alpha_ptrs", "be one a delta, " + std::to_string(deltas.size()),
                       std::to_string(alphas.size()));
  }
  std::vector<WeightedDelta> weighted(deltas.size());
  for (std::size_t k = 0; k < deltas.size(); ++k) weighted[k] = {deltas[k], alphas[k]};
  return blend_checked(h, weighted, out, numel);
}

bool all_finite_on_cpu(const Addresses& arrays, const std::vector<std::size_t>& numels) {
  if (arrays.size() != numels.size()) {
    throw InvalidInput("numels", "be one an array, " + std::to_string(arrays.size()),
                       std::to_string(numels.size()));
  }
  std::vector<FloatArray> found(arrays.size());
  for (std::size_t k = 0; k < arrays.size(); ++k) found[k] = {arrays[k], numels[k]};
  return all_finite(found);
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
  module.def(
      "blend_checked", blend_checked_on_cpu, py::arg("h_ptr"), py::arg("delta_ptrs"),
      py::arg("alpha_ptrs"), py::arg("out_ptr"), py::arg("numel"),
      "Write h + sum_k alpha_k * delta_k to out, in CPU memory; true where every value is "
      "finite.\n\n"
      "float32 alone, to the bit what torch gives for h + delta * alpha in order. alpha_ptrs holds "
      "one address a delta,\n"
      "0 for an alpha of 1. The GIL is held; out overlaps nothing.");
  module.def("all_finite", all_finite_on_cpu, py::arg("array_ptrs"), py::arg("numels"),
             "Whether every value of float32 arrays in CPU memory is finite.\n\n"
             "numels holds one count an array. The GIL is held.");
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
