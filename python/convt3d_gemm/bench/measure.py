"""One layer through all competitors: each is checked against float64, and those that are right are timed."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from convt3d_gemm.bench.ceilings import Ceilings
from convt3d_gemm.bench.checking import Expected, error_bound
from convt3d_gemm.bench.competitors import BASELINE, Algorithm
from convt3d_gemm.bench.device import (
    OUT_OF_MEMORY,
    cache_bytes,
    has_tf32,
    poisoned_memory,
    release_memory,
    require_memory,
    why_failed,
)
from convt3d_gemm.bench.inputs import Layout, Tensors
from convt3d_gemm.bench.layers import Layer, Operator
from convt3d_gemm.bench.timing import LONGEST_BURST, Clock, Timing, rotations, time_in_turn

Status = Literal["ok", "wrong", "failed", "out of memory", "not applicable"]

# Enough to turn over any cache, and not so much that drawing it takes longer than the timing.
_ROTATION_BYTES = 256 << 20


@dataclass(frozen=True)
class Settings:
    """What stays the same through a run.

    Attributes:
        device: where everything is computed; the current device, if it is a GPU.
        layout: of all tensors.
        tf32: whether float32 on a GPU may use TF32.
        repeats: the most repeats of a measurement.
        seconds: the time after which one layer gets no further repeats, but never fewer than three.
        seed: of the random inputs.
    """

    device: torch.device
    layout: Layout = "ncdhw"
    tf32: bool = False
    repeats: int = 100
    seconds: float = 0.5
    seed: int = 0

    def precision(self, dtype: torch.dtype) -> str:
        """The precision of float32, "tf32" where it is allowed and the device has it; "ieee" for all else."""
        return "tf32" if dtype == torch.float32 and self.tf32 and has_tf32(self.device) else "ieee"


@dataclass(frozen=True)
class Result:
    """What came out for one algorithm on one layer.

    Attributes:
        status: "ok"; "wrong", and then only the baseline is timed; "failed"; "out of memory"; or "not applicable".
        reason: why it is not "ok", in a few words.
        error: relative L2 error against float64; of two gradients the larger.
        error_bound: what `error` may be at most.
        checked: what of the result the error is taken over.
        workspace_bytes: memory beside inputs and results: as the algorithm states it, else as measured.
        measured_workspace_bytes: the same as measured, which only a GPU allows.
        floor: milliseconds that the ceilings of the device put under any algorithm.
        speedup: the baseline's median over this one's; None where either has none.
    """

    layer: Layer
    operator: Operator
    dtype: torch.dtype
    precision: str
    layout: Layout
    algorithm: str
    status: Status
    floor: float
    error_bound: float
    reason: str | None = None
    timing: Timing | None = None
    error: float | None = None
    checked: str | None = None
    workspace_bytes: int | None = None
    measured_workspace_bytes: int | None = None
    speedup: float | None = None

    @property
    def tflops(self) -> float | None:
        """1e12 operations per second; taps that fall outside the output count as if they were multiplied."""
        return None if self.timing is None else self.layer.flops(self.operator) / self.timing.median / 1e9

    @property
    def gigabytes_per_second(self) -> float | None:
        """1e9 bytes per second, where every tensor counts as if it were moved once, whatever the algorithm does."""
        if self.timing is None:
            return None
        return self.layer.elements_moved(self.operator) * self.dtype.itemsize / self.timing.median / 1e6

    @property
    def floor_fraction(self) -> float | None:
        """The floor's time over this one: 1 is as fast as the device could be."""
        return None if self.timing is None else self.floor / self.timing.median


@contextlib.contextmanager
def _older_tf32_interface() -> Iterator[None]:
    """PyTorch 2.9 on would like another interface to TF32; this is for the one that every version has."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Please use the new API")
        yield


@contextlib.contextmanager
def comparison_mode(tf32: bool) -> Iterator[None]:
    """PyTorch at its best while it is compared: cuDNN tries its kernels, and float32 is as asked for."""
    with _older_tf32_interface():
        allowed, matmul_precision = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
        torch.backends.cudnn.allow_tf32 = tf32
        torch.set_float32_matmul_precision("high" if tf32 else "highest")  # for the GEMM ceiling
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.cudnn.benchmark = benchmark
        with _older_tf32_interface():
            torch.backends.cudnn.allow_tf32 = allowed
            torch.set_float32_matmul_precision(matmul_precision)


def measure(
    layer: Layer,
    operator: Operator,
    dtype: torch.dtype,
    algorithms: Sequence[Algorithm],
    settings: Settings,
    ceilings: Ceilings,
) -> list[Result]:
    """Check every algorithm on one layer, then time in turn those that are right.

    Call it inside `comparison_mode`. What an algorithm raises does not get out: it becomes a result's reason.

    Returns:
        One result per algorithm, in their order.
    """
    unmeasured = [
        Result(
            layer=layer,
            operator=operator,
            dtype=dtype,
            precision=settings.precision(dtype),
            layout=settings.layout,
            algorithm=algorithm.name,
            status="failed",
            floor=1e3 * ceilings.floor_seconds(layer, operator, dtype),
            error_bound=error_bound(dtype, settings.precision(dtype)),
        )
        for algorithm in algorithms
    ]
    results = unmeasured
    try:
        results = _check_all(algorithms, results, settings)
        release_memory(settings.device)
        results = _time_all(algorithms, results, settings)
    except Exception as error:  # no memory for the inputs or the reference: no algorithm is to blame
        results = [
            _failed(result, why_failed(error), "before any algorithm ran: ") if result.reason is None else result
            for result in results
        ]
    finally:
        release_memory(settings.device)
    return _with_speedups(results)


def status_of_failure(reason: str) -> Status:
    """The status that goes with what `why_failed` says."""
    return "out of memory" if reason == OUT_OF_MEMORY else "failed"


def _failed(result: Result, reason: str, when: str = "") -> Result:
    """The result with the reason why there is none."""
    return dataclasses.replace(result, status=status_of_failure(reason), reason=f"{when}{reason}")


def _least_bytes(layer: Layer, operator: Operator, dtype: torch.dtype) -> int:
    """What a measurement holds at once at the very least: all tensors, and those of one sample in float64."""
    sample = dataclasses.replace(layer, batch=1)
    return dtype.itemsize * layer.elements_moved(operator) + 8 * sample.elements_moved(operator)


def _check_all(algorithms: Sequence[Algorithm], results: Sequence[Result], settings: Settings) -> list[Result]:
    """The results with everything but the times."""
    layer, operator, dtype = results[0].layer, results[0].operator, results[0].dtype
    require_memory(settings.device, _least_bytes(layer, operator, dtype))
    tensors = Tensors.draw(layer, operator, dtype, settings.layout, settings.device, settings.seed)
    expected = Expected.of(layer, operator, tensors)
    checked = []
    for algorithm, result in zip(algorithms, results, strict=True):
        refusal = algorithm.refusal(layer, operator)
        if refusal is not None:
            checked.append(dataclasses.replace(result, status="not applicable", reason=refusal))
            continue
        try:
            checked.append(_check(algorithm, result, tensors, expected, settings))
        except Exception as error:
            checked.append(_failed(result, why_failed(error)))
        release_memory(settings.device)
    return checked


def _check(algorithm: Algorithm, result: Result, tensors: Tensors, expected: Expected, settings: Settings) -> Result:
    """The result with its error and workspace."""
    layer, operator, device = result.layer, result.operator, settings.device
    shapes = layer.result_shapes(operator)
    size = result.dtype.itemsize * sum(map(math.prod, shapes))

    def run() -> tuple[Tensor, ...]:
        return algorithm.run(layer, operator, tensors.grad_output, tensors.input, tensors.weight)

    with poisoned_memory(device, size):
        outputs = run()
    got = tuple(tuple(output.shape) for output in outputs)
    if got != shapes:
        return dataclasses.replace(result, status="wrong", reason=f"shape {got}, expected {shapes}")
    error = expected.error(outputs)
    del outputs

    measured = None
    if device.type == "cuda":
        # By a second call: in the first one cuDNN tries kernels, with whatever workspace they like.
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        measured = max(0, torch.cuda.max_memory_allocated(device) - before - size)
    stated = algorithm.workspace(layer, operator, tensors.input, tensors.weight) if algorithm.workspace else None

    right = error <= result.error_bound  # a NaN is not
    return dataclasses.replace(
        result,
        status="ok" if right else "wrong",
        reason=None if right else f"error {error:.1e}, at most {result.error_bound:.1e} allowed",
        error=error,
        checked=expected.checked,
        workspace_bytes=measured if stated is None else stated,
        measured_workspace_bytes=measured,
    )


def _time_all(algorithms: Sequence[Algorithm], results: Sequence[Result], settings: Settings) -> list[Result]:
    """The results with the times of those that are right."""
    layer, operator, dtype = results[0].layer, results[0].operator, results[0].dtype
    sets = [
        Tensors.draw(layer, operator, dtype, settings.layout, settings.device, settings.seed + number)
        for number in range(_rotation(layer, operator, dtype, settings))
    ]
    # Results are kept for one turn of the rotation: none is written to memory that the cache still holds.
    kept: collections.deque[tuple[Tensor, ...]] = collections.deque(maxlen=len(sets))

    def competitor(algorithm: Algorithm, turn: Iterator[Tensors]) -> Callable[[], None]:
        def call() -> None:
            tensors = next(turn)
            kept.append(algorithm.run(layer, operator, tensors.grad_output, tensors.input, tensors.weight))

        return call

    calls = {
        result.algorithm: competitor(algorithm, turn)
        for algorithm, result, turn in zip(algorithms, results, rotations(sets, len(algorithms)), strict=True)
        if result.status == "ok" or _is_imprecise_baseline(result)
    }
    # On a GPU one turn and one call more: then PyTorch's allocator has all the blocks that it will need.
    warm_up = len(sets) + 1 if settings.device.type == "cuda" else 1
    timings = time_in_turn(calls, Clock(settings.device), settings.repeats, settings.seconds, warm_up)
    timed = []
    for result in results:
        outcome = timings.get(result.algorithm)
        if isinstance(outcome, Timing):
            result = dataclasses.replace(result, timing=outcome)
        elif outcome is not None:
            result = _failed(result, outcome)
        timed.append(result)
    return timed


def _is_imprecise_baseline(result: Result) -> bool:
    """Whether it is PyTorch's own that is wrong, by a finite error.

    On long reductions oneDNN rounds more than float32 is allowed here. It is shown as wrong like any other,
    but it is timed nevertheless: the others are compared with what PyTorch does.
    """
    return (
        result.status == "wrong"
        and result.algorithm == BASELINE
        and result.error is not None
        and math.isfinite(result.error)
    )


def _rotation(layer: Layer, operator: Operator, dtype: torch.dtype, settings: Settings) -> int:
    """How many sets of tensors to go through so that none is in the cache when its turn comes again."""
    one = layer.elements_moved(operator) * dtype.itemsize
    wanted = min(2 * cache_bytes(settings.device), _ROTATION_BYTES)
    return min(-(-wanted // one), LONGEST_BURST)


def _with_speedups(results: Sequence[Result]) -> list[Result]:
    baseline = next((result.timing for result in results if result.algorithm == BASELINE), None)
    return [
        dataclasses.replace(result, speedup=baseline.median / result.timing.median)
        if baseline is not None and result.timing is not None
        else result
        for result in results
    ]
