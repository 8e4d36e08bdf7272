"""Swapping the transposed 3-D convolutions inside a model."""

from __future__ import annotations

from typing import TypeVar

import torch

from convt3d_gemm.selection import check_algorithm
from convt3d_gemm.modules import ConvTranspose3d

__all__ = ["replace_conv_transpose3d"]

Module = TypeVar("Module", bound=torch.nn.Module)


def replace_conv_transpose3d(module: Module, algorithm: str = "auto") -> Module:
    """Swap every `torch.nn.ConvTranspose3d` inside a module for this package's, in place.

    A layer stays the object it was, with another class: its parameters, hooks, training mode, dtype, device, and every
    reference that the model holds to it are untouched. Layers of this package get the new `algorithm`; other
    subclasses, whose `forward` may do more, are left alone.

    Args:
        module: any module; it may itself be a `torch.nn.ConvTranspose3d`.
        algorithm: see `convt3d_gemm.conv_transpose3d`.

    Returns:
        The same module.

    Raises:
        ValueError: an algorithm that there is not.
        TypeError: `module` is not a module.
    """
    check_algorithm(algorithm)
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    for layer in module.modules():
        if type(layer) is torch.nn.ConvTranspose3d:
            layer.__class__ = ConvTranspose3d
        if type(layer) is ConvTranspose3d:
            layer.algorithm = algorithm
    return module
