"""`ConvTranspose3d`, torch's module with a choice of algorithm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from convt3d_gemm.functional import conv_transpose3d
from convt3d_gemm.parameters import Triple
from convt3d_gemm.selection import check_algorithm

__all__ = ["ConvTranspose3d"]


class ConvTranspose3d(torch.nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` with one more keyword, `algorithm`.

    Everything else is the base class's: constructor, initial weights for a seed, `state_dict`, and the `output_size`
    argument of `forward`. Shapes and errors are those of `convt3d_gemm.conv_transpose3d`.
    """

    algorithm: str = "auto"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Triple,
        stride: int | Triple = 1,
        padding: int | Triple = 0,
        output_padding: int | Triple = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | Triple = 1,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        algorithm: str = "auto",
    ) -> None:
        check_algorithm(algorithm)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,  # type: ignore[arg-type]
            device,
            dtype,
        )
        self.algorithm = algorithm

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Apply the transposed convolution to (N, Cin, D, H, W) or (Cin, D, H, W).

        Args:
            input: see `convt3d_gemm.conv_transpose3d`.
            output_size: the spatial size (or the whole size) that the output shall have, where the stride leaves a
                choice; it stands in for `output_padding`.

        Raises:
            ValueError: a padding mode other than zeros, or an output_size that the parameters can't give.
            RuntimeError: as `convt3d_gemm.conv_transpose3d`.
        """
        if self.padding_mode != "zeros":
            raise ValueError("Only `zeros` padding mode is supported for ConvTranspose3d")
        output_padding: Any = self.output_padding
        if output_size is not None:
            output_padding = self._output_padding(
                input,
                output_size,
                self.stride,  # type: ignore[arg-type]
                self.padding,  # type: ignore[arg-type]
                self.kernel_size,  # type: ignore[arg-type]
                3,
                self.dilation,  # type: ignore[arg-type]
            )
        return conv_transpose3d(
            input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,  # type: ignore[arg-type]
            output_padding,
            self.groups,
            self.dilation,
            algorithm=self.algorithm,
        )

    def extra_repr(self) -> str:
        """The base class's description, and the algorithm."""
        inherited: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{inherited}, algorithm={self.algorithm!r}"
