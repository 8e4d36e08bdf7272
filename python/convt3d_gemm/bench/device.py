"""The device of a run: what it is, its cache, its memory, and what it says when it fails."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

from convt3d_gemm.compatibility import OutOfMemoryError


def versions() -> dict[str, str | int | None]:
    """Those of Python, PyTorch, and the CUDA and cuDNN that PyTorch brings, None where it has none."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def describe(device: torch.device) -> dict[str, object]:
    """Name, memory and whatever else decides about speed; sizes in bytes."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "type": "cuda",
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cache_bytes": cache_bytes(device),
        }
    return {
        "type": "cpu",
        "name": _processor_name(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "cache_bytes": cache_bytes(device),
    }


def _processor_name() -> str:
    """The model's name as Linux gives it; on aarch64 it gives none, and the architecture has to do."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cache_bytes(device: torch.device) -> int:
    """The size of the last cache before memory; a guess of 64 MiB where the system does not tell."""
    size = 0
    if device.type == "cuda":
        size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    else:
        with contextlib.suppress(ValueError, OSError):
            size = os.sysconf("SC_LEVEL3_CACHE_SIZE")
    return size if size > 0 else 64 << 20


def other_load() -> str | None:
    """A warning if the processors were busy in the last minute, since times on the CPU then mean little."""
    load, processors = os.getloadavg()[0], os.cpu_count() or 1
    if load <= processors / 2:
        return None
    return f"this machine is busy (load {load:.1f} on {processors} processors): times on the CPU are disturbed"


def has_tf32(device: torch.device) -> bool:
    """Whether the device has TF32 units (compute capability 8.0 on)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def release_memory(device: torch.device) -> None:
    """Give unused memory back, so that one layer's leftovers do not count against the next."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextlib.contextmanager
def poisoned_memory(device: torch.device, size: int) -> Iterator[None]:
    """Where possible, fresh tensors made inside hold NaN: what is never written cannot pass for right.

    Args:
        device: where the tensors will be.
        size: the bytes that will be allocated there.
    """
    if device.type == "cuda":
        # The caching allocator hands out again what was freed last.
        release_memory(device)
        poison = torch.full((-(-size // 8),), float("nan"), dtype=torch.float64, device=device)
        del poison
        yield
        return
    # Deterministic mode fills what torch.empty returns. On a GPU it would also change cuDNN's kernels.
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def require_memory(device: torch.device, size: int) -> None:
    """Refuse what cannot fit into a CPU's memory, where asking for it would end the process instead of raising.

    Args:
        device: a GPU raises by itself, and is not looked at.
        size: the bytes that are sure to be needed at once.

    Raises:
        MemoryError: if the system says that fewer are available.
    """
    if device.type != "cpu":
        return
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:") and size > 1024 * int(line.split()[1]):
                raise MemoryError


#: What `why_failed` says of any failed allocation.
OUT_OF_MEMORY = "out of memory"


def why_failed(error: Exception) -> str:
    """The first line of what went wrong, short enough for a table."""
    text = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, (OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in text:
        return OUT_OF_MEMORY
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= 160 else text[:159] + "…"
