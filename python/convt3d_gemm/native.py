"""PyTorch's own transposed convolution (cuDNN, oneDNN), under the same operators as the other algorithms."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from convt3d_gemm.parameters import Parameters

__all__ = ["computes_float16_on_cpu", "forward", "gradients"]


def forward(input: Tensor, weight: Tensor, bias: Tensor | None, parameters: Parameters) -> Tensor:
    """The transposed convolution, (N, Cout, OD, OH, OW)."""
    # Not by torch.ops, which takes the host three times as long.
    return torch.convolution(
        input,
        weight,
        bias,
        parameters.stride,
        parameters.padding,
        parameters.dilation,
        True,
        parameters.output_padding,
        parameters.groups,
    )


def gradients(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    parameters: Parameters,
    *,
    with_input: bool,
    with_weight: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients asked for, with respect to the input and the weight."""
    grad_input, grad_weight, _ = torch.ops.aten.convolution_backward.default(
        grad_output,
        input,
        weight,
        None,
        parameters.stride,
        parameters.padding,
        parameters.dilation,
        True,
        parameters.output_padding,
        parameters.groups,
        [with_input, with_weight, False],
    )
    return grad_input, grad_weight


@functools.cache
def computes_float16_on_cpu() -> bool:
    """Whether this release of PyTorch does: older ones raise."""
    one = torch.ones(1, 1, 1, 1, 1, dtype=torch.float16)
    triple = (1, 1, 1)
    try:
        forward(one, one, None, Parameters(triple, (0, 0, 0), (0, 0, 0), triple, 1))
    except RuntimeError:
        return False
    return True
