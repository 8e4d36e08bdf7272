"""The transposed 3-D convolutions inside a network, with the shapes that they really see."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convt3d_gemm import ConvTranspose3d, replace_conv_transpose3d
from convt3d_gemm.bench.layers import Layer, Triple


@dataclass(frozen=True)
class Found:
    """One geometry that occurs in a network.

    Attributes:
        layer: its geometry, named after the network and numbered in the order of the calls.
        modules: the names of the modules that see it.
        calls: how often it is computed in one forward pass.
        replaced: whether `replace_conv_transpose3d` replaces all of these modules.
    """

    layer: Layer
    modules: tuple[str, ...]
    calls: int
    replaced: bool


def find_layers(name: str, network: torch.nn.Module, inputs: Sequence[Tensor]) -> list[Found]:
    """Run the network once and look at every `torch.nn.ConvTranspose3d` that is called.

    Equal geometries are one entry. What calls the function instead of a module is not seen, and not replaced either.

    Args:
        name: what to call the network.
        network: on the device of the inputs; it is run in the mode that it is in, without gradients.
        inputs: its arguments.

    Raises:
        Exception: whatever the network raises.
    """
    calls: list[tuple[str, Layer]] = []
    with _watched(network, lambda module_name, layer: calls.append((module_name, layer))), torch.no_grad():
        network(*inputs)
    replaced = {
        module_name
        for module_name, module in replace_conv_transpose3d(copy.deepcopy(network)).named_modules()
        if isinstance(module, ConvTranspose3d)
    }
    modules_by_layer: dict[Layer, list[str]] = {}
    for module_name, layer in calls:
        modules_by_layer.setdefault(layer, []).append(module_name)
    return [
        Found(
            layer=dataclasses.replace(layer, name=f"{name}[{number}]"),
            modules=tuple(dict.fromkeys(names)),
            calls=len(names),
            replaced=replaced.issuperset(names),
        )
        for number, (layer, names) in enumerate(modules_by_layer.items())
    ]


@contextlib.contextmanager
def _watched(network: torch.nn.Module, see: Callable[[str, Layer], None]) -> Iterator[None]:
    """Inside, ``see`` is told the name and the geometry of every transposed convolution that is called."""

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.ConvTranspose3d, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
            see(name, _layer_of(module, args[0] if args else kwargs["input"], out))

        return hook

    handles = [
        module.register_forward_hook(hook_of(name), with_kwargs=True)
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.ConvTranspose3d)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layer_of(module: torch.nn.ConvTranspose3d, input: Tensor, output: Tensor) -> Layer:
    """The geometry of one call; without its name, so that equal ones compare equal."""
    layer = functools.partial(
        Layer,
        name="",
        batch=input.size(0) if input.dim() == 5 else 1,
        in_channels=module.in_channels,
        out_channels=module.out_channels,
        kernel_size=_triple(module.kernel_size),
        input_size=_triple(input.shape[-3:]),
        stride=_triple(module.stride),
        padding=_triple(module.padding),
        dilation=_triple(module.dilation),
        groups=module.groups,
    )
    # From the output, since an output_size given to the call takes the place of the module's own output_padding; and
    # from the largest there can be, since with none there may be no output.
    most = _triple([max(pair) - 1 for pair in zip(module.stride, module.dilation, strict=True)])
    sizes = zip(most, output.shape[-3:], layer(output_padding=most).output_size, strict=True)
    return layer(output_padding=_triple([padding + got - largest for padding, got, largest in sizes]))


def _triple(values: Sequence[Any]) -> Triple:
    depth, height, width = map(int, values)
    return depth, height, width
