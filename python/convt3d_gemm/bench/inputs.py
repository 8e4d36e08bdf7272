"""What the algorithms are run on: random tensors in a dtype and a layout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from convt3d_gemm.bench.layers import Layer, Operator

#: "ncdhw", or "ndhwc" for tensors in the memory format channels_last_3d, the weight included.
Layout = Literal["ncdhw", "ndhwc"]

MEMORY_FORMATS: dict[Layout, torch.memory_format] = {"ncdhw": torch.contiguous_format, "ndhwc": torch.channels_last_3d}


@dataclass(frozen=True)
class Tensors:
    """One set of what an operator takes; ``grad_output`` is empty for the forward operator."""

    grad_output: Tensor
    input: Tensor
    weight: Tensor

    @classmethod
    def draw(
        cls,
        layer: Layer,
        operator: Operator,
        dtype: torch.dtype,
        layout: Layout,
        device: torch.device,
        seed: int,
    ) -> Tensors:
        """Random ones, scaled so that outputs are about 1, which keeps float16 from overflowing."""
        generator = torch.Generator(device).manual_seed(seed)
        memory_format = MEMORY_FORMATS[layout]

        def normal(shape: Sequence[int]) -> Tensor:
            values = torch.randn(shape, generator=generator, device=device, dtype=dtype)
            return values.contiguous(memory_format=memory_format)

        products = layer.in_channels / layer.groups * layer.taps / math.prod(layer.stride)
        return cls(
            grad_output=normal(layer.output_shape if operator != "forward" else (0,) * 5),
            input=normal(layer.input_shape),
            weight=normal(layer.weight_shape).div_(math.sqrt(max(1.0, products))),
        )
