#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include "bindings.h"
#include "esper/cuda_backend.h"
#include "esper/probe.h"

namespace esper::bindings {
namespace {

using Figures = std::tuple<std::size_t, float, float, float, float, float>;

Figures figures_of(const ProbeResult& r) {
  return {r.count, r.mean, r.variance, r.entropy, r.dead_share, r.nonfinite_share};
}

Figures probe_pointer(std::uintptr_t data_ptr, std::size_t numel, const std::string& dtype,
                      std::size_t max_samples) {
  const DType type = dtype_of(dtype);
  const py::gil_scoped_release release;
  return figures_of(probe(reinterpret_cast<const std::byte*>(data_ptr), numel, type, max_samples));
}

std::optional<Figures> collect(CudaProbe& self, CudaProbe::Ticket ticket) {
  const auto result = self.collect(ticket);
  return result ? std::optional<Figures>(figures_of(*result)) : std::nullopt;
}

void bind_cuda_probe(py::module_& module) {
  py::class_<CudaProbe>(
      module, "CudaProbe",
      "The probe of tensors in device memory: results arrive in pinned memory and nothing waits.")
      .def(py::init<std::size_t, int>(), py::arg("num_slots") = 1024, py::arg("device") = 0,
           "Up to num_slots results may be under way.\n\n"
           "Raises:\n    UnavailableError: there is no CUDA in this build or on this machine.")
      .def(
          "launch",
          [](CudaProbe& self, std::uintptr_t data_ptr, std::size_t numel, const std::string& dtype,
             std::uintptr_t stream, std::size_t max_samples) {
            return self.launch(data_ptr, numel, dtype_of(dtype), max_samples, stream);
          },
          py::arg("data_ptr"), py::arg("numel"), py::arg("dtype"), py::arg("stream"),
          py::arg("max_samples") = kProbeDefaultSamples,
          "Enqueue the probe of a dense device tensor on a raw stream; a ticket, or None where all "
          "slots are under way.")
      .def("collect", collect, py::arg("ticket"),
           "The figures as probe() gives them, which ends the ticket; None while the device is not "
           "there yet.")
      .def_property_readonly("refused", &CudaProbe::refused, "Launches that found no free slot.");
}

}  // namespace

void bind_probe(py::module_& module) {
  module.def(
      "probe", probe_pointer, py::arg("data_ptr"), py::arg("numel"), py::arg("dtype"),
      py::arg("max_samples") = kProbeDefaultSamples,
      "Statistics of a dense CPU tensor's values: (count, mean, variance, entropy, dead_share, "
      "nonfinite_share).\n\n"
      "Looks at one element of each of max_samples equal strata, or at all if there are no more; "
      "the same tensor\n"
      "gives the same figures. mean, variance and entropy (nats, 32 bins, Miller-Madow) are of the "
      "finite values and NaN\n"
      "without any; dead_share counts exact zeros. For n samples the standard error is at most "
      "sigma/sqrt(n) for the\n"
      "mean, sqrt((kurtosis - 1)/n) of the variance, 0.5/sqrt(n) for the shares, and about "
      "1/sqrt(n) for the entropy.\n"
      "The GIL is released: the caller keeps the memory alive and unwritten.\n\n"
      "Args:\n    data_ptr: Tensor.data_ptr() of a CPU tensor without gaps, in any order of axes.\n"
      "    dtype: 'float32', 'float16', 'bfloat16' or 'float64'.");
  bind_cuda_probe(module);
}

}  // namespace esper::bindings
