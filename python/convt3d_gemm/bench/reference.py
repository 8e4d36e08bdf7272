"""The right answers: PyTorch's own convolution in float64.

It runs one sample at a time, since a whole batch in float64 might not fit in memory, and without cuDNN's trials,
which would cost more than they gain for what is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from convt3d_gemm.bench.inputs import Tensors
from convt3d_gemm.bench.layers import Layer


def forward(layer: Layer, tensors: Tensors, samples: Sequence[int]) -> Tensor:
    """The output of the chosen samples, float64 of shape (len(samples), Cout, OD, OH, OW)."""
    weight = _float64(tensors.weight)
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        inputs = (_float64(tensors.input[sample, None]) for sample in samples)
        outputs = [functional.conv_transpose3d(input, weight, None, *layer.functional_parameters) for input in inputs]
        return torch.cat(outputs)


def grad_input(layer: Layer, tensors: Tensors, samples: Sequence[int]) -> Tensor:
    """The gradient with respect to the chosen samples of the input, float64 (len(samples), Cin, D, H, W)."""
    return torch.cat([_gradients(layer, tensors, sample, (True, False, False))[0] for sample in samples])


def grad_weight(layer: Layer, tensors: Tensors) -> Tensor:
    """The gradient with respect to the weight, float64 (Cin, Cout/groups, kd, kh, kw), summed over all samples."""
    gradient = tensors.weight.new_zeros(layer.weight_shape, dtype=torch.float64)
    for sample in range(layer.batch):
        gradient += _gradients(layer, tensors, sample, (False, True, False))[1]
    return gradient


def _gradients(layer: Layer, tensors: Tensors, sample: int, wanted: tuple[bool, bool, bool]) -> tuple[Tensor, Tensor]:
    """What one sample gives of the gradients of input and weight; undefined where not ``wanted``."""
    operands = (_float64(tensor[sample, None]) for tensor in (tensors.grad_output, tensors.input))
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        of_input, of_weight, _ = torch.ops.aten.convolution_backward(
            *operands, _float64(tensors.weight), None, *layer.backward_parameters, wanted
        )
    return of_input, of_weight


def _float64(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float64).contiguous()
