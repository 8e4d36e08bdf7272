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

from convt3d_gemm import _C, get_workspace_limit, library, set_workspace_limit
from convt3d_gemm.parameters import Parameters

Triple = tuple[int, int, int]

#: Relative L2 error that each dtype must keep to against float64.
BOUNDS = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1.5e-2,
}
TF32_BOUND = 1e-3


def dtype_of(precision: str) -> torch.dtype:
    dtype: torch.dtype = torch.float32 if precision == "tf32" else getattr(torch, precision)
    return dtype


def bound_of(precision: str) -> float:
    return TF32_BOUND if precision == "tf32" else BOUNDS[dtype_of(precision)]


#: Those of this package, which everything is tested on; "auto" and "native" choose among them and PyTorch.
ALGORITHMS = ["gemm", "direct"]
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

    def operator_parameters(self, algorithm: str) -> tuple[Any, ...]:
        """As torch.ops.convt3d_gemm takes them, the algorithm last."""
        return (self.stride, self.padding, self.output_padding, self.dilation, self.groups, algorithm)

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
        return Tensors(*(tensor.to(dtype) for tensor in vars(self).values()))

    def abs(self) -> Tensors:
        return Tensors(*(tensor.abs() for tensor in vars(self).values()))


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
    "into one channel": Case(in_channels=24, out_channels=1),
    "three channels into many": Case(in_channels=3, out_channels=40),
    "many channels": Case(1, 32, 48, size=(4, 5, 9)),
    "many channels, no multiple of eight": Case(1, 37, 19, size=(3, 4, 7), kernel=(2, 3, 3)),
    "many channels, stride 1": Case(1, 32, 16, size=(4, 5, 9), stride=(1, 1, 1)),
    "many channels, dilated": Case(1, 16, 32, size=(4, 5, 6), dilation=(2, 2, 2)),
    "many channels, two groups": Case(1, 64, 32, groups=2, size=(3, 4, 5)),
    "eight channels a group": Case(1, 32, 32, groups=4, size=(3, 4, 5)),
    "many channels, kernel = stride": Case(1, 48, 32, size=(3, 4, 5), kernel=(2, 2, 2), padding=(0, 0, 0)),
    "many channels, pointwise": Case(1, 32, 48, 1, (4, 5, 6), (1, 1, 1), (1, 1, 1), (0, 0, 0)),
    "empty batch": Case(batch=0),
}

#: Operators with so many tiles in half types that on an H200 some warps store while others multiply the next ones.
MANY_TILES = {
    "even rows": ("forward", Case(8, 8, 32, 1, (32, 32, 33), (4, 4, 4), (1, 1, 1), (0, 1, 1))),
    "rows of vectors": ("forward", Case(16, 8, 32, 1, (32, 32, 31), (2, 2, 2), (1, 1, 1), (0, 0, 0))),
    "two residues a row, odd rows": ("forward", Case(8, 16, 16, 1, (24, 24, 48), (4, 4, 4), (1, 1, 1), (1, 1, 0))),
    "two residues a row, even rows": ("forward", Case(16, 32, 16, 1, (16, 32, 64), (3, 3, 3), (1, 1, 1), (0, 0, 0))),
    "two residues a row, vectors": ("forward", Case(4, 16, 16, 1, (24, 24, 32), (2, 2, 2), (2, 2, 2), (0, 0, 0))),
    "two residues a row, one warpgroup": ("forward", Case(8, 8, 24, 1, (16, 16, 48), (2, 2, 2), (2, 2, 2), (0, 0, 0))),
    "gradient, vectors": ("grad_input", Case(8, 48, 16, 1, (24, 24, 64), (2, 2, 2), (2, 2, 2), (0, 0, 0))),
    "gradient, two residues a row": ("grad_input", Case(16, 16, 48, 1, (24, 24, 64), (2, 2, 2), (1, 1, 1), (0, 0, 0))),
}

HALF_TYPES = ("bfloat16", "float16")
TF32_TOO = (*HALF_TYPES, "tf32")

#: The same where they store runs of voxels, as they lie in the result, in these precisions of half types and TF32.
MANY_RUNS = {
    "odd rows": ("forward", Case(4, 8, 8, 1, (24, 32, 32), (3, 3, 3), (2, 2, 2), (0, 1, 0)), TF32_TOO),
    "channels in turn": ("forward", Case(4, 8, 48, 1, (16, 16, 33), (3, 3, 3), (2, 2, 2), (1, 1, 0)), TF32_TOO),
    "stride 1": ("forward", Case(16, 8, 24, 1, (8, 32, 16), (4, 4, 4), (1, 1, 1), (0, 0, 0)), TF32_TOO),
    "residues beyond stride": ("forward", Case(8, 8, 32, 1, (12, 16, 33), (3, 3, 3), (3, 2, 2), (0, 0, 0)), TF32_TOO),
    "groups, even rows": ("forward", Case(4, 32, 64, 4, (24, 8, 31), (2, 2, 2), (2, 2, 2), (0, 0, 0)), TF32_TOO),
    "gradient": ("grad_input", Case(16, 8, 8, 1, (8, 32, 63), (2, 2, 2), (1, 2, 2), (0, 0, 0)), HALF_TYPES),
    "gradient, groups": ("grad_input", Case(16, 16, 16, 2, (16, 8, 33), (2, 2, 2), (3, 3, 3), (0, 0, 0)), ("tf32",)),
    "parts of rows": ("grad_input", Case(8, 8, 24, 1, (16, 32, 31), (3, 3, 3), (2, 2, 2), (1, 1, 1)), ("tf32",)),
}

#: Forward where these runs have rows without taps as well, in half types and TF32.
FILLED_RUNS = {
    "channels in turn": Case(24, 16, 128, 1, (8, 16, 32), (3, 3, 3), (2, 2, 2), (1, 1, 1), (0, 0, 0), (2, 2, 2)),
    "blocks of columns": Case(24, 16, 64, 1, (8, 16, 32), (3, 3, 3), (2, 2, 2), (1, 1, 1), (0, 0, 0), (2, 2, 2)),
    "groups": Case(16, 32, 64, 2, (8, 16, 48), (3, 3, 3), (2, 2, 2), (1, 1, 1), (0, 0, 0), (2, 2, 2)),
    "rows left over": Case(32, 16, 24, 1, (8, 15, 32), (3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 0), (2, 2, 2)),
    "one tap of a stride of 3": Case(16, 16, 32, 1, (8, 16, 48), (3, 1, 3), (2, 3, 2), (0, 0, 0), (0, 0, 0)),
}

#: Forward where an H200 has the source copied in bulk: all taps of a tile read the same voxels, of half types a run of
#: each channel, in TF32 a box.
COPIED = {
    "parts of planes": Case(4, 64, 16, 1, (16, 13, 32), (2, 2, 2), (2, 2, 2), (0, 0, 0)),
    "parts of planes, handed over": Case(4, 128, 64, 1, (16, 13, 32), (2, 2, 2), (2, 2, 2), (0, 0, 0)),
    "planes": Case(16, 64, 32, 1, (9, 4, 16), (2, 2, 2), (2, 2, 2), (0, 0, 0)),
    "one stride of 1": Case(4, 64, 32, 1, (24, 17, 32), (1, 2, 2), (1, 2, 2), (0, 0, 0)),
    "groups": Case(4, 128, 64, 2, (16, 14, 32), (2, 2, 2), (2, 2, 2), (0, 0, 0)),
    "rows without taps": Case(8, 64, 32, 1, (8, 12, 32), (1, 2, 2), (2, 2, 2), (0, 0, 0)),
    "three stages": Case(4, 48, 48, 1, (16, 15, 48), (2, 2, 2), (2, 2, 2), (0, 0, 0)),
}

#: Forward where an H200 has boxes of the source copied in TF32: taps that read different voxels.
BOXED = {
    "odd rows": Case(4, 32, 32, 1, (10, 12, 64), (3, 3, 3), (2, 2, 2), (1, 1, 1), (0, 0, 0)),
    "handed over": Case(4, 32, 32, 1, (32, 32, 64), (3, 3, 3), (2, 2, 2), (1, 1, 1), (0, 0, 0)),
    "gaps": Case(4, 32, 32, 4, (12, 24, 48), (3, 5, 7), (2, 2, 2), (1, 2, 3), (1, 1, 1)),
    "gaps, handed over": Case(4, 16, 16, 2, (32, 32, 64), (3, 3, 3), (2, 2, 2), (1, 1, 1), (0, 0, 0)),
    "one residue": Case(16, 128, 128, 1, (16, 16, 16), (4, 4, 4), (2, 2, 2), (1, 1, 1), (0, 0, 0)),
    "samples": Case(64, 128, 128, 1, (4, 4, 4), (4, 4, 4), (2, 2, 2), (1, 1, 1), (0, 0, 0)),
    "two residues": Case(2, 64, 64, 1, (16, 16, 32), (3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1)),
    "channels left over": Case(4, 44, 64, 1, (12, 14, 32), (3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1)),
    "few channels left over": Case(4, 20, 32, 1, (12, 14, 32), (3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1)),
    "dilation": Case(8, 32, 32, 1, (16, 16, 20), (3, 3, 3), (2, 2, 2), (1, 1, 1), (0, 0, 0), (3, 3, 3)),
    "bare rows": Case(8, 64, 32, 1, (16, 16, 20), (2, 2, 2), (3, 3, 2), (0, 0, 0), (0, 0, 0)),
    "rows cut": Case(4, 64, 32, 1, (16, 13, 32), (2, 2, 2), (2, 2, 2), (1, 1, 1), (0, 0, 0)),
    "parts of rows": Case(1, 32, 32, 1, (8, 8, 264), (3, 3, 3), (2, 2, 2), (0, 0, 1), (0, 0, 0)),
}

#: Operators that an H200 computes with windows in TF32: taps of neighbouring planes that all planes have alike.
WINDOWS = {
    "48 columns": ("forward", Case(4, 48, 48, 1, (16, 32, 32), (3, 3, 3), (1, 1, 1), (0, 0, 0), (0, 0, 0))),
    "channels left over": ("forward", Case(4, 44, 40, 1, (16, 32, 32), (3, 3, 3), (1, 1, 1), (1, 1, 1), (0, 0, 0))),
    "64 columns": ("forward", Case(8, 32, 64, 1, (18, 32, 32), (3, 5, 5), (1, 1, 1), (0, 0, 0), (0, 0, 0))),
    "eight slots": ("forward", Case(4, 48, 24, 1, (22, 32, 32), (3, 3, 3), (1, 1, 1), (0, 0, 0), (0, 0, 0))),
    "groups": ("forward", Case(4, 64, 96, 2, (15, 32, 32), (3, 3, 3), (1, 1, 1), (1, 1, 1), (0, 0, 0))),
    "blocks of columns": ("forward", Case(2, 32, 96, 1, (15, 32, 32), (3, 3, 3), (1, 1, 1), (1, 1, 1), (0, 0, 0))),
    "dilated rows": (
        "forward",
        Case(4, 32, 48, 1, (15, 32, 32), (3, 3, 3), (1, 1, 1), (1, 2, 2), (0, 0, 0), (1, 2, 2)),
    ),
    "32 columns": ("grad_input", Case(4, 32, 64, 1, (18, 24, 24), (3, 5, 7), (1, 1, 1), (0, 0, 0), (0, 0, 0))),
    "every other plane": (
        "grad_input",
        Case(8, 32, 64, 1, (16, 32, 32), (3, 3, 3), (2, 2, 2), (1, 1, 1), (0, 0, 0), (2, 2, 2)),
    ),
    "strides along rows": ("grad_input", Case(4, 48, 48, 1, (18, 32, 32), (3, 3, 3), (1, 1, 2), (1, 1, 1), (0, 0, 1))),
}

#: Forward that an H200 computes with cubes in TF32: kernel 3 and stride 2 along each axis, where the first residue has
#: one tap; sources that are boxes or not, rows of any length, channels and columns left over.
CUBES = {
    "decoder": Case(2, 128, 64, 1, (16, 16, 32), (3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1)),
    "rows of 33": Case(2, 128, 64, 1, (16, 16, 33), (3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1)),
    "odd ends": Case(2, 128, 64, 1, (16, 16, 32), (3, 3, 3), (2, 2, 2), (1, 1, 1), (0, 0, 0)),
    "groups": Case(2, 256, 128, 2, (12, 16, 32), (3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1)),
    "left over": Case(2, 100, 40, 1, (16, 16, 32), (3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1)),
    "short rows": Case(4, 96, 32, 1, (10, 12, 20), (3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1)),
    "padding of the kernel": Case(2, 128, 64, 1, (16, 16, 32), (3, 3, 3), (2, 2, 2), (3, 1, 3), (1, 1, 1)),
}

#: Forward where an H200 has points in TF32: all taps of a source voxel at once, one tile for each block of threads.
POINTS = {
    "24 columns": Case(2, 320, 320, 1, (8, 8, 8), (2, 2, 2), (2, 2, 2), (0, 0, 0), (0, 0, 0)),
    "32 columns": Case(2, 512, 256, 1, (8, 8, 8), (2, 2, 2), (2, 2, 2), (0, 0, 0), (0, 0, 0)),
    "left over": Case(2, 300, 200, 1, (6, 7, 12), (2, 2, 2), (2, 2, 2), (0, 0, 0), (0, 0, 0)),
    "groups": Case(2, 256, 128, 2, (8, 12, 16), (2, 2, 2), (2, 2, 2), (0, 0, 0), (0, 0, 0)),
    "samples": Case(9, 256, 256, 1, (2, 4, 4), (2, 2, 2), (2, 2, 2), (0, 0, 0), (0, 0, 0)),
    "output beyond": Case(2, 320, 320, 1, (8, 8, 8), (2, 2, 2), (2, 2, 2), (0, 0, 0), (1, 1, 0)),
}

#: All of these.
PATTERNS = {
    **{f"windows, {name}": of for name, of in WINDOWS.items()},
    **{f"cubes, {name}": ("forward", case) for name, case in CUBES.items()},
    **{f"points, {name}": ("forward", case) for name, case in POINTS.items()},
}

#: Depthwise forward that half types compute by bands on tensor cores: rows of outputs that are whole sectors, whole
#: words, or that begin anywhere, and as many source rows and planes that meet an output as there is code for.
BANDS = {
    "sectors": Case(2, 3, 3, 3, (5, 13, 48), (4, 4, 4), (2, 2, 2), (1, 1, 1), (0, 0, 0)),
    "odd rows": Case(2, 3, 3, 3, (5, 13, 48), (3, 3, 3), (2, 2, 2), (1, 1, 1), (0, 0, 0)),
    "odd rows of even planes": Case(2, 3, 3, 3, (4, 12, 24), (3, 3, 3), (2, 2, 2), (0, 1, 0), (0, 1, 0)),
    "words": Case(2, 3, 3, 3, (5, 13, 9), (4, 4, 4), (2, 2, 2), (0, 1, 1), (1, 0, 0)),
    "odd sources": Case(2, 3, 3, 3, (5, 13, 33), (3, 4, 4), (2, 2, 2), (1, 1, 1), (1, 1, 1)),
    "one shift": Case(2, 3, 3, 3, (5, 13, 16), (2, 1, 4), (2, 2, 2), (0, 0, 1), (0, 0, 0)),
    "one shift, odd rows": Case(2, 3, 3, 3, (5, 13, 16), (2, 2, 3), (2, 2, 2), (0, 0, 1), (0, 0, 0)),
    "three shifts": Case(2, 3, 3, 3, (5, 13, 16), (5, 6, 4), (2, 2, 2), (2, 2, 1), (0, 0, 0)),
    "unlike shifts, odd rows": Case(2, 3, 3, 3, (5, 13, 20), (3, 5, 5), (2, 2, 2), (1, 2, 2), (0, 0, 0)),
    "stride 4": Case(2, 3, 3, 3, (5, 13, 21), (3, 3, 5), (2, 2, 4), (1, 1, 1), (0, 0, 1)),
    "dilated rows": Case(2, 3, 3, 3, (5, 13, 32), (3, 3, 3), (2, 2, 2), (1, 1, 3), (1, 1, 1), (1, 1, 3)),
    "padding beyond the kernel": Case(2, 3, 3, 3, (5, 13, 32), (4, 4, 4), (2, 2, 2), (4, 5, 4), (0, 0, 0)),
    "short rows": Case(2, 3, 3, 3, (5, 13, 3), (3, 3, 3), (2, 2, 2), (1, 1, 1), (0, 0, 0)),
    "pairs of planes in turn": Case(2, 200, 200, 200, (12, 9, 16), (4, 4, 4), (2, 2, 2), (1, 1, 1), (0, 0, 0)),
    "pairs of odd planes in turn": Case(2, 200, 200, 200, (12, 9, 16), (3, 3, 3), (2, 2, 2), (1, 1, 1), (0, 0, 0)),
    "sectors of both planes": Case(2, 3, 3, 3, (5, 13, 24), (3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1)),
    "words of both planes": Case(2, 3, 3, 3, (5, 13, 13), (3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 0, 1)),
    "tiles": Case(1, 3, 3, 3, (4, 40, 120), (3, 3, 3), (2, 2, 2), (1, 1, 1), (0, 0, 0)),
    "wide rows": Case(1, 3, 3, 3, (3, 9, 700), (3, 4, 4), (2, 2, 2), (1, 1, 1), (0, 0, 1)),
    "volumes in turn": Case(1, 66000, 66000, 66000, (2, 2, 4), (3, 3, 3), (2, 2, 2), (1, 1, 1), (0, 0, 0)),
}

#: Depthwise grad_input that they compute so: rows of grad_output that begin with vectors, between them alike or not,
#: and between words, tiles at the volume's ends, and blocks that go on from one tile to the next.
GRAD_INPUT_BANDS = {
    "whole rows": Case(2, 3, 3, 3, (5, 13, 48), (4, 4, 4), (2, 2, 2), (1, 1, 1), (0, 0, 0)),
    "odd rows": Case(2, 3, 3, 3, (5, 13, 48), (3, 3, 3), (2, 2, 2), (1, 1, 1), (0, 0, 0)),
    "odd rows of even planes": Case(2, 3, 3, 3, (4, 12, 24), (3, 3, 3), (2, 2, 2), (0, 1, 0), (0, 1, 0)),
    "words": Case(2, 3, 3, 3, (5, 13, 9), (4, 4, 4), (2, 2, 2), (0, 1, 1), (1, 0, 0)),
    "one window": Case(1, 1, 1, 1, (1, 1, 8), (3, 3, 3), (2, 2, 2), (1, 1, 1), (0, 0, 0)),
    "tiles": Case(1, 3, 3, 3, (3, 43, 20), (3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1)),
    "whole rows in tiles": Case(1, 3, 3, 3, (3, 43, 20), (4, 4, 4), (2, 2, 2), (1, 1, 1), (0, 0, 0)),
    "wide rows": Case(1, 3, 3, 3, (4, 9, 150), (3, 3, 3), (2, 2, 2), (1, 1, 1), (0, 0, 0)),
    "high planes": Case(1, 3, 3, 3, (4, 100, 11), (4, 4, 4), (2, 2, 2), (1, 2, 2), (0, 0, 1)),
    "long rows of taps": Case(2, 3, 3, 3, (5, 13, 20), (3, 3, 7), (2, 2, 2), (1, 1, 3), (0, 0, 0)),
    "short rows of taps": Case(2, 3, 3, 3, (5, 13, 20), (4, 4, 2), (2, 2, 2), (1, 1, 0), (0, 0, 0)),
    "dilated rows": Case(2, 3, 3, 3, (5, 13, 32), (3, 3, 3), (2, 2, 2), (1, 1, 3), (1, 1, 1), (1, 1, 3)),
    "padding beyond the kernel": Case(2, 3, 3, 3, (5, 13, 32), (4, 4, 4), (2, 2, 2), (4, 5, 2), (0, 0, 0)),
    "tiles in turn": Case(2, 300, 300, 300, (12, 9, 16), (4, 4, 4), (2, 2, 2), (1, 1, 1), (0, 0, 0)),
    "tiles of odd rows in turn": Case(2, 400, 400, 400, (12, 9, 16), (3, 3, 3), (2, 2, 2), (1, 1, 1), (0, 0, 0)),
}


#: Depthwise layers that no kernel is compiled for: boxes of taps of several shapes, short and long rows, rows outside,
#: and few channels, of which many blocks share the sums.
ANY_DEPTHWISE = {
    "five taps": Case(2, 3, 3, 3, (4, 9, 40), (5, 5, 5), (2, 2, 2), (2, 2, 2), (1, 1, 1)),
    "unlike axes": Case(2, 3, 3, 3, (3, 9, 33), (1, 4, 3), (1, 2, 2), (0, 1, 1), (0, 1, 0)),
    "stride 3": Case(2, 3, 3, 3, (4, 6, 70), (3, 3, 3), (3, 3, 3), (0, 0, 0), (2, 0, 1)),
    "stride over the kernel": Case(2, 3, 3, 3, (4, 6, 10), (2, 2, 2), (3, 4, 3), (0, 1, 0), (1, 0, 0)),
    "dilated": Case(2, 3, 3, 3, (5, 9, 7), (3, 3, 3), (2, 2, 2), (2, 2, 2), (1, 1, 1), (2, 2, 2)),
    "dilated further than strides": Case(2, 3, 3, 3, (5, 9, 7), (3, 2, 4), (2, 3, 2), (2, 1, 4), (0, 2, 1), (3, 2, 3)),
    "long taps": Case(2, 8, 8, 8, (3, 9, 11), (2, 9, 11), (1, 1, 1), (0, 4, 5)),
    "one row": Case(2, 3, 3, 3, (7, 1, 40), (3, 1, 3), (2, 1, 2), (1, 0, 1), (1, 0, 1)),
    "shared sums": Case(3, 2, 2, 2, (16, 20, 24), (3, 2, 5), (2, 2, 2), (1, 0, 2), (0, 0, 0)),
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


def arguments_of(case: Case, tensors: Tensors, operator: str, algorithm: str) -> tuple[Any, ...]:
    """The operator's arguments, as torch.ops.convt3d_gemm takes them."""
    operands: dict[str, tuple[Any, ...]] = {
        "forward": (tensors.input, tensors.weight, tensors.bias),
        "grad_input": (tensors.grad_output, tensors.weight, list(tensors.input.shape[2:])),
        "grad_weight": (tensors.grad_output, tensors.input, list(tensors.weight.shape[2:])),
        "grad_input_weight": (tensors.grad_output, tensors.input, tensors.weight),
    }
    return (*operands[operator], *case.operator_parameters(algorithm))


def call(operator: str, arguments: tuple[Any, ...]) -> list[Tensor]:
    """The results of one of torch.ops.convt3d_gemm."""
    results = getattr(torch.ops.convt3d_gemm, operator)(*arguments)
    return [results] if isinstance(results, Tensor) else list(results)


def ours(case: Case, tensors: Tensors, operator: str, algorithm: str) -> list[Tensor]:
    """This package's results of an operator."""
    return call(operator, arguments_of(case, tensors, operator, algorithm))


def plan_of(case: Case, tensors: Tensors, operator: str, algorithm: str) -> _C.Plan:
    """How this package would compute it just now."""
    parameters = Parameters(case.stride, case.padding, case.output_padding, case.dilation, case.groups)
    sizes = tensors.input.shape, tensors.weight.shape
    return library.plan_call(algorithm, operator, *sizes, parameters, tensors.input).plan


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.detach()))


def relative_error(
    results: Sequence[Tensor], references: Sequence[Tensor], magnitudes: Sequence[Tensor] | None = None
) -> float:
    """The largest L2 error of any result, relative to its reference (or magnitude); NaN anywhere makes it infinite."""
    worst = 0.0
    for result, reference, magnitude in zip(results, references, magnitudes or references, strict=True):
        assert result.shape == reference.shape
        error, norm = _norm(result.double() - reference), _norm(magnitude)
        relative = error / norm if norm > 0 else error
        worst = max(worst, math.inf if math.isnan(relative) else relative)
    return worst


def significant_strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides that say where an element lies; PyTorch's own results vary in the others."""
    sized = zip(tensor.size(), tensor.stride(), strict=True)
    return tuple(stride for size, stride in sized if size != 1) if tensor.numel() else ()


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
    before = get_workspace_limit()
    set_workspace_limit(limit)
    try:
        yield
    finally:
        set_workspace_limit(before)


def direct_kernels(device: torch.device, operator: str) -> set[str]:
    """The families of kernels that algorithm "direct" chooses from for an operator on this device."""
    if device.type == "cpu":
        return {"tiles"}
    capability = torch.cuda.get_device_capability()
    families = {"simt", "depthwise"}
    if operator != "grad_weight" and capability >= (8, 0):
        families.add("pipelined" if capability == (9, 0) else "tensor")
    if operator in ("grad_weight", "grad_input_weight") and capability >= (8, 0):
        families.add("tensor")
    return families


def kernels_of(plan: _C.Plan) -> list[str]:
    """The families of kernels that a plan has chosen, those of grad_input before those of grad_weight."""
    return [name.split()[0] for name in plan.configuration.split(", ") if name]


def poison(device: torch.device) -> None:
    """Leave NaN in the memory that the next allocations are likely to get."""
    blocks = [torch.full((size,), math.nan, device=device) for size in (1 << 10, 1 << 14, 1 << 18, 1 << 21)]
    del blocks


def _triples(values: st.SearchStrategy[int]) -> st.SearchStrategy[Triple]:
    return st.tuples(values, values, values)


#: Input and output channels of one group.
_CHANNELS = {
    "depthwise": (st.just(1), st.integers(1, 2)),
    "few": (st.integers(1, 4), st.integers(1, 4)),
    "some": (st.integers(1, 9), st.integers(1, 17)),
    "many": (st.sampled_from([16, 32, 48]) | st.integers(1, 40),) * 2,
}
_GEOMETRIES = ["any", "any", "any", "stride over kernel", "kernel = stride", "pointwise"]
_MOST_OUTPUTS, _MOST_PRODUCTS = 150_000, 20_000_000


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Of every kind: any number of channels in groups up to depthwise, and any geometry."""
    channels = draw(st.sampled_from(list(_CHANNELS)))
    groups = draw(st.integers(1, {"depthwise": 9, "many": 2}.get(channels, 3)))
    in_channels, out_channels = (groups * draw(number) for number in _CHANNELS[channels])

    geometry = draw(st.sampled_from(_GEOMETRIES))
    stride, dilation, kernel = (1, 1, 1), (1, 1, 1), (1, 1, 1)
    if geometry != "pointwise":
        kernel = stride = draw(_triples(st.integers(1, 3)))
    if geometry == "stride over kernel":
        stride = draw(st.tuples(*(st.integers(taps, taps + 2) for taps in kernel)))
    elif geometry == "any":
        kernel, stride = draw(_triples(st.integers(1, 5))), draw(_triples(st.integers(1, 4)))
        dilation = draw(_triples(st.integers(1, 3)))

    case = Case(
        draw(st.integers(1, 4)),
        in_channels,
        out_channels,
        groups,
        draw(_triples(st.integers(1, 12))),
        kernel,
        stride,
        (0, 0, 0),
        draw(st.tuples(*(st.integers(0, max(s, d) - 1) for s, d in zip(stride, dilation, strict=True)))),
        dilation,
    )
    case = _shrunk(case)
    if geometry not in ("kernel = stride", "pointwise"):
        return replace(case, padding=draw(st.tuples(*(st.integers(0, min((n - 1) // 2, 4)) for n in _unpadded(case)))))
    return replace(case, output_padding=(0, 0, 0))


def _unpadded(case: Case) -> list[int]:
    """The output's size per dimension without padding."""
    axes = zip(case.size, case.stride, case.dilation, case.kernel, case.output_padding, strict=True)
    return [(n - 1) * s + d * (k - 1) + o + 1 for n, s, d, k, o in axes]


def _shrunk(case: Case) -> Case:
    """The case with so few samples and voxels that it takes no more than milliseconds."""
    while case.batch > 1 or max(case.size) > 1:
        outputs = case.batch * case.out_channels * math.prod(_unpadded(case))
        inputs = case.batch * case.in_channels * math.prod(case.size)
        products = inputs * case.out_channels // case.groups * math.prod(case.kernel)
        if outputs <= _MOST_OUTPUTS and products <= _MOST_PRODUCTS:
            break
        if case.batch > 1:
            case = replace(case, batch=case.batch - 1)
        else:
            size = list(case.size)
            size[size.index(max(size))] //= 2
            case = replace(case, size=(size[0], size[1], size[2]))
    return case
