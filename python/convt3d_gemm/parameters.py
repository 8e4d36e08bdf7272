"""The parameters of a transposed convolution, checked once and passed along together."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple, Union

__all__ = ["Parameters", "SizeArgument"]

Triple = tuple[int, int, int]
SizeArgument = Union[int, Sequence[int]]


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
        """
        return cls(
            _triple("stride", stride),
            _triple("padding", padding),
            _triple("output_padding", output_padding),
            _triple("dilation", dilation),
            _integer("groups", groups),
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
        """`make`, remembered for arguments that can be hashed."""
        try:
            return _make_cached(stride, padding, output_padding, dilation, groups)
        except TypeError:
            return cls.make(stride, padding, output_padding, dilation, groups)


@functools.lru_cache(maxsize=1024, typed=True)
def _make_cached(
    stride: SizeArgument,
    padding: SizeArgument,
    output_padding: SizeArgument,
    dilation: SizeArgument,
    groups: int,
) -> Parameters:
    return Parameters.make(stride, padding, output_padding, dilation, groups)


def _integer(name: str, value: object) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an int or a tuple of ints, got bool")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an int or a tuple of ints, got {type(value).__name__}") from None
    if not -(2**63) <= number < 2**63:
        raise RuntimeError(f"{name} must fit in 64 bits, got {number}")
    return number


def _triple(name: str, value: SizeArgument) -> Triple:
    if not isinstance(value, Sequence):
        number = _integer(name, value)
        return (number, number, number)
    if isinstance(value, str) or len(value) not in (1, 3):
        raise RuntimeError(f"{name} must be one int or three (depth, height, width), got {value!r}")
    numbers = [_integer(name, element) for element in value]
    return (numbers[0], numbers[-2] if len(numbers) == 3 else numbers[0], numbers[-1])
