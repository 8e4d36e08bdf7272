"""Swapping the transposed 3-D convolutions inside a model."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch.nn.utils import parametrize

from convt3d_gemm.modules import ConvTranspose3d
from convt3d_gemm.selection import check_algorithm

__all__ = ["replace_conv_transpose3d"]

Module = TypeVar("Module", bound=torch.nn.Module)


def replace_conv_transpose3d(module: Module, algorithm: str = "auto") -> Module:
    """Swap every `torch.nn.ConvTranspose3d` inside a module for this package's, in place.

    A layer stays the object it was, with another class: its parameters, hooks, training mode, dtype, device, and every
    reference that the model holds to it are untouched, and so are its parametrisations. Layers of this package get
    the new `algorithm`; other subclasses, whose `forward` may do more, are left alone.

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
        if _class_of(layer) is torch.nn.ConvTranspose3d:
            _swap(layer)
        if _class_of(layer) is ConvTranspose3d:
            layer.algorithm = algorithm  # type: ignore[assignment]
    return module


def _class_of(layer: torch.nn.Module) -> type:
    """The layer's class, or the one that torch derived it from to parametrise the layer."""
    return type(layer).__bases__[0] if parametrize.is_parametrized(layer) else type(layer)


def _swap(layer: torch.nn.Module) -> None:
    if parametrize.is_parametrized(layer):
        # Copies of the layer share its class, so that one stays as it is.
        own = {name: value for name, value in vars(type(layer)).items() if name not in ("__dict__", "__weakref__")}
        layer.__class__ = type(type(layer).__name__, (ConvTranspose3d,), own)
    else:
        layer.__class__ = ConvTranspose3d
