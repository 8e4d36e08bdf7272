"""The operators as PyTorch's dispatcher knows them: torch.ops.convt3d_gemm.*.

Three bilinear operators, closed under differentiation: each one's derivatives are the other two. `grad_input_weight`
is two of them in one call. Registered with fake implementations, so torch.compile keeps them whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from convt3d_gemm import native, selection
from convt3d_gemm.gemm import memory_format_of
from convt3d_gemm.parameters import Parameters

__all__ = ["forward"]

_PARAMETERS = "int[3] stride, int[3] padding, int[3] output_padding, int[3] dilation, int groups, str algorithm"

_SCHEMAS = {
    "forward": f"(Tensor input, Tensor weight, Tensor? bias, {_PARAMETERS}) -> Tensor",
    "grad_input": f"(Tensor grad_output, Tensor weight, SymInt[3] input_size, {_PARAMETERS}) -> Tensor",
    "grad_weight": f"(Tensor grad_output, Tensor input, SymInt[3] kernel_size, {_PARAMETERS}) -> Tensor",
    "grad_input_weight": f"(Tensor grad_output, Tensor input, Tensor weight, {_PARAMETERS}) -> (Tensor, Tensor)",
}

Sizes = Sequence[int]


def _parameters(stride: Sizes, padding: Sizes, output_padding: Sizes, dilation: Sizes, groups: int) -> Parameters:
    return Parameters.make(stride, padding, output_padding, dilation, groups)


# ---- implementations ------------------------------------------------------------------------------------------------


def _forward(input: Tensor, weight: Tensor, bias: Tensor | None, *parameters: Any) -> Tensor:
    return selection.forward(input, weight, bias, _parameters(*parameters[:5]), parameters[5])


def _grad_input(grad_output: Tensor, weight: Tensor, input_size: Sizes, *parameters: Any) -> Tensor:
    size = torch.Size((grad_output.size(0), weight.size(0), *input_size))
    return selection.grad_input(grad_output, weight, size, _parameters(*parameters[:5]), parameters[5])


def _grad_weight(grad_output: Tensor, input: Tensor, kernel_size: Sizes, *parameters: Any) -> Tensor:
    groups = parameters[4]
    size = torch.Size((input.size(1), grad_output.size(1) // max(groups, 1), *kernel_size))
    return selection.grad_weight(grad_output, input, size, _parameters(*parameters[:5]), parameters[5])


def _grad_input_weight(grad_output: Tensor, input: Tensor, weight: Tensor, *parameters: Any) -> tuple[Tensor, Tensor]:
    return selection.grad_input_weight(grad_output, input, weight, _parameters(*parameters[:5]), parameters[5])


# ---- fake implementations: sizes, dtypes and memory formats, without data -----------------------------------------------


def _fake_forward(input: Tensor, weight: Tensor, bias: Tensor | None, *parameters: Any) -> Tensor:
    size = native.forward(input, weight, bias, _parameters(*parameters[:5])).shape
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=memory_format_of(input))


def _fake_grad_input(grad_output: Tensor, weight: Tensor, input_size: Sizes, *parameters: Any) -> Tensor:
    size = (grad_output.size(0), weight.size(0), *input_size)
    memory_format = memory_format_of(grad_output)
    return torch.empty(size, dtype=weight.dtype, device=weight.device, memory_format=memory_format)


def _fake_grad_weight(grad_output: Tensor, input: Tensor, kernel_size: Sizes, *parameters: Any) -> Tensor:
    size = (input.size(1), grad_output.size(1) // parameters[4], *kernel_size)
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=memory_format_of(input))


def _fake_grad_input_weight(
    grad_output: Tensor, input: Tensor, weight: Tensor, *parameters: Any
) -> tuple[Tensor, Tensor]:
    memory_format = memory_format_of(input)
    return (
        torch.empty_like(input, memory_format=memory_format),
        torch.empty_like(weight, memory_format=memory_format),
    )


# ---- derivatives ----------------------------------------------------------------------------------------------------


def _remember(ctx: Any, tensors: tuple[Tensor, ...], parameters: tuple[Any, ...]) -> None:
    ctx.save_for_backward(*tensors)
    ctx.parameters = parameters
    ctx.set_materialize_grads(False)


def _sum(*terms: Tensor | None) -> Tensor | None:
    present = [term for term in terms if term is not None]
    return None if not present else present[0] if len(present) == 1 else present[0] + present[1]


def _nones(parameters: Sequence[Any]) -> tuple[None, ...]:
    return (None,) * len(parameters)


def _kernel_size(weight: Tensor) -> tuple[int, ...]:
    return tuple(weight.shape[2:])


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _remember(ctx, inputs[:2], inputs[3:])
    ctx.has_bias = inputs[2] is not None


def _backward_forward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    input, weight = ctx.saved_tensors
    parameters = ctx.parameters
    for_input = for_weight = for_bias = None
    if grad is not None:
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        if needs_input and needs_weight:
            for_input, for_weight = grad_input_weight(grad, input, weight, *parameters)
        elif needs_input:
            for_input = grad_input(grad, weight, input.shape[2:], *parameters)
        elif needs_weight:
            for_weight = grad_weight(grad, input, _kernel_size(weight), *parameters)
        if ctx.has_bias and needs_bias:
            for_bias = grad.sum((0, 2, 3, 4))
    return for_input, for_weight, for_bias, *_nones(parameters)


def _setup_grad_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _remember(ctx, inputs[:2], inputs[3:])


def _backward_grad_input(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    grad_output, weight = ctx.saved_tensors
    parameters = ctx.parameters
    for_grad_output = for_weight = None
    if grad is not None and ctx.needs_input_grad[0]:
        for_grad_output = forward(grad, weight, None, *parameters)
    if grad is not None and ctx.needs_input_grad[1]:
        for_weight = grad_weight(grad_output, grad, _kernel_size(weight), *parameters)
    return for_grad_output, for_weight, None, *_nones(parameters)


def _setup_grad_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _remember(ctx, inputs[:2], inputs[3:])


def _backward_grad_weight(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    grad_output, input = ctx.saved_tensors
    parameters = ctx.parameters
    for_grad_output = for_input = None
    if grad is not None and ctx.needs_input_grad[0]:
        for_grad_output = forward(input, grad, None, *parameters)
    if grad is not None and ctx.needs_input_grad[1]:
        for_input = grad_input(grad_output, grad, input.shape[2:], *parameters)
    return for_grad_output, for_input, None, *_nones(parameters)


def _setup_grad_input_weight(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _remember(ctx, inputs[:3], inputs[3:])


def _backward_grad_input_weight(ctx: Any, by_input: Tensor | None, by_weight: Tensor | None) -> tuple[Any, ...]:
    grad_output, input, weight = ctx.saved_tensors
    parameters = ctx.parameters
    needs_grad_output, needs_input, needs_weight = ctx.needs_input_grad[:3]
    for_grad_output = for_input = for_weight = None
    if needs_grad_output:
        for_grad_output = _sum(
            None if by_input is None else forward(by_input, weight, None, *parameters),
            None if by_weight is None else forward(input, by_weight, None, *parameters),
        )
    if needs_input and by_weight is not None:
        for_input = grad_input(grad_output, by_weight, input.shape[2:], *parameters)
    if needs_weight and by_input is not None:
        for_weight = grad_weight(grad_output, by_input, _kernel_size(weight), *parameters)
    return for_grad_output, for_input, for_weight, *_nones(parameters)


# ---- registration ---------------------------------------------------------------------------------------------------

_library = torch.library.Library("convt3d_gemm", "DEF")


def _autograd_kernel(
    operator: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """An autograd implementation for releases without torch.library.register_autograd (before 2.4)."""

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = operator(*inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return backward(ctx, *grads)

    return Differentiable.apply  # type: ignore[no-any-return]


def _register(
    name: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    tags = [
        getattr(torch.Tag, tag)
        for tag in ("pt2_compliant_tag", "needs_fixed_stride_order")
        if hasattr(torch.Tag, tag)
    ]
    qualified = f"convt3d_gemm::{name}"
    _library.define(name + _SCHEMAS[name], tags=tags)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    operator: Callable[..., Any] = getattr(torch.ops.convt3d_gemm, name).default
    if hasattr(torch.library, "register_fake"):  # PyTorch 2.4 and later
        torch.library.register_fake(qualified, fake, lib=_library)
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_library)
    else:
        torch.library.impl_abstract(qualified, fake, lib=_library)
        _library.impl(name, _autograd_kernel(operator, setup_context, backward), "Autograd")
    return operator


forward = _register("forward", _forward, _fake_forward, _setup_forward, _backward_forward)
grad_input = _register("grad_input", _grad_input, _fake_grad_input, _setup_grad_input, _backward_grad_input)
grad_weight = _register(
    "grad_weight", _grad_weight, _fake_grad_weight, _setup_grad_weight, _backward_grad_weight
)
grad_input_weight = _register(
    "grad_input_weight",
    _grad_input_weight,
    _fake_grad_input_weight,
    _setup_grad_input_weight,
    _backward_grad_input_weight,
)
