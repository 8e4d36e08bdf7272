"""Gradients of every order: against finite differences, against PyTorch's own, and reproducible."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from cases import ALGORITHMS, BOUNDS, LAYOUTS, NAMED, OPERATORS, Case, Tensors, relative_error, tf32
from convt3d_gemm import ConvTranspose3d, conv_transpose3d

#: Small enough for finite differences over every number.
SMALL = {
    "strided": Case(2, 2, 3, size=(2, 1, 2), kernel=(2, 3, 2), padding=(0, 1, 1), output_padding=(1, 0, 1)),
    "grouped, dilated": Case(1, 4, 2, groups=2, size=(2, 2, 1), kernel=(2, 1, 2), dilation=(2, 1, 3)),
    "depthwise": Case(2, 3, 3, groups=3, size=(1, 2, 2), kernel=(1, 2, 2), padding=(0, 0, 1)),
    "pointwise": Case(2, 3, 2, 1, (1, 2, 2), (1, 1, 1), (1, 1, 1), (0, 0, 0)),
    "kernel = stride": Case(1, 2, 2, size=(1, 2, 2), kernel=(1, 2, 2), stride=(1, 2, 2), padding=(0, 0, 0)),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Thousands of calls on a few numbers each: threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


NAMES = ("input", "weight", "bias")
SUBSETS = [subset for count in (1, 2, 3) for subset in itertools.combinations(NAMES, count)]


@dataclass
class Leaves:
    """The tensors of a case, of which some require gradients."""

    input: Tensor
    weight: Tensor
    bias: Tensor
    wanted: list[Tensor]


def leaves_of(
    case: Case, wanted: Sequence[str], layout: torch.memory_format, device: torch.device, dtype: torch.dtype
) -> Leaves:
    tensors = case.tensors(device, dtype, layout, seed=1)
    named = {name: getattr(tensors, name) for name in NAMES}
    return Leaves(**named, wanted=[named[name].requires_grad_() for name in wanted])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    ("wanted", "with_bias"),
    [(subset, True) for subset in SUBSETS] + [(subset, False) for subset in SUBSETS if "bias" not in subset],
)
@pytest.mark.parametrize("name", SMALL)
def test_first_and_second_derivatives(
    name: str,
    wanted: tuple[str, ...],
    with_bias: bool,
    layout: torch.memory_format,
    algorithm: str,
    device: torch.device,
) -> None:
    case = SMALL[name]
    leaves = leaves_of(case, wanted, layout, device, torch.float64)

    def function(*_: Tensor) -> Tensor:
        bias = leaves.bias if with_bias else None
        return conv_transpose3d(leaves.input, leaves.weight, bias, **case.parameters, algorithm=algorithm)

    assert gradcheck(function, leaves.wanted, nondet_tol=0.0, fast_mode=True)
    assert gradgradcheck(function, leaves.wanted, nondet_tol=0.0, fast_mode=True)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_every_element_of_the_jacobian(
    name: str, layout: torch.memory_format, algorithm: str, device: torch.device
) -> None:
    case = SMALL[name]
    leaves = leaves_of(case, NAMES, layout, device, torch.float64)

    def function(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return conv_transpose3d(input, weight, bias, **case.parameters, algorithm=algorithm)

    assert gradcheck(function, leaves.wanted, nondet_tol=0.0)


def _operators(case: Case, tensors: Tensors, algorithm: str) -> dict[str, tuple[Callable[..., Any], list[Tensor]]]:
    """Each operator as a function of the tensors that it can be differentiated by."""
    operators, parameters = torch.ops.convt3d_gemm, case.operator_parameters(algorithm)
    input, weight, bias, grad_output = tensors.input, tensors.weight, tensors.bias, tensors.grad_output
    return {
        "forward": (lambda x, w, b: operators.forward(x, w, b, *parameters), [input, weight, bias]),
        "grad_input": (
            lambda g, w: operators.grad_input(g, w, input.shape[2:], *parameters),
            [grad_output, weight],
        ),
        "grad_weight": (
            lambda g, x: operators.grad_weight(g, x, weight.shape[2:], *parameters),
            [grad_output, input],
        ),
        "grad_input_weight": (
            lambda g, x, w: operators.grad_input_weight(g, x, w, *parameters),
            [grad_output, input, weight],
        ),
    }


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", ["strided", "grouped, dilated", "pointwise"])
def test_operators_themselves(
    name: str, operator: str, layout: torch.memory_format, algorithm: str, device: torch.device
) -> None:
    tensors = SMALL[name].tensors(device, torch.float64, layout, seed=2)
    function, arguments = _operators(SMALL[name], tensors, algorithm)[operator]
    for count in range(1, len(arguments) + 1):
        for wanted in itertools.combinations(range(len(arguments)), count):
            leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(arguments)]
            assert gradcheck(function, leaves, nondet_tol=0.0, fast_mode=True)
            assert gradgradcheck(function, leaves, nondet_tol=0.0, fast_mode=True)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("result", [0, 1])
def test_one_of_two_results_differentiated(result: int, algorithm: str, device: torch.device) -> None:
    """Where only one of grad_input_weight's results is used, the other's gradient is not there at all."""
    case = SMALL["strided"]
    tensors = case.tensors(device, torch.float64, torch.contiguous_format, seed=3)
    leaves = [t.requires_grad_() for t in (tensors.grad_output, tensors.input, tensors.weight)]
    together = torch.ops.convt3d_gemm.grad_input_weight(*leaves, *case.operator_parameters(algorithm))[result]
    unused = leaves[1 if result == 0 else 2]
    used = [leaf for leaf in leaves if leaf is not unused]
    function, _ = _operators(case, tensors, algorithm)["grad_input" if result == 0 else "grad_weight"]
    alone = function(leaves[0], leaves[2] if result == 0 else leaves[1])
    direction = torch.randn_like(alone)
    results = torch.autograd.grad(together, leaves, direction, allow_unused=True)
    expected = torch.autograd.grad(alone, used, direction)
    assert results[1 if result == 0 else 2] is None
    assert relative_error([r for r in results if r is not None], expected) <= BOUNDS[torch.float64]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", ["depthwise", "grouped, dilated"])
def test_third_derivative(name: str, layout: torch.memory_format, algorithm: str, device: torch.device) -> None:
    case = SMALL[name]
    leaves = leaves_of(case, NAMES, layout, device, torch.float64)

    def third(function: Callable[..., Tensor], **keywords: Any) -> tuple[Tensor, ...]:
        value = function(leaves.input, leaves.weight, leaves.bias, **case.parameters, **keywords).pow(4).sum()
        for order in range(3):
            grads = torch.autograd.grad(value, leaves.wanted, create_graph=order < 2)
            value = torch.stack([grad.pow(2).mean() for grad in grads]).sum()
        return grads

    expected = third(torch.nn.functional.conv_transpose3d)
    assert relative_error(third(conv_transpose3d, algorithm=algorithm), expected) <= BOUNDS[torch.float64]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("wanted", SUBSETS, ids="-".join)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", ["odd sizes", "two groups", "pointwise", "kernel = stride"])
def test_native_gradients(
    name: str, layout: torch.memory_format, wanted: tuple[str, ...], algorithm: str, device: torch.device
) -> None:
    """First derivatives in float32, and those of their squares, against PyTorch's in float64."""
    case = NAMED[name]

    def derivatives(dtype: torch.dtype, algorithm: str) -> list[Tensor]:
        leaves = leaves_of(case, wanted, layout, device, torch.float32)
        given = [t.to(dtype) for t in (leaves.input, leaves.weight, leaves.bias)]
        output = conv_transpose3d(given[0], given[1], given[2], **case.parameters, algorithm=algorithm)
        first = torch.autograd.grad(output.pow(3).sum(), leaves.wanted, create_graph=True)
        penalty = torch.stack([grad.pow(2).sum() for grad in first]).sum()
        return [*first, *torch.autograd.grad(penalty, leaves.wanted)]

    with tf32(False):
        results = derivatives(torch.float32, algorithm)
    expected = [reference.double() for reference in derivatives(torch.float64, "native")]
    # The second derivative sums products of four rounded numbers, so it may be off by as many roundings more.
    assert relative_error(results[: len(wanted)], expected[: len(wanted)]) <= 2 * BOUNDS[torch.float32]
    assert relative_error(results, expected) <= 4 * BOUNDS[torch.float32]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", ["plain", "depthwise", "pointwise", "kernel = stride", "many channels"])
def test_reproducible(
    name: str, layout: torch.memory_format, dtype: torch.dtype, algorithm: str, device: torch.device
) -> None:
    """Output and gradients are the same to the last bit, from one graph or from two."""
    case = NAMED[name]
    grad_output = case.tensors(device, dtype, layout, seed=1).grad_output

    def run() -> tuple[list[Tensor], list[Tensor]]:
        leaves = leaves_of(case, NAMES, layout, device, dtype)
        output = conv_transpose3d(leaves.input, leaves.weight, leaves.bias, **case.parameters, algorithm=algorithm)
        once = torch.autograd.grad(output, leaves.wanted, grad_output, retain_graph=True)
        again = torch.autograd.grad(output, leaves.wanted, grad_output)
        return [output, *once], [output, *again]

    first, *others = itertools.chain(*(run() for _ in range(3)))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_freed_graph(device: torch.device) -> None:
    leaves = leaves_of(SMALL["strided"], NAMES, torch.contiguous_format, device, torch.float32)
    output = conv_transpose3d(leaves.input, leaves.weight, leaves.bias, stride=2, algorithm="gemm").sum()
    torch.autograd.backward(output)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.backward(output)


def test_saved_tensor_changed_in_place(device: torch.device) -> None:
    leaves = leaves_of(SMALL["strided"], ["weight"], torch.contiguous_format, device, torch.float32)
    output = conv_transpose3d(leaves.input, leaves.weight, stride=2, algorithm="gemm").sum()
    leaves.input.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(output)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_checkpointed(algorithm: str, device: torch.device) -> None:
    from torch.utils.checkpoint import checkpoint

    case = SMALL["strided"]
    leaves = leaves_of(case, NAMES, torch.contiguous_format, device, torch.float64)

    def function(input: Tensor) -> Tensor:
        return conv_transpose3d(input, leaves.weight, leaves.bias, **case.parameters, algorithm=algorithm).tanh()

    expected = torch.autograd.grad(function(leaves.input).sum(), leaves.wanted)
    output = checkpoint(function, leaves.input, use_reentrant=False)
    results = torch.autograd.grad(output.sum(), leaves.wanted)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "auto"])
def test_training(algorithm: str, layout: torch.memory_format, device: torch.device) -> None:
    """A small decoder trained with either layer has the same losses, to rounding."""

    def losses(make_layer: Callable[..., torch.nn.Module], **keywords: Any) -> Tensor:
        torch.manual_seed(5)
        model = torch.nn.Sequential(
            make_layer(8, 6, 3, stride=2, padding=1, output_padding=1, **keywords),
            torch.nn.BatchNorm3d(6),
            torch.nn.SiLU(),
            make_layer(6, 6, 3, padding=1, groups=3, **keywords),
            torch.nn.SiLU(),
            make_layer(6, 1, 2, stride=2, **keywords),
        )
        model = model.to(device, memory_format=layout)  # type: ignore[call-overload]
        input = torch.randn(3, 8, 3, 4, 3).to(device, memory_format=layout)
        target = torch.randn(3, 1, 12, 16, 12).to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        history = []
        for _ in range(10):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(input), target)
            torch.autograd.backward(loss)
            optimizer.step()
            history.append(loss.detach())
        return torch.stack(history)

    with tf32(False):
        expected = losses(torch.nn.ConvTranspose3d)
        results = losses(ConvTranspose3d, algorithm=algorithm)
    assert expected[-1] < 0.98 * expected[0]
    torch.testing.assert_close(results, expected, rtol=1e-4, atol=0)


# ---- forward mode, and torch.func --------------------------------------------------------------------------------

FUNC_WARNINGS = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning",  # make_dual's own
    "ignore:There is a performance drop:UserWarning",  # vmap goes through the samples one by one
)


@FUNC_WARNINGS
@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "native"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("wanted", SUBSETS)
def test_forward_mode(
    wanted: tuple[str, ...], layout: torch.memory_format, algorithm: str, device: torch.device
) -> None:
    case = SMALL["strided"]
    leaves = leaves_of(case, wanted, layout, device, torch.float64)

    def function(*arguments: Tensor) -> Tensor:
        named: dict[str, Any] = {"input": leaves.input, "weight": leaves.weight, "bias": leaves.bias}
        named.update(zip(wanted, arguments, strict=True))
        return conv_transpose3d(**named, **case.parameters, algorithm=algorithm)

    checks = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert gradcheck(function, leaves.wanted, nondet_tol=0.0, fast_mode=False, **checks)
    assert gradgradcheck(function, leaves.wanted, nondet_tol=0.0, fast_mode=True, check_fwd_over_rev=True)


@FUNC_WARNINGS
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_forward_mode_of_operators(operator: str, algorithm: str, device: torch.device) -> None:
    tensors = SMALL["grouped, dilated"].tensors(device, torch.float64, torch.contiguous_format, seed=2)
    function, arguments = _operators(SMALL["grouped, dilated"], tensors, algorithm)[operator]
    for count in range(1, len(arguments) + 1):
        for chosen in itertools.combinations(range(len(arguments)), count):
            given = [tensor.detach().requires_grad_(i in chosen) for i, tensor in enumerate(arguments)]
            assert gradcheck(function, given, check_forward_ad=True, fast_mode=True)


def _functions(case: Case, algorithm: str) -> list[Callable[..., Tensor]]:
    """This package's and PyTorch's, as scalars that depend on each operand more than linearly."""

    def ours(*operands: Any) -> Tensor:
        return conv_transpose3d(*operands, **case.parameters, algorithm=algorithm).sin().sum()

    def theirs(*operands: Any) -> Tensor:
        return torch.nn.functional.conv_transpose3d(*operands, **case.parameters).sin().sum()

    return [ours, theirs]


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor], list[Tensor]], Any]] = {
    "grad": lambda function, operands: torch.func.grad(function, argnums=(0, 1, 2))(*operands),
    "jvp": lambda function, operands: torch.func.jvp(function, tuple(operands), tuple(x.cos() for x in operands))[1],
    "vjp": lambda function, operands: torch.func.vjp(function, *operands)[1](operands[0].new_tensor(2.0)),
    "jvp of grad": lambda function, operands: torch.func.jvp(
        torch.func.grad(function, argnums=(0, 1, 2)), tuple(operands), tuple(x.cos() for x in operands)
    )[1],
    "hessian": lambda function, operands: torch.func.hessian(function, argnums=(0, 1, 2))(*operands)[1],
    "grad of each sample": lambda function, operands: torch.func.vmap(
        torch.func.grad(lambda input, *rest: function(input[None], *rest), argnums=(0, 1)), (0, None, None)
    )(*operands),
}


@FUNC_WARNINGS
@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "native", "auto"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_functional_transforms(transform: str, algorithm: str, device: torch.device) -> None:
    case = SMALL["kernel = stride"] if transform == "hessian" else SMALL["strided"]
    tensors = case.tensors(device, torch.float64, torch.contiguous_format, seed=5)
    operands = [tensors.input, tensors.weight, tensors.bias]
    results, expected = (TRANSFORMS[transform](function, operands) for function in _functions(case, algorithm))
    torch.testing.assert_close(results, expected, rtol=1e-10, atol=1e-10)


@FUNC_WARNINGS
@pytest.mark.skipif(not hasattr(torch.library, "register_autograd"), reason="needs PyTorch 2.4")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("transform", ["grad", "jvp", "jvp of grad"])
def test_compiled_functional_transforms(transform: str, backend: str, device: torch.device) -> None:
    """Never a derivative that was dropped on the way."""
    case = SMALL["strided"]
    tensors = case.tensors(device, torch.float64, torch.contiguous_format, seed=5)
    operands = [tensors.input, tensors.weight, tensors.bias]
    ours, theirs = _functions(case, "direct")
    compiled = torch.compile(lambda *given: TRANSFORMS[transform](ours, list(given)), backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(*operands), TRANSFORMS[transform](theirs, operands), rtol=1e-10, atol=1e-10)


@FUNC_WARNINGS
@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "native"])
def test_tangents_of_a_compiled_layer(algorithm: str, device: torch.device) -> None:
    case, forward_ad = SMALL["strided"], torch.autograd.forward_ad
    tensors = case.tensors(device, torch.float64, torch.contiguous_format, seed=5)
    tangent = torch.ones_like(tensors.input)

    def ours(input: Tensor) -> Tensor:
        return conv_transpose3d(input, tensors.weight, tensors.bias, **case.parameters, algorithm=algorithm)

    with forward_ad.dual_level():
        output = torch.compile(ours, backend="eager")(forward_ad.make_dual(tensors.input, tangent))
        result = forward_ad.unpack_dual(output).tangent
    assert result is not None
    expected = torch.nn.functional.conv_transpose3d(tangent, tensors.weight, None, **case.parameters)
    torch.testing.assert_close(result, expected)
