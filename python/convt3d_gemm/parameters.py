"""The parameters of a transposed convolution, checked once and passed along together."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch

from convt3d_gemm.compatibility import is_compiling

__all__ = ["Parameters", "SizeArgument", "Triple"]

Triple = tuple[int, int, int]
SizeArgument = int | Sequence[int]


class Parameters(NamedTuple):
    """Stride, padding, output_padding and dilation in depth, height, width; and groups."""

    stride: Triple
    padding: Triple
    output_padding: Triple
    dilation: Triple
    groups: int

    @classmethod
    def make(
        cls,
        stride: SizeArgument,
        padding: SizeArgument,
        output_padding: SizeArgument,
        dilation: SizeArgument,
        groups: int,
    ) -> Parameters:
        """Bring the arguments to triples. Whether the values fit a convolution is for the C++ library to say.

        Raises:
            TypeError: an argument is not an integer or a sequence of them.
            RuntimeError: a sequence has neither one nor three elements.
            ValueError: an integer does not fit in 64 bits.
        """
        return cls(
            _triple("stride", stride),
            _triple("padding", padding),
            _triple("output_padding", output_padding),
            _triple("dilation", dilation),
            _integer("groups", groups, "an int"),
        )

    @classmethod
    def cached(
        cls,
        stride: SizeArgument,
        padding: SizeArgument,
        output_padding: SizeArgument,
        dilation: SizeArgument,
        groups: int,
    ) -> Parameters:
        """`make`, remembered where arguments that are equal mean the same."""
        plain = _is_plain(stride) and _is_plain(padding) and _is_plain(output_padding) and _is_plain(dilation)
        make = _make_cached if plain and type(groups) is int else cls.make
        return make(stride, padding, output_padding, dilation, groups)


def _is_plain(value: object) -> bool:
    """Whether it is an int, or three in a tuple: not floats that equal them, nor a tensor, which changes."""
    return type(value) is int or (
        type(value) is tuple and len(value) == 3 and type(value[0]) is type(value[1]) is type(value[2]) is int
    )


@functools.lru_cache(maxsize=1024)
def _make_cached(
    stride: SizeArgument,
    padding: SizeArgument,
    output_padding: SizeArgument,
    dilation: SizeArgument,
    groups: int,
) -> Parameters:
    return Parameters.make(stride, padding, output_padding, dilation, groups)


def _integer(name: str, value: object, allowed: str = "an int or a tuple of ints") -> int:
    if isinstance(value, bool):
        raise TypeError(f"{name} must be {allowed}, got bool")
    if isinstance(value, torch.SymInt) or (is_compiling() and isinstance(value, int)):
        return value  # type: ignore[return-value]  # perhaps of a tensor's size: to look at it is to compile for it
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be {allowed}, got {type(value).__name__}") from None
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{name} must fit in 64 bits, got {number}")
    return number


def _triple(name: str, value: SizeArgument) -> Triple:
    if not isinstance(value, Sequence) or isinstance(value, str):
        number = _integer(name, value)
        return (number, number, number)
    numbers = [_integer(name, element) for element in value]
    if len(numbers) not in (1, 3):
        raise RuntimeError(f"{name} must be one int or three (depth, height, width), got {value!r}")
    return (numbers[0], numbers[-2] if len(numbers) == 3 else numbers[0], numbers[-1])
