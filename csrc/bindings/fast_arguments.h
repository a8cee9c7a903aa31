// The parameters of a vector call and the conversion of its arguments, for fast_method.h. The
// common case of a correct call is inline; fast_arguments.cpp holds the rest.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include "bindings.h"

namespace esper::bindings {

// A parameter's name, and its default as Python shows it; without one it is required. The function
// itself fills defaults in (`…_or`).
struct FastParameter {
  // NOLINTNEXTLINE(google-explicit-constructor): a bare name is a required parameter.
  constexpr FastParameter(const char* name, const char* default_text = nullptr)
      : name(name), default_text(default_text) {}

  const char* name;
  const char* default_text;
};

// A method's name and parameters. REQUIRES: required ones come first; all text is static.
template <std::size_t N>
struct FastSignature {
  template <class... Parameters>
  explicit constexpr FastSignature(const char* name, Parameters... parameters)
      : name(name), parameters{{FastParameter(parameters)...}} {}

  [[nodiscard]] constexpr std::size_t num_required() const {
    std::size_t count = 0;
    for (const FastParameter& parameter : parameters) count += parameter.default_text == nullptr;
    return count;
  }

  [[nodiscard]] std::string doc(const char* text) const {
    std::string line = std::string(name) + "($self";
    for (const FastParameter& parameter : parameters) {
      line += std::string(", ") + parameter.name;
      if (parameter.default_text != nullptr) line += std::string("=") + parameter.default_text;
    }
    return line + ")\n--\n\n" + text;
  }

  const char* name;
  std::array<FastParameter, N> parameters;
};
template <class... Parameters>
FastSignature(const char*, Parameters...) -> FastSignature<sizeof...(Parameters)>;

namespace fast {

[[nodiscard]] inline std::string type_name(PyObject* value) {
  return Py_TYPE(value)->tp_name;
}

// What a failed conversion left behind becomes an error that names the parameter; never returns.
[[noreturn, gnu::cold]] void refuse_type(const char* name, const char* rule, PyObject* value);
[[noreturn, gnu::cold]] void refuse_range(const char* name, std::int64_t low, std::uint64_t high,
                                          PyObject* value);

// An int of one digit, without a call. False for all others, which are not wrong for that.
[[nodiscard, gnu::always_inline]] inline bool small_integer(PyObject* value,
                                                            std::int64_t& number) noexcept {
  if (!PyLong_CheckExact(value)) return false;
  auto* object = reinterpret_cast<PyLongObject*>(value);
#if PY_VERSION_HEX >= 0x030C0000
  if (!PyUnstable_Long_IsCompact(object)) return false;
  number = PyUnstable_Long_CompactValue(object);
#else
  const Py_ssize_t size = Py_SIZE(value);  // the sign is the number's, 0 stands for 0
  if (size < -1 || size > 1) return false;
  number = size * static_cast<std::int64_t>(object->ob_digit[0]);
  if (size == 0) number = 0;
#endif
  return true;
}

// Any object with __index__. False where the value is no number of 64 bits.
bool wide_integer(PyObject* value, const char* name, std::int64_t& number);
bool wide_integer(PyObject* value, const char* name, std::uint64_t& number);

double slow_number(PyObject* value, const char* name);

// Sorts positional and named arguments into one slot per parameter; an absent one is nullptr.
// Throws py::type_error as Python's own functions do.
void sort_arguments(const char* method, const FastParameter* parameters, std::size_t num_parameters,
                    PyObject* const* args, std::size_t num_args, PyObject* keyword_names,
                    PyObject** slots);

}  // namespace fast

// The arguments of one call, one slot per parameter, absent trailing ones left out. Valid during
// the call. REQUIRES: only `has` and `..._or` are asked about an argument that was not given.
class FastArguments {
 public:
  [[gnu::always_inline]] FastArguments(PyObject* const* values, std::size_t num_values,
                                       const FastParameter* parameters) noexcept
      : values_(values), num_values_(num_values), parameters_(parameters) {}

  // False where an optional argument was not given.
  [[nodiscard, gnu::always_inline]] bool has(std::size_t i) const noexcept {
    return i < num_values_ && values_[i] != nullptr;
  }

  [[nodiscard, gnu::always_inline]] py::handle object(std::size_t i) const noexcept {
    return values_[i];
  }

  // A whole number within `Integer`; throws py::type_error, InvalidInput.
  template <class Integer>
  [[nodiscard, gnu::always_inline]] Integer integer(std::size_t i) const {
    using Wide = std::conditional_t<std::is_signed_v<Integer>, std::int64_t, std::uint64_t>;
    if (std::int64_t small = 0; fast::small_integer(values_[i], small)) {
      if (std::in_range<Integer>(small)) return static_cast<Integer>(small);
    } else if (Wide wide = 0; fast::wide_integer(values_[i], name(i), wide)) {
      if (std::in_range<Integer>(wide)) return static_cast<Integer>(wide);
    }
    fast::refuse_range(name(i), std::numeric_limits<Integer>::min(),
                       static_cast<std::uint64_t>(std::numeric_limits<Integer>::max()), values_[i]);
  }

  template <class Integer>
  [[nodiscard, gnu::always_inline]] Integer integer_or(std::size_t i, Integer otherwise) const {
    return has(i) ? integer<Integer>(i) : otherwise;
  }

  // Any number, infinities and NaN included; throws py::type_error.
  [[nodiscard, gnu::always_inline]] double number(std::size_t i) const {
    PyObject* value = values_[i];
    return PyFloat_CheckExact(value) ? PyFloat_AS_DOUBLE(value) : fast::slow_number(value, name(i));
  }

  // As `number`; None gives `none`.
  [[nodiscard, gnu::always_inline]] double number_or_none(std::size_t i, double none) const {
    PyObject* value = values_[i];
    if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
    return value == Py_None ? none : fast::slow_number(value, name(i));
  }

  // Python's truth of the argument; throws py::error_already_set where it has none.
  [[nodiscard, gnu::always_inline]] bool truth_or(std::size_t i, bool otherwise) const {
    if (!has(i)) return otherwise;
    if (values_[i] == Py_True || values_[i] == Py_False) return values_[i] == Py_True;
    const int truth = PyObject_IsTrue(values_[i]);
    if (truth < 0) throw py::error_already_set();
    return truth != 0;
  }

  // The UTF-8 bytes of a str, which keeps them; throws py::type_error.
  [[nodiscard, gnu::always_inline]] std::string_view text(std::size_t i) const {
    PyObject* value = values_[i];
    if (PyUnicode_CheckExact(value) && PyUnicode_IS_COMPACT_ASCII(value)) {
      return {static_cast<const char*>(PyUnicode_DATA(value)),
              static_cast<std::size_t>(PyUnicode_GET_LENGTH(value))};
    }
    if (!PyUnicode_Check(value)) fast::refuse_type(name(i), "be str", value);
    return utf8(value);
  }

  // As `text`, and the bytes of a bytes object.
  [[nodiscard, gnu::always_inline]] std::string_view text_or_bytes(std::size_t i) const {
    PyObject* value = values_[i];
    if (PyBytes_Check(value)) {
      return {PyBytes_AS_STRING(value), static_cast<std::size_t>(PyBytes_GET_SIZE(value))};
    }
    if (!PyUnicode_Check(value)) fast::refuse_type(name(i), "be str or bytes", value);
    return text(i);
  }

 private:
  [[nodiscard]] const char* name(std::size_t i) const noexcept { return parameters_[i].name; }

  static std::string_view utf8(PyObject* value) {
    Py_ssize_t size = 0;
    const char* bytes = PyUnicode_AsUTF8AndSize(value, &size);
    if (bytes == nullptr) throw py::error_already_set();
    return {bytes, static_cast<std::size_t>(size)};
  }

  PyObject* const* values_;
  std::size_t num_values_;
  const FastParameter* parameters_;
};

}  // namespace esper::bindings
