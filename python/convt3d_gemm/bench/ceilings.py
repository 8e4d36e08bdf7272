"""What the device can do at best, measured, and the floor that this puts under every layer's time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from convt3d_gemm.bench.device import release_memory
from convt3d_gemm.bench.layers import Layer, Operator
from convt3d_gemm.bench.timing import Clock

_LARGEST_GEMM = 8192
_HOST_SECONDS = 1e-4  # more than the host needs to launch a copy or a GEMM, so that the launch is not timed


@dataclass(frozen=True)
class Ceilings:
    """The best rates that the device showed.

    Attributes:
        copy_rate: bytes per second, those read and those written, of a copy far larger than the cache.
        gemm_rates: operations per second of a large square GEMM, by dtype.
    """

    copy_rate: float
    gemm_rates: dict[torch.dtype, float]

    def floor_seconds(self, layer: Layer, operator: Operator, dtype: torch.dtype) -> float:
        """The least time of an algorithm that does all multiplications and moves every tensor once."""
        multiplying = layer.flops(operator) / self.gemm_rates[dtype]
        moving = layer.elements_moved(operator) * dtype.itemsize / self.copy_rate
        return max(multiplying, moving)


def measure_ceilings(clock: Clock, dtypes: Iterable[torch.dtype]) -> Ceilings:
    """Measure the copy rate, and the GEMM rate of each dtype at the precision that is set (TF32 or not)."""
    ceilings = Ceilings(_copy_rate(clock), {dtype: _gemm_rate(clock, dtype) for dtype in dtypes})
    release_memory(clock.device)
    return ceilings


def _fastest(clock: Clock, call: Callable[[], object], repeats: int) -> float:
    """The shortest time: a ceiling is the best that was seen, and anything that disturbs makes it longer."""
    call()
    return min(clock.time(call, host_seconds=_HOST_SECONDS).seconds for _ in range(repeats))


def _copy_rate(clock: Clock) -> float:
    size = 1 << 30 if clock.device.type == "cuda" else 1 << 28
    source = torch.ones(size // 4, dtype=torch.float32, device=clock.device)
    target = torch.empty_like(source)
    return 2 * size / _fastest(clock, lambda: target.copy_(source), repeats=10)


def _gemm_rate(clock: Clock, dtype: torch.dtype) -> float:
    """Of the largest size that is still quick: doubled until a call takes long enough to be at full speed."""
    long_enough = 2e-3 if clock.device.type == "cuda" else 5e-2
    size, seconds = 256, 0.0
    rate = 0.0
    while seconds < long_enough and size < _LARGEST_GEMM:
        size *= 2
        left = torch.randn(size, size, device=clock.device).to(dtype)
        right = torch.randn(size, size, device=clock.device).to(dtype)
        product = torch.empty_like(left)
        seconds = _fastest(clock, lambda: torch.mm(left, right, out=product), repeats=5)  # noqa: B023
        rate = max(rate, 2 * size**3 / seconds)
    return rate
