// What every binding file needs: pybind11 and the registration functions that module.cpp calls.
// Bindings hold no logic.
#pragma once

// pybind11's own headers are not written for -Wconversion.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wconversion"
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#pragma GCC diagnostic pop

namespace esper::bindings {

namespace py = pybind11;

void bind_blend(py::module_& module);
void bind_kernel_cache(py::module_& module);
void bind_probe(py::module_& module);
void bind_signal_ring(py::module_& module);
void bind_state_layout(py::module_& module);
void bind_stream_dispatcher(py::module_& module);

}  // namespace esper::bindings
