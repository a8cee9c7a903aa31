// The slow halves of fast_arguments.h and fast_method.h: whatever is not the common case of a
// correct call.

#include <string>

#include "esper/errors.h"
#include "fast_method.h"

namespace esper::bindings::fast {
namespace {

std::string shown(PyObject* value) {
  return py::repr(value).cast<std::string>();
}

// A number of 64 bits, or nothing with a Python error set.
void convert(PyObject* integer, std::int64_t& number) {
  number = PyLong_AsLongLong(integer);
}
void convert(PyObject* integer, std::uint64_t& number) {
  number = PyLong_AsUnsignedLongLong(integer);
}

template <class Wide>
bool convert_index(PyObject* value, const char* name, Wide& number) {
  const auto integer = py::reinterpret_steal<py::object>(PyNumber_Index(value));
  if (!integer) {
    if (PyErr_ExceptionMatches(PyExc_TypeError) == 0) throw py::error_already_set();
    PyErr_Clear();
    refuse_type(name, "be an integer", value);
  }
  convert(integer.ptr(), number);
  if (PyErr_Occurred() == nullptr) return true;
  if (PyErr_ExceptionMatches(PyExc_OverflowError) == 0) throw py::error_already_set();
  PyErr_Clear();
  return false;
}

std::size_t position_of(PyObject* keyword, const FastParameter* parameters,
                        std::size_t num_parameters) {
  std::size_t i = 0;
  while (i < num_parameters && PyUnicode_CompareWithASCIIString(keyword, parameters[i].name) != 0) {
    ++i;
  }
  return i;
}

}  // namespace

void refuse_type(const char* name, const char* rule, PyObject* value) {
  throw py::type_error(std::string(name) + " must " + rule + ", got " + type_name(value));
}

void refuse_range(const char* name, std::int64_t low, std::uint64_t high, PyObject* value) {
  throw InvalidInput(name, "be between " + std::to_string(low) + " and " + std::to_string(high),
                     shown(value));
}

void refuse_hollow(PyObject* self) {
  throw py::type_error(type_name(self) + ".__init__() must be called first");
}

bool wide_integer(PyObject* value, const char* name, std::int64_t& number) {
  return convert_index(value, name, number);
}
bool wide_integer(PyObject* value, const char* name, std::uint64_t& number) {
  return convert_index(value, name, number);
}

double slow_number(PyObject* value, const char* name) {
  const double number = PyFloat_AsDouble(value);
  if (number != -1.0 || PyErr_Occurred() == nullptr) return number;
  if (PyErr_ExceptionMatches(PyExc_TypeError) != 0) {
    PyErr_Clear();
    refuse_type(name, "be a real number", value);
  }
  if (PyErr_ExceptionMatches(PyExc_OverflowError) == 0) throw py::error_already_set();
  PyErr_Clear();
  throw InvalidInput(name, "fit a 64-bit float", shown(value));
}

void sort_arguments(const char* method, const FastParameter* parameters, std::size_t num_parameters,
                    PyObject* const* args, std::size_t num_args, PyObject* keyword_names,
                    PyObject** slots) {
  const std::string call = std::string(method) + "()";
  if (num_args > num_parameters) {
    throw py::type_error(call + " takes at most " + std::to_string(num_parameters) +
                         " arguments, got " + std::to_string(num_args));
  }
  for (std::size_t i = 0; i < num_args; ++i) slots[i] = args[i];
  const Py_ssize_t num_named = keyword_names == nullptr ? 0 : PyTuple_GET_SIZE(keyword_names);
  for (Py_ssize_t named = 0; named < num_named; ++named) {
    PyObject* keyword = PyTuple_GET_ITEM(keyword_names, named);
    const std::size_t i = position_of(keyword, parameters, num_parameters);
    if (i == num_parameters) {
      throw py::type_error(call + " has no parameter " + shown(keyword));
    }
    if (slots[i] != nullptr) {
      throw py::type_error(call + " must get " + parameters[i].name + " once, got it twice");
    }
    slots[i] = args[num_args + static_cast<std::size_t>(named)];
  }
  for (std::size_t i = 0; i < num_parameters; ++i) {
    if (slots[i] == nullptr && parameters[i].default_text == nullptr) {
      throw py::type_error(call + " must get " + parameters[i].name + ", got " +
                           std::to_string(num_args) + " positional arguments without it");
    }
  }
}

}  // namespace esper::bindings::fast
