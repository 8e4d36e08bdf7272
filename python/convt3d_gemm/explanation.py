"""`explain`: in words, what "auto" picks for a convolution and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from convt3d_gemm import decision, library
from convt3d_gemm.binding import has_backend, missing_backend
from convt3d_gemm.parameters import Parameters, SizeArgument
from convt3d_gemm.problem import OPERATORS, Problem
from convt3d_gemm.selection import problem_of_call

__all__ = ["Explanation", "OperatorExplanation", "explain", "explain_problem"]


@dataclass(frozen=True)
class OperatorExplanation:
    """What "auto" picks for one operator, and why.

    Attributes:
        operator: "forward", "grad_input", "grad_weight" or "grad_input_weight" (both at once).
        pick: the algorithm; for both gradients at once perhaps two, that of grad_input and that of grad_weight.
        reason: in a few words.
        source: where `times` are from: "tuned" (measured on this device), "first use" (likewise, by this process),
            "table" (this layer, measured on this class of device), "model" (the cost model), or "none".
        times: milliseconds of all that could have been picked, fastest first; two names where one computes grad_input
            and the other grad_weight; of these only the fastest and the pick are here.
        operations: a multiply-add is two.
        tensor_bytes: that any algorithm has to read or write once.
        column_bytes: of the whole column matrix, which "gemm" writes and reads on top, in pieces.
        workspace_bytes: that "gemm" and "direct" take for a call, by name; those that do not fit the limit are absent.
        expected_cycles: of a multiprocessor's clock, that the plan of "direct" expects; 0 where it expects nothing, as
            on a CPU.
        floor: milliseconds of all multiplications, or of moving every tensor once, at the device's best rates; None for
            a device that the cost model does not know.
    """

    operator: str
    pick: tuple[str, ...]
    reason: str
    source: str
    times: Mapping[tuple[str, ...], float]
    operations: int
    tensor_bytes: int
    column_bytes: int
    workspace_bytes: Mapping[str, int]
    expected_cycles: float
    floor: float | None

    def __str__(self) -> str:
        """A few lines of words."""
        lines = [
            f"{self.operator}: {' + '.join(self.pick)}, because {self.reason}",
            f"  {_scaled(self.operations).strip()} operations and {_sized(self.tensor_bytes)} to read and write"
            + ("" if self.floor is None else f": at least {_milliseconds(self.floor)} on this device"),
        ]
        for pick, time in self.times.items():
            times_floor = f", {time / self.floor:.1f} times the floor" if self.floor else ""
            lines.append(f"  {' + '.join(pick)}: {_milliseconds(time)}{times_floor}{self._beside(pick)}")
        return "\n".join(lines)

    def _beside(self, pick: tuple[str, ...]) -> str:
        said = []
        if pick == ("gemm",):
            said.append(f"columns of {_sized(self.column_bytes)}" if self.column_bytes else "without columns")
        if pick == ("direct",) and self.expected_cycles:
            said.append(f"its plan expects {_scaled(round(self.expected_cycles)).strip()} clock cycles")
        if len(pick) == 1 and pick[0] in self.workspace_bytes:
            said.append(f"workspace {_sized(self.workspace_bytes[pick[0]])}")
        return f" ({', '.join(said)})" if said else ""


@dataclass(frozen=True)
class Explanation:
    """What "auto" picks for each operator of one convolution.

    Attributes:
        layer: the convolution, as ``convt3d --layer`` takes it.
        setting: precision, layout and device, in words.
        costs: where the cost model's figures are from.
        operators: by name.
    """

    layer: str
    setting: str
    costs: str
    operators: Mapping[str, OperatorExplanation]

    def __str__(self) -> str:
        """Some lines for each operator."""
        return "\n".join([f"{self.layer}, {self.setting}", self.costs, *map(str, self.operators.values())])


def explain(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: SizeArgument = 1,
    padding: SizeArgument = 0,
    output_padding: SizeArgument = 0,
    groups: int = 1,
    dilation: SizeArgument = 1,
) -> Explanation:
    """Say what algorithm "auto" picks for a convolution and its gradients, and why.

    Nothing is computed, but where "auto" would measure before it picks: see `conv_transpose3d`.

    Args:
        input: (N, Cin, D, H, W) or (Cin, D, H, W); its size, dtype, device and memory format are looked at.
        weight: (Cin, Cout / groups, kd, kh, kw).
        bias: makes no difference; there so that the arguments are those of `conv_transpose3d`.
        stride: as in `conv_transpose3d`, like the parameters that follow.
        padding: see stride.
        output_padding: see stride.
        groups: see stride.
        dilation: see stride.

    Returns:
        The decisions, with `str` in words.

    Raises:
        TypeError: an argument of the wrong type.
        RuntimeError: arguments that no convolution satisfies, or a device that this build does not compute on.
        NotImplementedError: a dtype other than float64, float32, float16 and bfloat16.
    """
    parameters = Parameters.make(stride, padding, output_padding, dilation, groups)
    return explain_problem(problem_of_call("forward", input, weight, bias, parameters))


def explain_problem(problem: Problem, operators: Sequence[str] = OPERATORS) -> Explanation:
    """`explain` of a problem, for the operators given."""
    if not has_backend(problem.device.type):
        raise RuntimeError(f"algorithm 'auto' is PyTorch's own here: {missing_backend(problem.device.type)}")
    made = [_explained(decision.decide(problem._replace(operator=operator))) for operator in operators]
    costs = decision.costs_of(problem.device)
    if costs is None:
        known = "the cost model knows no device like this one"
    else:
        known = f"cost model: class {costs.name} ({costs.source})"
    name = decision.hardware_of(problem.device).name
    setting = f"{problem.precision}, {problem.layout.upper()}, on {problem.device} ({name})"
    return Explanation(problem.layer, setting, known, {each.operator: each for each in made})


def _explained(made: decision.Decision) -> OperatorExplanation:
    problem = made.problem
    costs = decision.costs_of(problem.device)
    return OperatorExplanation(
        operator=problem.operator,
        pick=made.pick,
        reason=made.reason,
        source=made.source,
        times=made.notable_times,
        operations=problem.operations,
        tensor_bytes=problem.tensor_bytes,
        column_bytes=problem.column_bytes,
        workspace_bytes=decision.workspace_bytes_of(problem),
        expected_cycles=library.planned("direct", problem).plan.expected_cycles,
        floor=None if costs is None or problem.precision not in costs.multiply_rates else costs.floor(problem),
    )


def _milliseconds(time: float) -> str:
    return f"{time:.3g} ms" if time < 1000 else f"{time:.0f} ms"


def _sized(count: int) -> str:
    return f"{_scaled(count)}B"


def _scaled(count: int) -> str:
    """``1.49 G`` of 1490000000: by thousands, as rates are."""
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {prefix}"
    return f"{count} "
