"""What an operator of the closed set is: attributes, shapes, work, and the torch modules it becomes.

An operator never sees a blueprint as a whole: it is handed one ``Call`` (a node with its attributes resolved and the
types of its inputs) and answers for that call alone.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import fx, nn

from esper.blueprints.types import Layout, Mixing, TensorType
from esper.contracts.blueprint import AttributeValue, Expression
from esper.contracts.errors import InvalidBlueprintError

MAX_FEATURES: Final = 65_536
"""Most features of any value."""

NODE_KEY: Final = "blueprint_node"
"""Entry of an fx node's ``meta`` that names the IR node it was emitted for."""

Resolved = int | float | bool | str
"""An attribute after its expression was evaluated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attribute:
    """One attribute an operator takes."""

    name: str
    """Name in the IR."""
    kind: type[int | float | bool | str]
    """``int``, ``float``, ``bool``, or ``str`` for a word of ``words``."""
    default: AttributeValue
    """Value where the node leaves it out."""
    low: float = -math.inf
    """Smallest legal number."""
    high: float = math.inf
    """Largest legal number."""
    words: tuple[str, ...] = ()
    """Legal words."""
    odd: bool = False
    """Whether a whole number must be odd."""

    @property
    def rule(self) -> str:
        """The rule in words, to follow ``must``."""
        if self.kind is str:
            return f"be one of {', '.join(self.words)}"
        if self.kind is bool:
            return "be true or false"
        noun = "a finite real number" if self.kind is float else "an odd whole number" if self.odd else "a whole number"
        return f"be {noun} in [{self.low:g}, {self.high:g}]"

    def accepts(self, value: object) -> bool:
        """Say whether a resolved value is legal."""
        if self.kind is str:
            return isinstance(value, str) and value in self.words
        if self.kind is bool or isinstance(value, bool):
            return self.kind is bool and isinstance(value, bool)
        numbers = (int, float) if self.kind is float else (int,)
        if not isinstance(value, numbers) or not math.isfinite(value):
            return False
        return self.low <= value <= self.high and not (self.odd and int(value) % 2 == 0)


def features_attribute(default: AttributeValue | None = None) -> Attribute:
    """Give the attribute that sets the number of output features; the layer's output features by default."""
    value = Expression("C") if default is None else default
    return Attribute(name="features", kind=int, default=value, low=1, high=MAX_FEATURES)


BIAS: Final = Attribute(name="bias", kind=bool, default=True)
"""Whether a map adds a learned bias."""

INIT: Final = Attribute(name="init", kind=str, default="default", words=("default", "kaiming", "orthogonal", "zero"))
"""How a map's weights begin; ``zero`` also zeroes the bias, so that the map gives exactly 0 at birth."""


@dataclass(frozen=True, slots=True)
class Call:
    """One node at one site: resolved attributes and the types of its inputs."""

    node: str
    """Name of the node."""
    inputs: tuple[TensorType, ...]
    """Types of the inputs, in order."""
    attributes: Mapping[str, Resolved]
    """Every attribute of the operator."""

    def integer(self, name: str) -> int:
        """Give a whole-number attribute."""
        value = self.attributes[name]
        assert isinstance(value, int)
        return value

    def real(self, name: str) -> float:
        """Give a real attribute."""
        value = self.attributes[name]
        assert isinstance(value, int | float)
        return float(value)

    def flag(self, name: str) -> bool:
        """Give a truth-value attribute."""
        value = self.attributes[name]
        assert isinstance(value, bool)
        return value

    def word(self, name: str) -> str:
        """Give a word attribute."""
        value = self.attributes[name]
        assert isinstance(value, str)
        return value

    def refuse(self, part: str, rule: str, received: object) -> InvalidBlueprintError:
        """Build the error that names this node."""
        error = InvalidBlueprintError.of(f"node '{self.node}' {part}", rule, received)
        assert isinstance(error, InvalidBlueprintError)
        return error

    def need_layout(self, *layouts: Layout) -> TensorType:
        """Give the first input's type, which must have one of the layouts.

        Raises:
            InvalidBlueprintError: It has another one.
        """
        if self.inputs[0].layout not in layouts:
            names = " or ".join(layout.value for layout in layouts)
            raise self.refuse("input", f"be a {names} here", str(self.inputs[0]))
        return self.inputs[0]

    def need_several(self, part: str, count: int, noun: str) -> None:
        """Refuse what gives a constant on a single value, so that nothing before it could ever learn.

        Raises:
            InvalidBlueprintError: ``count`` is below 2.
        """
        if count < 2:
            raise self.refuse(part, f"be over at least 2 {noun}", count)


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What one call costs, for one example."""

    parameters: int = 0
    """Trainable parameters."""
    flops: int = 0
    """Operations of matrix products, convolutions and attention; a multiply-add counts 2."""
    saves_inputs: tuple[int, ...] = ()
    """Indices of the inputs that backward needs."""
    saves_output: bool = False
    """Whether backward needs the output."""
    saved_bytes: int = 0
    """Bytes of further tensors that backward needs, float32."""
    is_view: bool = False
    """Whether the output shares the first input's memory."""


class Emitter:
    """Turns calls into nodes of one fx graph, and owns the modules and parameters they use.

    Weights are drawn from the emitter's own generator, so building disturbs no global random state.
    """

    def __init__(self, graph: fx.Graph, root: nn.Module, generator: torch.Generator) -> None:
        self.graph = graph
        self.root = root
        self.generator = generator

    def module(self, name: str, module: nn.Module, *args: fx.Node, part: str = "node") -> fx.Node:
        """Add a call of a module, registered as ``<part>_<node>``, which no other node can give."""
        target = f"{part}_{name}"
        self.root.add_module(target, module)
        return self.graph.call_module(target, args)

    def parameter(self, name: str, value: torch.Tensor) -> fx.Node:
        """Add a trainable parameter, registered as ``node_<node>``."""
        target = f"node_{name}"
        self.root.register_parameter(target, nn.Parameter(value))
        return self.graph.get_attr(target)

    def function(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Add a call of a torch function."""
        return self.graph.call_function(target, args, kwargs)

    def method(self, target: str, *args: Any) -> fx.Node:
        """Add a call of a tensor method."""
        return self.graph.call_method(target, args)


class Operator(abc.ABC):
    """One member of the closed operator set."""

    name: ClassVar[str]
    """Name in the IR."""
    arity: ClassVar[int] = 1
    """Number of inputs."""
    attributes: ClassVar[tuple[Attribute, ...]] = ()
    """Attributes it takes."""
    shape_inputs: ClassVar[tuple[int, ...]] = ()
    """Indices of the inputs of which only the shape is read."""

    @abc.abstractmethod
    def infer(self, call: Call) -> TensorType:
        """Give the type of the output.

        Raises:
            InvalidBlueprintError: The inputs' types do not fit; the message names the node.
        """

    @abc.abstractmethod
    def work(self, call: Call, output: TensorType) -> Work:
        """Give what the call costs, exactly."""

    @abc.abstractmethod
    def emit(self, emitter: Emitter, args: Sequence[fx.Node], call: Call, output: TensorType) -> fx.Node:
        """Add the call to a graph and give the node that holds its output."""

    def mixing(self, call: Call) -> Mixing:
        """Say how far the call carries information between positions."""
        del call
        return Mixing.NONE

    def keeps_leading(self, call: Call) -> bool:
        """Say whether a VECTOR input may carry further leading dimensions."""
        del call
        return True

    def constants(self, call: Call, output: TensorType) -> object:
        """Give what is fixed when the module is built; equal values mean that one module serves both calls."""
        return tuple(sorted(call.attributes.items())), self.work(call, output).parameters


def bare(cls: Callable[..., nn.Module], *args: int, **kwargs: int | bool) -> nn.Module:
    """Give a layer on the CPU whose weights are not drawn yet, so that torch's random state is left alone."""
    return cls(*args, device="meta", dtype=torch.float32, **kwargs).to_empty(device="cpu")


def initialise(module: nn.Module, init: str, generator: torch.Generator) -> nn.Module:
    """Fill the weight and bias of a linear map or convolution; give the module back."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, nn.Parameter)
    fan_in = weight[0].numel()
    with torch.no_grad():
        if init == "zero":
            weight.zero_()
        elif init == "orthogonal":
            nn.init.orthogonal_(weight.view(weight.shape[0], -1), generator=generator)
        elif init == "kaiming":
            nn.init.kaiming_normal_(weight, generator=generator)
        else:
            bound = 1.0 / math.sqrt(fan_in)
            weight.uniform_(-bound, bound, generator=generator)
        if isinstance(bias, nn.Parameter):
            if init == "default":
                bound = 1.0 / math.sqrt(fan_in)
                bias.uniform_(-bound, bound, generator=generator)
            else:
                bias.zero_()
    return module
