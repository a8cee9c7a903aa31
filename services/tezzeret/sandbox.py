"""What a worker process may do, given up one right after the other before it imports anything large.

    limits        processor time, memory, file size, open files, no core dumps (rlimits)
    files         reads of the interpreter, its packages and system libraries; writes below its scratch directory alone
                  (Landlock)
    scope         what later versions of Landlock added: truncation, TCP, device control, signals and abstract sockets
                  outside; the row names each that this kernel is too old to enforce
    network       no sockets at all, no tracing of other processes, no io_uring (seccomp)
    parent        ends with the process that started it

Each protection is a row that says whether this system enforces it; what it does not enforce is said, never assumed.
Call `enter` from the main thread before any other thread exists: threads that are there already keep their rights.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from esper.contracts import errors
from esper.contracts.kernel import ValidationCheck
from esper.services.tezzeret.config import WorkerLimits

_LIBC: Final = ctypes.CDLL(None, use_errno=True)

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_SECCOMP: Final = 22
_PR_SET_NO_NEW_PRIVS: Final = 38

_LANDLOCK_CREATE_RULESET: Final = 444
_LANDLOCK_ADD_RULE: Final = 445
_LANDLOCK_RESTRICT_SELF: Final = 446
_LANDLOCK_VERSION_FLAG: Final = 1
_LANDLOCK_PATH_BENEATH: Final = 1
_FS_EXECUTE, _FS_WRITE_FILE, _FS_READ_FILE, _FS_READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_FS_TRUNCATE: Final = 1 << 14
_FS_IOCTL_DEV: Final = 1 << 15
_FS_READ: Final = _FS_EXECUTE | _FS_READ_FILE | _FS_READ_DIR
_FS_FILE_ONLY: Final = _FS_EXECUTE | _FS_WRITE_FILE | _FS_READ_FILE | _FS_TRUNCATE | _FS_IOCTL_DEV
_FS_BITS_OF_ABI: Final = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
_LATER_PROTECTIONS: Final = {
    3: "truncation of files outside",
    4: "TCP",
    5: "control of devices",
    6: "signals and abstract sockets outside",
}
"""What a version of Landlock was the first to enforce."""
_NET_TCP: Final = 0b11
_SCOPES: Final = 0b11

_SYSTEM_PATHS: Final = (
    "/usr", "/lib", "/lib64", "/bin", "/sys/devices/system/cpu", "/proc/self", "/proc/cpuinfo", "/proc/meminfo",
    "/etc/ld.so.cache", "/etc/localtime", "/etc/passwd", "/etc/nsswitch.conf", "/etc/alternatives", "/dev/urandom",
)  # fmt: skip
_WRITABLE_DEVICES: Final = ("/dev/null",)
_CUDA_NODES: Final = ("dev/nvidia*", "dev/nvidia-caps/*", "proc/driver/nvidia", "sys/module/nvidia")

# Numbers of: socket, connect, bind, listen, accept, accept4, ptrace, process_vm_readv, process_vm_writev,
# io_uring_setup, bpf, userfaultfd, perf_event_open, add_key, request_key, keyctl, mount, unshare, setns.
_DENIED: Final = {
    "x86_64": (
        0xC000003E, (41, 42, 49, 50, 43, 288, 101, 310, 311, 425, 321, 323, 298, 248, 249, 250, 165, 272, 308),
    ),
    "aarch64": (
        0xC00000B7, (198, 203, 200, 201, 202, 242, 117, 270, 271, 425, 280, 282, 241, 217, 218, 219, 40, 97, 268),
    ),
}  # fmt: skip
_X32_BIT: Final = 0x40000000


def enter(limits: WorkerLimits, scratch: Path, devices: Sequence[Path] = ()) -> tuple[ValidationCheck, ...]:
    """Give up every right that a compile does not need; give one row per protection.

    Args:
        limits: What it may use.
        scratch: Directory it may write to.
        devices: Device nodes it may read, write and control; see `cuda_devices`.
    """
    rows = [_die_with_parent(), _limit(limits)]
    _prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    return (*rows, *_restrict_files(scratch, devices), _deny_syscalls())


def cuda_devices(root: Path = Path("/")) -> tuple[Path, ...]:
    """Give what CUDA needs of this machine beyond libraries, and what of it is there: nodes below ``dev`` and facts."""
    nodes = [node for pattern in _CUDA_NODES for node in root.glob(pattern)]
    return tuple(sorted(nodes))


def allow_cpu(limits: WorkerLimits) -> None:
    """Give the next job its processor time, beyond what the process has used so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = int(used.ru_utime + used.ru_stime) + 1 + limits.cpu_s
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def follow_worker(worker: int) -> None:
    """Have a fork of a worker, which inherits all else, end with it too; each of its answers has a deadline of its own.

    Args:
        worker: Process id of the worker.
    """
    _die_with_parent()
    if os.getppid() != worker:  # it died before it could be followed
        os._exit(1)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))


def readable_paths() -> tuple[Path, ...]:
    """Give what a worker must read: interpreter, installed packages, Esper's own code, system libraries."""
    code = [str(Path(errors.__file__).parents[1]), str(Path(__file__).parents[1])]
    site_packages = [entry for entry in sys.path if entry.endswith("-packages")]
    wanted = [*_SYSTEM_PATHS, sys.prefix, sys.base_prefix, sys.exec_prefix, *site_packages, *code]
    found = {Path(path).resolve() for path in wanted if Path(path).exists()}
    return tuple(sorted(found))


def _die_with_parent() -> ValidationCheck:
    done = _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    return _row("parent", done, "ends with the process that started it")


def _limit(limits: WorkerLimits) -> ValidationCheck:
    cpu_s = limits.cpu_s * (limits.jobs_per_worker + 1)
    wanted = {
        resource.RLIMIT_CPU: cpu_s,
        resource.RLIMIT_AS: limits.address_space_bytes,
        resource.RLIMIT_FSIZE: limits.file_bytes,
        resource.RLIMIT_NOFILE: limits.open_files,
        resource.RLIMIT_CORE: 0,
    }
    for name, value in wanted.items():
        _, hard = resource.getrlimit(name)
        bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (bound, bound))
    allow_cpu(limits)
    detail = f"{limits.cpu_s} s of CPU a job, {limits.address_space_bytes} bytes of memory, {limits.open_files} files"
    return _row("limits", True, detail)


def _restrict_files(scratch: Path, devices: Sequence[Path]) -> tuple[ValidationCheck, ValidationCheck]:
    abi = _landlock_abi()
    if abi < 1:
        why = f"this kernel has no Landlock ({os.strerror(ctypes.get_errno())})"
        return _row("files", False, why), _row("scope", False, why)
    handled = (1 << _FS_BITS_OF_ABI.get(abi, 16)) - 1
    attributes = struct.pack("<Q", handled)
    if abi >= 4:
        attributes += struct.pack("<Q", _NET_TCP)
    if abi >= 6:
        attributes += struct.pack("<Q", _SCOPES)
    ruleset = _LIBC.syscall(_LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0)
    if ruleset < 0:
        why = f"Landlock refused its rules ({os.strerror(ctypes.get_errno())})"
        return _row("files", False, why), _row("scope", False, why)
    try:
        _allow(ruleset, readable_paths(), _FS_READ & handled)
        _allow(ruleset, map(Path, _WRITABLE_DEVICES), (_FS_READ_FILE | _FS_WRITE_FILE) & handled)
        _allow(ruleset, devices, (_FS_READ_FILE | _FS_READ_DIR | _FS_WRITE_FILE | _FS_IOCTL_DEV) & handled)
        _allow(ruleset, [scratch], handled)
        done = _LIBC.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0) == 0
    finally:
        os.close(ruleset)
    detail = f"Landlock ABI {abi}: reads of code alone, writes below the scratch directory"
    if devices:
        detail += f", {len(devices)} device nodes open"
    return _row("files", done, detail), _scope_row(abi, done)


def _landlock_abi() -> int:
    """Give the version of Landlock that this kernel has; below 1 where it has none."""
    return int(_LIBC.syscall(_LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_VERSION_FLAG))


def _scope_row(abi: int, restricted: bool) -> ValidationCheck:
    """Say which of Landlock's later protections hold, and which this kernel is too old for."""
    lacking = [f"{what} (Landlock ABI {since})" for since, what in _LATER_PROTECTIONS.items() if abi < since]
    if not restricted:
        return _row("scope", False, "Landlock could not be entered")
    if lacking:
        return _row("scope", False, f"this kernel has Landlock ABI {abi}, too old to hold back {', '.join(lacking)}")
    return _row("scope", True, f"Landlock ABI {abi}: {', '.join(_LATER_PROTECTIONS.values())}")


def _allow(ruleset: int, paths: Iterable[Path], access: int) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            allowed = access if path.is_dir() else access & _FS_FILE_ONLY
            rule = struct.pack("<Qi", allowed, descriptor)
            if _LIBC.syscall(_LANDLOCK_ADD_RULE, ruleset, _LANDLOCK_PATH_BENEATH, rule, 0) != 0:
                number = ctypes.get_errno()
                raise OSError(number, f"Landlock refused the rule for {path}: {os.strerror(number)}")
        finally:
            os.close(descriptor)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def _deny_syscalls() -> ValidationCheck:
    known = _DENIED.get(platform.machine())
    if known is None:
        return _row("network", False, f"no list of system calls for {platform.machine()}")
    code = _filter_code(*known)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(code) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    done = _prctl(_PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0)
    return _row("network", done, "seccomp: no sockets, tracing, io_uring or namespaces")


def _filter_code(architecture: int, denied: tuple[int, ...]) -> bytes:
    """Give the BPF program: another architecture kills, a denied call answers EPERM, all else passes."""
    load, jump_equal, jump_at_least, give = 0x20, 0x15, 0x35, 0x06
    kill, refuse, allow = 0x80000000, 0x00050001, 0x7FFF0000
    count = len(denied)
    steps = [(load, 0, 0, 4), (jump_equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    steps.append((jump_at_least, count + 1, 0, _X32_BIT))
    steps += [(jump_equal, count - place, 0, number) for place, number in enumerate(denied)]
    steps += [(give, 0, 0, allow), (give, 0, 0, refuse)]
    return b"".join(struct.pack("<HBBI", *step) for step in steps)


def _prctl(option: int, *arguments: object) -> bool:
    converted = [ctypes.c_ulong(item) if isinstance(item, int) else item for item in arguments]
    return bool(_LIBC.prctl(ctypes.c_int(option), *converted) == 0)


def _row(name: str, enforced: bool, detail: str) -> ValidationCheck:
    shown = detail if enforced else f"NOT ENFORCED: {detail}"
    return ValidationCheck(name=name, passed=enforced, detail=shown)
