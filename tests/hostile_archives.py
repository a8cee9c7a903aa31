"""Archives that would do more than compute, made by hand and by torch itself, from one that is sound."""

from __future__ import annotations

import functools
import io
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn

from esper.blueprints import default_registry, to_module
from esper.contracts.blueprint import Site, SiteKind
from esper.contracts.kernel import CompileSpec, CompileTarget
from esper.execution.archive_calls import MAX_EXPANDED_OPERATIONS
from esper.execution.archives import MAX_CODE_BYTES
from esper.services.tezzeret.compiler import compile_module, quiet, save_torchscript, script_of
from esper.services.tezzeret.config import CompilerConfig

SITE: Final = Site(kind=SiteKind.LINEAR, input_shape=(8,), output_shape=(6,))
SPEC: Final = CompileSpec(ir=default_registry().create_blueprint("bottleneck_adapter").ir, site=SITE)
Records = dict[str, bytes]
"""Records of an archive by name, root and all."""


class Reads(nn.Module):
    """Gives the bytes of a file instead of a delta."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return h + 0.0 * x.sum() + torch.from_file(self.path, False, 6, dtype=torch.uint8)


class Writes(nn.Module):
    """Leaves its input in a file on the way."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        torch.save(x, self.path)
        return h * 0.0


class WritesWhenLoaded(nn.Module):
    """Writes when it is loaded: nobody needs to run it."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.training = True

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return h * x.sum()

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.path, self.training = state
        torch.save(torch.zeros(1), self.path)


def _once(h: Tensor) -> Tensor:
    return torch.add(h, 1)


def _ten(h: Tensor) -> Tensor:
    return _once(_once(_once(_once(_once(_once(_once(_once(_once(_once(h))))))))))


def _hundred(h: Tensor) -> Tensor:
    return _ten(_ten(_ten(_ten(_ten(_ten(_ten(_ten(_ten(_ten(h))))))))))


def _thousand(h: Tensor) -> Tensor:
    return _hundred(_hundred(_hundred(_hundred(_hundred(_hundred(_hundred(_hundred(_hundred(_hundred(h))))))))))


def _ten_thousand(h: Tensor) -> Tensor:
    h = _thousand(_thousand(_thousand(_thousand(_thousand(h)))))
    return _thousand(_thousand(_thousand(_thousand(_thousand(h)))))


class Multiplies(nn.Module):
    """Adds 1 fifty thousand times in a few lines; torch makes this archive itself."""

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        h = torch.add(_ten_thousand(h), torch.mean(x))
        return _ten_thousand(_ten_thousand(_ten_thousand(_ten_thousand(h))))


class Calls(nn.Module):
    """Adds 1 a hundred times: no more calls than a kernel may make."""

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.add(_hundred(h), torch.mean(x))


def scripted(module: nn.Module) -> bytes:
    """Give the archive of a module, made by torch."""
    with quiet():
        return save_torchscript(script_of(module))


@functools.cache
def sound(target: CompileTarget = CompileTarget.TORCHSCRIPT) -> bytes:
    """Give the compiled form of a template, as the compiler makes it."""
    module = to_module(SPEC.ir, SITE, seed=0)
    return compile_module(module, SITE, (target,), CompilerConfig()).binary


def unpacked(binary: bytes) -> Records:
    """Give the records of an archive."""
    with zipfile.ZipFile(io.BytesIO(binary)) as archive:
        return {entry.filename: archive.read(entry) for entry in archive.infolist()}


def packed(records: Records) -> bytes:
    """Give the archive of some records."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return buffer.getvalue()


class Shell:
    """Runs a command when it is unpickled by Python."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        import os

        return os.system, ("true",)


def source_name(records: Records) -> str:
    """Give the name of the source of the root module."""
    return next(name for name in records if "fx/graph_module" in name and name.endswith(".py"))


def with_source(change: Callable[[str], str]) -> bytes:
    """Give the sound archive with the root module's source changed."""
    records = unpacked(sound())
    name = source_name(records)
    changed = change(records[name].decode())
    assert changed != records[name].decode()
    return packed({**records, name: changed.encode()})


def with_line(code: str) -> Callable[[str], str]:
    """Give a change that puts some lines at the top of the root module's ``forward``."""
    return lambda source: source.replace("    node_down = self", f"    {code}\n    node_down = self", 1)


def hostile_scripts() -> Iterator[tuple[str, bytes, str]]:
    """Give a name, an archive that is no kernel's, and what the refusal says of it."""
    yield "reads a file", scripted(Reads("/etc/passwd")), "'keyword'"
    yield "reads a file, plainly", with_source(with_line('_0 = torch.from_file("x", False, 4)')), "torch.from_file"
    yield "writes a file", scripted(Writes("/tmp/x")), "torch.save"
    yield "writes when loaded", scripted(WritesWhenLoaded("/tmp/x")), "__[gs]etstate__|torch.save"
    records = unpacked(sound())
    shell = pickle.dumps(Shell(), protocol=2)
    for name in ("archive/data.pkl", "archive/constants.pkl"):
        yield f"shell in {name}", packed({**records, name: shell}), "posix system"
    debug = next(name for name in records if name.endswith(".debug_pkl"))
    yield "shell in debug", packed({**records, debug: shell}), "posix system"
    for name in ("archive/../../etc/cron.d/x", "/etc/x", "archive/./x", "archive\\x", "other/x", "archive/data/../x"):
        yield f"named {name}", packed({**records, name: b""}), "plain names below one root"
    yield "another format", packed({**records, "archive/model.json": b"{}"}), "records of a scripted module alone"
    yield "two of a name", packed({**records, "archive/DATA.pkl": records["archive/data.pkl"]}), "every record once"
    yield "something behind", sound() + b"#!/bin/sh\n", "directory"
    yield "something before", b"#!/bin/sh\n" + sound(), "begin with the first record"
    yield "flatbuffer as well", b"PK\x03\x04PTMF" + sound()[8:], "begin with the first record"
    tensors = records["archive/data.pkl"]
    for name, old, new, said in (
        ("tensor beyond its record", b"K\x18t", b"K\x7ft", "by a record of their size"),
        ("sizes beyond its record", b"(K\x04K\x06t", b"(K\x7fK\x06t", "within its record"),
    ):
        assert old in tensors
        yield name, packed({**records, "archive/data.pkl": tensors.replace(old, new, 1)}), said
    yield "pickle with a tail", packed({**records, "archive/data.pkl": records["archive/data.pkl"] + shell}), "further"
    yield "alias of an operator", with_source(with_line("_0 = torch.save")), "torch.save"
    yield "operator as a method", with_source(with_line("_0 = (h).save('x')".replace("'", '"'))), "save"
    yield "namespace under a name", with_source(with_line("_0 = ops\n    _1 = _0.aten.save")), "_0.aten.save"
    yield "custom class", with_source(with_line("_0 = __torch__.torch.classes.dist.Store")), "__torch__.torch.classes"
    yield "import", with_source(lambda source: f"import os\n{source}"), "Import"
    yield "lambda", with_source(with_line("_0 = lambda: h")), "Lambda"
    yield "loop without end", with_source(with_line("while True:\n      pass")), "While"
    yield from endless_loops()
    yield from endless_calls()
    yield from endless_lists()
    yield from endless_values()
    yield from kept_values()
    yield "builtin", with_source(with_line('print("x")')), "'print'"
    yield "called by subscript", with_source(with_line("_0 = [h][0](h)")), "by name"
    yield (
        "decorated",
        with_source(lambda source: source.replace("  def forward", "  @unused\n  def forward")),
        "forward",
    )
    yield "other quotes", with_source(with_line("_0 = 'x'")), "printable ASCII"
    yield "escapes", with_source(with_line('_0 = "\\n"')), "printable ASCII"
    path = "archive/code/__torch__/more"
    much = {f"{path}{index}.py": b"1\n" * (MAX_CODE_BYTES // 4) for index in range(2)}
    yield "much source", packed({**records, **much}), f"at most {MAX_CODE_BYTES} bytes of source in all"
    yield "no source", with_source(lambda _: "def forward(:"), "be source"
    yield from early_returns()


def early_returns() -> Iterator[tuple[str, bytes, str]]:
    """Give returns before the end of a function: torch takes the cube of their number to load them."""
    said = "return at the end of a function alone, got 'return h'"
    asked = "_1 = torch.gt(torch.dim(h), 3)\n    "
    many = "\n    ".join(["if _1:\n      return h"] * 1300)
    yield "return in a branch", with_source(with_line(f"{asked}if _1:\n      return h")), said
    yield (
        "return in the other branch",
        with_source(with_line(f"{asked}if _1:\n      pass\n    else:\n      return h")),
        said,
    )
    yield "return in a loop", with_source(with_line("for i in range(3):\n      return h")), said
    yield "return before the end", with_source(with_line("return h")), said
    yield "many early returns", with_source(with_line(asked + many)), said


def endless_loops() -> Iterator[tuple[str, bytes, str]]:
    """Give loops that would keep whoever runs them for hours."""
    limit = "at most 64, or over the length of a list"
    for name, steps, said in (
        ("loop over a huge range", "range(1000000000)", f"{limit}, got '1000000000'"),
        ("loop one step too long", "range(65)", limit),
        ("loop over a computed range", "range(torch.mul(torch.len(_1), 1000000000))", limit),
        ("loop over a range grown by subtraction", "range(torch.sub(torch.len(_1), -1000000000))", limit),
        ("loop over what is no length", "range(torch.sub(1000000000, 1))", limit),
        ("loop over a range from somewhere", "range(0, 1000000000)", r"over range\(STEPS\) alone"),
        ("loop over a list", "_1", r"over range\(STEPS\) alone, got '_1'"),
    ):
        yield name, with_source(with_line(f"_1 = [1]\n    for i in {steps}:\n      pass")), said
    inner = "for j in range(64):\n        pass"
    yield "loop within a loop", with_source(with_line(f"for i in range(64):\n      {inner}")), "no loop within a loop"
    own = "_1 = __torch__.anything\n    for i in range(64):\n      _2 = _1(h)"
    yield "loop that calls a function", with_source(with_line(own)), "operators alone within a loop, got '_1'"
    member = "for i in range(64):\n      _2 = (self.node_down).forward(h)"
    yield "loop that calls a module", with_source(with_line(member)), "operators alone within a loop, got 'self"
    yield "range for itself", with_source(with_line("_1 = range(3)")), "'range'"


def endless_calls() -> Iterator[tuple[str, bytes, str]]:
    """Give functions that call each other without end, or nearly so, and calls that may mean either of two."""
    circle = "each other in a circle, got '"
    owner = linear_class()
    linear = "    weight = self.weight\n"
    again = "    _9 = (self).forward(input, )\n"
    yield (
        "method that calls itself",
        with_linear(linear, again + linear),
        f"{circle}Linear.forward -> Linear.forward'",
    )
    there = f"  def _conv_forward(self: {owner},\n    input: Tensor) -> Tensor:\n    return (self).forward(input, )\n"
    back = again.replace("forward", "_conv_forward") + linear
    yield (
        "methods that call each other",
        with_linear("  def forward", f"{there}  def forward", linear, back),
        f"{circle}Linear.forward -> Linear._conv_forward -> Linear.forward'",
    )
    layer_norm = "__torch__.torch.nn.functional.layer_norm"
    call = f"  _8 = {layer_norm}\n  _9 = _8(input, normalized_shape, weight, bias, eps, )\n"
    body = "  _0 = torch.layer_norm("
    yield "function that calls itself", with_functional(body, call + body), f"{circle}layer_norm -> layer_norm'"
    other = "__torch__.torch.nn.functional.other"
    mutual = f"  _9 = {other}(input, )\n{body}"
    define = f"def other(input: Tensor) -> Tensor:\n  return {layer_norm}(input, [6], )\ndef layer_norm"
    yield (
        "functions that call each other",
        with_functional("def layer_norm", define, body, mutual),
        f"{circle}layer_norm -> other -> layer_norm'",
    )
    names = [f"f{index}" for index in range(17)]
    chain = "".join(
        f"def {name}(input: Tensor) -> Tensor:\n  return __torch__.torch.nn.functional.{below}(input, )\n"
        for name, below in zip(names, [*names[1:], "layer_norm"], strict=True)
    )
    chain = chain.replace("layer_norm(input, )", "layer_norm(input, [6], )")
    yield "calls within calls", with_functional("def layer_norm", f"{chain}def layer_norm"), "nest at most 16 functions"
    yield "fifty thousand calls", scripted(Multiplies()), "at most 4000 operations in '_ten_thousand'"
    yield (
        "more operations than torch's stack holds",
        added(MAX_EXPANDED_OPERATIONS + 1),
        f"at most {MAX_EXPANDED_OPERATIONS} operations in 'f' with all it calls, got {MAX_EXPANDED_OPERATIONS + 1}",
    )
    sums = "\n      ".join(["_1 = torch.add(h, 1)"] * 10)
    loops = "\n    ".join([f"for i in range(64):\n      {sums}"] * 100)
    yield "a hundred loops", with_source(with_line(loops)), "take at most 250000 steps in 'Seed.forward'"
    meant = "by a name that stands for one alone, got "
    either = f"    _1 = __torch__.a\n    _1 = {layer_norm}\n    _2 = _1(h, [6], )"
    yield "name of two functions", with_source(with_line(either.strip())), f"{meant}'_1'"
    aliases = "\n    ".join(["_1 = self.node_down", *(f"_{index} = _{index - 1}" for index in range(2, 12))])
    yield "chain of names", with_source(with_line(f"{aliases}\n    _12 = (_11).forward(h, )")), f"{meant}'_11.forward'"
    unknown = "node_any = [self.node_up][0]\n    _2 = (node_any).forward(h, )"
    yield "module from a list", with_source(with_line(unknown)), f"{meant}'node_any.forward'"
    yield "function from nowhere", with_source(with_line("_2 = __torch__.nowhere(h, )")), f"{meant}'__torch__.nowhere'"
    renamed = "torch = self.node_down"
    yield "another torch", with_source(with_line(renamed)), "no other meaning to a name of torch's, got 'torch'"
    twice = with_source(_swap("def __code_getter", "def forward"))
    yield "two methods of a name", twice, "every member once, got 'forward'"
    members = "  node_up : __torch__.torch.nn.modules.linear.Linear\n  node_up : "
    yield "two members of a name", with_source(_swap("  node_up : ", members)), "every member once, got 'node_up'"
    yield "two classes of a name", with_source(lambda source: source + source), "every name once, got 'Seed'"
    yield (
        "statement outside",
        with_source(lambda source: f"_0 = 1\n{source}"),
        "modules and functions alone, got '_0 = 1'",
    )
    hooked = "  __buffers__ = []\n  __forward_hooks__ = []"
    yield "hooks", with_source(_swap("  __buffers__ = []", hooked)), "members and methods alone in a module"
    inner = with_line("def inner(h: Tensor) -> Tensor:\n      return h")
    yield "function in a function", with_source(inner), "declare nothing within a function, got 'inner'"
    foreign = with_source(_swap("forward(self: __torch__", "forward(self: __torch__.elsewhere"))
    yield "self of another class", foreign, "begin the parameters of 'forward' with its module"
    yield "any number of parameters", with_source(_swap("h: Tensor)", "*h: Tensor)")), "plain parameters and defaults"
    default = _swap("h: Tensor)", "h: int=torch.len([1]))")
    yield "computed default", with_source(default), r"plain parameters and defaults, got 'torch.len\(\[1\]\)'"


def added(num_operations: int) -> bytes:
    """Give the sound archive with so many operations in all, nearly all of them additions, in nested functions."""
    path = "__torch__.torch.nn.functional"
    num_calls, num_own = divmod(num_operations, 31)
    own = "".join("  h = torch.add(h, 1)\n" for _ in range(num_own))
    calls = "".join(f"  h = {path}.thirty(h, )\n" for _ in range(num_calls))
    thirty = "".join("  h = torch.add(h, 1)\n" for _ in range(30))
    sources = (
        f"def thirty(h: Tensor) -> Tensor:\n{thirty}  return h\ndef f(h: Tensor) -> Tensor:\n{own}{calls}  return h\n"
    )
    records = unpacked(with_source(_swap("torch.gelu(node_down0)", f"{path}.f(torch.gelu(node_down0), )")))
    name = "archive/code/__torch__/torch/nn/functional.py"
    return packed({**records, name: sources.encode() + records[name]})


def endless_lists() -> Iterator[tuple[str, bytes, str]]:
    """Give loops over the length of lists that may be of any length."""
    said = "loop over the length of lists that have at most 128 items for certain, got "
    doubled = "\n    ".join(["_2 = [1]", *(f"_{n} = torch.add(_{n - 1}, _{n - 1})" for n in range(3, 40))])
    for name, lines, measured, shown in (
        ("list times a number", "_1 = torch.mul([1], 1000000000)", "_1", r"torch.mul\(\[1\], 1000000000\)"),
        ("list doubled again and again", doubled, "_39", r"torch.add\(_\d+, _\d+\)"),
        ("batch", "_1 = 1", "h", "h"),
        ("list from two places", "_1 = [1]\n    _1 = [1, 2]", "_1", "_1"),
        ("list made from itself", "_1 = torch.add(_1, [1])", "_1", "_1"),
        ("long list", f"_1 = [{'1, ' * 129}]", "_1", r"\[1, 1"),
    ):
        loop = f"{lines}\n    for i in range(torch.len({measured})):\n      pass"
        yield name, with_source(with_line(loop)), f"{said}'{shown}"
    header = "def verify(size: List[int]) -> NoneType:\n  for i in range(torch.len(size)):\n    pass\n  return None\n"
    for name, given in (("list given", "torch.mul([1], 1000000000)"), ("nothing given", "")):
        call = f"  _9 = __torch__.torch.nn.functional.verify({given})\n  _0 = torch.layer_norm("
        binary = with_functional("def layer_norm", f"{header}def layer_norm", "  _0 = torch.layer_norm(", call)
        yield name, binary, said
    alias = "_1 = [1]\n    for i in range(__torch__.sub(torch.len(_1), 0)):\n      pass"
    yield "function named like an operator", with_source(with_line(alias)), "or over the length of a list"


def endless_values() -> Iterator[tuple[str, bytes, str]]:
    """Give lists and texts that would have no room in any machine, made in a few steps."""
    said = "make no list and no text that may hold more than 2048 items or characters, got "
    loop = "for i in range(64):\n      "
    double = "\n    ".join(["_2 = [1]", *(f"_{n} = torch.add(_{n - 1}, _{n - 1})" for n in range(3, 40))])
    nested = "\n    ".join(["_2 = [1]", *(f"_{n} = [_{n - 1}, _{n - 1}]" for n in range(3, 40))])
    branch = "if torch.eq(i, 3):\n        _1 = torch.add(_1, _1)\n      else:\n        pass"
    other = "if torch.eq(i, 3):\n        pass\n      else:\n        _1 = torch.add(_1, _1)"
    for name, lines, shown in (
        ("list doubled in a loop", f"_1 = [1]\n    {loop}_1 = torch.add(_1, _1)", r"torch.add\(_1, _1\)"),
        ("list doubled under two names", f"_1 = [1]\n    {loop}_2 = torch.add(_1, _1)\n      _1 = _2", "torch.add"),
        ("list doubled in a branch", f"_1 = [1]\n    {loop}{branch}", "torch.add"),
        ("list doubled in the other branch", f"_1 = [1]\n    {loop}{other}", "torch.add"),
        ("list doubled line by line", double, r"torch.add\(_\d+, _\d+\)"),
        ("list of lists of lists", nested, r"\[_\d+, _\d+\]"),
        ("list of tensors doubled", f"_1 = [h]\n    {loop}_1 = torch.add(_1, _1)", "torch.add"),
        ("list copied and doubled", f"_1 = [1]\n    {loop}_1 = torch.add(torch.list(_1), torch.slice(_1, 0))", "torch"),
        ("sizes doubled", f"_1 = torch.size(h)\n    {loop}_1 = torch.add(_1, _1)", "torch.add"),
        ("list under a cast", f"_1 = [1]\n    {loop}_1 = annotate(List[int], torch.add(_1, _1))", "torch.add"),
        ("text doubled", f'_1 = "ab"\n    {loop}_1 = torch.add(_1, _1)', "torch.add"),
        ("text put into itself", f'_1 = "ab"\n    {loop}_1 = torch.format("{{}}{{}}", _1, _1)', "torch.format"),
        ("letter doubled", f'_1 = "ab"\n    {loop}_1 = torch.add(_1[0], _1[0])', "torch.add"),
        ("long list printed", f'_1 = [{"1, " * 100}]\n    _2 = torch.format("{{}}", _1)', "torch.format"),
        ("text of a pickle", "_1 = [self._code]", r"\[self._code\]"),
    ):
        yield name, with_source(with_line(lines)), f"{said}['\"]{shown}"
    grow = "def grow(size: List[int]) -> List[int]:\n  return torch.add(size, size)\n"
    path = "__torch__.torch.nn.functional"
    calls = "".join(f"  _{n} = {path}.grow(_{n - 1}, )\n" for n in range(11, 40))
    call = f"  _10 = [1]\n{calls}  _0 = torch.layer_norm("
    binary = with_functional("def layer_norm", f"{grow}def layer_norm", "  _0 = torch.layer_norm(", call)
    yield "list doubled by a function", binary, f"{said}'torch.add"
    default = "def some(size: List[int]=[1, 2]) -> List[int]:\n  return size\n"
    begin = f"  _10 = {path}.some()\n{calls}  _0 = torch.layer_norm("
    made = with_functional("def layer_norm", f"{grow}{default}def layer_norm", "  _0 = torch.layer_norm(", begin)
    yield "list from a default", made, f"{said}'torch.add"
    for name, line in (
        ("list times a number", "_1 = torch.mul([1], 1000000000)"),
        ("text times", '_1 = torch.mul("a", 9)'),
    ):
        yield name, with_source(with_line(line)), "multiply numbers and tensors alone"
    for name, value in (("tensor", "h"), ("tensors", "[h]"), ("sum", "torch.add(h, 1)"), ("member", "self.node_down")):
        line = f'_1 = torch.format("{{}}", {value})'
        yield f"{name} printed", with_source(with_line(line)), "put numbers and texts alone into a text"
    deep = f"_1 = _2{'[0]' * 2000}"
    yield "item of an item of an item", with_source(with_line(deep)), "nest expressions less deep|be source"


def kept_values() -> Iterator[tuple[str, bytes, str]]:
    """Give values that would be kept from one run to the next, and members that are more than tensors."""
    names = "give values to names alone, got "
    grown = "self.weight = torch.cat([h, h], 0)"
    yield "member given a value", with_source(with_line(grown)), f"{names}'self.weight'"
    inner = "(self.node_down).weight = torch.cat([h, h], 0)"
    yield "member of a member given a value", with_source(with_line(inner)), f"{names}'self.node_down.weight'"
    yield "item given a value", with_source(with_line("_1 = [1]\n    _1[0] = 2")), rf"{names}'_1\[0\]'"
    yield "one of two given a value", with_source(with_line("_1, self.bias = 1, h")), f"{names}'self.bias'"
    member = with_linear("  weight : Tensor", "  weight : List[int]")
    yield "list as a member", member, r"have a tensor or a module as 'weight', got 'List\[int\]'"
    records = unpacked(sound())
    listed = pickle.dumps(([1, 2],), protocol=2)
    yield "list as a constant", packed({**records, "archive/constants.pkl": listed}), "hold tensors and modules alone"
    pickled = records["archive/data.pkl"]
    assert b"(K\x04K\x06t" in pickled
    assert b"K\x06K\x01\x86" in pickled or b"(K\x06K\x01t" in pickled
    wide = pickled.replace(b"(K\x04K\x06t", b"(K\x7fK\x06t", 1)
    wide = wide.replace(b"(K\x06K\x01t", b"(K\x00K\x01t", 1).replace(b"K\x06K\x01\x86", b"K\x00K\x01\x86", 1)
    seen = packed({**records, "archive/data.pkl": wide})
    yield "one row seen many times", seen, "give a tensor no more numbers than its record has"


def linear_class() -> str:
    """Give the class of one of the sound archive's linear layers, which torch may number."""
    records = unpacked(sound())
    found = re.search(r"node_down : ([\w.]+)", records[source_name(records)].decode())
    assert found is not None
    return found[1]


def _swap(old: str, new: str) -> Callable[[str], str]:
    return lambda source: source.replace(old, new, 1)


def with_record(name: str, *swaps: str) -> bytes:
    """Give the sound archive with texts in one of its records replaced: old, new, old, new, and so on."""
    records = unpacked(sound())
    source = records[name].decode()
    for old, new in zip(swaps[::2], swaps[1::2], strict=True):
        assert old in source
        source = source.replace(old, new, 1)
    return packed({**records, name: source.encode()})


def with_linear(*swaps: str) -> bytes:
    """Give the sound archive with texts in the source of a linear layer replaced."""
    path = linear_class().rpartition(".")[0].replace(".", "/")
    return with_record(f"archive/code/{path}.py", *swaps)


def with_functional(*swaps: str) -> bytes:
    """Give the sound archive with texts in the source of its functions replaced."""
    return with_record("archive/code/__torch__/torch/nn/functional.py", *swaps)


def with_model(change: Callable[[dict[str, Any]], None]) -> bytes:
    """Give the sound exported program with its graph changed."""
    return with_text("archive/models/model.json", change)


def with_text(name: str, change: Callable[[dict[str, Any]], None]) -> bytes:
    """Give the sound exported program with one of its texts changed."""
    records = unpacked(sound(CompileTarget.EXPORTED_PROGRAM))
    value = json.loads(records[name])
    change(value)
    return packed({**records, name: json.dumps(value).encode()})


def _graph(model: dict[str, Any]) -> dict[str, Any]:
    graph: dict[str, Any] = model["graph_module"]["graph"]
    return graph


EVIL: Final = "__import__('os').system('true')"


def endless_weights() -> Iterator[tuple[str, bytes, str]]:
    """Give weights of an exported program that a copy of them would make larger than their records."""
    config = "archive/data/weights/model_weights_config.json"

    def meta_of(found: dict[str, Any]) -> dict[str, Any]:
        meta: dict[str, Any] = next(iter(found["config"].values()))["tensor_meta"]
        return meta

    def wide(found: dict[str, Any]) -> None:
        meta_of(found).update(sizes=[{"as_int": 1_000_000_000}], strides=[{"as_int": 0}])

    def sizeless(found: dict[str, Any]) -> None:
        meta_of(found).update(sizes=[{"as_expr": {"expr_str": "1"}}])

    many = "no more numbers than its record has bytes, got "
    yield "weight seen many times", with_text(config, wide), f"{many}'?1000000000"
    yield "weight of a size that nobody knows", with_text(config, sizeless), f"{many}'?inf"


def hostile_programs() -> Iterator[tuple[str, bytes, str]]:
    """Give a name, an exported program that is no kernel's, and what the refusal says of it."""
    records = unpacked(sound(CompileTarget.EXPORTED_PROGRAM))
    weights = "archive/data/weights/model_weights_config.json"
    constants = "archive/data/constants/model_constants_config.json"
    shell = pickle.dumps(Shell(), protocol=2)

    def operator(model: dict[str, Any]) -> None:
        _graph(model)["nodes"][0]["target"] = "torch.ops.aten.from_file.default"

    def function(model: dict[str, Any]) -> None:
        _graph(model)["nodes"][0]["target"] = "os.system"

    def expression(model: dict[str, Any]) -> None:
        _graph(model)["tensor_values"]["x"]["sizes"][0]["as_expr"]["expr_str"] = EVIL

    def argument(model: dict[str, Any]) -> None:
        _graph(model)["nodes"][0]["inputs"][0]["name"] = f"input={EVIL}, other"

    def module_name(model: dict[str, Any]) -> None:
        model["graph_module"]["module_call_graph"][0]["fqn"] = EVIL

    def spec(model: dict[str, Any]) -> None:
        model["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = '[1, {"type": "os.system"}]'

    def pickled(config: dict[str, Any]) -> None:
        next(iter(config["config"].values()))["use_pickle"] = True

    def elsewhere(config: dict[str, Any]) -> None:
        next(iter(config["config"].values()))["path_name"] = "../weight_0"

    yield from endless_weights()
    yield "operator", with_model(operator), "target.*from_file"
    yield "function", with_model(function), "target.*os.system"
    yield "expression", with_model(expression), "expr_str"
    yield "guard", with_model(lambda model: model.update(guards_code=[EVIL])), "guards_code"
    yield "argument", with_model(argument), "plain words"
    yield "module name", with_model(module_name), "plain words"
    yield "tree of inputs", with_model(spec), "in_spec"
    yield "custom object", with_model(lambda model: _graph(model).update(custom_obj_values={"a": {}})), "custom_obj"
    yield "graph in a graph", with_model(lambda model: _graph(model).update(as_graph={})), "as_graph"
    yield "metadata", with_model(lambda model: _graph(model)["nodes"][0]["metadata"].update(a="b")), "metadata"
    yield "pickled weight", with_text(weights, pickled), "raw numbers"
    yield "weight elsewhere", with_text(weights, elsewhere), "plain words|raw numbers"
    yield (
        "constant",
        with_text(constants, lambda config: config["config"].update(a={"path_name": "opaque_0"})),
        "no cons",
    )
    yield "pickled inputs", packed({**records, "archive/data/sample_inputs/model.pt": shell}), "no example inputs"
    yield "pickled constants", packed({**records, "archive/data/constants/opaque_0": shell}), "exported program alone"
    yield "shared library", packed({**records, "archive/data/aotinductor/model/a.so": b""}), "exported program alone"
