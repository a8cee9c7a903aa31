"""What was compiled for CUDA, read from the built module itself: no device, and but for one test no toolkit, is needed.

The machine code lies in "fat binaries", one for each source with kernels. Their layout is NVIDIA's own and not
documented; `cuobjdump` of CUDA 13.2 reads the same, and is asked too where it is on the path.
"""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from esper.contracts.errors import UnavailableError
from esper.execution import _native
from esper.execution._native import CudaProbe, StreamDispatcher, cuda_available, cuda_blend, cuda_built

MODULE = Path(_native.__file__)
SOURCES = Path(__file__).parents[3] / "csrc" / "cuda"

FATBIN_HEADER = struct.Struct("<IHHQ")  # magic, version, bytes of the header, bytes of the images
FATBIN_MAGIC = struct.pack("<IH", 0xBA55ED50, 1)
IMAGE_HEADER = struct.Struct("<HHIQ12xI")  # kind, version, bytes of the header, bytes of the image, ..., architecture
PTX, MACHINE_CODE = 1, 2

Images = list[tuple[int, int]]  # (kind, architecture) in the order of the file


def _images(data: bytes, start: int) -> Images:
    _, _, header_bytes, size_bytes = FATBIN_HEADER.unpack_from(data, start)
    at, end = start + header_bytes, start + header_bytes + size_bytes
    found = []
    while at < end:
        kind, _, image_header_bytes, image_bytes, architecture = IMAGE_HEADER.unpack_from(data, at)
        found.append((kind, architecture))
        at += image_header_bytes + image_bytes
    return found


def fat_binaries(path: Path) -> list[Images]:
    """The images of each fat binary of a file."""
    data = path.read_bytes()
    return [_images(data, match.start()) for match in re.finditer(re.escape(FATBIN_MAGIC), data)]


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def wanted_architectures() -> set[int]:
    """As CMakeLists.txt chooses: 100 where the compiler knows it. Without one here, what every compiler knows."""
    nvcc = shutil.which("nvcc")
    known = re.findall(r"^sm_(\d+)$", _output(nvcc, "--list-gpu-code"), re.MULTILINE) if nvcc else ["80", "90"]
    return {80, 90, 100} & {int(architecture) for architecture in known}


needs_cuda_build = pytest.mark.skipif(not cuda_built(), reason="needs a build with the CUDA parts: no nvcc was there")
without_device = pytest.mark.skipif(cuda_available(), reason="a CUDA device is there")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_a_machine_with_a_compiler_builds_the_cuda_parts() -> None:
    assert cuda_built(), "nvcc is here: build anew, without ESPER_CUDA=OFF"


@needs_cuda_build
def test_every_kernel_has_machine_code_for_each_architecture_and_ptx_for_later_ones() -> None:
    wanted = wanted_architectures()
    assert {80, 90} <= wanted
    binaries = fat_binaries(MODULE)
    assert len(binaries) == len(list(SOURCES.glob("*.cu"))) > 0
    for images in binaries:
        assert wanted <= {architecture for kind, architecture in images if kind == MACHINE_CODE}
        assert max(wanted) <= max((architecture for kind, architecture in images if kind == PTX), default=0)


@pytest.mark.skipif(cuda_built(), reason="this build has the CUDA parts")
def test_a_build_without_cuda_carries_no_kernels() -> None:
    assert fat_binaries(MODULE) == []


@needs_cuda_build
@pytest.mark.skipif(shutil.which("cuobjdump") is None, reason="needs cuobjdump")
def test_nvidias_tool_reads_the_same() -> None:
    for kind, option, suffix in ((MACHINE_CODE, "--list-elf", "cubin"), (PTX, "--list-ptx", "ptx")):
        told = re.findall(rf"\.sm_(\d+)\.{suffix}$", _output("cuobjdump", option, str(MODULE)), re.MULTILINE)
        read = [architecture for images in fat_binaries(MODULE) for each, architecture in images if each == kind]
        assert sorted(map(int, told)) == sorted(read)


ALONE = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("_native", sys.argv[1])
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
mapped = {line.split()[-1].rpartition("/")[2] for line in open("/proc/self/maps")}
print(json.dumps([sorted(name for name in mapped if name.startswith("libcuda")), native.cuda_available()]))
"""


def test_the_module_alone_loads_no_cuda_library_and_says_whether_there_is_a_device() -> None:
    loaded, available = json.loads(_output(sys.executable, "-I", "-c", ALONE, str(MODULE)))
    assert loaded == [], "the runtime is linked statically, and the driver looked for when it is asked for"
    assert available is cuda_available()


@pytest.mark.skipif(_has_driver(), reason="a CUDA driver is there")
def test_without_a_driver_cuda_is_not_available() -> None:
    assert cuda_available() is False


@without_device
@pytest.mark.parametrize(
    "call",
    [
        lambda: StreamDispatcher("cuda"),
        CudaProbe,
        lambda: cuda_blend(0, [], 0, 0, 0, "float32", 0),
    ],
    ids=["StreamDispatcher", "CudaProbe", "cuda_blend"],
)
def test_without_a_device_every_way_in_says_why(call: Callable[[], object]) -> None:
    expected = r"cudaGetDeviceCount.* failed with cudaError" if cuda_built() else "got a build without a CUDA compiler"
    with pytest.raises(UnavailableError, match=expected):
        call()
