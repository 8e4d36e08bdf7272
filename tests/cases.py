"""Convolutions to test on: what one is, its tensors, PyTorch's answers, and how to draw them at random."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

Triple = tuple[int, int, int]

#: Relative L2 error that each dtype must keep to against float64.
BOUNDS = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1.5e-2,
}
TF32_BOUND = 1e-3

OPERATORS = ["forward", "grad_input", "grad_weight", "grad_input_weight"]
LAYOUTS = [torch.contiguous_format, torch.channels_last_3d]


@dataclass(frozen=True)
class Case:
    batch: int = 2
    in_channels: int = 4
    out_channels: int = 6
    groups: int = 1
    size: Triple = (4, 5, 6)
    kernel: Triple = (3, 3, 3)
    stride: Triple = (2, 2, 2)
    padding: Triple = (1, 1, 1)
    output_padding: Triple = (0, 0, 0)
    dilation: Triple = (1, 1, 1)

    @property
    def parameters(self) -> dict[str, Any]:
        return {
            "stride": self.stride,
            "padding": self.padding,
            "output_padding": self.output_padding,
            "groups": self.groups,
            "dilation": self.dilation,
        }

    @property
    def operator_parameters(self) -> tuple[Any, ...]:
        """As torch.ops.convt3d_gemm takes them, the algorithm last."""
        return (self.stride, self.padding, self.output_padding, self.dilation, self.groups, "gemm")

    def tensors(self, device: torch.device, dtype: torch.dtype, layout: torch.memory_format, seed: int) -> Tensors:
        generator = torch.Generator().manual_seed(seed)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64)

        input = draw(self.batch, self.in_channels, *self.size)
        weight = draw(self.in_channels, self.out_channels // self.groups, *self.kernel)
        bias = draw(self.out_channels)
        output_size = torch.nn.functional.conv_transpose3d(input.to("meta"), weight.to("meta"), **self.parameters).shape
        grad_output = draw(*output_size)
        # Rounding first, so that the float64 reference sees the very numbers that the operator sees.
        rounded = [tensor.to(dtype).to(device) for tensor in (input, weight, bias, grad_output)]
        rounded[0] = rounded[0].contiguous(memory_format=layout)
        rounded[3] = rounded[3].contiguous(memory_format=layout)
        return Tensors(*rounded)


@dataclass(frozen=True)
class Tensors:
    input: Tensor
    weight: Tensor
    bias: Tensor
    grad_output: Tensor

    def to(self, dtype: torch.dtype) -> Tensors:
        return Tensors(*(t.to(dtype) for t in (self.input, self.weight, self.bias, self.grad_output)))


#: One convolution of each kind that an implementation may treat on its own.
NAMED = {
    "plain": Case(),
    "odd sizes": Case(3, 5, 7, size=(3, 5, 7), kernel=(3, 2, 5), stride=(2, 3, 1), padding=(1, 0, 2)),
    "stride over kernel": Case(kernel=(2, 1, 3), stride=(4, 3, 5), padding=(0, 0, 1)),
    "stride 1": Case(stride=(1, 1, 1), padding=(1, 0, 2)),
    "dilation": Case(stride=(1, 1, 1), dilation=(2, 3, 1), kernel=(2, 3, 4)),
    "dilation, stride, no factor shared": Case(stride=(2, 3, 4), dilation=(3, 2, 3), padding=(2, 1, 0)),
    "dilation, stride, a factor shared": Case(stride=(4, 2, 6), dilation=(6, 2, 4), padding=(3, 2, 1)),
    "output_padding under stride": Case(stride=(3, 2, 4), output_padding=(2, 1, 3)),
    "output_padding under dilation": Case(stride=(1, 1, 2), dilation=(3, 2, 3), output_padding=(2, 1, 2)),
    "padding over kernel": Case(stride=(2, 2, 2), padding=(4, 3, 5), kernel=(3, 3, 3), size=(7, 5, 8)),
    "two groups": Case(groups=2),
    "depthwise": Case(in_channels=6, out_channels=6, groups=6),
    "depthwise, three out of each": Case(in_channels=4, out_channels=12, groups=4, stride=(1, 2, 1)),
    "groups of several into one": Case(in_channels=6, out_channels=3, groups=3),
    "one voxel": Case(size=(1, 1, 1)),
    "one sample": Case(batch=1),
    "one of everything": Case(1, 1, 1, 1, (1, 1, 1), (1, 1, 1), (1, 1, 1), (0, 0, 0)),
    "one channel in and out": Case(in_channels=1, out_channels=1),
    "a line": Case(size=(1, 9, 1), kernel=(1, 3, 1), stride=(1, 2, 1), padding=(0, 1, 0)),
    "a plane": Case(size=(1, 6, 7), kernel=(1, 3, 3), padding=(0, 1, 1)),
    "pointwise": Case(kernel=(1, 1, 1), stride=(1, 1, 1), padding=(0, 0, 0)),
    "pointwise, grouped": Case(kernel=(1, 1, 1), stride=(1, 1, 1), padding=(0, 0, 0), groups=2),
    "pointwise, strided": Case(kernel=(1, 1, 1), stride=(2, 1, 3), padding=(0, 0, 0)),
    "pointwise, cropped": Case(kernel=(1, 1, 1), stride=(1, 1, 1), padding=(1, 0, 1)),
    "kernel = stride": Case(kernel=(2, 2, 2), padding=(0, 0, 0)),
    "kernel = stride, uneven": Case(kernel=(1, 2, 3), stride=(1, 2, 3), padding=(0, 0, 0)),
    "kernel = stride, padded": Case(kernel=(2, 2, 2), padding=(1, 0, 1)),
    "kernel = stride, grouped": Case(kernel=(2, 2, 2), padding=(0, 0, 0), groups=2),
    "empty batch": Case(batch=0),
}


def native(case: Case, tensors: Tensors, operator: str, dtype: torch.dtype) -> list[Tensor]:
    """PyTorch's results of an operator, computed in `dtype`."""
    given = tensors.to(dtype)
    if operator == "forward":
        return [torch.nn.functional.conv_transpose3d(given.input, given.weight, given.bias, **case.parameters)]
    wanted = [operator != "grad_weight", operator != "grad_input", False]
    results = torch.ops.aten.convolution_backward(
        given.grad_output,
        given.input,
        given.weight,
        None,
        case.stride,
        case.padding,
        case.dilation,
        True,
        case.output_padding,
        case.groups,
        wanted,
    )
    return [result for result, is_wanted in zip(results, wanted, strict=True) if is_wanted]


def ours(case: Case, tensors: Tensors, operator: str) -> list[Tensor]:
    """This package's results of an operator."""
    operators, parameters = torch.ops.convt3d_gemm, case.operator_parameters
    given, weight, grad_output = tensors.input, tensors.weight, tensors.grad_output
    if operator == "forward":
        return [operators.forward(given, weight, tensors.bias, *parameters)]
    if operator == "grad_input":
        return [operators.grad_input(grad_output, weight, given.shape[2:], *parameters)]
    if operator == "grad_weight":
        return [operators.grad_weight(grad_output, given, weight.shape[2:], *parameters)]
    return list(operators.grad_input_weight(grad_output, given, weight, *parameters))


def squared_error(result: Tensor, reference: Tensor) -> tuple[float, float]:
    """Squared norms of the error and of the reference."""
    assert result.shape == reference.shape
    result, reference = result.detach().double(), reference.detach()
    difference = result - reference
    return float((difference * difference).sum()), float((reference * reference).sum())


def relative_error(results: Sequence[Tensor], references: Sequence[Tensor]) -> float:
    """The largest relative L2 error of any result; NaN anywhere makes it infinite."""
    worst = 0.0
    for result, reference in zip(results, references, strict=True):
        error, norm = squared_error(result, reference)
        relative = math.sqrt(error / norm) if norm > 0 else math.sqrt(error)
        worst = max(worst, math.inf if math.isnan(relative) else relative)
    return worst


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """PyTorch's switch for TF32 in convolutions."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@contextlib.contextmanager
def workspace_limit(limit: int) -> Iterator[None]:
    from convt3d_gemm import get_workspace_limit, set_workspace_limit

    before = get_workspace_limit()
    set_workspace_limit(limit)
    try:
        yield
    finally:
        set_workspace_limit(before)


def poison(device: torch.device) -> None:
    """Leave NaN in the memory that the next allocations are likely to get."""
    blocks = [torch.full((size,), math.nan, device=device) for size in (1 << 10, 1 << 14, 1 << 18, 1 << 21)]
    del blocks


def _triples(values: st.SearchStrategy[int]) -> st.SearchStrategy[Triple]:
    return st.tuples(values, values, values)


@st.composite
def cases(draw: st.DrawFn, largest_output: int = 40_000) -> Case:
    """Of every kind: groups up to depthwise, strides over the kernel, dilation with stride, pointwise."""
    kind = draw(st.sampled_from(["any", "any", "any", "kernel=stride", "pointwise", "depthwise"]))
    groups = draw(st.integers(1, 9 if kind == "depthwise" else 3))
    per_group_in = 1 if kind == "depthwise" else draw(st.integers(1, 9))
    per_group_out = draw(st.integers(1, 2 if kind == "depthwise" else 17))
    kernel = draw(_triples(st.integers(1, 5)))
    stride = draw(_triples(st.integers(1, 4)))
    dilation = draw(_triples(st.integers(1, 3)))
    if kind in ("kernel=stride", "pointwise"):
        kernel = stride = draw(_triples(st.integers(1, 3))) if kind == "kernel=stride" else (1, 1, 1)
        dilation = (1, 1, 1)
    size = draw(_triples(st.integers(1, 7)))
    padding, output_padding = [0, 0, 0], [0, 0, 0]
    if kind not in ("kernel=stride", "pointwise"):
        for axis in range(3):
            output_padding[axis] = draw(st.integers(0, max(stride[axis], dilation[axis]) - 1))
            full = (size[axis] - 1) * stride[axis] + dilation[axis] * (kernel[axis] - 1) + 1
            padding[axis] = draw(st.integers(0, min((full + output_padding[axis] - 1) // 2, 4)))
    case = Case(
        batch=draw(st.integers(1, 4)),
        in_channels=groups * per_group_in,
        out_channels=groups * per_group_out,
        groups=groups,
        size=size,
        kernel=kernel,
        stride=stride,
        padding=(padding[0], padding[1], padding[2]),
        output_padding=(output_padding[0], output_padding[1], output_padding[2]),
        dilation=dilation,
    )
    voxels = math.prod((n - 1) * s + d * (k - 1) + 3 for n, s, d, k in zip(size, stride, dilation, kernel, strict=True))
    if case.batch * case.out_channels * voxels > largest_output:
        smaller = (min(size[0], 3), min(size[1], 2), min(size[2], 3))
        case = replace(case, batch=1, size=smaller, padding=(0, 0, 0))
    return case
