"""The competitors of the comparison, by name. A new one is one more entry of `ALGORITHMS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from convt3d_gemm import conv_transpose3d, workspace_bytes
from convt3d_gemm.bench.layers import Layer, Operator

Forward = Callable[[Layer, Tensor, Tensor], Tensor]
GradInputWeight = Callable[[Layer, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
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
        grad_input_weight: (layer, grad_output, input, weight) -> (grad_input, grad_weight).
        refusal: (layer, operator) -> why the algorithm does not apply, or None where it does.
        workspace: (layer, operator, input, weight) -> bytes, for an algorithm that can tell; else it is
            measured.
    """

    name: str
    forward: Forward
    grad_input_weight: GradInputWeight
    refusal: Callable[[Layer, Operator], str | None] = _applies
    workspace: Workspace | None = None

    def run(
        self, layer: Layer, operator: Operator, grad_output: Tensor, input: Tensor, weight: Tensor
    ) -> tuple[Tensor, ...]:
        """The output alone, or grad_input and grad_weight."""
        if operator == "forward":
            return (self.forward(layer, input, weight),)
        return self.grad_input_weight(layer, grad_output, input, weight)


def _native_forward(layer: Layer, input: Tensor, weight: Tensor) -> Tensor:
    return functional.conv_transpose3d(input, weight, None, *layer.functional_parameters)


def _native_grad_input_weight(
    layer: Layer, grad_output: Tensor, input: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    grad_input, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad_output, input, weight, None, *layer.backward_parameters, (True, True, False)
    )
    return grad_input, grad_weight


def _of_this_package(name: str) -> Algorithm:
    """An algorithm that this package has under ``name``."""

    def forward(layer: Layer, input: Tensor, weight: Tensor) -> Tensor:
        return conv_transpose3d(input, weight, None, *layer.functional_parameters, algorithm=name)

    def grad_input_weight(layer: Layer, grad_output: Tensor, input: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        grad_input, grad_weight = torch.ops.convt3d_gemm.grad_input_weight(
            grad_output,
            input,
            weight,
            layer.stride,
            layer.padding,
            layer.output_padding,
            layer.dilation,
            layer.groups,
            name,
        )
        return grad_input, grad_weight

    def workspace(layer: Layer, operator: Operator, input: Tensor, weight: Tensor) -> int:
        parameters = layer.functional_parameters
        return workspace_bytes(input, weight, None, *parameters, operator=operator, algorithm=name)

    return Algorithm(name, forward, grad_input_weight, workspace=workspace)


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


def _aten_refusal(layer: Layer, operator: Operator) -> str | None:
    if operator != "forward":
        return "its gradients are native's: slow_conv_transpose3d has no backward of its own"
    if layer.groups != 1:
        return "slow_conv_transpose3d takes no groups"
    return None


#: Every competitor. What the others are compared with comes first.
ALGORITHMS: dict[str, Algorithm] = {
    algorithm.name: algorithm
    for algorithm in (
        Algorithm("native", _native_forward, _native_grad_input_weight),
        _of_this_package("gemm"),
        _of_this_package("direct"),
        # The same algorithm as gemm, as PyTorch has it.
        Algorithm("aten", _aten_forward, _native_grad_input_weight, refusal=_aten_refusal),
    )
}

#: The one that PyTorch runs by itself (cuDNN, oneDNN): the others are held against it.
BASELINE = "native"

#: Those that run when none are asked for.
DEFAULT_ALGORITHMS = (BASELINE, "gemm", "direct")
