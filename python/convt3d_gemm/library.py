"""The C++ library's algorithms on torch tensors: the plan, memory for results and workspace, and the call.

Sizes are PyTorch's: input (N, Cin, D, H, W), weight (Cin, Cout / groups, kd, kh, kw), output (N, Cout, OD, OH, OW).
A tensor in channels_last_3d is computed in that layout and gives results in it; others are made contiguous.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from convt3d_gemm import _C
from convt3d_gemm.binding import has_backend, missing_backend
from convt3d_gemm.compatibility import OutOfMemoryError, cuda_stream
from convt3d_gemm.parameters import Parameters
from convt3d_gemm.problem import Problem

__all__ = [
    "ALGORITHMS",
    "OPERATORS",
    "Call",
    "check_grad_output",
    "forward",
    "grad_input",
    "grad_input_weight",
    "grad_weight",
    "is_out_of_memory",
    "plan_call",
    "plan_for",
    "planned",
]

#: The algorithms and the operators by name. (The binding's enumerations are slow to hash, and every call looks its plan
#: up.)
ALGORITHMS = {
    "gemm": _C.Algorithm.gemm,
    "direct": _C.Algorithm.direct,
}
OPERATORS = {
    "forward": _C.Operator.forward,
    "grad_input": _C.Operator.grad_input,
    "grad_weight": _C.Operator.grad_weight,
    "grad_input_weight": _C.Operator.grad_input_weight,
}

_DATA_TYPES = {
    torch.float64: _C.DataType.float64,
    torch.float32: _C.DataType.float32,
    torch.float16: _C.DataType.float16,
    torch.bfloat16: _C.DataType.bfloat16,
}


class Call(NamedTuple):
    """What one algorithm needs to compute a problem: made once, and remembered.

    Attributes:
        algorithm: its name.
        problem: what is computed.
        plan: how the C++ library computes it under the problem's limit.
        fits: whether it can.
        workspace_bytes: that the plan takes, cuBLAS's own included.
        output_size: (N, Cout, OD, OH, OW).
    """

    algorithm: str
    problem: Problem
    plan: _C.Plan
    fits: bool
    workspace_bytes: int
    output_size: tuple[int, ...]

    @property
    def limited_bytes(self) -> int:
        """The part of the workspace that the limit is about: columns and partial sums."""
        return self.plan.column_bytes + self.plan.partial_bytes

    def within(self, limit: int) -> Call:
        """The same under another workspace limit."""
        return planned(self.algorithm, self.problem._replace(limit=limit))


def _check_sizes(input_size: torch.Size, weight_size: torch.Size, dtype: torch.dtype) -> None:
    if dtype not in _DATA_TYPES:
        raise NotImplementedError(f"input must be float64, float32, float16 or bfloat16, got {dtype}")
    if len(input_size) != 5:
        raise RuntimeError(f"input must have 5 dimensions (N, Cin, D, H, W), got size {tuple(input_size)}")
    if len(weight_size) != 5:
        raise RuntimeError(
            f"weight must have 5 dimensions (Cin, Cout / groups, kd, kh, kw), got size {tuple(weight_size)}"
        )
    if weight_size[0] != input_size[1]:
        raise RuntimeError(
            f"weight of size {tuple(weight_size)} expects input to have {weight_size[0]} channels, "
            f"got input of size {tuple(input_size)}"
        )


def _described(problem: Problem) -> _C.Problem:
    _, input_size, weight_size, parameters, *_ = problem
    _check_sizes(input_size, weight_size, problem.dtype)
    return _C.Problem(
        batch=input_size[0],
        in_channels=input_size[1],
        out_channels=weight_size[1] * max(parameters.groups, 1),
        groups=parameters.groups,
        input=(input_size[2], input_size[3], input_size[4]),
        kernel=(weight_size[2], weight_size[3], weight_size[4]),
        stride=parameters.stride,
        padding=parameters.padding,
        output_padding=parameters.output_padding,
        dilation=parameters.dilation,
        layout=_C.Layout.ndhwc if problem.memory_format == torch.channels_last_3d else _C.Layout.ncdhw,
        dtype=_DATA_TYPES[problem.dtype],
        precision=_C.Precision.tf32 if problem.tf32 else _C.Precision.ieee,
    )


@functools.lru_cache(maxsize=4096)
def planned(algorithm: str, problem: Problem) -> Call:
    """Plan a problem.

    Args:
        algorithm: of `ALGORITHMS`.
        problem: what is to be computed.

    Raises:
        RuntimeError: sizes and parameters that no convolution satisfies, or a device without a backend.
        NotImplementedError: a dtype other than float64, float32, float16 and bfloat16.
    """
    description = _described(problem)
    device = problem.device
    if not has_backend(device.type):
        raise RuntimeError(f"algorithm {algorithm!r}: {missing_backend(device.type)}")
    target = _C.Target.cpu(problem.threads) if device.type == "cpu" else _C.Target.cuda(device.index)
    plan = _C.Plan(description, OPERATORS[problem.operator], target, problem.limit, ALGORITHMS[algorithm])
    return Call(algorithm, problem, plan, plan.fits, plan.workspace_bytes, problem.output_size)


def plan_for(target: _C.Target, algorithm: str, problem: Problem) -> _C.Plan:
    """Plan a problem for a target that need not be there, whatever the problem's device.

    Args:
        target: where it would be computed.
        algorithm: of `ALGORITHMS`.
        problem: what would be computed.

    Raises:
        RuntimeError: sizes and parameters that no convolution satisfies.
        NotImplementedError: a dtype other than float64, float32, float16 and bfloat16.
    """
    return _C.Plan(_described(problem), OPERATORS[problem.operator], target, problem.limit, ALGORITHMS[algorithm])


def plan_call(
    algorithm: str,
    operator: str,
    input_size: torch.Size,
    weight_size: torch.Size,
    parameters: Parameters,
    like: Tensor,
) -> Call:
    """Plan an operator under the present settings: `planned` of `Problem.of` the other arguments."""
    return planned(algorithm, Problem.of(operator, input_size, weight_size, parameters, like))


def _allocate_workspace(call: Call) -> tuple[_C.Plan, Tensor]:
    """The workspace, and the plan that it is for.

    Where it can't be allocated, its limit is halved until the smallest pieces have failed too.
    """
    if not call.fits:
        problem = call.problem
        raise RuntimeError(
            f"algorithm {call.algorithm!r} needs a workspace of at least {call.limited_bytes} bytes for input of size "
            f"{tuple(problem.input_size)} and weight of size {tuple(problem.weight_size)}, but the limit is "
            f"{problem.limit}; "
            "raise it with set_workspace_limit, or use algorithm 'direct' or 'native'"
        )
    while True:
        try:
            return call.plan, torch.empty(call.workspace_bytes, dtype=torch.uint8, device=call.problem.device)
        except RuntimeError as error:
            smaller = call.within(max(call.limited_bytes // 2, 1))
            # Where nothing fits that limit, the plan is for the smallest pieces there are.
            if not is_out_of_memory(error) or smaller.workspace_bytes >= call.workspace_bytes:
                raise
            call = smaller


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether it is the allocator's, of CUDA or of the CPU."""
    return isinstance(error, OutOfMemoryError) or "can't allocate memory" in str(error)


def _where(call: Call, workspace: Tensor) -> tuple[int, int, int, int]:
    """The last arguments of every call of the C++ library: workspace, device, stream and threads.

    The workspace may be freed as soon as the call returns: the caching allocator hands its memory out again only to
    work that is queued behind it.
    """
    index, threads = call.problem.device.index, call.problem.threads
    if index is None:
        return workspace.data_ptr(), 0, 0, threads
    return workspace.data_ptr(), index, cuda_stream(index), threads


def _empty(size: tuple[int, ...] | torch.Size, call: Call) -> Tensor:
    problem = call.problem
    return torch.empty(size, dtype=problem.dtype, device=problem.device, memory_format=problem.memory_format)


def check_grad_output(output_size: tuple[int, ...], grad_output: Tensor) -> None:
    """Raise RuntimeError unless the gradient has the output's size."""
    if tuple(grad_output.shape) != output_size:
        raise RuntimeError(f"grad_output must have the output's size {output_size}, got {tuple(grad_output.shape)}")


def forward(call: Call, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The transposed convolution, (N, Cout, OD, OH, OW)."""
    plan, workspace = _allocate_workspace(call)
    input = input.contiguous(memory_format=call.problem.memory_format)
    weight = weight.contiguous(memory_format=call.problem.memory_format)
    bias = None if bias is None else bias.contiguous()
    output = _empty(call.output_size, call)
    plan.forward(
        input.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        output.data_ptr(),
        *_where(call, workspace),
    )
    return output


def grad_input(call: Call, grad_output: Tensor, weight: Tensor) -> Tensor:
    """The gradient with respect to the input, (N, Cin, D, H, W)."""
    check_grad_output(call.output_size, grad_output)
    plan, workspace = _allocate_workspace(call)
    grad_output = grad_output.contiguous(memory_format=call.problem.memory_format)
    weight = weight.contiguous(memory_format=call.problem.memory_format)
    result = _empty(call.problem.input_size, call)
    plan.grad_input(grad_output.data_ptr(), weight.data_ptr(), result.data_ptr(), *_where(call, workspace))
    return result


def grad_weight(call: Call, grad_output: Tensor, input: Tensor) -> Tensor:
    """The gradient with respect to the weight, (Cin, Cout / groups, kd, kh, kw)."""
    check_grad_output(call.output_size, grad_output)
    plan, workspace = _allocate_workspace(call)
    grad_output = grad_output.contiguous(memory_format=call.problem.memory_format)
    input = input.contiguous(memory_format=call.problem.memory_format)
    result = _empty(call.problem.weight_size, call)
    plan.grad_weight(grad_output.data_ptr(), input.data_ptr(), result.data_ptr(), *_where(call, workspace))
    return result


def grad_input_weight(call: Call, grad_output: Tensor, input: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both gradients; with algorithm "gemm" from one set of columns."""
    check_grad_output(call.output_size, grad_output)
    plan, workspace = _allocate_workspace(call)
    grad_output = grad_output.contiguous(memory_format=call.problem.memory_format)
    input = input.contiguous(memory_format=call.problem.memory_format)
    weight = weight.contiguous(memory_format=call.problem.memory_format)
    input_result, weight_result = _empty(call.problem.input_size, call), _empty(call.problem.weight_size, call)
    plan.grad_input_weight(
        grad_output.data_ptr(),
        input.data_ptr(),
        weight.data_ptr(),
        input_result.data_ptr(),
        weight_result.data_ptr(),
        *_where(call, workspace),
    )
    return input_result, weight_result
