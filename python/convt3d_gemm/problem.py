"""`Problem`: one operator on tensors of one description, under the settings of the moment; and what it takes to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from convt3d_gemm.compatibility import allows_tf32
from convt3d_gemm.parameters import Parameters, Triple
from convt3d_gemm.settings import get_workspace_limit

__all__ = ["OPERATORS", "Problem", "memory_format_of", "operations_of"]

#: Those that an algorithm computes; the last one is the two before it in one call.
OPERATORS = ("forward", "grad_input", "grad_weight", "grad_input_weight")


def memory_format_of(tensor: Tensor) -> torch.memory_format:
    """channels_last_3d for a 5-D tensor whose channels are innermost, else contiguous_format."""
    if tensor.is_contiguous():
        return torch.contiguous_format
    if tensor.is_contiguous(memory_format=torch.channels_last_3d) or tensor.stride(1) == 1 != tensor.size(1):
        return torch.channels_last_3d
    return torch.contiguous_format


def operations_of(input_size: Sequence[int], weight_size: Sequence[int]) -> int:
    """Of one operator; a multiply-add is two. As if every tap of every input voxel met an output voxel."""
    return 2 * math.prod(input_size) * math.prod(weight_size[1:])


class Problem(NamedTuple):
    """What is computed, on what, and within which limits: all that plans and decisions depend on.

    Attributes:
        operator: one of `OPERATORS`.
        input_size: (N, Cin, D, H, W).
        weight_size: (Cin, Cout / groups, kd, kh, kw).
        parameters: of the convolution.
        memory_format: of all tensors.
        dtype: of all tensors.
        tf32: whether float32 may be multiplied in TF32.
        device: of all tensors.
        threads: for work on a CPU; 1 on CUDA.
        limit: of the workspace, in bytes.
    """

    operator: str
    input_size: torch.Size
    weight_size: torch.Size
    parameters: Parameters
    memory_format: torch.memory_format
    dtype: torch.dtype
    tf32: bool
    device: torch.device
    threads: int
    limit: int

    @classmethod
    def of(
        cls, operator: str, input_size: torch.Size, weight_size: torch.Size, parameters: Parameters, like: Tensor
    ) -> Problem:
        """The problem under the present workspace limit, number of threads and TF32 setting.

        Args:
            operator: one of `OPERATORS`.
            input_size: (N, Cin, D, H, W).
            weight_size: (Cin, Cout / groups, kd, kh, kw).
            parameters: of the convolution.
            like: the tensor whose dtype, device and memory format the call takes.
        """
        dtype, on_cuda = like.dtype, like.is_cuda
        return cls(
            operator,
            input_size,
            weight_size,
            parameters,
            memory_format_of(like),
            dtype,
            on_cuda and dtype is torch.float32 and allows_tf32(),
            like.device,
            1 if on_cuda else torch.get_num_threads(),
            get_workspace_limit(),
        )

    @property
    def output_size(self) -> tuple[int, ...]:
        """(N, Cout, OD, OH, OW)."""
        axes = zip(self.input_size[2:], self.weight_size[2:], *self.parameters[:4], strict=True)
        spatial = ((i - 1) * s - 2 * p + d * (k - 1) + op + 1 for i, k, s, p, op, d in axes)
        return (self.input_size[0], self.weight_size[1] * self.parameters.groups, *spatial)

    @property
    def precision(self) -> str:
        """How numbers are multiplied: "tf32", or the name of the dtype."""
        return "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")

    @property
    def layout(self) -> str:
        """The name that ``convt3d --layout`` has for the memory format: "ncdhw" or "ndhwc"."""
        return "ndhwc" if self.memory_format == torch.channels_last_3d else "ncdhw"

    @property
    def taps(self) -> int:
        """The number of the kernel's taps."""
        return math.prod(self.weight_size[2:])

    @property
    def operations(self) -> int:
        """See `operations_of`; both gradients at once are two operators."""
        once = operations_of(self.input_size, self.weight_size)
        return 2 * once if self.operator == "grad_input_weight" else once

    @property
    def tensor_bytes(self) -> int:
        """Bytes that any algorithm has to read or write once: what it takes, plus what it gives."""
        x, w, y = math.prod(self.input_size), math.prod(self.weight_size), math.prod(self.output_size)
        elements = y + 2 * x + 2 * w if self.operator == "grad_input_weight" else x + w + y
        return elements * self.dtype.itemsize

    @property
    def column_bytes(self) -> int:
        """Bytes of the whole column matrix, which "gemm" makes in pieces: those moved by writing and reading it once.

        Half types' columns are float32 where several of them are added up.
        """
        if self.taps == 1 and self.parameters.stride == (1, 1, 1) and self.parameters.padding == (0, 0, 0):
            return 0
        added_up = self.operator == "forward" and any(
            k > s for k, s in zip(self.weight_size[2:], self.parameters.stride, strict=True)
        )
        size = max(self.dtype.itemsize, 4) if added_up else self.dtype.itemsize
        rows = self.weight_size[1] * self.parameters.groups * self.taps
        return self.input_size[0] * rows * math.prod(self.input_size[2:]) * size

    @property
    def layer(self) -> str:
        """The convolution as ``convt3d --layer`` spells it: N2,Cin64,Cout32,k2,in64,s2,p0,op0,d1,g1."""
        stride, padding, output_padding, dilation, groups = self.parameters
        triples = {
            "k": self.weight_size[2:],
            "in": self.input_size[2:],
            "s": stride,
            "p": padding,
            "op": output_padding,
            "d": dilation,
        }
        spelled = [f"{key}{_compact((value[0], value[1], value[2]))}" for key, value in triples.items()]
        batch, in_channels = self.input_size[:2]
        out_channels = self.weight_size[1] * groups
        return ",".join([f"N{batch}", f"Cin{in_channels}", f"Cout{out_channels}", *spelled, f"g{groups}"])

    def __str__(self) -> str:
        """The operator, the layer, the precision, the layout and the device."""
        return f"{self.operator} of {self.layer}, {self.precision}, {self.layout.upper()}, on {self.device}"


def _compact(triple: Triple) -> str:
    """3 for (3, 3, 3), 3x5x7 for (3, 5, 7)."""
    return str(triple[0]) if len(set(triple)) == 1 else "x".join(map(str, triple))
