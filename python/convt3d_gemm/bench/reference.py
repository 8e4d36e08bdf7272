"""The right answers in float64, tap by tap.

Every algorithm that is compared may be wrong, PyTorch's own included, so none of them is the judge: this is
the definition itself, `o = i*stride - padding + j*dilation`, as one small GEMM per tap j. It also stays
affordable where float64 columns would not (kb68's take 80 GB in float32): it needs one tap's share of one
sample at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import EllipsisType

import torch
from torch import Tensor

from convt3d_gemm.bench.layers import Layer

_Window = tuple[slice, slice, slice]
_Index = tuple[EllipsisType, slice, slice, slice]


def meeting_windows(layer: Layer, tap: int) -> tuple[_Window, _Window]:
    """The input voxels and the output voxels that tap number ``tap`` joins, as slices of equal lengths."""
    _, kernel_height, kernel_width = layer.kernel_size
    position = (
        tap // (kernel_height * kernel_width),
        tap // kernel_width % kernel_height,
        tap % kernel_width,
    )
    depth, height, width = (_meeting_slices(layer, axis, j) for axis, j in enumerate(position))
    return (depth[0], height[0], width[0]), (depth[1], height[1], width[1])


def _meeting_slices(layer: Layer, axis: int, j: int) -> tuple[slice, slice]:
    """Along one axis: the i whose `o = i*stride - padding + j*dilation` is inside the output, and those o."""
    stride = layer.stride[axis]
    offset = j * layer.dilation[axis] - layer.padding[axis]
    first = max(0, -(offset // stride))
    last = min(layer.input_size[axis] - 1, (layer.output_size[axis] - 1 - offset) // stride)
    count = max(0, last - first + 1)
    start = first * stride + offset
    return slice(first, first + count), slice(start, start + count * stride, stride)


def _grouped(sample: Tensor, layer: Layer) -> Tensor:
    """(C, D, H, W) as float64 (groups, C/groups, D, H, W)."""
    return sample.to(torch.float64).view(layer.groups, -1, *sample.shape[1:])


def _by_tap(weight: Tensor, layer: Layer) -> Tensor:
    """The weight as float64 (taps, groups, Cin/groups, Cout/groups)."""
    channels = (layer.groups, layer.in_channels // layer.groups, layer.out_channels // layer.groups)
    return weight.to(torch.float64).reshape(*channels, layer.taps).permute(3, 0, 1, 2).contiguous()


def _windows(layer: Layer, taps: Sequence[int]) -> Iterator[tuple[int, _Index, _Index]]:
    """(place in ``taps``, index of the input, index of the output) for every tap that joins any voxels."""
    for place, tap in enumerate(taps):
        input_window, output_window = meeting_windows(layer, tap)
        if all(window.stop > window.start for window in input_window):
            yield place, (..., *input_window), (..., *output_window)


def forward(layer: Layer, input: Tensor, weight: Tensor, samples: Sequence[int]) -> Tensor:
    """The output of the chosen samples, float64 of shape (len(samples), Cout, OD, OH, OW)."""
    by_tap = _by_tap(weight, layer)
    output = input.new_zeros((len(samples), *layer.output_shape[1:]), dtype=torch.float64)
    for place, sample in enumerate(samples):
        x, y = _grouped(input[sample], layer), _grouped(output[place], layer)
        for tap, input_window, output_window in _windows(layer, range(layer.taps)):
            voxels = x[input_window]
            y[output_window] += (by_tap[tap].mT @ voxels.flatten(2)).view(y[output_window].shape)
    return output


def grad_input(layer: Layer, grad_output: Tensor, weight: Tensor, samples: Sequence[int]) -> Tensor:
    """The gradient with respect to the chosen samples of the input, float64 (len(samples), Cin, D, H, W)."""
    by_tap = _by_tap(weight, layer)
    gradient = grad_output.new_zeros((len(samples), *layer.input_shape[1:]), dtype=torch.float64)
    for place, sample in enumerate(samples):
        gy, gx = _grouped(grad_output[sample], layer), _grouped(gradient[place], layer)
        for tap, input_window, output_window in _windows(layer, range(layer.taps)):
            voxels = gy[output_window]
            gx[input_window] += (by_tap[tap] @ voxels.flatten(2)).view(gx[input_window].shape)
    return gradient


def grad_weight(layer: Layer, grad_output: Tensor, input: Tensor, taps: Sequence[int]) -> Tensor:
    """The gradient with respect to the chosen taps of the weight, float64 (Cin, Cout/groups, len(taps)).

    It is a sum over all samples, so a cheaper check leaves out taps here, not samples.
    """
    gradient = input.new_zeros((*layer.weight_shape[:2], len(taps)), dtype=torch.float64)
    for sample in range(layer.batch):
        gy, x = _grouped(grad_output[sample], layer), _grouped(input[sample], layer)
        for tap_place, input_window, output_window in _windows(layer, taps):
            product = x[input_window].flatten(2) @ gy[output_window].flatten(2).mT
            gradient[:, :, tap_place] += product.flatten(0, 1)
    return gradient
