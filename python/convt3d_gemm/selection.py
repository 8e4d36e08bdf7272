"""Which algorithm computes an operator, and the checks that all of them share."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from convt3d_gemm import gemm, native
from convt3d_gemm.binding import has_backend, missing_backend
from convt3d_gemm.parameters import Parameters, SizeArgument
from convt3d_gemm.settings import get_workspace_limit

__all__ = ["algorithms", "check_algorithm", "workspace_bytes"]

Operator = gemm.Operator

_ALGORITHMS = ("auto", "gemm", "native")


def algorithms() -> tuple[str, ...]:
    """The names that `algorithm` may take: "auto", "gemm" and "native" (PyTorch's own)."""
    return _ALGORITHMS


def check_algorithm(algorithm: str) -> None:
    """Raise ValueError unless `algorithm` is one of `algorithms()`."""
    if algorithm not in _ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(map(repr, _ALGORITHMS))}, got {algorithm!r}")


def _check_tensors(first_name: str, first: Tensor, **others: Tensor | None) -> None:
    """All tensors must share the first one's dtype, a real floating-point one, and its device."""
    if not first.is_floating_point():
        raise NotImplementedError(f"{first_name} must be a real floating-point tensor, got {first.dtype}")
    for name, other in others.items():
        if other is None:
            continue
        if other.dtype is not first.dtype:
            raise RuntimeError(
                f"{name} must have the same dtype as {first_name}, got {other.dtype} and {first.dtype}"
            )
        if other.device != first.device:
            raise RuntimeError(
                f"{name} must be on the same device as {first_name}, got {other.device} and {first.device}"
            )
        if other.layout is not torch.strided:
            raise RuntimeError(f"{name} must be a dense tensor, got layout {other.layout}")
    if first.layout is not torch.strided:
        raise RuntimeError(f"{first_name} must be a dense tensor, got layout {first.layout}")


def _takes_gemm(
    algorithm: str,
    operator: gemm.Operator,
    input_size: torch.Size,
    weight_size: torch.Size,
    parameters: Parameters,
    like: Tensor,
) -> bool:
    """Whether the GEMM path computes the call; the alternative is PyTorch's own."""
    check_algorithm(algorithm)
    if algorithm != "auto":
        return algorithm == "gemm"
    if has_backend(like.device.type):
        memory_format = gemm.memory_format_of(like)
        return gemm.fits(operator, input_size, weight_size, parameters, memory_format, like)
    if like.device.type in ("cpu", "cuda"):
        warnings.warn(f"algorithm 'auto' uses PyTorch's own: {missing_backend(like.device.type)}", stacklevel=2)
    return False


def _check_bias(bias: Tensor | None, weight: Tensor, parameters: Parameters) -> None:
    if bias is not None and bias.shape != (weight.size(1) * parameters.groups,):
        raise RuntimeError(
            f"bias must have one element per output channel, {weight.size(1) * parameters.groups}, "
            f"got size {tuple(bias.shape)}"
        )


def forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, parameters: Parameters, algorithm: str
) -> Tensor:
    """The transposed convolution of a 5-D input."""
    _check_tensors("input", input, weight=weight, bias=bias)
    takes_gemm = _takes_gemm(algorithm, Operator.forward, input.shape, weight.shape, parameters, input)
    _check_bias(bias, weight, parameters)
    if takes_gemm:
        return gemm.forward(input, weight, bias, parameters)
    return native.forward(input, weight, bias, parameters)


def grad_input(
    grad_output: Tensor, weight: Tensor, input_size: torch.Size, parameters: Parameters, algorithm: str
) -> Tensor:
    """The gradient with respect to an input of size `input_size`."""
    _check_tensors("grad_output", grad_output, weight=weight)
    if _takes_gemm(algorithm, Operator.grad_input, input_size, weight.shape, parameters, grad_output):
        return gemm.grad_input(grad_output, weight, input_size, parameters)
    input = grad_output.new_empty(1).expand(input_size)  # only its size and dtype are looked at
    return native.gradients(grad_output, input, weight, parameters, with_input=True, with_weight=False)[0]


def grad_weight(
    grad_output: Tensor, input: Tensor, weight_size: torch.Size, parameters: Parameters, algorithm: str
) -> Tensor:
    """The gradient with respect to a weight of size `weight_size`."""
    _check_tensors("grad_output", grad_output, input=input)
    if _takes_gemm(algorithm, Operator.grad_weight, input.shape, weight_size, parameters, input):
        return gemm.grad_weight(grad_output, input, weight_size, parameters)
    weight = grad_output.new_empty(1).expand(weight_size)
    return native.gradients(grad_output, input, weight, parameters, with_input=False, with_weight=True)[1]


def grad_input_weight(
    grad_output: Tensor, input: Tensor, weight: Tensor, parameters: Parameters, algorithm: str
) -> tuple[Tensor, Tensor]:
    """Both gradients at once."""
    _check_tensors("grad_output", grad_output, input=input, weight=weight)
    if _takes_gemm(algorithm, Operator.grad_input_weight, input.shape, weight.shape, parameters, input):
        return gemm.grad_input_weight(grad_output, input, weight, parameters)
    return native.gradients(grad_output, input, weight, parameters, with_input=True, with_weight=True)


def workspace_bytes(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: SizeArgument = 1,
    padding: SizeArgument = 0,
    output_padding: SizeArgument = 0,
    groups: int = 1,
    dilation: SizeArgument = 1,
    *,
    operator: str = "forward",
) -> int:
    """Bytes of workspace that algorithm "gemm" takes for one call, under the present workspace limit.

    Args:
        input: (N, Cin, D, H, W) or (Cin, D, H, W).
        weight: (Cin, Cout / groups, kd, kh, kw).
        bias: ignored; there so that the arguments are those of `conv_transpose3d`.
        stride: as in `conv_transpose3d`, like the parameters that follow.
        padding: see stride.
        output_padding: see stride.
        groups: see stride.
        dilation: see stride.
        operator: "forward", "grad_input", "grad_weight" or "grad_input_weight".

    Raises:
        ValueError: an operator that there is not.
        RuntimeError: arguments that no convolution satisfies.
    """
    named = {name: getattr(Operator, name) for name in ("forward", "grad_input", "grad_weight", "grad_input_weight")}
    if operator not in named:
        raise ValueError(f"operator must be one of {', '.join(map(repr, named))}, got {operator!r}")
    if input.dim() == 4:
        input = input.unsqueeze(0)
    parameters = Parameters.make(stride, padding, output_padding, dilation, groups)
    plan, _ = gemm.plan_for(
        named[operator],
        input.shape,
        weight.shape,
        parameters,
        gemm.memory_format_of(input),
        input.dtype,
        input.device,
        get_workspace_limit(),
    )
    return plan.workspace_bytes
