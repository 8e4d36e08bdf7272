"""What "auto" picks: the algorithm that is fastest as measured by `tune`, or as the cost model expects."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import torch

from convt3d_gemm import library
from convt3d_gemm.bench.device import describe
from convt3d_gemm.costs import Costs, Hardware, costs_for
from convt3d_gemm.measurements import Measurements
from convt3d_gemm.problem import Problem

__all__ = [
    "Decision",
    "Pick",
    "candidates_of",
    "costs_of",
    "decide",
    "forget_decisions",
    "hardware_of",
    "measurements_of",
    "pick_of",
    "workspace_bytes_of",
]

logger = logging.getLogger("convt3d_gemm")

#: An algorithm; for both gradients at once perhaps two, that of grad_input and that of grad_weight.
Pick = tuple[str, ...]

#: Where the times come from: this device, the class's table, the cost model; or nothing was compared.
Source = Literal["tuned", "table", "model", "none"]


class Decision(NamedTuple):
    """What computes a problem, and why.

    Attributes:
        problem: what is computed.
        pick: the algorithm, or one for each gradient.
        output_size: (N, Cout, OD, OH, OW).
        call: of the library, where it computes the whole; None where PyTorch does, or where there are two.
        source: where the times come from.
        times: milliseconds of all that could have been picked, fastest first.
        margin: how far ahead of native a pick had to be.
        reason: in a few words.
    """

    problem: Problem
    pick: Pick
    output_size: tuple[int, ...]
    call: library.Call | None
    source: Source
    times: Mapping[Pick, float]
    margin: float
    reason: str

    @property
    def notable_times(self) -> dict[Pick, float]:
        """The times without those of pairs, but for the fastest pair."""
        pairs = itertools.islice((pick for pick in self.times if len(pick) > 1), 1, None)
        left_out = set(pairs)
        return {pick: time for pick, time in self.times.items() if pick not in left_out}


def decide(problem: Problem) -> Decision:
    """The decision for a problem; made once, and remembered until `forget_decisions`.

    Raises:
        RuntimeError: sizes and parameters that no convolution satisfies, or a device without a backend.
        NotImplementedError: a dtype other than float64, float32, float16 and bfloat16.
    """
    return _decided(problem)


@functools.lru_cache(maxsize=4096)
def _decided(problem: Problem) -> Decision:
    # Whatever happens then, arguments that no convolution satisfies raise what they raise for each algorithm.
    calls = {name: library.planned(name, problem) for name in library.ALGORITHMS}
    decision = _made(problem, calls)
    logger.debug("%s: %s, because %s", problem, " + ".join(decision.pick), decision.reason)
    return decision


def _made(problem: Problem, calls: Mapping[str, library.Call]) -> Decision:
    output_size = next(iter(calls.values())).output_size
    calls = {name: call for name, call in calls.items() if call.fits}

    def picked(
        pick: Pick, reason: str, source: Source = "none", times: Mapping[Pick, float] | None = None, margin: float = 0.0
    ) -> Decision:
        call = calls.get(pick[0]) if len(pick) == 1 else None
        return Decision(problem, pick, output_size, call, source, times or {}, margin, reason)

    if 0 in problem.input_size:  # nothing to be fast at
        return picked((next(iter(calls), "native"),), "there is nothing to compute")
    if not calls:
        return picked(("native",), "no other algorithm fits the workspace limit")
    for source, margin, times in _known_times(problem):
        candidates = candidates_of(times, [*calls, "native"])
        if ("native",) in candidates:  # else there is nothing to be held against
            pick = pick_of(candidates, margin)
            return picked(pick, _reason(source, margin, pick, candidates), source, candidates, margin)
    return picked(("native",), "nothing like it was ever measured")


def _known_times(problem: Problem) -> Iterable[tuple[Source, float, Mapping[str, Mapping[str, float]]]]:
    """Times by operator and algorithm from each source that may have some, the best first, and its margin."""
    parts = [problem]
    if problem.operator == "grad_input_weight":
        parts += [problem._replace(operator=operator) for operator in ("grad_input", "grad_weight")]
    measurements = measurements_of(problem.device)
    yield "tuned", 0.0, {part.operator: measurements.find(part) for part in parts}
    costs = costs_of(problem.device)
    if costs is not None:
        yield "table", costs.margin_of_measured, {part.operator: costs.measured(part) for part in parts}
        yield "model", costs.margin, {part.operator: costs.predict(part) for part in parts}


def candidates_of(times: Mapping[str, Mapping[str, float]], possible: Iterable[str]) -> dict[Pick, float]:
    """What may be picked, fastest first: an algorithm for the whole, or one for each gradient.

    Args:
        times: milliseconds by operator and algorithm: of the operator itself, and where it is both gradients, of each.
        possible: the algorithms that can be called.
    """
    whole, *parts = times.values()
    possible = list(possible)
    candidates: dict[Pick, float] = {(name,): whole[name] for name in possible if name in whole}
    if parts:
        first, second = parts
        for one, other in itertools.permutations(possible, 2):
            if one in first and other in second:
                candidates[one, other] = first[one] + second[other]
    return dict(sorted(candidates.items(), key=lambda candidate: candidate[1]))


def pick_of(candidates: Mapping[Pick, float], margin: float) -> Pick:
    """The fastest, if it is ahead of native by the margin; else native, which is among them."""
    fastest = next(iter(candidates))
    return fastest if candidates[fastest] * (1 + margin) < candidates["native",] else ("native",)


def _reason(source: Source, margin: float, pick: Pick, candidates: Mapping[Pick, float]) -> str:
    said = {"tuned": "measured here", "table": "measured on this class of device", "model": "expected"}[source]
    native, time = candidates["native",], candidates[pick]
    if pick != ("native",):
        return f"{said}: {time:.3g} ms, native {native:.3g} ms"
    best, fastest = next(iter(candidates.items()))
    if best == pick:
        return f"{said}: {time:.3g} ms, and no other is faster"
    behind = f"{' + '.join(best)}'s {fastest:.3g} ms are less than {margin:.0%} ahead"
    return f"{said}: {time:.3g} ms, and {behind}"


def workspace_bytes_of(problem: Problem) -> dict[str, int]:
    """The workspace of each algorithm of the library that fits the limit."""
    calls = {name: library.planned(name, problem) for name in library.ALGORITHMS}
    return {name: call.workspace_bytes for name, call in calls.items() if call.fits}


def forget_decisions(*, read_again: bool = True) -> None:
    """Make every decision anew.

    Args:
        read_again: the files of measurements, too; else what this process knows of them stays.
    """
    _decided.cache_clear()
    if read_again:
        measurements_of.cache_clear()


def _with_index(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


@functools.cache
def hardware_of(device: torch.device) -> Hardware:
    """What the cost model knows a device by."""
    known = describe(_with_index(device))
    if device.type == "cuda":
        major, minor = str(known["compute_capability"]).split(".")
        return Hardware("cuda", str(known["name"]), (int(major), int(minor)), int(str(known["multiprocessors"])))
    return Hardware("cpu", str(known["name"]), (0, 0), int(str(known["threads"])))


@functools.cache
def costs_of(device: torch.device) -> Costs | None:
    """The cost model for a device, or None if no class of its table stands for it."""
    return costs_for(hardware_of(device))


@functools.cache
def measurements_of(device: torch.device) -> Measurements:
    """What was measured on devices of this model."""
    return Measurements(hardware_of(device).name)
