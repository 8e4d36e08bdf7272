"""Timing calls: one after the other on a device's clock, and several competitors in turn."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from convt3d_gemm.bench.device import why_failed

_Set = TypeVar("_Set")

_SLEEP_CYCLES_PER_SECOND = 2e9  # about a GPU's clock: a sleep may be too long or short by half without harm
_LONGEST_SLEEP = 0.05

LEAST_REPEATS = 3
LONGEST_BURST = 32
_BURST_SECONDS = 1e-3  # calls shorter than this are timed several at a time


@dataclass(frozen=True)
class Burst:
    """The time of several calls in a row.

    Attributes:
        seconds: per call, on the device.
        host_seconds: per call, until it returned to the host.
    """

    seconds: float
    host_seconds: float


class Clock:
    """Times calls on one device: CUDA events on a GPU, the host's clock elsewhere.

    Args:
        device: where the calls compute.
        hide_host: whether a GPU is kept waiting until the calls are queued. Else what the host takes longer than the
            GPU counts, as it does for whoever runs a whole network.
    """

    def __init__(self, device: torch.device, *, hide_host: bool = True) -> None:
        self.device = device
        self.hide_host = hide_host

    def time(self, call: Callable[[], object], count: int = 1, host_seconds: float = 0.0) -> Burst:
        """Call ``count`` times.

        Args:
            call: what to time; on a GPU it goes to the current stream of the current device.
            count: how often.
            host_seconds: what one call is known to cost the host. The GPU is kept waiting for as long as the
                host needs to queue all calls, so that short kernels are not timed as the host's own speed.
        """
        if self.device.type != "cuda":
            began = time.perf_counter()
            for _ in range(count):
                call()
            seconds = (time.perf_counter() - began) / count
            return Burst(seconds, seconds)
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self.device)
        sleep = min(1.5 * host_seconds * count, _LONGEST_SLEEP) if self.hide_host else 0.0
        if sleep > 0:
            torch.cuda._sleep(int(sleep * _SLEEP_CYCLES_PER_SECOND))
        start.record()
        began = time.perf_counter()
        for _ in range(count):
            call()
        host = time.perf_counter() - began
        end.record()
        end.synchronize()
        return Burst(start.elapsed_time(end) / 1e3 / count, host / count)


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median over the repeats, and the quartiles around it.

    A repeat is the mean over a burst of ``calls`` calls (one, unless calls are very short).
    """

    median: float
    lower_quartile: float
    upper_quartile: float
    repeats: int
    calls: int

    @classmethod
    def of(cls, milliseconds: Sequence[float], calls: int) -> Timing:
        """Summarise the repeats."""
        if len(milliseconds) == 1:
            return cls(milliseconds[0], milliseconds[0], milliseconds[0], 1, calls)
        lower, median, upper = statistics.quantiles(milliseconds, n=4, method="inclusive")
        return cls(median, lower, upper, len(milliseconds), calls)

    @property
    def spread(self) -> float:
        """Half of what lies between the quartiles, as a fraction of the median."""
        return (self.upper_quartile - self.lower_quartile) / 2 / self.median


def rotations(sets: Sequence[_Set], count: int) -> list[Iterator[_Set]]:
    """All sets in turn, endlessly, for each of `count` competitors.

    Each begins with another set: else one would find in the cache what the one before it has just used, but not the
    first and the last of them, which time_in_turn has come after themselves.
    """
    begins = [number * len(sets) // count for number in range(count)]
    return [itertools.cycle([*sets[begin:], *sets[:begin]]) for begin in begins]


def time_in_turn(
    calls: Mapping[str, Callable[[], object]], clock: Clock, repeats: int, seconds: float, warm_up: int = 1
) -> dict[str, Timing | str]:
    """Time all calls, one repeat of each after the other, so that what disturbs one disturbs all.

    Args:
        calls: what to time, by name.
        clock: the device's.
        repeats: the most repeats.
        seconds: no further repeat is begun after this time, but there are three (or ``repeats``, if fewer).
        warm_up: how often each is called first; two more calls then say how long the bursts should be.

    Returns:
        By name the timing, or why there is none.
    """
    bursts: dict[str, tuple[int, float]] = {}  # calls per repeat, host seconds per call
    milliseconds: dict[str, list[float]] = {}
    failures: dict[str, str] = {}
    for name, call in calls.items():
        try:
            warm = clock.time(call, count=warm_up)
            if warm.seconds < seconds:  # else a call is so long that no closer look is needed
                warm = clock.time(call, count=2)
        except Exception as error:
            failures[name] = why_failed(error)
            continue
        count = max(1, min(math.ceil(_BURST_SECONDS / max(warm.seconds, 1e-6)), LONGEST_BURST))
        bursts[name] = count, warm.host_seconds
        milliseconds[name] = []

    began = time.perf_counter()
    for repeat in range(repeats):
        if repeat >= LEAST_REPEATS and time.perf_counter() - began > seconds:
            break
        running = [name for name in bursts if name not in failures]
        for name in running if repeat % 2 == 0 else reversed(running):
            count, host_seconds = bursts[name]
            try:
                milliseconds[name].append(1e3 * clock.time(calls[name], count, host_seconds).seconds)
            except Exception as error:
                failures[name] = why_failed(error)
    timings = {name: Timing.of(times, bursts[name][0]) for name, times in milliseconds.items() if times}
    return {**timings, **failures}
