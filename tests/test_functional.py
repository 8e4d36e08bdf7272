"""`conv_transpose3d` and its gradients on hand-picked convolutions and tensors, against PyTorch's own."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cases import (
    ALGORITHMS,
    BOUNDS,
    LAYOUTS,
    NAMED,
    Case,
    Tensors,
    native,
    relative_error,
    significant_strides,
    tf32,
    workspace_limit,
)
from convt3d_gemm import algorithms, conv_transpose3d, replace_conv_transpose3d
from convt3d_gemm.binding import has_backend

REFERENCE = torch.nn.functional.conv_transpose3d


def with_gradients(case: Case, tensors: Tensors, algorithm: str) -> list[Tensor]:
    """The output and the gradients of input, weight and bias."""
    input, weight, bias = (t.detach().requires_grad_() for t in (tensors.input, tensors.weight, tensors.bias))
    output = conv_transpose3d(input, weight, bias, **case.parameters, algorithm=algorithm)
    return [output, *torch.autograd.grad(output, [input, weight, bias], tensors.grad_output)]


def reference_with_gradients(case: Case, tensors: Tensors) -> list[Tensor]:
    """The same in float64, from PyTorch."""
    return [
        *native(case, tensors, "forward", torch.float64),
        *native(case, tensors, "grad_input_weight", torch.float64),
        tensors.grad_output.double().sum((0, 2, 3, 4)),
    ]


def check(case: Case, tensors: Tensors, algorithm: str) -> None:
    with tf32(False):
        results = with_gradients(case, tensors, algorithm)
    expected = reference_with_gradients(case, tensors)
    assert relative_error(results, expected) <= BOUNDS[tensors.input.dtype]
    assert all(result.dtype == tensors.input.dtype for result in results)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", NAMED)
def test_values(
    name: str, layout: torch.memory_format, dtype: torch.dtype, algorithm: str, device: torch.device
) -> None:
    check(NAMED[name], NAMED[name].tensors(device, dtype, layout, seed=1), algorithm)


HALF = [
    "odd sizes",
    "depthwise",
    "pointwise",
    "kernel = stride",
    "a line",
    "many channels",
    "many channels, two groups",
]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", HALF)
def test_half_types(
    name: str, layout: torch.memory_format, dtype: torch.dtype, algorithm: str, device: torch.device
) -> None:
    check(NAMED[name], NAMED[name].tensors(device, dtype, layout, seed=2), algorithm)


@pytest.mark.parametrize("algorithm", algorithms())
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", ["plain", "depthwise", "empty batch"])
def test_every_algorithm(name: str, layout: torch.memory_format, algorithm: str, device: torch.device) -> None:
    check(NAMED[name], NAMED[name].tensors(device, torch.float32, layout, seed=3), algorithm)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", ["plain", "two groups", "pointwise", "kernel = stride", "many channels"])
def test_no_bias(name: str, algorithm: str, device: torch.device) -> None:
    case = NAMED[name]
    tensors = case.tensors(device, torch.float64, torch.contiguous_format, seed=4)
    expected = REFERENCE(tensors.input, tensors.weight, **case.parameters)
    result = conv_transpose3d(tensors.input, tensors.weight, **case.parameters, algorithm=algorithm)
    assert relative_error([result], [expected]) <= BOUNDS[torch.float64]


def test_positional_order() -> None:
    stated = re.match(r"\s*conv_transpose3d\((.*?)\) -> Tensor", str(REFERENCE.__doc__))
    assert stated is not None
    theirs = [(name, default) for name, _, default in (part.partition("=") for part in stated[1].split(", "))]
    parameters = list(inspect.signature(conv_transpose3d).parameters.values())
    positional = [parameter for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    empty = inspect.Parameter.empty
    assert [(p.name, "" if p.default is empty else str(p.default)) for p in positional] == theirs
    assert [(p.name, p.default) for p in parameters[len(positional) :]] == [("algorithm", "auto")]
    assert parameters[-1].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_positional_arguments(algorithm: str, device: torch.device) -> None:
    case = Case(stride=(2, 3, 4), padding=(1, 0, 2), output_padding=(1, 2, 0), dilation=(2, 3, 1), groups=2)
    tensors = case.tensors(device, torch.float64, torch.contiguous_format, seed=5)
    arguments: tuple[Any, ...] = (
        tensors.input,
        tensors.weight,
        tensors.bias,
        case.stride,
        case.padding,
        case.output_padding,
        case.groups,
        case.dilation,
    )
    result = conv_transpose3d(*arguments, algorithm=algorithm)
    assert relative_error([result], [REFERENCE(*arguments)]) <= BOUNDS[torch.float64]


# ---- forms that parameters come in -------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", algorithms())
@pytest.mark.parametrize(
    "form",
    [
        lambda value: value,
        lambda value: (value,),
        lambda value: [value] * 3,
        lambda value: (value, value, value),
        lambda value: torch.Size([value] * 3),
        lambda value: np.int64(value),
        lambda value: (np.int32(value),) * 3,
        lambda value: torch.tensor(value),
    ],
    ids=["int", "one", "list", "tuple", "Size", "int64", "int32s", "tensor"],
)
def test_forms_of_parameters(form: Callable[[int], Any], algorithm: str) -> None:
    case = Case(stride=(3, 3, 3), padding=(1, 1, 1), output_padding=(2, 2, 2), dilation=(2, 2, 2), groups=2)
    tensors = case.tensors(torch.device("cpu"), torch.float64, torch.contiguous_format, seed=6)
    given = {"stride": form(3), "padding": form(1), "output_padding": form(2), "dilation": form(2)}
    result = conv_transpose3d(tensors.input, tensors.weight, None, groups=2, **given, algorithm=algorithm)
    expected = REFERENCE(tensors.input, tensors.weight, None, **case.parameters)
    assert relative_error([result], [expected]) <= BOUNDS[torch.float64]


def test_numpy_groups() -> None:
    case = NAMED["two groups"]
    tensors = case.tensors(torch.device("cpu"), torch.float64, torch.contiguous_format, seed=7)
    groups: Any = np.int64(2)
    result = conv_transpose3d(tensors.input, tensors.weight, None, 2, 1, 0, groups, algorithm="gemm")
    expected = REFERENCE(tensors.input, tensors.weight, None, 2, 1, 0, 2)
    assert relative_error([result], [expected]) <= BOUNDS[torch.float64]


def test_parameters_are_not_remembered_by_identity() -> None:
    input, weight = torch.ones(1, 1, 3, 3, 3), torch.ones(1, 1, 2, 2, 2)
    stride: Any = torch.tensor(2)
    assert conv_transpose3d(input, weight, stride=stride).shape == (1, 1, 6, 6, 6)
    stride.fill_(3)
    assert conv_transpose3d(input, weight, stride=stride).shape == (1, 1, 8, 8, 8)


# ---- shapes and views of tensors ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "two groups", "pointwise", "one voxel"])
@pytest.mark.parametrize("algorithm", algorithms())
def test_unbatched(name: str, algorithm: str, device: torch.device) -> None:
    case = NAMED[name]
    tensors = case.tensors(device, torch.float64, torch.contiguous_format, seed=8)
    leaves = input, weight, bias = tensors.input[0], tensors.weight, tensors.bias
    for leaf in leaves:
        leaf.requires_grad_()
    output = conv_transpose3d(input, weight, bias, **case.parameters, algorithm=algorithm)
    expected = REFERENCE(input, weight, bias, **case.parameters)
    assert output.dim() == 4
    grad_output = tensors.grad_output[0]
    results = [output, *torch.autograd.grad(output, leaves, grad_output)]
    references = [expected, *torch.autograd.grad(expected, leaves, grad_output)]
    assert relative_error(results, references) <= BOUNDS[torch.float64]


@pytest.mark.parametrize("algorithm", algorithms())
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", ["plain", "depthwise", "pointwise", "kernel = stride"])
def test_empty_batch(name: str, layout: torch.memory_format, algorithm: str, device: torch.device) -> None:
    case = NAMED[name]
    full = case.tensors(device, torch.float32, layout, seed=9)
    tensors = Tensors(full.input[:0], full.weight, full.bias, full.grad_output[:0])
    output, grad_input, grad_weight, grad_bias = with_gradients(case, tensors, algorithm)
    assert output.shape == (0, *full.grad_output.shape[1:])
    assert grad_input.shape == (0, *full.input.shape[1:])
    assert torch.equal(grad_weight, torch.zeros_like(full.weight))
    assert torch.equal(grad_bias, torch.zeros_like(full.bias))


def _sliced(tensor: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(tensor, (1, 2, 2, 1, 1, 0), value=7.0)
    return padded[:, :, 1:, 2:-1, 1:-2]


def _every_other(tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(2, dim=4)[..., ::2]


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(3, 4).contiguous().transpose(3, 4)


def _samples_inside(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def _channels_within(tensor: Tensor) -> Tensor:
    wider = torch.cat([tensor, tensor, tensor], 1).contiguous(memory_format=torch.channels_last_3d)
    channels = tensor.size(1)
    return wider[:, channels : 2 * channels]


def _planes_within(tensor: Tensor) -> Tensor:
    wider = torch.cat([tensor, tensor], 2).contiguous(memory_format=torch.channels_last_3d)
    return wider[:, :, tensor.size(2) :]


def _off_by_one(tensor: Tensor) -> Tensor:
    """At an address that is a multiple of no vector's width."""
    storage = tensor.new_empty(tensor.numel() + 1)
    return storage[1:].as_strided(tensor.size(), tensor.stride(), 1).copy_(tensor)


def _off_by_one_channels_last(tensor: Tensor) -> Tensor:
    return _off_by_one(tensor.contiguous(memory_format=torch.channels_last_3d))


VIEWS = [
    _sliced,
    _every_other,
    _transposed,
    _samples_inside,
    _channels_within,
    _planes_within,
    _off_by_one,
    _off_by_one_channels_last,
]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("which", ["input", "weight", "grad_output", "all"])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", ["plain", "two groups", "pointwise", "kernel = stride"])
def test_views(name: str, view: Callable[[Tensor], Tensor], which: str, algorithm: str, device: torch.device) -> None:
    case = NAMED[name]
    tensors = case.tensors(device, torch.float32, torch.contiguous_format, seed=10)

    def viewed(tensor: Tensor, name: str) -> Tensor:
        view_of_it = view(tensor) if which in (name, "all") else tensor
        assert torch.equal(view_of_it, tensor)
        return view_of_it

    check(
        case,
        Tensors(
            viewed(tensors.input, "input"),
            viewed(tensors.weight, "weight"),
            tensors.bias.repeat_interleave(2)[::2] if which == "all" else tensors.bias,
            viewed(tensors.grad_output, "grad_output"),
        ),
        algorithm,
    )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_expanded(layout: torch.memory_format, algorithm: str, device: torch.device) -> None:
    case = NAMED["plain"]
    tensors = case.tensors(device, torch.float32, layout, seed=11)
    expanded = Tensors(
        tensors.input[:1].expand_as(tensors.input),
        tensors.weight[..., :1].expand_as(tensors.weight),
        tensors.bias[:1].expand_as(tensors.bias),
        tensors.grad_output[:1, :1, :1, :1, :1].expand_as(tensors.grad_output),
    )
    check(case, expanded, algorithm)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gradient_of_a_sum(algorithm: str, device: torch.device) -> None:
    """Autograd gives a gradient of one number, expanded."""
    case = NAMED["odd sizes"]
    tensors = case.tensors(device, torch.float64, torch.contiguous_format, seed=12)
    input, weight = tensors.input.requires_grad_(), tensors.weight.requires_grad_()
    results = torch.autograd.grad(
        conv_transpose3d(input, weight, **case.parameters, algorithm=algorithm).sum(), [input, weight]
    )
    expected = torch.autograd.grad(REFERENCE(input, weight, **case.parameters).sum(), [input, weight])
    assert relative_error(results, expected) <= BOUNDS[torch.float64]


@pytest.mark.parametrize("algorithm", algorithms())
@pytest.mark.parametrize("grad_layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", ["plain", "two groups", "depthwise", "pointwise", "kernel = stride"])
def test_layout_is_kept(
    name: str,
    layout: torch.memory_format,
    grad_layout: torch.memory_format,
    algorithm: str,
    device: torch.device,
) -> None:
    """Whatever the layout of the gradient that comes in: the input's decides."""
    case = NAMED[name]
    tensors = case.tensors(device, torch.float32, layout, seed=13)
    grad_output = tensors.grad_output.contiguous(memory_format=grad_layout)
    output, grad_input, grad_weight, _ = with_gradients(
        case, Tensors(tensors.input, tensors.weight, tensors.bias, grad_output), algorithm
    )
    assert tensors.input.is_contiguous(memory_format=layout)
    for result in (output, grad_input, grad_weight):
        assert significant_strides(result) == significant_strides(torch.empty(result.shape, memory_format=layout))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_layout_of_channels_last_slices(algorithm: str, device: torch.device) -> None:
    case = NAMED["plain"]
    tensors = case.tensors(device, torch.float32, torch.channels_last_3d, seed=14)
    for view in (_channels_within, _planes_within):
        output = conv_transpose3d(view(tensors.input), tensors.weight, **case.parameters, algorithm=algorithm)
        assert output.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_arguments_are_left_as_they_were(algorithm: str, device: torch.device) -> None:
    case = NAMED["two groups"]
    tensors = case.tensors(device, torch.float32, torch.contiguous_format, seed=15)
    before = [t.clone() for t in (tensors.input, tensors.weight, tensors.bias, tensors.grad_output)]
    with_gradients(case, tensors, algorithm)
    after = [tensors.input, tensors.weight, tensors.bias, tensors.grad_output]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


# ---- values that are not finite, and pieces ----------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize(
    "name", ["dilation, stride, a factor shared", "many channels, dilated", "eight channels a group", "depthwise"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_not_finite(dtype: torch.dtype, name: str, value: float, algorithm: str, device: torch.device) -> None:
    """One bad voxel spoils exactly the outputs that it reaches."""
    case = NAMED[name]
    tensors = case.tensors(device, dtype, torch.contiguous_format, seed=16)
    tensors.input[-1, 2, 1, 3, 2] = value
    result = conv_transpose3d(tensors.input, tensors.weight, tensors.bias, **case.parameters, algorithm=algorithm)
    expected = REFERENCE(tensors.input.float(), tensors.weight.float(), tensors.bias.float(), **case.parameters)
    assert not bool(expected.isfinite().all())
    assert torch.equal(result.isfinite(), expected.isfinite())


@pytest.mark.parametrize("algorithm", ["auto", "direct"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", [name for name in NAMED if name != "empty batch"])
def test_in_pieces(name: str, layout: torch.memory_format, algorithm: str, device: torch.device) -> None:
    with workspace_limit(1 << 14):
        check(NAMED[name], NAMED[name].tensors(device, torch.float64, layout, seed=17), algorithm)


# ---- autocast ----------------------------------------------------------------------------------------------

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("input_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_autocast(input_dtype: torch.dtype, weight_dtype: torch.dtype, device: torch.device) -> None:
    """The output's and the gradients' dtypes are PyTorch's, and so is what can't be mixed."""
    case = NAMED["plain"]
    lower = torch.bfloat16 if device.type == "cpu" else torch.float16
    tensors = case.tensors(device, torch.float32, torch.contiguous_format, seed=18)

    def run(function: Callable[..., Tensor], **keywords: Any) -> list[Tensor]:
        input = tensors.input.to(input_dtype).requires_grad_()
        weight, bias = (t.to(weight_dtype).requires_grad_() for t in (tensors.weight, tensors.bias))
        with torch.autocast(device.type, dtype=lower):
            output = function(input, weight, bias, **case.parameters, **keywords)
        return [output, *torch.autograd.grad(output, [input, weight, bias], torch.ones_like(output))]

    try:
        expected = run(REFERENCE)
    except RuntimeError:
        for algorithm in ALGORITHMS:
            with pytest.raises(RuntimeError, match="dtype"):
                run(conv_transpose3d, algorithm=algorithm)
        return
    for algorithm in algorithms():
        results = run(conv_transpose3d, algorithm=algorithm)
        assert [result.dtype for result in results] == [result.dtype for result in expected]
        doubles = [result.double() for result in expected]
        assert relative_error(results, doubles) <= 2 * BOUNDS[lower]


def test_autocast_switched_off(device: torch.device) -> None:
    case = NAMED["plain"]
    tensors = case.tensors(device, torch.float32, torch.contiguous_format, seed=19)
    lower = torch.bfloat16 if device.type == "cpu" else torch.float16
    with torch.autocast(device.type, dtype=lower), torch.autocast(device.type, enabled=False):
        output = conv_transpose3d(tensors.input, tensors.weight, tensors.bias, **case.parameters)
    assert output.dtype == torch.float32


# ---- modes of PyTorch --------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_inference_mode(algorithm: str, device: torch.device) -> None:
    case = NAMED["plain"]
    tensors = case.tensors(device, torch.float64, torch.contiguous_format, seed=20)
    expected = REFERENCE(tensors.input, tensors.weight, tensors.bias, **case.parameters)
    weight = tensors.weight.requires_grad_()
    with torch.inference_mode():
        result = conv_transpose3d(tensors.input, weight, tensors.bias, **case.parameters, algorithm=algorithm)
    assert result.is_inference()
    assert relative_error([result], [expected]) <= BOUNDS[torch.float64]


@pytest.mark.parametrize("algorithm", algorithms())
@pytest.mark.parametrize("requires_grad", [False, True])
def test_meta_tensors(algorithm: str, requires_grad: bool) -> None:
    case = NAMED["odd sizes"]
    tensors = case.tensors(torch.device("cpu"), torch.float32, torch.contiguous_format, seed=21)
    given = (tensors.input, tensors.weight, tensors.bias)
    input, weight, bias = (tensor.to("meta").requires_grad_(requires_grad) for tensor in given)
    result = conv_transpose3d(input, weight, bias, **case.parameters, algorithm=algorithm)
    assert result.is_meta
    assert result.shape == tensors.grad_output.shape
    assert result.dtype == torch.float32


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_one_thread_and_many(algorithm: str) -> None:
    case = NAMED["plain"]
    tensors = case.tensors(torch.device("cpu"), torch.float64, torch.contiguous_format, seed=22)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            check(case, tensors, algorithm)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


# ---- tensors that are not what their data say --------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", algorithms())
@pytest.mark.parametrize("which", ["input", "weight", "bias"])
def test_tensors_that_stand_for_their_negative(which: str, algorithm: str, device: torch.device) -> None:
    case = NAMED["plain"]
    tensors = case.tensors(device, torch.float64, torch.contiguous_format, seed=3)
    operands: dict[str, Any] = {"input": tensors.input, "weight": tensors.weight, "bias": tensors.bias}
    negative = torch._neg_view(operands[which])
    result = conv_transpose3d(**{**operands, which: negative}, **case.parameters, algorithm=algorithm)
    expected = conv_transpose3d(**{**operands, which: -operands[which]}, **case.parameters, algorithm="native")
    assert relative_error([result], [expected]) <= BOUNDS[torch.float64]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_subclasses_of_tensor(algorithm: str) -> None:
    class Named(Tensor):
        pass

    tensors = NAMED["plain"].tensors(torch.device("cpu"), torch.float64, torch.contiguous_format, seed=3)
    plain = conv_transpose3d(tensors.input, tensors.weight, algorithm=algorithm)
    result = conv_transpose3d(tensors.input.as_subclass(Named), tensors.weight, algorithm=algorithm)
    assert type(result) is Named
    assert torch.equal(result.as_subclass(Tensor), plain)


# ---- what others see of a call ----------------------------------------------------------------------------------


def test_symbolic_trace() -> None:
    model = torch.nn.Sequential(torch.nn.ConvTranspose3d(4, 6, 3, stride=2), torch.nn.ReLU())
    replaced = replace_conv_transpose3d(model, algorithm="direct")
    traced = torch.fx.symbolic_trace(replaced)
    calls = [node for node in traced.graph.nodes if node.target is conv_transpose3d]
    assert [node.kwargs for node in calls] == [{"algorithm": "direct"}]
    input = torch.randn(1, 4, 3, 3, 3)
    assert torch.equal(traced(input), replaced(input))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_counted_operations(algorithm: str) -> None:
    """As many as PyTorch counts for its own: a multiply-add is two, in the call and in each of its gradients."""
    counter = pytest.importorskip("torch.utils.flop_counter").FlopCounterMode
    tensors = NAMED["two groups"].tensors(torch.device("cpu"), torch.float32, torch.contiguous_format, seed=3)

    def counted(function: Callable[..., Tensor], **keywords: Any) -> int:
        for leaf in (tensors.input, tensors.weight):
            leaf.requires_grad_()
        with counter(display=False) as mode:
            output = function(tensors.input, tensors.weight, **NAMED["two groups"].parameters, **keywords)
            torch.autograd.grad(output.sum(), [tensors.input, tensors.weight])
        return int(mode.get_total_flops())

    once = 2 * tensors.input.numel() * tensors.weight[0].numel()
    assert counted(conv_transpose3d, algorithm=algorithm) == 3 * once


def test_names_in_a_profile() -> None:
    tensors = NAMED["plain"].tensors(torch.device("cpu"), torch.float32, torch.contiguous_format, seed=3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        conv_transpose3d(tensors.input, tensors.weight, algorithm="gemm")
        conv_transpose3d(tensors.input, tensors.weight.requires_grad_(), algorithm="gemm").sum().backward()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["convt3d_gemm::forward"] == 2
    assert counts["convt3d_gemm::grad_weight"] == 1


TWO_HOST_THREADS = """
import threading, torch
from convt3d_gemm import conv_transpose3d

torch.set_num_threads(4)
input, weight = torch.randn(4, 16, 8, 8, 8), torch.randn(16, 16, 3, 3, 3)
expected = conv_transpose3d(input, weight, algorithm="gemm")
same = []

def call():
    same.append(all(torch.equal(conv_transpose3d(input, weight, algorithm="gemm"), expected) for _ in range(200)))

threads = [threading.Thread(target=call) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(same)
"""


@pytest.mark.skipif(not has_backend("cpu"), reason="this build has no CPU backend")
def test_two_host_threads() -> None:
    """OpenBLAS has one number of threads for the process, and says so where one caller changes another's."""
    ended = subprocess.run([sys.executable, "-c", TWO_HOST_THREADS], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[True, True]"
    assert "OpenBLAS Warning" not in ended.stdout + ended.stderr
