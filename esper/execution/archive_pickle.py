"""Pickles inside an archive: listed opcodes, listed names, and tensors that lie within their records.

The pickle is taken apart by Python's own unpickler, in its written-out form, with the listed opcodes alone and an inert
stand-in for every name; nothing that it names is ever imported or called.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Final

from typing_extensions import override

from esper.contracts.errors import CorruptDataError
from esper.execution.archive_errors import refuse

_OPCODES: Final = frozenset(
    {
        "PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
        "BINUNICODE", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS",
        "EMPTY_DICT", "SETITEM", "SETITEMS", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "GLOBAL", "REDUCE",
        "NEWOBJ", "BUILD", "BINPERSID",
    }
)  # fmt: skip
_DISPATCH: Final = {
    code: step
    for code, step in pickle._Unpickler.dispatch.items()
    if code in {ord(opcode.code) for opcode in pickletools.opcodes if opcode.name in _OPCODES}
}
_ITEM_BYTES: Final = {"FloatStorage": 4, "DoubleStorage": 8, "LongStorage": 8, "QInt8Storage": 1, "CharStorage": 1}
_CLASS: Final = re.compile(r"__torch__(\.(?!classes\b)\w+)+ \w+", re.ASCII)
_PACKED: Final = "__torch__.torch.classes.quantized LinearPackedParamsBase"


class _Object:
    """Stands for an object of a class of the archive."""

    def __setstate__(self, state: object) -> None:
        del state


def inspect_constants(data: bytes, name: str, tensors: Mapping[str, int]) -> None:
    """Do nothing when a pickle is a row of tensors, or of objects of the archive: what source may read by number.

    Arguments and errors are those of `inspect_pickle`.
    """
    held = inspect_pickle(data, name, tensors)
    if not isinstance(held, tuple) or not all(isinstance(one, _Object) for one in held):
        raise refuse("hold tensors and modules alone", type(held).__name__, record=name)


def inspect_pickle(data: bytes, name: str, tensors: Mapping[str, int]) -> object:
    """Give what a pickle holds, which is plain values and tensors alone, with an inert stand-in for each tensor.

    Args:
        data: The pickle.
        name: Record it comes from, for the message.
        tensors: Size of each record that a tensor may lie in, by its key, in bytes.

    Raises:
        CorruptDataError: It holds anything else; the message names the record and what it is.
    """
    stream = io.BytesIO(data)
    try:
        held: object = _Inert(stream, name, tensors).load()
    except CorruptDataError:
        raise
    except KeyError as error:  # of the dispatch table
        raise refuse("use the opcodes of plain values", error.args[0], record=name) from error
    except Exception as error:
        raise refuse("be whole", f"{type(error).__name__}: {error}", record=name) from error
    if stream.tell() != len(data):
        raise refuse("end where its pickle ends", f"{len(data) - stream.tell()} further bytes", record=name)
    return held


class _Inert(pickle._Unpickler):
    """Takes a pickle apart without importing a thing; knows no other opcodes than those of the list."""

    dispatch = _DISPATCH

    def __init__(self, stream: io.BytesIO, name: str, tensors: Mapping[str, int]) -> None:
        super().__init__(stream)
        self._name = name
        self._tensors = tensors
        self._known: dict[str, object] = {
            "collections OrderedDict": OrderedDict,
            "torch._utils _rebuild_tensor_v2": self._tensor,
            "torch._utils _rebuild_qtensor": self._tensor,
            "torch per_tensor_affine": "per_tensor_affine",
            "torch.jit._pickle restore_type_tag": _first,
            "torch.jit._pickle build_intlist": _first,
            _PACKED: _Object,
            **{f"torch {kind}": kind for kind in _ITEM_BYTES},
        }

    @override
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        wanted = f"{module_name} {global_name}"
        if wanted in self._known:
            return self._known[wanted]
        if _CLASS.fullmatch(wanted):
            return _Object
        raise refuse("name what a scripted module is made of alone", wanted, record=self._name)

    @override
    def persistent_load(self, pid: Any) -> Any:
        match pid:
            case ("storage", str() as kind, str() as key, "cpu", int() as count) if kind in _ITEM_BYTES:
                if self._tensors.get(key) == count * _ITEM_BYTES[kind]:
                    return count
        raise refuse("refer to tensors by a record of their size", pid, record=self._name)

    def _tensor(self, count: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> _Object:
        numbers = (count, offset, *size, *stride)
        if len(size) != len(stride) or not all(type(number) is int and number >= 0 for number in numbers):
            raise refuse("give a tensor sizes and strides >= 0", (offset, size, stride), record=self._name)
        last = offset + sum((have - 1) * step for have, step in zip(size, stride, strict=True))
        if 0 not in size and last >= count:
            raise refuse("keep a tensor within its record", (count, offset, size, stride), record=self._name)
        if math.prod(size) > count:  # one number seen many times, which the first copy would write out
            raise refuse("give a tensor no more numbers than its record has", (count, size, stride), record=self._name)
        return _Object()


def _first(value: object, *_: object) -> object:
    return value
