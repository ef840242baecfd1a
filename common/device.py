"""Which device to compute on, and in which precision."""

import contextlib
import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

from common.errors import RunStopped, UserError

# Makes a context of the precision that a network runs in.
Amp = Callable[[], AbstractContextManager]

# What torch says when host memory cannot be had, and a GPU's past its own allocator.
_NO_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")
# From malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def reuse_host_memory() -> None:
    """Let the C library keep freed blocks instead of handing them back to the system (glibc only; else nothing).

    Every activation of a training step on a CPU is a block large enough that glibc maps it afresh, and the page faults
    then cost as much as the arithmetic (measured by `python -m benchmarks.host_memory`).
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


@contextlib.contextmanager
def memory_errors(remedy: str) -> Iterator[None]:
    """Turn an allocation that fails, on a GPU or in host memory, into RunStopped with `remedy`, which names flags."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        lines = str(error).splitlines() or [""]
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not known and not any(text in str(error) for text in _NO_MEMORY):
            raise
        raise RunStopped(f"out of memory; {remedy} ({lines[0]})") from None


def pick_device(name: str, local_rank: int | None = None) -> torch.device:
    """The device that tensors report: `cuda` is the current GPU with its number. `auto` is a GPU where there is one.

    local_rank: of one of several processes, each of which takes the GPU of that number.
    Raises: UserError where the named device is unknown, absent or cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if local_rank is not None and name.startswith("cuda"):
        if name != "cuda":
            raise UserError(f"--device {name}: several processes take a GPU each; give --device cuda")
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: unknown; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {name}: this machine has no usable CUDA GPU; use --device cpu or auto")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} GPU(s), counted from 0")
        # Two runs on one device shall agree, hence no convolution that adds in changing order.
        torch.backends.cudnn.deterministic = True
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: this machine has none; use --device cpu or auto")
    elif device.type not in ("cpu", "mps"):
        raise UserError(f"--device {name}: not supported; use auto, cpu, cuda or cuda:N")
    try:
        device = torch.empty(0, device=device).device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # The device torch uses where none is named.
        return device
    except RuntimeError as error:
        raise UserError(
            f"--device {name}: it cannot be used ({str(error).splitlines()[0]}); use --device cpu"
        ) from None


def autocast(amp: str, device: torch.device) -> Amp:
    """A factory of autocast contexts. amp `auto`: bf16 on GPUs that have it, off elsewhere; `bf16`; `off`."""
    wanted = amp == "bf16" or (amp == "auto" and has_bf16(device))
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=wanted)


def has_bf16(device: torch.device) -> bool:
    """Whether it is a GPU that computes in bf16; older ones only imitate it, slowly."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def peak_memory(device: torch.device) -> dict[str, float]:
    """`peak_memory_gib`: the most that tensors have taken of a GPU's memory in this process, or that this process has
    taken of the host's; nothing where the system does not tell."""
    if device.type == "cuda":
        return {"peak_memory_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 3)}
    if resource is None or device.type != "cpu":
        return {}
    unit = 1 if sys.platform == "darwin" else 2**10
    return {"peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 3)}


def device_name(device: torch.device) -> str:
    """What a report calls the device: the GPU's own name, or the CPU with its thread count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
