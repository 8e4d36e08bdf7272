"""Which algorithm computes an operator, and the checks that all of them share."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from convt3d_gemm import library, native
from convt3d_gemm.binding import has_backend, missing_backend
from convt3d_gemm.compatibility import autocast_dtype
from convt3d_gemm.decision import Decision, decide
from convt3d_gemm.parameters import Parameters, SizeArgument
from convt3d_gemm.problem import Problem, memory_format_of

__all__ = [
    "algorithms",
    "check_algorithm",
    "check_tensors",
    "operands_of_call",
    "problem_of_call",
    "workspace_bytes",
]

_ALGORITHMS = ("auto", *library.ALGORITHMS, "native")


def algorithms() -> tuple[str, ...]:
    """The names that `algorithm` may take: "auto", "gemm", "direct" and "native" (PyTorch's own)."""
    return _ALGORITHMS


def check_algorithm(algorithm: str) -> None:
    """Raise ValueError unless `algorithm` is one of `algorithms()`."""
    _check_one_of("algorithm", algorithm, _ALGORITHMS)


def _check_one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


_SIZES = {
    "input": "(N, Cin, D, H, W)",
    "weight": "(Cin, Cout / groups, kd, kh, kw)",
    "grad_output": "(N, Cout, OD, OH, OW)",
}


def _alike(first: Tensor, other: Tensor) -> bool:
    """The part of `check_tensors` that a plan does not check again: all that a common call spends on it."""
    return other.dtype is first.dtype and other.device == first.device and other.layout is torch.strided is first.layout


def check_tensors(first_name: str, first: Tensor, **others: Tensor | None) -> None:
    """All tensors are dense, of the first one's dtype, a real floating-point one, and device; all but bias are 5-D."""
    if not first.is_floating_point():
        raise NotImplementedError(f"{first_name} must be a real floating-point tensor, got {first.dtype}")
    for name, tensor in ((first_name, first), *others.items()):
        if tensor is None:
            continue
        if name != "bias" and tensor.dim() != 5:
            raise RuntimeError(f"{name} must have 5 dimensions {_SIZES[name]}, got size {tuple(tensor.shape)}")
        if tensor.dtype is not first.dtype:
            raise RuntimeError(f"{name} must have the same dtype as {first_name}, got {tensor.dtype} and {first.dtype}")
        if tensor.device != first.device:
            raise RuntimeError(
                f"{name} must be on the same device as {first_name}, got {tensor.device} and {first.device}"
            )
        if tensor.layout is not torch.strided:
            raise RuntimeError(f"{name} must be a dense tensor, got layout {tensor.layout}")


OptionalTensor = TypeVar("OptionalTensor", Tensor, "Tensor | None")


def _autocast(tensor: OptionalTensor, dtype: torch.dtype) -> OptionalTensor:
    """The tensor in autocast's dtype; float64, which autocast leaves alone, as it is."""
    if tensor is None or not tensor.is_floating_point() or tensor.dtype is torch.float64:
        return tensor
    return tensor.to(dtype)


def operands_of_call(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a call of `conv_transpose3d` computes with: the tensors, in autocast's dtype inside of it.

    Raises:
        TypeError: one is no tensor.
    """
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a Tensor, got {type(input).__name__}")
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a Tensor, got {type(weight).__name__}")
    if bias is not None and not isinstance(bias, Tensor):
        raise TypeError(f"bias must be a Tensor or None, got {type(bias).__name__}")
    dtype = autocast_dtype(input.device.type)
    if dtype is None:
        return input, weight, bias
    return _autocast(input, dtype), _autocast(weight, dtype), _autocast(bias, dtype)


def problem_of_call(
    operator: str, input: Tensor, weight: Tensor, bias: Tensor | None, parameters: Parameters
) -> Problem:
    """What a call of `conv_transpose3d` computes, or one operator of its gradients.

    Raises:
        TypeError: one is no tensor.
        RuntimeError: tensors that do not go together.
        NotImplementedError: a dtype other than the real floating-point ones.
    """
    input, weight, bias = operands_of_call(input, weight, bias)
    if input.dim() == 4:
        input = input.unsqueeze(0)
    check_tensors("input", input, weight=weight, bias=bias)
    if bias is not None:
        _check_bias(bias, weight, parameters)
    return Problem.of(operator, input.shape, weight.shape, parameters, input)


def _library_call(
    algorithm: str,
    operator: str,
    input_size: torch.Size,
    weight_size: torch.Size,
    parameters: Parameters,
    like: Tensor,
    grad_output: Tensor | None = None,
) -> library.Call | None:
    """The library's call where one of its algorithms is to compute the operator; None where PyTorch's own is."""
    if algorithm in library.ALGORITHMS:
        return library.plan_call(algorithm, operator, input_size, weight_size, parameters, like)
    check_algorithm(algorithm)
    if algorithm == "auto":
        decision = _decision(operator, input_size, weight_size, parameters, like)
        if decision is not None:
            if grad_output is not None:  # PyTorch does not look, and the library looks at its own calls alone
                library.check_grad_output(decision.output_size, grad_output)
            return decision.call
    return None


def _decision(
    operator: str, input_size: torch.Size, weight_size: torch.Size, parameters: Parameters, like: Tensor
) -> Decision | None:
    """What "auto" picks, or None on a device that only PyTorch computes on."""
    if has_backend(like.device.type):
        return decide(Problem.of(operator, input_size, weight_size, parameters, like))
    if like.device.type in ("cpu", "cuda"):
        warnings.warn(f"algorithm 'auto' uses PyTorch's own: {missing_backend(like.device.type)}", stacklevel=2)
    return None


def _check_bias(bias: Tensor, weight: Tensor, parameters: Parameters) -> None:
    channels = weight.size(1) * parameters.groups
    if parameters.groups > 0 and (bias.dim() != 1 or bias.size(0) != channels):
        raise RuntimeError(f"bias must have one element per output channel, {channels}, got size {tuple(bias.shape)}")


def _in_layout_of(like: Tensor, result: Tensor) -> Tensor:
    """PyTorch's result in the layout that every algorithm keeps, and that the fake implementations promise."""
    return result.contiguous(memory_format=memory_format_of(like))


Compute = TypeVar("Compute", bound=Callable[..., Any])


def _with_fallback(compute: Compute) -> Compute:
    """The operator, with "auto" falling back to "native", which may need less, where the pick finds no memory."""

    @functools.wraps(compute)
    def computed(*operands: Any) -> Any:  # the algorithm comes last
        try:
            return compute(*operands)
        except RuntimeError as error:
            if operands[-1] != "auto" or not library.is_out_of_memory(error):
                raise
        return compute(*operands[:-1], "native")

    return computed  # type: ignore[return-value]


@_with_fallback
def forward(input: Tensor, weight: Tensor, bias: Tensor | None, parameters: Parameters, algorithm: str) -> Tensor:
    """The transposed convolution of a 5-D input."""
    if not _alike(input, weight) or (bias is not None and not _alike(input, bias)):
        check_tensors("input", input, weight=weight, bias=bias)
    call = _library_call(algorithm, "forward", input.shape, weight.shape, parameters, input)
    if call is None:  # then no plan has checked the rest
        check_tensors("input", input, weight=weight, bias=bias)
    if bias is not None:
        _check_bias(bias, weight, parameters)
    if call is None:
        return _in_layout_of(input, native.forward(input, weight, bias, parameters))
    return library.forward(call, input, weight, bias)


@_with_fallback
def grad_input(
    grad_output: Tensor, weight: Tensor, input_size: Sequence[int], parameters: Parameters, algorithm: str
) -> Tensor:
    """The gradient with respect to an input of spatial size `input_size`."""
    check_tensors("grad_output", grad_output, weight=weight)
    size = torch.Size((grad_output.size(0), weight.size(0), *input_size))
    call = _library_call(algorithm, "grad_input", size, weight.shape, parameters, grad_output, grad_output)
    if call is None:
        input = grad_output.new_empty(1).expand(size)  # only its size and dtype are looked at
        result, _ = native.gradients(grad_output, input, weight, parameters, with_input=True, with_weight=False)
        return _in_layout_of(grad_output, result)
    return library.grad_input(call, grad_output, weight)


@_with_fallback
def grad_weight(
    grad_output: Tensor, input: Tensor, kernel_size: Sequence[int], parameters: Parameters, algorithm: str
) -> Tensor:
    """The gradient with respect to a weight of spatial size `kernel_size`."""
    check_tensors("grad_output", grad_output, input=input)
    size = torch.Size((input.size(1), grad_output.size(1) // max(parameters.groups, 1), *kernel_size))
    call = _library_call(algorithm, "grad_weight", input.shape, size, parameters, input, grad_output)
    if call is None:
        weight = grad_output.new_empty(1).expand(size)
        _, result = native.gradients(grad_output, input, weight, parameters, with_input=False, with_weight=True)
        return _in_layout_of(input, result)
    return library.grad_weight(call, grad_output, input)


@_with_fallback
def grad_input_weight(
    grad_output: Tensor, input: Tensor, weight: Tensor, parameters: Parameters, algorithm: str
) -> tuple[Tensor, Tensor]:
    """Both gradients at once."""
    check_tensors("grad_output", grad_output, input=input, weight=weight)
    if algorithm == "auto":
        decision = _decision("grad_input_weight", input.shape, weight.shape, parameters, input)
        if decision is not None and len(decision.pick) == 2:
            first, second = decision.pick
            # Alone, grad_input would take its layout from grad_output; together, both take it from the input.
            grad_output = _in_layout_of(input, grad_output)
            return (
                grad_input(grad_output, weight, input.shape[2:], parameters, first),
                grad_weight(grad_output, input, weight.shape[2:], parameters, second),
            )
    call = _library_call(algorithm, "grad_input_weight", input.shape, weight.shape, parameters, input, grad_output)
    if call is None:
        results = native.gradients(grad_output, input, weight, parameters, with_input=True, with_weight=True)
        return _in_layout_of(input, results[0]), _in_layout_of(input, results[1])
    return library.grad_input_weight(call, grad_output, input, weight)


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
    algorithm: str = "gemm",
) -> int:
    """Bytes of workspace that an algorithm takes for one call, under the present workspace limit.

    Args:
        input: (N, Cin, D, H, W) or (Cin, D, H, W).
        weight: (Cin, Cout / groups, kd, kh, kw).
        bias: makes no difference; there so that the arguments are those of `conv_transpose3d`.
        stride: as in `conv_transpose3d`, like the parameters that follow.
        padding: see stride.
        output_padding: see stride.
        groups: see stride.
        dilation: see stride.
        operator: "forward", "grad_input", "grad_weight" or "grad_input_weight".
        algorithm: "gemm" or "direct".

    Raises:
        ValueError: an operator or an algorithm that there is not.
        TypeError: an argument of the wrong type.
        RuntimeError: arguments that no convolution satisfies.
        NotImplementedError: a dtype other than float64, float32, float16 and bfloat16.
    """
    _check_one_of("operator", operator, tuple(library.OPERATORS))
    _check_one_of("algorithm", algorithm, tuple(library.ALGORITHMS))
    parameters = Parameters.make(stride, padding, output_padding, dilation, groups)
    return library.planned(algorithm, problem_of_call(operator, input, weight, bias, parameters)).workspace_bytes
