// Methods of pybind11 classes that take the interpreter's vector call straight (METH_FASTCALL with
// keywords): no dispatcher, no overload table, no temporary objects. For the few methods on the
// training step's path; a pybind11 method costs some 150 to 400 ns a call, these 25 to 50.
//
//   constexpr FastSignature kPush{"push", "step", FastParameter{"flags", "0"}};
//
//   bool push(SignalRing& self, const FastArguments& args) {
//     return self.push(args.integer<std::uint64_t>(0), args.integer_or<std::uint32_t>(1, 0));
//   }
//
//   def_fast<push, kPush>(cls, "Append one record.");
//
// The function may return void (None), bool, or PyObject* (a new reference; nullptr with an error
// set). It may throw what any binding may throw: the module's own translators turn it into the same
// Python errors. Arguments come by position or by name; whoever calls keeps them alive. A wrong
// type is a TypeError, a number out of range an InvalidInput; both name the parameter.
//
// REQUIRES: the class T of `self` is bound without a registered C++ base, so that an instance's
// pointer is a T*. Python subclasses are welcome. The GIL is held during the call.
#pragma once

#include <cxxabi.h>

#include <array>
#include <cstddef>
#include <string>
#include <type_traits>

#include "bindings.h"
#include "fast_arguments.h"

namespace esper::bindings {

namespace fast {

[[noreturn, gnu::cold]] void refuse_hollow(PyObject* self);

// Without the search that pybind11 makes for instances of several C++ classes, unless it is one.
template <class T>
[[nodiscard, gnu::always_inline]] inline T& self_of(PyObject* self) {
  auto* instance = reinterpret_cast<py::detail::instance*>(self);
  void* pointer =
      instance->simple_layout
          ? instance->simple_value_holder[0]
          : instance->get_value_and_holder(py::detail::get_type_info(typeid(T))).value_ptr();
  if (pointer == nullptr) refuse_hollow(self);  // its __init__ was never called
  return *static_cast<T*>(pointer);
}

template <class Method>
struct MethodTraits;
template <class R, class T>
struct MethodTraits<R (*)(T&, const FastArguments&)> {
  using Self = T;
  using Result = R;
};

template <auto Method>
[[gnu::always_inline]] inline PyObject* result_of(
    typename MethodTraits<decltype(Method)>::Self& self, const FastArguments& args) {
  using Result = typename MethodTraits<decltype(Method)>::Result;
  if constexpr (std::is_void_v<Result>) {
    Method(self, args);
    Py_RETURN_NONE;
  } else if constexpr (std::is_same_v<Result, bool>) {
    return Py_NewRef(Method(self, args) ? Py_True : Py_False);
  } else {
    static_assert(std::is_same_v<Result, PyObject*>);
    return Method(self, args);
  }
}

template <auto Method, const auto& signature>
PyObject* call(PyObject* self, PyObject* const* args, Py_ssize_t num_args,
               PyObject* keyword_names) {
  constexpr std::size_t kNumParameters = signature.parameters.size();
  try {
    auto& object = self_of<typename MethodTraits<decltype(Method)>::Self>(self);
    const FastParameter* parameters = signature.parameters.data();
    auto num_given = static_cast<std::size_t>(num_args);
    std::array<PyObject*, kNumParameters> slots;
    if (keyword_names != nullptr || num_given < signature.num_required() ||
        num_given > kNumParameters) [[unlikely]] {
      slots.fill(nullptr);
      sort_arguments(signature.name, parameters, kNumParameters, args, num_given, keyword_names,
                     slots.data());
      args = slots.data();
      num_given = kNumParameters;
    }
    return result_of<Method>(object, {args, num_given, parameters});
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (abi::__forced_unwind&) {  // the thread is being ended
    throw;
  } catch (...) {
    py::detail::try_translate_exceptions();
  }
  return nullptr;
}

}  // namespace fast

// Adds the method to the class. Throws py::error_already_set.
template <auto Method, const auto& signature, class Class>
void def_fast(Class& cls, const char* doc) {
  static_assert(
      std::is_same_v<typename fast::MethodTraits<decltype(Method)>::Self, typename Class::type>);
  static const std::string text = signature.doc(doc);
  static PyMethodDef definition{
      signature.name,
      reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(fast::call<Method, signature>)),
      METH_FASTCALL | METH_KEYWORDS, text.c_str()};
  const auto method = py::reinterpret_steal<py::object>(
      PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(cls.ptr()), &definition));
  if (!method) throw py::error_already_set();
  cls.attr(signature.name) = method;
}

}  // namespace esper::bindings
