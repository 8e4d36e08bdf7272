"""Times every algorithm, so that "auto" knows instead of expecting: on a model's layers by `tune`, or at first use."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.operator_schemas import normalize_function
from torch.utils._python_dispatch import TorchDispatchMode

from convt3d_gemm import decision, library, selection
from convt3d_gemm.bench.device import cache_bytes, release_memory, why_failed
from convt3d_gemm.bench.timing import Clock, Timing, rotations, time_in_turn
from convt3d_gemm.binding import has_backend
from convt3d_gemm.parameters import Parameters
from convt3d_gemm.problem import OPERATORS, Problem

__all__ = ["Tuning", "measure", "tune", "tune_problems"]

#: Those that are timed: all that "auto" chooses among.
ALGORITHMS = (*library.ALGORITHMS, "native")

# Sets of tensors to go through, so that none is in the cache when its turn comes again.
_MOST_SETS = 16


@dataclass(frozen=True)
class Tuning:
    """What `tune` has measured.

    Attributes:
        decisions: what "auto" picks now for each problem; their `times` are the measured ones in milliseconds.
        failures: why an algorithm has no time, by problem and algorithm.
        kept: the file that the measurements are in, or None where it could not be written.
    """

    decisions: tuple[decision.Decision, ...]
    failures: Mapping[tuple[Problem, str], str]
    kept: str | None

    def __str__(self) -> str:
        """A line for each problem: the pick, and the milliseconds of all, fastest first."""
        if not self.decisions:
            return "no transposed 3-D convolution was found"
        lines = []
        for made in self.decisions:
            times = ", ".join(f"{' + '.join(pick)} {time:.3g} ms" for pick, time in made.notable_times.items())
            lines.append(f"{made.problem}: {' + '.join(made.pick)} ({times})")
        lines += [f"{problem}: {name} failed: {why}" for (problem, name), why in self.failures.items()]
        lines.append(f"kept in {self.kept}" if self.kept else "not kept: this process alone knows them")
        return "\n".join(lines)


def tune(model: torch.nn.Module, example_input: Any, *, training: bool | None = None, seconds: float = 0.2) -> Tuning:
    """Time every algorithm on the transposed 3-D convolutions of a model, and keep the times for "auto".

    The model is run once on the example, in evaluation mode and without gradients, and every transposed 3-D convolution
    that is called is noted: by torch's modules, this package's, or the functions. Each is then timed on random tensors
    of its shapes, dtype, layout and device, the algorithms in turn, with PyTorch's settings as they are: set
    `torch.backends.cudnn.benchmark`, autocast and the number of threads as they will be later on.

    Args:
        model: any module.
        example_input: what it is called with: a tensor, or a tuple of positional arguments.
        training: whether to time the gradients as well; if None, whether the model is in training mode.
        seconds: for each operator of each layer, the time after which nothing is repeated any more.

    Returns:
        What was measured, and what "auto" picks now.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `seconds` is not above 0.

    Whatever the model raises on the example is passed on. An algorithm that fails, for want of memory for example, is
    left out.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if training is None:
        training = model.training
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    with _in_evaluation(model), torch.no_grad(), _Recorder() as recorder:
        model(*arguments)
    operators = OPERATORS if training else ("forward",)
    problems = [problem._replace(operator=operator) for problem in recorder.problems for operator in operators]
    return tune_problems(problems, seconds=seconds)


def tune_problems(
    problems: Iterable[Problem], *, seconds: float = 0.2, progress: Callable[[Problem], None] | None = None
) -> Tuning:
    """Time every algorithm on each problem, and keep the times for "auto".

    Args:
        problems: on devices that the library has a backend for; others are left out.
        seconds: see `tune`.
        progress: called before each measurement.

    Raises:
        ValueError: `seconds` is not above 0.
    """
    if not seconds > 0:
        raise ValueError(f"seconds must be above 0, got {seconds}")
    measured: dict[Problem, dict[str, float]] = {}
    failures: dict[tuple[Problem, str], str] = {}
    for problem in dict.fromkeys(problems):
        if 0 in problem.input_size or not has_backend(problem.device.type):
            continue
        if progress is not None:
            progress(problem)
        times = measure(problem, ALGORITHMS, seconds=seconds)
        measured[problem] = {name: time for name, time in times.items() if isinstance(time, float)}
        failures.update({(problem, name): why for name, why in times.items() if isinstance(why, str)})
        release_memory(problem.device)
    kept: list[str] = []
    lasting = True
    for device in {problem.device: None for problem in measured}:
        file = decision.measurements_of(device)
        here = {problem: times for problem, times in measured.items() if problem.device == device and times}
        lasting = file.add(here) and lasting
        kept.append(str(file.path))
    decision.forget_decisions(read_again=lasting)
    decisions = tuple(decision.decide(problem) for problem in measured)
    return Tuning(decisions, failures, ", ".join(kept) if kept and lasting else None)


def measure(
    problem: Problem, algorithms: Sequence[str], *, seconds: float, repeats: int = 50
) -> dict[str, float | str]:
    """Milliseconds of each algorithm on random tensors, the median of repeats in turn; or why there is none.

    Args:
        problem: its device must be there, with a backend for the library's algorithms. The workspace limit, the number
            of threads and TF32 are those that are set, and should be the problem's.
        algorithms: names of `selection.algorithms()`.
        seconds: no repeat is begun after this time, but there are three.
        repeats: the most.
    """
    try:
        # The tensors have the dtype that autocast would give them, or that it is to leave alone.
        with torch.no_grad(), torch.autocast(problem.device.type, enabled=False), _on(problem.device):
            calls = _calls(problem, algorithms)
            # One turn of all sets and one call more: then PyTorch's allocator has all blocks that it will need.
            warm_up = _sets(problem) + 1 if problem.device.type == "cuda" else 1
            timings = time_in_turn(calls, Clock(problem.device), repeats, seconds, warm_up)
    except (RuntimeError, MemoryError) as error:  # no memory for the tensors: no algorithm is to blame
        return dict.fromkeys(algorithms, why_failed(error))
    return {name: result.median if isinstance(result, Timing) else result for name, result in timings.items()}


# A call of the user's waits meanwhile, so that a median of a few has to do.
_FIRST_USE_SECONDS, _FIRST_USE_REPEATS = 0.01, 7


@functools.lru_cache(maxsize=4096)
def _measured_at_first_use(problem: Problem) -> dict[str, float]:
    """Milliseconds of the algorithms that did not fail; known to this process alone."""
    times = measure(problem, ALGORITHMS, seconds=_FIRST_USE_SECONDS, repeats=_FIRST_USE_REPEATS)
    return {name: time for name, time in times.items() if isinstance(time, float)}


decision.measure_first_uses_by(_measured_at_first_use)


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _sets(problem: Problem) -> int:
    wanted = 2 * cache_bytes(problem.device)
    return max(1, min(-(-wanted // problem.tensor_bytes), _MOST_SETS))


def _calls(problem: Problem, algorithms: Sequence[str]) -> dict[str, Callable[[], object]]:
    """A call of each algorithm; all go through the same sets of tensors, each at its own pace."""
    generator = torch.Generator(problem.device).manual_seed(0)

    def normal(size: Sequence[int]) -> Tensor:
        drawn = torch.randn(size, generator=generator, device=problem.device, dtype=problem.dtype)
        return drawn.contiguous(memory_format=problem.memory_format)

    with_output = problem.operator != "forward"
    sets = [
        (
            normal(problem.input_size),
            normal(problem.weight_size),
            normal(problem.output_size if with_output else (0,) * 5),
        )
        for _ in range(_sets(problem))
    ]

    def call_of(algorithm: str, turn: Iterator[tuple[Tensor, Tensor, Tensor]]) -> Callable[[], object]:
        return lambda: _run(problem, algorithm, *next(turn))

    turns = rotations(sets, len(algorithms))
    return {name: call_of(name, turn) for name, turn in zip(algorithms, turns, strict=True)}


def _run(problem: Problem, algorithm: str, input: Tensor, weight: Tensor, grad_output: Tensor) -> object:
    parameters = problem.parameters
    if problem.operator == "forward":
        return selection.forward(input, weight, None, parameters, algorithm)
    if problem.operator == "grad_input":
        return selection.grad_input(grad_output, weight, input.shape[2:], parameters, algorithm)
    if problem.operator == "grad_weight":
        return selection.grad_weight(grad_output, input, weight.shape[2:], parameters, algorithm)
    return selection.grad_input_weight(grad_output, input, weight, parameters, algorithm)


@contextlib.contextmanager
def _in_evaluation(model: torch.nn.Module) -> Iterator[None]:
    """So that running it changes no statistics of a batch normalisation."""
    were_training = [module for module in model.modules() if module.training]
    with contextlib.suppress(NotImplementedError):  # an exported one is what it was exported as
        model.eval()
    try:
        yield
    finally:
        for module in were_training:
            module.training = True


class _Recorder(TorchDispatchMode):
    """Notes the problem of every transposed 3-D convolution that is called, torch's or this package's.

    Below autograd and autocast, so that shapes, dtypes and layouts are those that are computed on.

    Attributes:
        problems: of forward, each once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._found: dict[Problem, None] = {}

    @property
    def problems(self) -> list[Problem]:
        return list(self._found)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        aten = torch.ops.aten
        if func in (
            aten.convolution.default,
            aten._convolution.default,  # a traced model's
            aten.conv_transpose3d.input,  # in inference mode
            torch.ops.convt3d_gemm.forward.default,
        ):
            call = normalize_function(func, args, kwargs, normalize_to_only_use_kwargs=True)
            assert call is not None  # an overload has one schema
            if call.kwargs.get("transposed", True):
                self._note(call.kwargs)
        return func(*args, **kwargs)

    def _note(self, call: dict[str, Any]) -> None:
        input, weight = call["input"], call["weight"]
        if weight.dim() != 5 or not math.prod(input.shape):
            return
        if input.dim() == 4:
            input = input.unsqueeze(0)
        parameters = Parameters.make(*(call[name] for name in Parameters._fields))
        self._found[Problem.of("forward", input.shape, weight.shape, parameters, input)] = None
