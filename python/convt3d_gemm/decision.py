"""What "auto" picks: the algorithm that is fastest as measured, by `tune` or at first use, or as the model expects."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

import torch

from convt3d_gemm import library, native
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
    "doubted_of",
    "forget_decisions",
    "hardware_of",
    "measure_first_uses_by",
    "measurements_of",
    "pick_of",
    "workspace_bytes_of",
]

logger = logging.getLogger("convt3d_gemm")

#: An algorithm; for both gradients at once perhaps two, that of grad_input and that of grad_weight.
Pick = tuple[str, ...]

#: Where the times come from: `tune` or the first use on this device, the class's table, the cost model; or nothing was
#: compared.
Source = Literal["tuned", "first use", "table", "model", "none"]

#: Milliseconds of each algorithm on a problem.
Measure = Callable[[Problem], Mapping[str, float]]


class Decision(NamedTuple):
    """What computes a problem, and why.

    Attributes:
        problem: what is computed.
        pick: the algorithm, or one for each gradient.
        output_size: (N, Cout, OD, OH, OW).
        call: of the library, where it computes the whole; None where PyTorch does, or where there are two.
        source: where the times come from.
        times: milliseconds of all that could have been picked, fastest first.
        doubted: of these, what native has beaten on one of the nearest measured layers, and so was not picked.
        margin: how far ahead of native a pick had to be.
        reason: in a few words.
    """

    problem: Problem
    pick: Pick
    output_size: tuple[int, ...]
    call: library.Call | None
    source: Source
    times: Mapping[Pick, float]
    doubted: frozenset[Pick]
    margin: float
    reason: str

    @property
    def notable_times(self) -> dict[Pick, float]:
        """The times without those of pairs, but for the fastest pair and the pick."""
        fastest_pair = next((pick for pick in self.times if len(pick) == 2), None)
        return {pick: time for pick, time in self.times.items() if len(pick) == 1 or pick in (fastest_pair, self.pick)}


def decide(problem: Problem) -> Decision:
    """The decision for a problem; made once, and remembered until `forget_decisions`.

    While `torch.backends.cudnn.benchmark` is on, a GPU's problem that was not tuned is measured when it is first met,
    as PyTorch's own convolutions are then. Not where deterministic algorithms are asked for: what is measured to be
    fastest may be another one in the next run.

    Raises:
        RuntimeError: sizes and parameters that no convolution satisfies, or a device without a backend.
        NotImplementedError: a dtype other than float64, float32, float16 and bfloat16.
    """
    return _decided(problem, problem.device.type == "cuda" and _measures_first_uses())


_measure: Measure | None = None


def measure_first_uses_by(measure: Measure | None) -> None:
    """Have this measure what is first met, or nothing. Calling algorithms is up to modules that depend on this one."""
    global _measure
    _measure = measure


def _measures_first_uses() -> bool:
    cudnn = torch.backends.cudnn
    return cudnn.benchmark and not cudnn.deterministic and not torch.are_deterministic_algorithms_enabled()


@functools.lru_cache(maxsize=4096)
def _decided(problem: Problem, at_first_use: bool) -> Decision:
    # Whatever happens then, arguments that no convolution satisfies raise what they raise for each algorithm.
    calls = {name: library.planned(name, problem) for name in library.ALGORITHMS}
    decision = _made(problem, calls, at_first_use)
    logger.debug("%s: %s, because %s", problem, " + ".join(decision.pick), decision.reason)
    return decision


class Known(NamedTuple):
    """What one source knows of an operator, and if it is both gradients, then of each as well.

    Attributes:
        source: where the times come from.
        margin: how far ahead of native a pick must be.
        times: milliseconds by operator and algorithm.
        doubted: algorithms that are not to be picked all the same, by operator.
    """

    source: Source
    margin: float
    times: Mapping[str, Mapping[str, float]]
    doubted: Mapping[str, Collection[str]]


def _made(problem: Problem, calls: Mapping[str, library.Call], at_first_use: bool) -> Decision:
    output_size = next(iter(calls.values())).output_size
    calls = {name: call for name, call in calls.items() if call.fits}

    def unweighed(name: str, reason: str) -> Decision:
        return Decision(problem, (name,), output_size, calls.get(name), "none", {}, frozenset(), 0.0, reason)

    if 0 in problem.input_size:  # nothing to be fast at
        return unweighed(next(iter(calls), "native"), "there is nothing to compute")
    if not calls:
        return unweighed("native", "no other algorithm fits the workspace limit")
    if problem.dtype is torch.float16 and problem.device.type == "cpu" and not native.computes_float16_on_cpu():
        return unweighed(next(iter(calls)), "this PyTorch computes no float16 on a CPU")
    for known in _known_times(problem, at_first_use):
        times = candidates_of(known.times, [*calls, "native"])
        if ("native",) not in times:  # nothing to be held against
            continue
        doubted = doubted_of(times, known.doubted)
        pick = pick_of(times, known.margin, doubted)
        call = calls.get(pick[0]) if len(pick) == 1 else None
        reason = _reason(known, pick, times, doubted)
        return Decision(problem, pick, output_size, call, known.source, times, doubted, known.margin, reason)
    return unweighed("native", "nothing like it was ever measured")


def _known_times(problem: Problem, at_first_use: bool) -> Iterator[Known]:
    """From each source, the best first; measured only if it is asked for and no better one was enough."""
    parts = [problem]
    if problem.operator == "grad_input_weight":
        parts += [problem._replace(operator=operator) for operator in ("grad_input", "grad_weight")]
    measurements = measurements_of(problem.device)
    yield Known("tuned", 0.0, {part.operator: measurements.find(part) for part in parts}, {})
    # Nothing can be waited for while a graph is captured; who captures has run the same before.
    if at_first_use and _measure is not None and not torch.cuda.is_current_stream_capturing():
        yield Known("first use", 0.0, {part.operator: _measure(part) for part in parts}, {})
    costs = costs_of(problem.device)
    if costs is not None:
        margin = costs.margin_of_measured
        yield Known("table", margin, {part.operator: costs.measured(part) for part in parts}, {})
        doubted = {part.operator: costs.doubted(part) for part in parts}
        yield Known("model", costs.margin, {part.operator: costs.predict(part) for part in parts}, doubted)


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


def doubted_of(candidates: Iterable[Pick], doubted: Mapping[str, Collection[str]]) -> frozenset[Pick]:
    """The candidates that have a doubted algorithm: for the whole, or for either gradient."""
    if not doubted:
        return frozenset()
    whole, *parts = doubted.values()
    return frozenset(
        pick
        for pick in candidates
        if any(name in names for name, names in zip(pick, [whole] if len(pick) == 1 else parts, strict=True))
    )


def pick_of(candidates: Mapping[Pick, float], margin: float, doubted: Collection[Pick] = ()) -> Pick:
    """The fastest that is not doubted, if it is ahead of native by the margin; else native, which is among them."""
    fastest = next((pick for pick in candidates if pick not in doubted), ("native",))
    return fastest if candidates[fastest] * (1 + margin) < candidates["native",] else ("native",)


def _reason(known: Known, pick: Pick, times: Mapping[Pick, float], doubted: Collection[Pick]) -> str:
    said = {
        "tuned": "measured here",
        "first use": "measured at first use",
        "table": "measured on this class of device",
        "model": "expected",
    }[known.source]
    of_native = times["native",]
    if pick != ("native",):
        return f"{said}: {times[pick]:.3g} ms, native {of_native:.3g} ms"
    fastest = next(iter(times))
    if fastest == pick:
        return f"{said}: {of_native:.3g} ms, and no other is faster"
    other = f"{' + '.join(fastest)}'s {times[fastest]:.3g} ms"
    why = "in doubt: native was faster on a layer like it" if fastest in doubted else f"not {known.margin:.0%} ahead"
    return f"{said}: {of_native:.3g} ms, and {other} are {why}"


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
