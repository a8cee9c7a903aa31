"""The one error tree of Esper.

    EsperError
    ├── InvalidInputError            (ValueError)      a value breaks a rule of the call
    │   ├── UnsupportedLayerError    (TypeError)       this kind of layer cannot hold seeds
    │   ├── UnwrappableModelError    (TypeError)       the model as a whole cannot be wrapped
    │   ├── InvalidBlueprintError                      the IR names an unknown operator, cycles, disagrees in shape ...
    │   ├── ShapeMismatchError                         a kernel does not fit the layer it is loaded into
    │   └── ConfigError                                a setting is unknown or breaks its rule
    ├── InvalidStateError            (RuntimeError)    right call, wrong moment
    │   └── InvalidTransitionError   (ValueError)      the life-cycle table forbids this step
    ├── NotFoundError                (LookupError)     no record has the given identity
    ├── AlreadyExistsError           (FileExistsError) the identity is taken by other content
    ├── CapacityExceededError        (BufferError)     a bound (bytes, count, queue, disk) would be broken
    │   ├── BudgetExceededError                        growth would cost more than the run allows
    │   └── StorageFullError         (OSError)         no room left on the device
    ├── CorruptDataError             (ValueError)      checksum, signature or format does not hold
    │   └── SignatureError                             the signature is absent, unknown or false
    ├── UnavailableError             (ConnectionError) a service or store cannot be reached
    │   └── PortInUseError           (OSError)         another process holds the port
    ├── DeadlineExceededError        (TimeoutError)    the time allowed ran out
    ├── PermissionDeniedError        (PermissionError) the caller lacks the role
    ├── CompilationError             (RuntimeError)    a blueprint did not become a valid kernel
    ├── KernelExecutionError         (RuntimeError)    a kernel failed while it ran
    └── InternalError                (RuntimeError)    a defect of Esper, with an incident id

Every class has a stable ``reason`` that travels in gRPC status details; nobody branches on message text.
A message states the parameter, the rule (with its unit) and the value received.
"""

from __future__ import annotations

from typing import ClassVar


class EsperError(Exception):
    """Base of everything Esper raises on purpose.

    Attributes:
        reason: Stable upper-case identity of the class, used on the wire.
        parameter: Name of the argument, field or setting at fault; ``None`` when no single one is.
    """

    reason: ClassVar[str] = "ESPER"

    def __init__(self, message: str, *, parameter: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.parameter = parameter

    def __str__(self) -> str:
        return self.message


class InvalidInputError(EsperError, ValueError):
    """A value breaks a rule of the call."""

    reason = "INVALID_INPUT"

    @classmethod
    def of(cls, parameter: str, rule: str, received: object) -> InvalidInputError:
        """Build the error from its three parts: ``parameter must rule, got received``."""
        text = repr(received)
        shown = text if len(text) <= 200 else f"{text[:197]}..."
        return cls(f"{parameter} must {rule}, got {shown}", parameter=parameter)


class UnsupportedLayerError(InvalidInputError, TypeError):
    """This kind of layer cannot hold seeds."""

    reason = "UNSUPPORTED_LAYER"


class UnwrappableModelError(InvalidInputError, TypeError):
    """The model as a whole cannot be wrapped."""

    reason = "UNWRAPPABLE_MODEL"


class InvalidBlueprintError(InvalidInputError):
    """A blueprint is not a legal graph; the message names the node at fault."""

    reason = "INVALID_BLUEPRINT"


class ShapeMismatchError(InvalidInputError):
    """A kernel's shapes do not fit the layer it is loaded into."""

    reason = "SHAPE_MISMATCH"


class ConfigError(InvalidInputError):
    """A setting is unknown or breaks its rule."""

    reason = "CONFIG"


class InvalidStateError(EsperError, RuntimeError):
    """The call is right but comes at the wrong moment."""

    reason = "INVALID_STATE"


class InvalidTransitionError(InvalidStateError, ValueError):
    """The life-cycle table forbids this step."""

    reason = "INVALID_TRANSITION"


class NotFoundError(EsperError, LookupError):
    """No record has the given identity."""

    reason = "NOT_FOUND"


class AlreadyExistsError(EsperError, FileExistsError):
    """The identity is taken by other content."""

    reason = "ALREADY_EXISTS"


class CapacityExceededError(EsperError, BufferError):
    """A bound on bytes, count, queue or disk would be broken."""

    reason = "CAPACITY_EXCEEDED"


class BudgetExceededError(CapacityExceededError):
    """Growth would cost more parameters, FLOPs or adaptations than the run allows."""

    reason = "BUDGET_EXCEEDED"


class StorageFullError(CapacityExceededError, OSError):
    """The device has no room left; nothing half-written stays behind."""

    reason = "STORAGE_FULL"


class CorruptDataError(EsperError, ValueError):
    """A checksum, signature or format does not hold; the data was not used."""

    reason = "CORRUPT_DATA"


class SignatureError(CorruptDataError):
    """The signature is absent, made by an unknown key, or false."""

    reason = "SIGNATURE"


class UnavailableError(EsperError, ConnectionError):
    """A service, bus or store cannot be reached."""

    reason = "UNAVAILABLE"


class PortInUseError(UnavailableError):
    """Another process holds the port that was asked for."""

    reason = "PORT_IN_USE"


class DeadlineExceededError(EsperError, TimeoutError):
    """The time allowed for the call ran out."""

    reason = "DEADLINE_EXCEEDED"


class PermissionDeniedError(EsperError, PermissionError):
    """The caller lacks the role that the call asks for."""

    reason = "PERMISSION_DENIED"


class CompilationError(EsperError, RuntimeError):
    """A blueprint did not become a valid kernel; the message names the phase or check that failed."""

    reason = "COMPILATION"


class KernelExecutionError(EsperError, RuntimeError):
    """A kernel failed while it ran; the host's result was kept."""

    reason = "KERNEL_EXECUTION"


class InternalError(EsperError, RuntimeError):
    """A defect of Esper; the message carries an incident id to look up in the logs."""

    reason = "INTERNAL"


def all_error_types() -> tuple[type[EsperError], ...]:
    """Give every class of the tree, the base first, parents before children."""
    found: list[type[EsperError]] = [EsperError]
    for cls in found:
        found.extend(sub for sub in cls.__subclasses__() if sub not in found)
    return tuple(found)
