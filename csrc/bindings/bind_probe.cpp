#include <cstdint>
#include <string>
#include <tuple>

#include "bindings.h"
#include "esper/probe.h"

namespace esper::bindings {
namespace {

using Figures = std::tuple<std::size_t, float, float, float, float, float>;

Figures probe_pointer(std::uintptr_t data_ptr, std::size_t numel, const std::string& dtype,
                      std::size_t max_samples) {
  const DType type = dtype_of(dtype);
  const py::gil_scoped_release release;
  const ProbeResult r =
      probe(reinterpret_cast<const std::byte*>(data_ptr), numel, type, max_samples);
  return {r.count, r.mean, r.variance, r.entropy, r.dead_share, r.nonfinite_share};
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
}

}  // namespace esper::bindings
