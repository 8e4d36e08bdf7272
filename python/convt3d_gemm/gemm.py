"""The GEMM path on torch tensors: it makes the plan, allocates results and workspace, and calls the C++ library.

Sizes are PyTorch's: input (N, Cin, D, H, W), weight (Cin, Cout / groups, kd, kh, kw), output (N, Cout, OD, OH, OW).
A tensor in channels_last_3d is computed in that layout and gives results in it; others are made contiguous.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from convt3d_gemm import _C
from convt3d_gemm.binding import has_backend, missing_backend
from convt3d_gemm.compatibility import OutOfMemoryError, allows_tf32, cuda_stream
from convt3d_gemm.parameters import Parameters
from convt3d_gemm.settings import get_workspace_limit

__all__ = [
    "fits",
    "forward",
    "grad_input",
    "grad_input_weight",
    "grad_weight",
    "memory_format_of",
    "output_size",
    "plan_for",
]

Operator = _C.Operator

_DATA_TYPES = {
    torch.float64: _C.DataType.float64,
    torch.float32: _C.DataType.float32,
    torch.float16: _C.DataType.float16,
    torch.bfloat16: _C.DataType.bfloat16,
}


def memory_format_of(tensor: Tensor) -> torch.memory_format:
    """channels_last_3d for a 5-D tensor whose channels are innermost, else contiguous_format."""
    if tensor.is_contiguous():
        return torch.contiguous_format
    if tensor.is_contiguous(memory_format=torch.channels_last_3d) or tensor.stride(1) == 1 != tensor.size(1):
        return torch.channels_last_3d
    return torch.contiguous_format


@functools.lru_cache(maxsize=4096)
def _problem(
    input_size: torch.Size,
    weight_size: torch.Size,
    parameters: Parameters,
    memory_format: torch.memory_format,
    dtype: torch.dtype,
    tf32: bool,
) -> _C.Problem:
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
    return _C.Problem(
        batch=input_size[0],
        in_channels=input_size[1],
        out_channels=weight_size[1] * max(parameters.groups, 1),
        groups=parameters.groups,
        input=tuple(input_size[2:]),
        kernel=tuple(weight_size[2:]),
        stride=parameters.stride,
        padding=parameters.padding,
        output_padding=parameters.output_padding,
        dilation=parameters.dilation,
        layout=_C.Layout.ndhwc if memory_format == torch.channels_last_3d else _C.Layout.ncdhw,
        dtype=_DATA_TYPES[dtype],
        precision=_C.Precision.tf32 if tf32 else _C.Precision.ieee,
    )


@functools.lru_cache(maxsize=4096)
def _plan(
    operator: _C.Operator,
    input_size: torch.Size,
    weight_size: torch.Size,
    parameters: Parameters,
    memory_format: torch.memory_format,
    dtype: torch.dtype,
    tf32: bool,
    device: torch.device,
    threads: int,
    limit: int,
) -> tuple[_C.Plan, tuple[int, ...]]:
    """The plan, and the output's size (N, Cout, OD, OH, OW)."""
    problem = _problem(input_size, weight_size, parameters, memory_format, dtype, tf32)
    if not has_backend(device.type):
        raise RuntimeError(missing_backend(device.type))
    target = _C.Target.cpu(threads) if device.type == "cpu" else _C.Target.cuda(device.index)
    output = (input_size[0], weight_size[1] * parameters.groups, *problem.output)
    return _C.Plan(problem, operator, target, limit), output


def _threads(device: torch.device) -> int:
    return torch.get_num_threads() if device.type == "cpu" else 1


def plan_for(
    operator: _C.Operator,
    input_size: torch.Size,
    weight_size: torch.Size,
    parameters: Parameters,
    memory_format: torch.memory_format,
    dtype: torch.dtype,
    device: torch.device,
    limit: int,
) -> tuple[_C.Plan, tuple[int, ...]]:
    """The plan for an operator under a workspace limit in bytes, and the size of the convolution's output.

    Raises:
        RuntimeError: sizes and parameters that no convolution satisfies, or a device without a backend.
        NotImplementedError: a dtype other than float64, float32, float16 and bfloat16.
    """
    tf32 = dtype is torch.float32 and device.type == "cuda" and allows_tf32()
    return _plan(
        operator,
        input_size,
        weight_size,
        parameters,
        memory_format,
        dtype,
        tf32,
        device,
        _threads(device),
        limit,
    )


class _PlannedCall:
    """One call of an operator: its plan, its workspace, and where it runs.

    Where the workspace can't be allocated, its limit is halved until the smallest pieces have failed too.
    """

    __slots__ = ("_workspace", "output_size", "plan", "where")

    def __init__(
        self,
        operator: _C.Operator,
        input_size: torch.Size,
        weight_size: torch.Size,
        parameters: Parameters,
        memory_format: torch.memory_format,
        like: Tensor,
    ) -> None:
        device = like.device
        limit = get_workspace_limit()

        def plan_within(limit: int) -> tuple[_C.Plan, tuple[int, ...]]:
            return plan_for(operator, input_size, weight_size, parameters, memory_format, like.dtype, device, limit)

        self.plan, self.output_size = plan_within(limit)
        if not self.plan.fits:
            raise RuntimeError(
                f"algorithm 'gemm' needs a workspace of at least {self.plan.workspace_bytes} bytes for input of "
                f"size {tuple(input_size)} and weight of size {tuple(weight_size)}, but the limit is {limit}; "
                "raise it with set_workspace_limit, or use algorithm='native'"
            )
        while True:
            try:
                self._workspace = torch.empty(self.plan.workspace_bytes, dtype=torch.uint8, device=device)
                break
            except RuntimeError as error:
                limit = max(min(limit, self.plan.workspace_bytes) // 2, 1)
                smaller, _ = plan_within(limit)
                if not _is_out_of_memory(error) or not smaller.fits:
                    raise
                self.plan = smaller
        # The last arguments of every call of the C++ library. The workspace lives as long as this object; the caching
        # allocator hands its memory out again only to work that is queued behind this call.
        stream = cuda_stream(device.index) if device.type == "cuda" else 0
        self.where = (self._workspace.data_ptr(), device.index or 0, stream, _threads(device))


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, OutOfMemoryError) or "can't allocate memory" in str(error)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def fits(
    operator: _C.Operator,
    input_size: torch.Size,
    weight_size: torch.Size,
    parameters: Parameters,
    memory_format: torch.memory_format,
    like: Tensor,
) -> bool:
    """Whether the operator can be computed within the workspace limit."""
    limit = get_workspace_limit()
    return plan_for(
        operator, input_size, weight_size, parameters, memory_format, like.dtype, like.device, limit
    )[0].fits


def forward(input: Tensor, weight: Tensor, bias: Tensor | None, parameters: Parameters) -> Tensor:
    """The transposed convolution, (N, Cout, OD, OH, OW)."""
    memory_format = memory_format_of(input)
    call = _PlannedCall(Operator.forward, input.shape, weight.shape, parameters, memory_format, input)
    input = input.contiguous(memory_format=memory_format)
    weight = weight.contiguous(memory_format=memory_format)
    if bias is not None:
        bias = bias.contiguous()
    output = torch.empty(
        call.output_size, dtype=input.dtype, device=input.device, memory_format=memory_format
    )
    call.plan.forward(
        input.data_ptr(),
        weight.data_ptr(),
        _address(bias),
        output.data_ptr(),
        *call.where,
    )
    return output


def _check_grad_output(grad_output: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(grad_output.shape) != expected:
        raise RuntimeError(
            f"grad_output must have the output's size {expected}, got {tuple(grad_output.shape)}"
        )


def grad_input(grad_output: Tensor, weight: Tensor, input_size: torch.Size, parameters: Parameters) -> Tensor:
    """The gradient with respect to the input, of size `input_size`."""
    memory_format = memory_format_of(grad_output)
    call = _PlannedCall(Operator.grad_input, input_size, weight.shape, parameters, memory_format, grad_output)
    _check_grad_output(grad_output, call.output_size)
    grad_output = grad_output.contiguous(memory_format=memory_format)
    weight = weight.contiguous(memory_format=memory_format)
    result = torch.empty(input_size, dtype=weight.dtype, device=weight.device, memory_format=memory_format)
    call.plan.grad_input(
        grad_output.data_ptr(),
        weight.data_ptr(),
        result.data_ptr(),
        *call.where,
    )
    return result


def grad_weight(
    grad_output: Tensor, input: Tensor, weight_size: torch.Size, parameters: Parameters
) -> Tensor:
    """The gradient with respect to the weight, of size `weight_size`."""
    memory_format = memory_format_of(input)
    call = _PlannedCall(Operator.grad_weight, input.shape, weight_size, parameters, memory_format, input)
    _check_grad_output(grad_output, call.output_size)
    grad_output = grad_output.contiguous(memory_format=memory_format)
    input = input.contiguous(memory_format=memory_format)
    result = torch.empty(weight_size, dtype=input.dtype, device=input.device, memory_format=memory_format)
    call.plan.grad_weight(
        grad_output.data_ptr(),
        input.data_ptr(),
        result.data_ptr(),
        *call.where,
    )
    return result


def grad_input_weight(
    grad_output: Tensor, input: Tensor, weight: Tensor, parameters: Parameters
) -> tuple[Tensor, Tensor]:
    """Both gradients, from one set of columns."""
    memory_format = memory_format_of(input)
    call = _PlannedCall(Operator.grad_input_weight, input.shape, weight.shape, parameters, memory_format, input)
    _check_grad_output(grad_output, call.output_size)
    grad_output = grad_output.contiguous(memory_format=memory_format)
    input = input.contiguous(memory_format=memory_format)
    weight = weight.contiguous(memory_format=memory_format)
    input_result = torch.empty_like(input, memory_format=memory_format)
    weight_result = torch.empty_like(weight, memory_format=memory_format)
    call.plan.grad_input_weight(
        grad_output.data_ptr(),
        input.data_ptr(),
        weight.data_ptr(),
        input_result.data_ptr(),
        weight_result.data_ptr(),
        *call.where,
    )
    return input_result, weight_result
