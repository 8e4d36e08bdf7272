"""The competitors of the comparison, by name. A new one is one more entry of `ALGORITHMS`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from convt3d_gemm import conv_transpose3d, workspace_bytes
from convt3d_gemm.bench.layers import Layer, Operator

Forward = Callable[[Layer, Tensor, Tensor], Tensor]
Gradients = Callable[[Layer, Operator, Tensor, Tensor, Tensor], tuple[Tensor, ...]]
Workspace = Callable[[Layer, Operator, Tensor, Tensor], int]


def _applies(layer: Layer, operator: Operator) -> str | None:
    """The refusal of an algorithm that takes every layer: none."""
    return None


@dataclass(frozen=True)
class Algorithm:
    """One way to compute a layer and its gradients.

    Attributes:
        name: what the command line and the tables call it.
        forward: (layer, input, weight) -> output.
        gradients: (layer, operator, grad_output, input, weight) -> those that the operator's name names, in its order.
        refusal: (layer, operator) -> why the algorithm does not apply, or None where it does.
        workspace: (layer, operator, input, weight) -> bytes, for an algorithm that can tell; else it is
            measured.
    """

    name: str
    forward: Forward
    gradients: Gradients
    refusal: Callable[[Layer, Operator], str | None] = _applies
    workspace: Workspace | None = None

    def run(
        self, layer: Layer, operator: Operator, grad_output: Tensor, input: Tensor, weight: Tensor
    ) -> tuple[Tensor, ...]:
        """The output alone, or the gradients that the operator's name names."""
        if operator == "forward":
            return (self.forward(layer, input, weight),)
        return self.gradients(layer, operator, grad_output, input, weight)


def _native_forward(layer: Layer, input: Tensor, weight: Tensor) -> Tensor:
    return functional.conv_transpose3d(input, weight, None, *layer.functional_parameters)


def _native_gradients(
    layer: Layer, operator: Operator, grad_output: Tensor, input: Tensor, weight: Tensor
) -> tuple[Tensor, ...]:
    wanted = (operator != "grad_weight", operator != "grad_input", False)
    gradients = torch.ops.aten.convolution_backward(
        grad_output, input, weight, None, *layer.backward_parameters, wanted
    )
    return tuple(gradient for gradient, is_wanted in zip(gradients, wanted, strict=True) if is_wanted)


def _of_this_package(name: str) -> Algorithm:
    """An algorithm that this package has under ``name``."""

    def forward(layer: Layer, input: Tensor, weight: Tensor) -> Tensor:
        return conv_transpose3d(input, weight, None, *layer.functional_parameters, algorithm=name)

    def gradients(
        layer: Layer, operator: Operator, grad_output: Tensor, input: Tensor, weight: Tensor
    ) -> tuple[Tensor, ...]:
        operators = torch.ops.convt3d_gemm
        parameters = (layer.stride, layer.padding, layer.output_padding, layer.dilation, layer.groups, name)
        if operator == "grad_input":
            return (operators.grad_input(grad_output, weight, layer.input_size, *parameters),)
        if operator == "grad_weight":
            return (operators.grad_weight(grad_output, input, layer.kernel_size, *parameters),)
        return tuple(operators.grad_input_weight(grad_output, input, weight, *parameters))

    def workspace(layer: Layer, operator: Operator, input: Tensor, weight: Tensor) -> int:
        parameters = layer.functional_parameters
        return workspace_bytes(input, weight, None, *parameters, operator=operator, algorithm=name)

    # "auto" may choose PyTorch's own, which does not tell.
    return Algorithm(name, forward, gradients, workspace=None if name == "auto" else workspace)


def _aten_forward(layer: Layer, input: Tensor, weight: Tensor) -> Tensor:
    output: Tensor = torch.ops.aten.slow_conv_transpose3d(
        input,
        weight,
        layer.kernel_size,
        None,
        layer.stride,
        layer.padding,
        layer.output_padding,
        layer.dilation,
    )
    return output


def _aten_gradients(
    layer: Layer, operator: Operator, grad_output: Tensor, input: Tensor, weight: Tensor
) -> tuple[Tensor, ...]:
    with _neither_cudnn_nor_onednn():
        return _native_gradients(layer, operator, grad_output, input, weight)


@contextlib.contextmanager
def _neither_cudnn_nor_onednn() -> Iterator[None]:
    """Inside, convolution_backward goes to ATen's backward of slow_conv_transpose3d, which has no name of its own."""
    cudnn, onednn = torch.backends.cudnn.enabled, torch._C._get_mkldnn_enabled()
    torch.backends.cudnn.enabled = False
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = cudnn
        torch._C._set_mkldnn_enabled(onednn)


def _aten_refusal(layer: Layer, operator: Operator) -> str | None:
    if layer.groups != 1:
        return "slow_conv_transpose3d takes no groups"
    return None


#: Every competitor. What the others are compared with comes first.
ALGORITHMS: dict[str, Algorithm] = {
    algorithm.name: algorithm
    for algorithm in (
        Algorithm("native", _native_forward, _native_gradients),
        _of_this_package("gemm"),
        _of_this_package("direct"),
        _of_this_package("auto"),
        # The same algorithm as gemm, as PyTorch has it.
        Algorithm("aten", _aten_forward, _aten_gradients, refusal=_aten_refusal),
    )
}

#: The one that PyTorch runs by itself (cuDNN, oneDNN): the others are held against it.
BASELINE = "native"

#: Those that run when none are asked for.
DEFAULT_ALGORITHMS = (BASELINE, "gemm", "direct", "aten")
