"""Compiled bytes proven harmless without being run: what an archive may hold is listed, and all else is refused.

    TORCHSCRIPT        records of a scripted module; source of which every call is a listed operator, or a function
                       of the archive that calls none of its callers; pickles of listed opcodes and names, tensors
                       within their records
    EXPORTED_PROGRAM   records of an exported program without pickled weights; a graph of listed operators, in which
                       every string is a plain word and every expression arithmetic
    AOT_INDUCTOR       refused: machine code shows nothing of what it does
    EAGER              no bytes

``torch.jit.load`` runs code of the archive, and ``torch.export.load`` unpickles and evaluates text: both come after
this. Records are read by the very reader that loads them, so that what was looked at is what will run. What a form
computes is not proven here, only that it can do nothing but compute; nor for how long, beyond that the steps of a
script are bounded: an operator takes as long as its tensors are large. How large those become is seen where a form is
about to run, on shapes alone (`bounded_form`); lists and texts, which no operator there shows, are bounded here.
"""

from __future__ import annotations

import ast
import io
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from esper.contracts.kernel import CompileTarget
from esper.execution import archive_calls, archive_pickle, archive_program, archive_script, archive_values
from esper.execution.archive_errors import refuse

MAX_RECORDS: Final = 4096
"""Most records of an archive."""
MAX_RECORD_BYTES: Final = 4 * 1024 * 1024
"""Longest record that is no tensor, in bytes."""
MAX_CODE_BYTES: Final = 256 * 1024
"""Most bytes of all sources of a script, whose syntax trees take some 600 times as much; legal ones have a seventh."""
MAX_UNPACKED_BYTES: Final = 512 * 1024 * 1024
"""Most bytes of all records, unpacked."""

_NAME: Final = re.compile(r"\w+(/\.?\w[\w.]*)+", re.ASCII)
_PLAIN: Final = frozenset({"version", "byteorder", ".data/version", ".data/serialization_id"})
_SCRIPT_TENSOR: Final = re.compile(r"(data|constants)/\d+", re.ASCII)
_SCRIPT_CODE: Final = re.compile(r"code/__torch__(/\w+)+\.py", re.ASCII)
_SCRIPT_PICKLES: Final = {
    "data.pkl": ("data/", archive_pickle.inspect_pickle),
    "constants.pkl": ("constants/", archive_pickle.inspect_constants),
}
_PROGRAM_WEIGHT: Final = re.compile(r"data/weights/weight_\d+", re.ASCII)
_SAMPLES: Final = "data/sample_inputs/model.pt"
_PROGRAM_PLAIN: Final = _PLAIN | {"archive_format", "archive_version", _SAMPLES}

_LOCAL_HEADER: Final = b"PK\x03\x04"
_FLATBUFFER_MAGIC: Final = b"PTMF"
_END: Final = struct.Struct("<4s4H2LH")
_END_64: Final = struct.Struct("<4sQ2H2L4Q")
_LOCATOR: Final = struct.Struct("<4sLQL")
_END_MAGIC: Final = b"PK\x05\x06"
_END_64_MAGIC: Final = b"PK\x06\x06"
_LOCATOR_MAGIC: Final = b"PK\x06\x07"


@dataclass(frozen=True, slots=True)
class _Archive:
    """A zip archive whose structure has held."""

    sizes: Mapping[str, int]
    """Unpacked size of each record by its name below the root, in bytes."""
    reader: Any
    """torch's own reader of it."""

    def read(self, name: str) -> bytes:
        """Give one record."""
        if self.sizes[name] > MAX_RECORD_BYTES:
            raise refuse(f"have at most {MAX_RECORD_BYTES} bytes in record '{name}'", self.sizes[name])
        data: bytes = self.reader.get_record(name)
        return data

    def require(self, *names: str) -> None:
        """Refuse an archive that lacks a record."""
        for name in names:
            if name not in self.sizes:
                raise refuse(f"hold the record '{name}'", "none")


def inspect_binary(binary: bytes, target: CompileTarget) -> None:
    """Do nothing when compiled bytes can do nothing but compute.

    Raises:
        CorruptDataError: Something in them is not on the list of what a kernel needs; the message names it.
    """
    if target is CompileTarget.EAGER:
        if binary:
            raise refuse("be empty for EAGER", f"{len(binary)} bytes")
    elif target is CompileTarget.TORCHSCRIPT:
        _inspect_script(_open(binary))
    elif target is CompileTarget.EXPORTED_PROGRAM:
        _inspect_program(_open(binary))
    else:
        raise refuse("be of a target whose bytes can be looked through", target.name)


def _inspect_script(archive: _Archive) -> None:
    archive.require(*_SCRIPT_PICKLES)
    code = sum(size for name, size in archive.sizes.items() if _SCRIPT_CODE.fullmatch(name))
    if code > MAX_CODE_BYTES:
        raise refuse(f"have at most {MAX_CODE_BYTES} bytes of source in all", code)
    sources: dict[str, ast.Module] = {}
    for name in archive.sizes:
        if name in _PLAIN or _SCRIPT_TENSOR.fullmatch(name):
            continue
        if name in _SCRIPT_PICKLES:
            folder, inspect = _SCRIPT_PICKLES[name]
            inspect(archive.read(name), name, _tensors_of(archive, folder))
        elif _SCRIPT_CODE.fullmatch(name):
            sources[name] = archive_script.inspect_source(archive.read(name), name)
        elif _SCRIPT_CODE.fullmatch(name.removesuffix(".debug_pkl") if name.endswith(".debug_pkl") else ""):
            archive_pickle.inspect_pickle(archive.read(name), name, {})
        else:
            raise refuse("hold the records of a scripted module alone", name)
    archive_values.inspect_values(archive_calls.inspect_calls(sources))


def _inspect_program(archive: _Archive) -> None:
    archive.require(archive_program.MODEL, archive_program.WEIGHTS, archive_program.CONSTANTS)
    for name in archive.sizes:
        if name == _SAMPLES and archive.sizes[name]:
            raise refuse("have no example inputs, which are a pickle", archive.sizes[name], record=name)
        if name not in _PROGRAM_PLAIN | archive_program.TEXTS and not _PROGRAM_WEIGHT.fullmatch(name):
            raise refuse("hold the records of an exported program alone", name)
    for name in archive_program.TEXTS:
        archive_program.inspect_text(archive.read(name), name, archive.sizes)


def _tensors_of(archive: _Archive, folder: str) -> dict[str, int]:
    return {name.removeprefix(folder): size for name, size in archive.sizes.items() if name.startswith(folder)}


def _open(binary: bytes) -> _Archive:
    """Give the archive of some bytes once nothing about its structure can be read in two ways."""
    _require_plain_zip(binary)
    try:
        entries = zipfile.ZipFile(io.BytesIO(binary)).infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise refuse("be a zip archive", error) from error
    if not 1 <= len(entries) <= MAX_RECORDS:
        raise refuse(f"hold 1 to {MAX_RECORDS} records", len(entries))
    root = entries[0].filename.split("/")[0]
    sizes: dict[str, int] = {}
    for entry in entries:
        sizes[_record_name(entry, root)] = entry.file_size
    if len({name.casefold() for name in sizes}) != len(entries):
        raise refuse("hold every record once, upper and lower case alike", "two of a name")
    if sum(sizes.values()) > MAX_UNPACKED_BYTES:
        raise refuse(f"unpack to at most {MAX_UNPACKED_BYTES} bytes", sum(sizes.values()))
    try:
        reader = torch._C.PyTorchFileReader(io.BytesIO(binary))  # parses, and runs nothing
        agrees = sorted(reader.get_all_records()) == sorted(sizes) and all(
            reader.get_record_size(name) == size for name, size in sizes.items()
        )
    except RuntimeError as error:
        raise refuse("be an archive of torch's", str(error).split("\n", maxsplit=1)[0]) from error
    if not agrees:
        raise refuse("hold the same records to every reader", "others to torch's")
    return _Archive(sizes, reader)


def _require_plain_zip(binary: bytes) -> None:
    """Refuse bytes that are something else too, or whose directory another reader might look for elsewhere."""
    if binary[:4] != _LOCAL_HEADER or binary[4:8] == _FLATBUFFER_MAGIC:
        raise refuse("begin with the first record of a zip archive", binary[:8])
    ends = len(binary) - _END.size - _LOCATOR.size - _END_64.size
    if ends < 0:
        raise refuse("end with the directory of a zip archive", f"{len(binary)} bytes")
    magic, *disks, count, size, begin, comment = _END.unpack_from(binary, len(binary) - _END.size)
    if (magic, disks, comment) != (_END_MAGIC, [0, 0, count], 0):
        raise refuse("end with the one directory of a zip archive, without a comment", binary[-_END.size :])
    # torch writes the end in its long form too; either both say the same, or there is only the short one.
    is_short = begin + size == len(binary) - _END.size and _LOCATOR_MAGIC not in binary[ends:]
    long_end = _END_64.unpack_from(binary, ends)
    locator = _LOCATOR.unpack_from(binary, ends + _END_64.size)
    is_both = (
        begin + size == ends
        and (long_end[0], *long_end[1:2], *long_end[4:]) == (_END_64_MAGIC, 44, 0, 0, count, count, size, begin)
        and locator == (_LOCATOR_MAGIC, 0, ends, 1)
    )
    if not is_short and not is_both:
        raise refuse("end where its directory ends", binary[ends:])


def _record_name(entry: zipfile.ZipInfo, root: str) -> str:
    name = entry.filename
    if not _NAME.fullmatch(name) or ".." in name or not name.startswith(f"{root}/"):
        raise refuse("hold records with plain names below one root", name)
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or entry.flag_bits & 1:
        raise refuse("hold records stored or deflated", name)
    return name.removeprefix(f"{root}/")
