"""The operators under opcheck, fake tensors, torch.compile and torch.export: from PyTorch 2.6 on."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import (
    ALGORITHMS,
    BOUNDS,
    LAYOUTS,
    NAMED,
    OPERATORS,
    Tensors,
    arguments_of,
    call,
    ours,
    relative_error,
    significant_strides,
    tf32,
)
from convt3d_gemm import ConvTranspose3d, algorithms, conv_transpose3d

pytestmark = pytest.mark.skipif(torch.__version__ < "2.6", reason="PyTorch before 2.6")

HAS_COMPILER = any(shutil.which(name) for name in ("g++", "clang++", "c++"))


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ---- opcheck -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "native"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_opcheck(
    operator: str, layout: torch.memory_format, algorithm: str, requires_grad: bool, device: torch.device
) -> None:
    case = NAMED["two groups"]
    tensors = case.tensors(device, torch.float64, layout, seed=1)
    arguments = arguments_of(case, tensors, operator, algorithm)
    for argument in arguments:
        if isinstance(argument, Tensor):
            argument.requires_grad_(requires_grad)
    torch.library.opcheck(getattr(torch.ops.convt3d_gemm, operator).default, arguments)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("odd sizes", torch.float32), ("pointwise", torch.float16), ("kernel = stride", torch.bfloat16)],
)
@pytest.mark.parametrize("operator", OPERATORS)
def test_opcheck_of_more_arguments(
    operator: str, name: str, dtype: torch.dtype, algorithm: str, device: torch.device
) -> None:
    case = NAMED[name]
    tensors = case.tensors(device, dtype, torch.channels_last_3d, seed=2)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    overload = getattr(torch.ops.convt3d_gemm, operator).default
    torch.library.opcheck(overload, arguments_of(case, tensors, operator, algorithm), test_utils=tests)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_opcheck_without_bias(algorithm: str, device: torch.device) -> None:
    case = NAMED["plain"]
    tensors = case.tensors(device, torch.float32, torch.contiguous_format, seed=3)
    arguments = (tensors.input.requires_grad_(), tensors.weight, None, *case.operator_parameters(algorithm))
    torch.library.opcheck(torch.ops.convt3d_gemm.forward.default, arguments)


# ---- fake tensors ------------------------------------------------------------------------------------------


def _views(tensors: Tensors) -> Tensors:
    """Slices with gaps between their rows, and a gradient of one number."""
    return Tensors(
        torch.cat([tensors.input] * 2, 1)[:, : tensors.input.size(1)],
        tensors.weight.transpose(2, 4).contiguous().transpose(2, 4),
        tensors.bias,
        tensors.grad_output[:1, :1, :1, :1, :1].expand_as(tensors.grad_output),
    )


def _whole(tensors: Tensors) -> Tensors:
    return tensors


KINDS = ["plain", "two groups", "depthwise", "pointwise", "kernel = stride", "many channels", "a line", "empty batch"]


@pytest.mark.parametrize(
    ("algorithm", "dtype", "view", "names"),
    [
        ("gemm", torch.float32, _whole, list(NAMED)),
        ("gemm", torch.bfloat16, _views, KINDS),
        ("direct", torch.float32, _whole, KINDS),
        ("direct", torch.bfloat16, _views, KINDS),
        ("auto", torch.float16, _whole, KINDS),
        ("native", torch.float32, _whole, KINDS),
        ("native", torch.float64, _views, KINDS),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_fake_results_are_like_real_ones(
    operator: str,
    layout: torch.memory_format,
    algorithm: str,
    dtype: torch.dtype,
    view: Callable[[Tensors], Tensors],
    names: list[str],
    device: torch.device,
) -> None:
    from torch._subclasses import FakeTensorMode

    mode = FakeTensorMode()
    for name in names:
        case = NAMED[name]
        arguments = arguments_of(case, view(case.tensors(device, dtype, layout, seed=4)), operator, algorithm)
        real = call(operator, arguments)
        with mode:
            fake = call(operator, tuple(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments))
        for made, promised in zip(real, fake, strict=True):
            assert made.shape == promised.shape, name
            assert made.dtype == promised.dtype, name
            assert made.device == promised.device, name
            assert significant_strides(made) == significant_strides(promised), name


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_meta_results_are_like_real_ones(operator: str, algorithm: str) -> None:
    case = NAMED["odd sizes"]
    tensors = case.tensors(torch.device("cpu"), torch.float32, torch.channels_last_3d, seed=5)
    arguments = arguments_of(case, tensors, operator, algorithm)
    meta = call(operator, tuple(a.to("meta") if isinstance(a, Tensor) else a for a in arguments))
    for made, promised in zip(call(operator, arguments), meta, strict=True):
        assert promised.is_meta
        assert (made.shape, made.dtype, made.stride()) == (promised.shape, promised.dtype, promised.stride())


# ---- torch.compile -----------------------------------------------------------------------------------------


class Decoder(torch.nn.Module):
    """Two layers with work before, between and after them, for a compiler to fuse."""

    def __init__(self, algorithm: str) -> None:
        super().__init__()
        self.first = ConvTranspose3d(4, 6, 3, 2, 1, output_padding=1, groups=2, algorithm=algorithm)
        self.second = ConvTranspose3d(6, 3, 2, 2, bias=False, algorithm=algorithm)

    def forward(self, input: Tensor) -> Tensor:
        hidden = torch.nn.functional.silu(self.first(input * 2))
        result: Tensor = self.second(hidden).tanh() + 1
        return result


def _results(model: Callable[[Tensor], Tensor], parameters: list[Tensor], input: Tensor) -> list[Tensor]:
    input = input.detach().requires_grad_()
    output = model(input)
    return [output, *torch.autograd.grad(output.square().sum(), [input, *parameters])]


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("algorithm", "layout"),
    [*itertools.product(ALGORITHMS, LAYOUTS), ("native", torch.channels_last_3d)],
)
def test_compiled_model(layout: torch.memory_format, algorithm: str, dynamic: bool, device: torch.device) -> None:
    """Forward and backward equal eager ones, for sizes that change as well."""
    torch.manual_seed(0)
    model = Decoder(algorithm).to(device, torch.float64).to(memory_format=layout)  # type: ignore[call-overload]
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    parameters = list(model.parameters())
    for size in ((2, 4, 3, 4, 5), (3, 4, 5, 3, 4)):
        input = torch.randn(size, dtype=torch.float64).to(device).contiguous(memory_format=layout)
        results = _results(compiled, parameters, input)
        expected = _results(model, parameters, input)
        assert relative_error(results, expected) <= BOUNDS[torch.float64]
        assert [result.stride() for result in results] == [result.stride() for result in expected]


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own
@pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")
@pytest.mark.parametrize("algorithm", ["auto", "direct"])
def test_compiled_by_inductor(algorithm: str, device: torch.device) -> None:
    torch.manual_seed(0)
    model = Decoder(algorithm).to(device).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    compiled = torch.compile(model, fullgraph=True)
    input = torch.randn(2, 4, 3, 4, 5).to(device).contiguous(memory_format=torch.channels_last_3d)
    parameters = list(model.parameters())
    with tf32(False):
        results = _results(compiled, parameters, input)
        expected = _results(model, parameters, input)
    assert relative_error(results, [tensor.double() for tensor in expected]) <= BOUNDS[torch.float32]


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_compiled_operator_stays_whole(operator: str, algorithm: str, device: torch.device) -> None:
    """One node of the graph, in one graph; its gradients too."""
    case = NAMED["odd sizes"]
    tensors = case.tensors(device, torch.float64, torch.contiguous_format, seed=6)
    nodes: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        nodes.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    results = compiled(case, tensors, operator, algorithm)
    assert [node for node in nodes if "convt3d_gemm" in node] == [f"convt3d_gemm.{operator}"]
    assert all(torch.equal(a, b) for a, b in zip(results, ours(case, tensors, operator, algorithm), strict=True))


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_functional(device: torch.device) -> None:
    """Ints, tuples and lists as parameters, an unbatched input, and autocast."""
    tensors = NAMED["plain"].tensors(device, torch.float32, torch.contiguous_format, seed=7)
    lower = torch.bfloat16 if device.type == "cpu" else torch.float16

    def function(input: Tensor, weight: Tensor) -> list[Tensor]:
        batched = conv_transpose3d(input, weight, tensors.bias, 2, (1, 1, 1), 0, 1, [1, 1, 1])
        unbatched = conv_transpose3d(input[0], weight, stride=3)
        with torch.autocast(device.type, dtype=lower):
            lowered = conv_transpose3d(input, weight, stride=2, output_padding=1)
        return [batched, unbatched, lowered]

    results = torch.compile(function, fullgraph=True, backend="aot_eager")(tensors.input, tensors.weight)
    expected = function(tensors.input, tensors.weight)
    assert [result.dtype for result in results] == [torch.float32, torch.float32, lower]
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


class Sized(torch.nn.Module):
    """Two layers of a decoder whose skip connections say how large their outputs are."""

    def __init__(self) -> None:
        super().__init__()
        self.first = ConvTranspose3d(2, 2, 3, stride=2, padding=1, algorithm="direct")
        self.second = ConvTranspose3d(2, 2, 3, stride=2, padding=1, algorithm="gemm")

    def forward(self, input: Tensor, skip: Tensor, last: Tensor) -> Tensor:
        between = self.first(input, output_size=skip.shape[2:]) + skip
        output: Tensor = self.second(between, output_size=last.shape[2:]) + last
        return output


def _sized_inputs(size: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    sizes = [[-(-extent // scale) for extent in size] for scale in (4, 2, 1)]
    input, skip, last = (torch.randn(1, 2, *each, dtype=torch.float64) for each in sizes)
    return input, skip, last


@pytest.mark.usefixtures("_fresh_compiler")
@torch.no_grad()
def test_one_graph_for_all_output_sizes() -> None:
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    model = Sized().double()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for size in itertools.product((9, 10, 15), (12, 13), (14, 11, 17)):
        inputs = _sized_inputs(size)
        assert relative_error([compiled(*inputs)], [model(*inputs)]) <= BOUNDS[torch.float64]
    assert graphs <= 2  # as of torch.nn.ConvTranspose3d


@pytest.mark.usefixtures("_fresh_compiler")
def test_bad_call_while_compiling(device: torch.device) -> None:
    tensors = NAMED["plain"].tensors(device, torch.float32, torch.contiguous_format, seed=8)
    compiled = torch.compile(conv_transpose3d, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="weight must have the same dtype as input"):
        compiled(tensors.input, tensors.weight.double())


# ---- torch.export ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # PyTorch's own
@pytest.mark.parametrize("algorithm", algorithms())
def test_export(algorithm: str) -> None:
    model = Decoder(algorithm).double().eval()
    input = torch.randn(2, 4, 3, 4, 5, dtype=torch.float64)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (input,), dynamic_shapes={"input": {0: batch}})
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("convt3d_gemm.forward.default") == 2
    larger = torch.randn(5, 4, 3, 4, 5, dtype=torch.float64)
    assert relative_error([program.module()(larger)], [model(larger)]) <= BOUNDS[torch.float64]


@pytest.mark.skipif(not hasattr(torch.export.Dim, "AUTO"), reason="needs PyTorch 2.6")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_export_with_output_sizes() -> None:
    model = Sized().double().eval()
    axes = dict.fromkeys((2, 3, 4), torch.export.Dim.AUTO)
    program = torch.export.export(model, _sized_inputs((10, 14, 18)), dynamic_shapes=(axes, axes, axes))
    for size in ((10, 14, 18), (9, 14, 19), (16, 13, 21)):
        inputs = _sized_inputs(size)
        assert relative_error([program.module()(*inputs)], [model(*inputs)]) <= BOUNDS[torch.float64]
