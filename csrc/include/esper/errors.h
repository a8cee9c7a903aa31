// What the core throws. Every class derives from a standard exception, so that a C++ user needs
// none of these names; the bindings turn each into one class of esper.contracts.errors, in one
// place (bindings/module.cpp).
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

namespace esper {

// An argument breaks a rule of the call. `parameter()` names the argument.
class InvalidInput : public std::invalid_argument {
 public:
  InvalidInput(std::string parameter, const std::string& rule, const std::string& received)
      : std::invalid_argument(parameter + " must " + rule + ", got " + received),
        parameter_(std::move(parameter)) {}

  [[nodiscard]] const std::string& parameter() const noexcept { return parameter_; }

 private:
  std::string parameter_;
};

// The call is right but comes at the wrong moment (closed object, pinned entry, a loader that asks
// for its own key).
class InvalidState : public std::logic_error {
 public:
  using std::logic_error::logic_error;
};

// A bound on bytes or count would be broken; nothing was changed.
class CapacityExceeded : public std::length_error {
 public:
  using std::length_error::length_error;
};

// A magic number, version, size or checksum does not hold; nothing was changed.
class CorruptData : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The key is known to be absent for now (a negative cache entry).
class NotFound : public std::out_of_range {
 public:
  using std::out_of_range::out_of_range;
};

// A device or its driver is not there, or refused a call; the message names the call, file and
// line.
class DeviceError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace esper
