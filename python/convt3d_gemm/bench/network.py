"""A whole network before and after its transposed convolutions are replaced: errors first, then times."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from convt3d_gemm import replace_conv_transpose3d
from convt3d_gemm.bench.checking import error_bound
from convt3d_gemm.bench.device import release_memory, why_failed
from convt3d_gemm.bench.inputs import MEMORY_FORMATS, Layout
from convt3d_gemm.bench.measure import Settings, Status, status_of_failure
from convt3d_gemm.bench.timing import Clock, Timing, time_in_turn

#: What is timed: the network in evaluation, or a training step (forward, a loss and backward).
Task = Literal["forward", "training step"]

#: The name of the network as it is, among those of algorithms.
BEFORE = "before"

#: What is rounded otherwise may come out that many times as far from float64 as the network before.
_ALLOWED_OVER_BEFORE = 10


@dataclass(frozen=True)
class Network:
    """A network and what it is called with.

    Attributes:
        name: for tables.
        module: on any device; it is copied, never run or changed.
        input_sizes: of its positional arguments, which are drawn at random.
    """

    name: str
    module: torch.nn.Module
    input_sizes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class NetworkResult:
    """What came out for a network with one algorithm.

    Attributes:
        network: its name.
        algorithm: "before" for the network as it is, else what its transposed convolutions were replaced by.
        status: "ok"; "wrong", and then it is not timed; "failed"; or "out of memory".
        reason: why it is not "ok", in a few words.
        error: relative L2 error of all outputs, or of all parameters' gradients, against the network in float64.
        error_bound: what `error` may be at most: ten times that before, or what one layer is allowed if that is more.
        peak_bytes: memory beside parameters and inputs at its highest, which only a GPU tells.
        speedup: the time before over this one; None where either has none.
    """

    network: str
    task: Task
    dtype: torch.dtype
    precision: str
    layout: Layout
    algorithm: str
    status: Status
    reason: str | None = None
    timing: Timing | None = None
    error: float | None = None
    error_bound: float | None = None
    peak_bytes: int | None = None
    speedup: float | None = None


def draw_inputs(
    network: Network, dtype: torch.dtype, layout: Layout, device: torch.device, seed: int
) -> tuple[Tensor, ...]:
    """Normally distributed, float64 for that dtype and else float32: half types are autocast's matter."""
    generator = torch.Generator(device).manual_seed(seed)
    inputs = (
        torch.randn(size, generator=generator, device=device, dtype=_parameter_dtype(dtype))
        for size in network.input_sizes
    )
    return tuple(
        tensor.contiguous(memory_format=MEMORY_FORMATS[layout]) if tensor.dim() == 5 else tensor for tensor in inputs
    )


def measure_network(
    network: Network, task: Task, dtype: torch.dtype, algorithms: Sequence[str], settings: Settings
) -> list[NetworkResult]:
    """Check the network before and after, then time in turn those that are right.

    Call it inside `comparison_mode`. What a network raises does not get out: it becomes a result's reason.

    Args:
        network: the one to measure.
        task: what is timed. Errors are taken in evaluation mode, where dropout does not draw; times of a training
            step in training mode.
        dtype: float64 and float32 for parameters and inputs; float16 and bfloat16 by autocast over float32. TF32, where
            the settings allow it, is for matrix products as well.
        algorithms: for `replace_conv_transpose3d`, one copy of the network each.
        settings: of the run.

    Returns:
        One result for "before", then one per algorithm, in their order.
    """
    precision = settings.precision(dtype)
    results = {
        name: NetworkResult(network.name, task, dtype, precision, settings.layout, name, status="ok")
        for name in (BEFORE, *algorithms)
    }
    try:
        inputs = draw_inputs(network, dtype, settings.layout, settings.device, settings.seed)
        exact = _reference(network, task, inputs, settings)
        variants: dict[str, _Variant] = {}
        for name, result in results.items():
            try:
                variant = _Variant.make(network, name, task, dtype, inputs, settings)
                results[name] = _checked(variant, result, exact, results[BEFORE].error, settings)
            except Exception as error:
                results[name] = _failed(result, why_failed(error))
                continue
            if results[name].status == "ok":
                variants[name] = variant
        del exact
        release_memory(settings.device)
        timings = _times(variants, settings)
        for name, outcome in timings.items():
            result = results[name]
            results[name] = (
                dataclasses.replace(result, timing=outcome) if isinstance(outcome, Timing) else _failed(result, outcome)
            )
    except Exception as error:  # not of an algorithm, but of the network in float64 or of its inputs
        results = {
            name: _failed(result, why_failed(error), "in float64: ") if result.reason is None else result
            for name, result in results.items()
        }
    finally:
        release_memory(settings.device)
    return _with_speedups(list(results.values()))


def _failed(result: NetworkResult, reason: str, when: str = "") -> NetworkResult:
    return dataclasses.replace(result, status=status_of_failure(reason), reason=f"{when}{reason}")


def _parameter_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class _Variant:
    """A copy of the network on the device, and a way to run it."""

    module: torch.nn.Module
    inputs: tuple[Tensor, ...]
    task: Task
    autocast: Callable[[], contextlib.AbstractContextManager[Any]]

    @classmethod
    def make(
        cls,
        network: Network,
        algorithm: str,
        task: Task,
        dtype: torch.dtype,
        inputs: tuple[Tensor, ...],
        settings: Settings,
    ) -> _Variant:
        module = copy.deepcopy(network.module)
        if algorithm != BEFORE:
            replace_conv_transpose3d(module, algorithm)
        module.to(settings.device, _parameter_dtype(dtype)).requires_grad_(task != "forward")
        for parameter in module.parameters():
            if parameter.dim() == 5:
                parameter.data = parameter.data.contiguous(memory_format=MEMORY_FORMATS[settings.layout])

        def autocast() -> contextlib.AbstractContextManager[Any]:
            if dtype.itemsize >= 4:
                return contextlib.nullcontext()
            return torch.autocast(settings.device.type, dtype)

        return cls(module, inputs, task, autocast)

    def run(self) -> list[Tensor]:
        """The outputs, or for a training step those and the gradients left in the parameters."""
        if self.task == "forward":
            with torch.no_grad(), self.autocast():
                return tensors_in(self.module(*self.inputs))
        self.module.zero_grad(set_to_none=True)
        with torch.enable_grad():
            with self.autocast():
                outputs = tensors_in(self.module(*self.inputs))
            _loss(outputs).backward()
        return outputs

    def checked_values(self) -> list[Tensor]:
        """What the error is taken over, in evaluation mode: outputs, or the parameters' gradients."""
        self.module.eval()
        outputs = self.run()
        if self.task == "forward":
            return outputs
        gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
        self.module.zero_grad(set_to_none=True)
        return gradients


def tensors_in(output: object) -> list[Tensor]:
    """The floating-point tensors in what a network returns: a tensor, or sequences and mappings that hold some."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, Sequence) and not isinstance(output, str):
        return [tensor for item in output for tensor in tensors_in(item)]
    return []


def _loss(outputs: Sequence[Tensor]) -> Tensor:
    """Between a mean and a sum of squares, where gradients of float16 neither vanish nor overflow."""
    parts = []
    for output in outputs:
        if output.requires_grad:
            wide = output.float() if output.dtype.itemsize < 4 else output
            parts.append(wide.square().sum() / math.sqrt(wide.numel()))
    if not parts:
        raise RuntimeError("no output of the network depends on its parameters")
    return torch.stack(parts).sum()


def _reference(network: Network, task: Task, inputs: Sequence[Tensor], settings: Settings) -> list[Tensor]:
    """What the network as it is gives in float64, for the same inputs; without cuDNN's trials, since once is enough."""
    exact_inputs = tuple(tensor.double() for tensor in inputs)
    variant = _Variant.make(network, BEFORE, task, torch.float64, exact_inputs, settings)
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        return variant.checked_values()


def _checked(
    variant: _Variant,
    result: NetworkResult,
    exact: Sequence[Tensor],
    error_before: float | None,
    settings: Settings,
) -> NetworkResult:
    """The result with its error, its verdict and, on a GPU, its memory."""
    values = variant.checked_values()
    shapes, expected = ([tuple(tensor.shape) for tensor in tensors] for tensors in (values, exact))
    if shapes != expected:
        return dataclasses.replace(result, status="wrong", reason="results of other shapes than in float64")
    error = combined_error(values, exact)
    bound = error_bound(result.dtype, result.precision)
    if result.algorithm == BEFORE:
        bound = math.inf  # it is what there is; only what is not finite is wrong
    elif error_before is not None and math.isfinite(error_before):
        bound = max(bound, _ALLOWED_OVER_BEFORE * error_before)
    right = math.isfinite(error) and error <= bound
    reason = f"error {error:.1e}, at most {bound:.1e} allowed" if math.isfinite(error) else "results are not finite"
    del values
    return dataclasses.replace(
        result,
        status="ok" if right else "wrong",
        reason=None if right else reason,
        error=error,
        error_bound=bound if math.isfinite(bound) else None,
        peak_bytes=_peak_bytes(variant, settings.device),
    )


def combined_error(values: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The relative L2 error of several tensors as if they were one; not finite if a value is not."""
    difference = math.hypot(*(_norm(value.double() - right) for value, right in zip(values, exact, strict=True)))
    norm = math.hypot(*map(_norm, exact))
    return difference / norm if norm else difference


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))


def _peak_bytes(variant: _Variant, device: torch.device) -> int | None:
    """By a second run: in the first one cuDNN tries kernels, with whatever workspace they like."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    variant.run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    variant.module.zero_grad(set_to_none=True)
    return peak


def _times(variants: Mapping[str, _Variant], settings: Settings) -> dict[str, Timing | str]:
    for variant in variants.values():
        variant.module.train(variant.task != "forward")
    calls = {name: variant.run for name, variant in variants.items()}
    clock = Clock(settings.device, hide_host=False)
    return time_in_turn(calls, clock, settings.repeats, settings.seconds)


def _with_speedups(results: Sequence[NetworkResult]) -> list[NetworkResult]:
    before = results[0].timing
    return [
        dataclasses.replace(result, speedup=before.median / result.timing.median)
        if before is not None and result.timing is not None
        else result
        for result in results
    ]
