"""The differentiable operators, and as PyTorch's dispatcher knows them: torch.ops.convt3d_gemm.*.

Three bilinear operators, closed under differentiation: each one's derivatives backwards are the other two, forwards it
is its own. `grad_input_weight` is two of them in one call. Each is registered with a fake implementation, so
torch.compile keeps it whole, and with its derivatives, which torch.func takes as well.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from convt3d_gemm import native, selection
from convt3d_gemm.compatibility import (
    forward_gradients_enabled,
    is_compiling,
    is_plain,
    is_plain_eager,
    single_level_autograd,
)
from convt3d_gemm.parameters import Parameters
from convt3d_gemm.problem import memory_format_of, operations_of

__all__ = ["Operator", "forward", "grad_input", "grad_input_weight", "grad_weight"]

# output_padding may depend on an input's size, where it makes an output_size.
_PARAMETERS = "int[3] stride, int[3] padding, SymInt[3] output_padding, int[3] dilation, int groups, str algorithm"

_library = torch.library.Library("convt3d_gemm", "DEF")

Gradients = tuple["Tensor | None", "Tensor | None", "Tensor | None"]


class Operator:
    """A function of three operands (tensors, or sizes), the parameters and an algorithm; differentiable.

    A call that nobody watches goes straight to the implementation, which saves the host some tens of microseconds; one
    under torch.compile, a dispatch mode, a profiler, a functional transform, forward-mode differentiation or with a
    tensor subclass goes through the dispatcher.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        implementation: Callable[..., Any],
        fake: Callable[..., Any],
        derivative: Callable[..., Gradients],
        tangent: Callable[..., Any],
        saved: int,
    ) -> None:
        """Register the operator.

        Args:
            name: in torch.ops.convt3d_gemm.
            schema: of the three operands and of the result; `{}` stands for the parameters and the algorithm.
            implementation: computes the result.
            fake: makes an empty result of the right size, dtype and memory format.
            derivative: takes (needs_grad, saved operands, parameters, algorithm, *gradients of the results) and gives
                the gradients of the three operands. Gradients may be None throughout.
            tangent: takes (saved operands, third operand if that is a size, parameters, algorithm, *tangents of the
                three operands) and gives those of the results. Tangents may be None throughout.
            saved: how many operands, from the first, the derivatives need.
        """
        self._implementation = implementation
        rules = (derivative, tangent, saved)
        self._function = _differentiable(name, implementation, *rules)
        tags = [
            getattr(torch.Tag, tag)
            for tag in ("pt2_compliant_tag", "needs_fixed_stride_order")
            if hasattr(torch.Tag, tag)
        ]
        _library.define(name + schema.format(_PARAMETERS), tags=tags)
        _library.impl(name, _flattened(implementation), "CompositeExplicitAutograd")
        self._dispatched: Callable[..., Any] = getattr(torch.ops.convt3d_gemm, name).default
        qualified = f"convt3d_gemm::{name}"
        if hasattr(torch.library, "register_fake"):  # PyTorch 2.4 and later
            torch.library.register_fake(qualified, _flattened(fake), lib=_library)
        else:
            torch.library.impl_abstract(qualified, _flattened(fake), lib=_library)

        def below_autograd(*operands: Any) -> Any:
            # Function.forward differentiates nothing, but what is below may be another transform, which does.
            with torch._C._AutoDispatchBelowAutograd(), torch.enable_grad(), forward_gradients_enabled():
                return self._dispatched(*operands[:3], *operands[3], operands[4])

        function = _differentiable(name, below_autograd, *rules)

        def autograd(*operands: Any) -> Any:
            # What Function.apply is without torch.func, whose transforms the dispatcher peels off one by one.
            with single_level_autograd():
                return super(torch.autograd.Function, function).apply(*operands)  # type: ignore[misc]

        _library.impl(name, _flattened(autograd), "Autograd")

    def __call__(self, first: Any, second: Any, third: Any, parameters: Parameters, algorithm: str) -> Any:
        """Compute the operator."""
        if is_compiling() or not (is_plain_eager() and is_plain(first) and is_plain(second) and is_plain(third)):
            return self._dispatched(first, second, third, *parameters, algorithm)
        if torch.is_grad_enabled() and _needs_grad(first, second, third):
            return self._function.apply(first, second, third, parameters, algorithm)
        return self._implementation(first, second, third, parameters, algorithm)


def _needs_grad(first: Tensor, second: Tensor, third: Any) -> bool:
    return first.requires_grad or second.requires_grad or (isinstance(third, Tensor) and third.requires_grad)


def _flattened(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its parameters one by one, as a schema spells them."""

    def flat(first: Any, second: Any, third: Any, *arguments: Any) -> Any:
        return function(first, second, third, Parameters.make(*arguments[:5]), arguments[5])

    return flat


def _differentiable(
    name: str,
    implementation: Callable[..., Any],
    derivative: Callable[..., Gradients],
    tangent: Callable[..., Any],
    saved: int,
) -> type[torch.autograd.Function]:
    """The implementation with its derivatives, without the dispatcher's part; profilers and graphs call it `name`."""

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*inputs[:saved])
            ctx.save_for_forward(*inputs[:saved])
            ctx.size = None if isinstance(inputs[2], Tensor) else inputs[2]
            ctx.rest = inputs[3:]
            return implementation(*inputs)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            return (*derivative(ctx.needs_input_grad[:3], ctx.saved_tensors, *ctx.rest, *grads), None, None)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            return tangent(ctx.saved_tensors, ctx.size, *ctx.rest, *tangents[:3])

    return types.new_class(f"convt3d_gemm::{name}", (Differentiable,))


# ---- fake implementations: sizes, dtypes and memory formats, without data -------------------------------------------


def _fake_forward(input: Tensor, weight: Tensor, bias: Tensor | None, parameters: Parameters, algorithm: str) -> Tensor:
    selection.check_tensors("input", input, weight=weight, bias=bias)
    size = native.forward(input, weight, bias, parameters).shape
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=memory_format_of(input))


def _fake_grad_input(
    grad_output: Tensor, weight: Tensor, input_size: torch.Size, parameters: Parameters, algorithm: str
) -> Tensor:
    selection.check_tensors("grad_output", grad_output, weight=weight)
    size = (grad_output.size(0), weight.size(0), *input_size)
    memory_format = memory_format_of(grad_output)
    return torch.empty(size, dtype=weight.dtype, device=weight.device, memory_format=memory_format)


def _fake_grad_weight(
    grad_output: Tensor, input: Tensor, kernel_size: torch.Size, parameters: Parameters, algorithm: str
) -> Tensor:
    selection.check_tensors("grad_output", grad_output, input=input)
    size = (input.size(1), grad_output.size(1) // max(parameters.groups, 1), *kernel_size)
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=memory_format_of(input))


def _fake_grad_input_weight(
    grad_output: Tensor, input: Tensor, weight: Tensor, parameters: Parameters, algorithm: str
) -> tuple[Tensor, Tensor]:
    selection.check_tensors("grad_output", grad_output, input=input, weight=weight)
    memory_format = memory_format_of(input)
    return (
        torch.empty_like(input, memory_format=memory_format),
        torch.empty_like(weight, memory_format=memory_format),
    )


# ---- derivatives ----------------------------------------------------------------------------------------------------

Needs = tuple[bool, bool, bool]


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return first if second is None else second
    return first + second


def _derivative_of_forward(
    needs: Needs, saved: tuple[Tensor, ...], parameters: Parameters, algorithm: str, grad: Tensor | None
) -> Gradients:
    if grad is None:
        return None, None, None
    input, weight = saved
    for_input = for_weight = None
    if needs[0] and needs[1]:
        for_input, for_weight = grad_input_weight(grad, input, weight, parameters, algorithm)
    elif needs[0]:
        for_input = grad_input(grad, weight, input.shape[2:], parameters, algorithm)
    elif needs[1]:
        for_weight = grad_weight(grad, input, weight.shape[2:], parameters, algorithm)
    return for_input, for_weight, grad.sum((0, 2, 3, 4)) if needs[2] else None


def _derivative_of_grad_input(
    needs: Needs, saved: tuple[Tensor, ...], parameters: Parameters, algorithm: str, grad: Tensor | None
) -> Gradients:
    if grad is None:
        return None, None, None
    grad_output, weight = saved
    return (
        forward(grad, weight, None, parameters, algorithm) if needs[0] else None,
        grad_weight(grad_output, grad, weight.shape[2:], parameters, algorithm) if needs[1] else None,
        None,
    )


def _derivative_of_grad_weight(
    needs: Needs, saved: tuple[Tensor, ...], parameters: Parameters, algorithm: str, grad: Tensor | None
) -> Gradients:
    if grad is None:
        return None, None, None
    grad_output, input = saved
    return (
        forward(input, grad, None, parameters, algorithm) if needs[0] else None,
        grad_input(grad_output, grad, input.shape[2:], parameters, algorithm) if needs[1] else None,
        None,
    )


def _derivative_of_grad_input_weight(
    needs: Needs,
    saved: tuple[Tensor, ...],
    parameters: Parameters,
    algorithm: str,
    by_input: Tensor | None,
    by_weight: Tensor | None,
) -> Gradients:
    grad_output, input, weight = saved
    through_input = _derivative_of_grad_input(
        (needs[0], needs[2], False), (grad_output, weight), parameters, algorithm, by_input
    )
    through_weight = _derivative_of_grad_weight(
        (needs[0], needs[1], False), (grad_output, input), parameters, algorithm, by_weight
    )
    return _sum(through_input[0], through_weight[0]), through_weight[1], through_input[1]


Tangents = tuple["Tensor | None", "Tensor | None"]


def _bilinear(operator: Operator, operands: tuple[Tensor, ...], tangents: Tangents, *rest: Any) -> Tensor | None:
    """The tangent of `operator`, from those of its two operands."""
    by_first = None if tangents[0] is None else operator(tangents[0], operands[1], *rest)
    by_second = None if tangents[1] is None else operator(operands[0], tangents[1], *rest)
    return _sum(by_first, by_second)


def _tangent_of_forward(saved: tuple[Tensor, ...], size: None, *rest: Any) -> Tensor | None:
    *with_parameters, of_input, of_weight, of_bias = rest
    input, weight = saved
    if of_bias is None:
        return _bilinear(forward, (input, weight), (of_input, of_weight), None, *with_parameters)
    by_others = forward(torch.zeros_like(input) if of_input is None else of_input, weight, of_bias, *with_parameters)
    return _sum(by_others, None if of_weight is None else forward(input, of_weight, None, *with_parameters))


def _tangent_of_grad_input(saved: tuple[Tensor, ...], size: Any, *rest: Any) -> Tensor | None:
    *with_parameters, of_grad_output, of_weight, _ = rest
    return _bilinear(grad_input, saved, (of_grad_output, of_weight), size, *with_parameters)


def _tangent_of_grad_weight(saved: tuple[Tensor, ...], size: Any, *rest: Any) -> Tensor | None:
    *with_parameters, of_grad_output, of_input, _ = rest
    return _bilinear(grad_weight, saved, (of_grad_output, of_input), size, *with_parameters)


def _tangent_of_grad_input_weight(saved: tuple[Tensor, ...], size: None, *rest: Any) -> Tangents:
    *with_parameters, of_grad_output, of_input, of_weight = rest
    grad_output, input, weight = saved
    through_input = _tangent_of_grad_input(
        (grad_output, weight), input.shape[2:], *with_parameters, of_grad_output, of_weight, None
    )
    through_weight = _tangent_of_grad_weight(
        (grad_output, input), weight.shape[2:], *with_parameters, of_grad_output, of_input, None
    )
    # Of several results, each has to have a tangent.
    return (
        torch.zeros_like(input) if through_input is None else through_input,
        torch.zeros_like(weight) if through_weight is None else through_weight,
    )


# ---- the operators --------------------------------------------------------------------------------------------------

forward = Operator(
    "forward",
    "(Tensor input, Tensor weight, Tensor? bias, {}) -> Tensor",
    selection.forward,
    _fake_forward,
    _derivative_of_forward,
    _tangent_of_forward,
    saved=2,
)
grad_input = Operator(
    "grad_input",
    "(Tensor grad_output, Tensor weight, SymInt[3] input_size, {}) -> Tensor",
    selection.grad_input,
    _fake_grad_input,
    _derivative_of_grad_input,
    _tangent_of_grad_input,
    saved=2,
)
grad_weight = Operator(
    "grad_weight",
    "(Tensor grad_output, Tensor input, SymInt[3] kernel_size, {}) -> Tensor",
    selection.grad_weight,
    _fake_grad_weight,
    _derivative_of_grad_weight,
    _tangent_of_grad_weight,
    saved=2,
)
grad_input_weight = Operator(
    "grad_input_weight",
    "(Tensor grad_output, Tensor input, Tensor weight, {}) -> (Tensor, Tensor)",
    selection.grad_input_weight,
    _fake_grad_input_weight,
    _derivative_of_grad_input_weight,
    _tangent_of_grad_input_weight,
    saved=3,
)


# ---- operations, as torch.utils.flop_counter counts them ------------------------------------------------------------


def _register_operations() -> None:
    from torch.utils.flop_counter import register_flop_formula

    names = torch.ops.convt3d_gemm

    @register_flop_formula(names.forward)
    def _of_forward(input: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
        return operations_of(input, weight)

    @register_flop_formula(names.grad_input)
    def _of_grad_input(grad_output: torch.Size, weight: torch.Size, *_: Any, out_shape: torch.Size, **__: Any) -> int:
        return operations_of(out_shape, weight)

    @register_flop_formula(names.grad_weight)
    def _of_grad_weight(grad_output: torch.Size, input: torch.Size, *_: Any, out_shape: torch.Size, **__: Any) -> int:
        return operations_of(input, out_shape)

    @register_flop_formula(names.grad_input_weight)
    def _of_both(grad_output: torch.Size, input: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
        return 2 * operations_of(input, weight)


_register_operations()
