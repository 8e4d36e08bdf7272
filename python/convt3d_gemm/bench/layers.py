"""The layers that the comparison runs on: what describes one, the published table, and the presets."""

from __future__ import annotations

import difflib
import functools
import math
import re
from dataclasses import dataclass
from typing import Literal

from convt3d_gemm import _C

Triple = tuple[int, int, int]

#: What is timed: the layer itself, a gradient of it, or both gradients together (a training step needs both).
Operator = Literal["forward", "grad_input", "grad_weight", "grad_input_weight"]


@dataclass(frozen=True)
class Layer:
    """One transposed 3-D convolution without bias; triples are in the order depth, height, width.

    Raises:
        ValueError: if the batch is empty, or for parameters that the library refuses: a size out of range, groups
            that do not divide the channels, an output_padding smaller than neither stride nor dilation, no output.
    """

    name: str
    batch: int
    in_channels: int
    out_channels: int
    kernel_size: Triple
    input_size: Triple
    stride: Triple = (1, 1, 1)
    padding: Triple = (0, 0, 0)
    output_padding: Triple = (0, 0, 0)
    dilation: Triple = (1, 1, 1)
    groups: int = 1

    def __post_init__(self) -> None:
        if self.batch < 1:  # which the library computes, but there is nothing to measure
            raise ValueError(f"batch must be at least 1, got {self.batch}")
        _ = self.output_size  # refuses parameters that do not fit together

    @property
    def taps(self) -> int:
        """The number of kernel taps."""
        return math.prod(self.kernel_size)

    @functools.cached_property
    def output_size(self) -> Triple:
        """The output's depth, height and width."""
        try:
            problem = _C.Problem(
                batch=self.batch,
                in_channels=self.in_channels,
                out_channels=self.out_channels,
                groups=self.groups,
                input=self.input_size,
                kernel=self.kernel_size,
                stride=self.stride,
                padding=self.padding,
                output_padding=self.output_padding,
                dilation=self.dilation,
                # A layer is measured in several of these; its geometry is the same in all.
                layout=_C.Layout.ncdhw,
                dtype=_C.DataType.float64,
                precision=_C.Precision.ieee,
            )
        except RuntimeError as error:
            raise ValueError(str(error)) from None
        depth, height, width = problem.output
        return depth, height, width

    @property
    def functional_parameters(self) -> tuple[Triple, Triple, Triple, int, Triple]:
        """What torch.nn.functional.conv_transpose3d takes after the bias, in its order."""
        return self.stride, self.padding, self.output_padding, self.groups, self.dilation

    @property
    def backward_parameters(self) -> tuple[Triple, Triple, Triple, bool, Triple, int]:
        """What torch.ops.aten.convolution_backward takes after the bias's sizes, in its order; True for transposed."""
        return self.stride, self.padding, self.dilation, True, self.output_padding, self.groups

    @property
    def input_shape(self) -> tuple[int, int, int, int, int]:
        """(N, Cin, D, H, W)."""
        return (self.batch, self.in_channels, *self.input_size)

    @property
    def weight_shape(self) -> tuple[int, int, int, int, int]:
        """(Cin, Cout/groups, kd, kh, kw)."""
        return (self.in_channels, self.out_channels // self.groups, *self.kernel_size)

    @property
    def output_shape(self) -> tuple[int, int, int, int, int]:
        """(N, Cout, OD, OH, OW)."""
        return (self.batch, self.out_channels, *self.output_size)

    def result_shapes(self, operator: Operator) -> tuple[tuple[int, int, int, int, int], ...]:
        """What the operator gives: the output alone, or the gradients that its name names, in its order."""
        if operator == "forward":
            return (self.output_shape,)
        shapes = {"input": self.input_shape, "weight": self.weight_shape}
        return tuple(shape for name, shape in shapes.items() if name in operator)

    def flops(self, operator: Operator) -> int:
        """Operations (a multiply-add is two) as if every tap of every input voxel met an output voxel."""
        once = 2 * math.prod(self.input_shape) * (self.out_channels // self.groups) * self.taps
        return 2 * once if operator == "grad_input_weight" else once

    def elements_moved(self, operator: Operator) -> int:
        """Elements that any algorithm has to read or write once: what it takes, plus what it gives.

        The forward operator and either gradient take two of input, weight and output and give the third.
        """
        x, w, y = math.prod(self.input_shape), math.prod(self.weight_shape), math.prod(self.output_shape)
        return y + 2 * x + 2 * w if operator == "grad_input_weight" else x + w + y

    @property
    def specification(self) -> str:
        """The text from which :func:`parse_layer` makes this layer again, its name aside."""
        return ",".join(f"{key}{_compact(getattr(self, field))}" for key, field in _KEYS.items())


#: The keys of a layer's specification. Those of `_NEEDED` have no default.
_KEYS = {
    "N": "batch",
    "Cin": "in_channels",
    "Cout": "out_channels",
    "k": "kernel_size",
    "in": "input_size",
    "s": "stride",
    "p": "padding",
    "op": "output_padding",
    "d": "dilation",
    "g": "groups",
}
_NEEDED = ("Cin", "Cout", "k", "in")
_SCALARS = ("batch", "in_channels", "out_channels", "groups")

SPECIFICATION_HELP = (
    "the name of a layer in the table, or a specification such as "
    "N2,Cin64,Cout32,k2,in64x64x64,s2,p0,op0,d1,g1: batch, channels, kernel size, input size, stride, "
    "padding, output padding, dilation, groups. k, in, s, p, op and d take one number or three "
    "(k3x5x7: depth, height, width). Cin, Cout, k and in are needed; the rest default to "
    "N1, s1, p0, op0, d1, g1"
)


def _compact(value: int | Triple) -> str:
    """3 for 3 and for (3, 3, 3), 3x5x7 for (3, 5, 7)."""
    if isinstance(value, int):
        return str(value)
    return str(value[0]) if len(set(value)) == 1 else "x".join(map(str, value))


def parse_layer(text: str) -> Layer:
    """The layer that ``text`` names or specifies as `SPECIFICATION_HELP` says, keys in any case and order.

    Raises:
        ValueError: saying what is wrong with the text and what is allowed.
    """
    text = text.strip()
    if text in LAYERS:
        return LAYERS[text]
    if "," not in text:  # a specification has at least the four parts that are needed
        near = difflib.get_close_matches(text, LAYERS, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(LAYERS)}"
        raise ValueError(f"no layer is called {text!r}: {hint}")

    keys = {key.lower(): key for key in _KEYS}
    values: dict[str, int | Triple] = {}
    for part in text.split(","):
        match = re.fullmatch(r"([A-Za-z]+)([0-9x]*)", part.strip())
        key = keys.get(match[1].lower()) if match else None
        if match is None or key is None:
            raise ValueError(
                f"cannot read {part.strip()!r} in the layer {text!r}: a part is one of {', '.join(_KEYS)} "
                "followed by a number or, where it applies, three joined by x"
            )
        field = _KEYS[key]
        if field in values:
            raise ValueError(f"{key} is given twice in the layer {text!r}")
        values[field] = _parse_value(part.strip(), match[2], scalar=field in _SCALARS)
    missing = [key for key in _NEEDED if _KEYS[key] not in values]
    if missing:
        raise ValueError(f"the layer {text!r} lacks {', '.join(missing)}")
    try:
        return Layer(**{"name": text, "batch": 1, **values})  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"the layer {text!r}: {error}") from None


def _parse_value(part: str, digits: str, *, scalar: bool) -> int | Triple:
    """The number, or the triple (one number stands for three), that follows a key."""
    if not re.fullmatch(r"\d+" if scalar else r"\d+(x\d+x\d+)?", digits):
        allowed = "one number" if scalar else "one number, or three joined by x,"
        raise ValueError(f"cannot read {part!r}: {allowed} must follow the key")
    numbers = tuple(map(int, digits.split("x")))
    if scalar:
        return numbers[0]
    depth, height, width = numbers if len(numbers) == 3 else numbers * 3
    return depth, height, width


#: KernelBench level 1, by number, as its newest commit defines them. kb73 passes its groups in the place
#: of output_padding and so runs ungrouped; kb73g4 is what it meant to be.
_KERNELBENCH = (
    Layer("kb58", 16, 32, 16, (3, 5, 7), (16, 32, 64)),
    Layer("kb61", 8, 48, 48, (3, 3, 3), (64, 64, 64)),
    Layer("kb68", 16, 32, 64, (3, 5, 5), (64, 64, 64)),
    Layer("kb70", 8, 48, 24, (3, 3, 3), (96, 96, 96)),
    Layer("kb72", 8, 32, 32, (3, 5, 7), (12, 24, 48), (2, 2, 2), (1, 2, 3), (1, 1, 1), groups=4),
    Layer("kb73", 4, 32, 32, (3, 3, 3), (32, 64, 128), (2, 2, 2), (1, 1, 1)),
    Layer("kb73g4", 4, 32, 32, (3, 3, 3), (32, 64, 128), (2, 2, 2), (1, 1, 1), groups=4),
    Layer("kb77", 16, 32, 64, (3, 3, 3), (16, 32, 32), (2, 2, 2), (1, 1, 1), dilation=(2, 2, 2)),
)

#: Decoders in use: nnU-Net, SwinUNETR, V-Net (kernel = stride), 3-D U-Net (output_padding), GANs, VAEs.
_DECODERS = (
    Layer("nnunet_deep", 2, 320, 320, (2, 2, 2), (8, 8, 8), (2, 2, 2)),
    Layer("nnunet_mid", 2, 128, 64, (2, 2, 2), (32, 32, 32), (2, 2, 2)),
    Layer("nnunet_top", 2, 64, 32, (2, 2, 2), (64, 64, 64), (2, 2, 2)),
    Layer("swin_top", 1, 48, 48, (2, 2, 2), (48, 48, 48), (2, 2, 2)),
    Layer("unet3d_k3s2", 2, 128, 64, (3, 3, 3), (32, 32, 32), (2, 2, 2), (1, 1, 1), (1, 1, 1)),
    Layer("gan_k4s2", 16, 256, 128, (4, 4, 4), (16, 16, 16), (2, 2, 2), (1, 1, 1)),
    Layer("gan_first", 64, 512, 256, (4, 4, 4), (4, 4, 4), (2, 2, 2), (1, 1, 1)),
    Layer("vae_aniso", 1, 256, 128, (3, 4, 4), (17, 32, 32), (1, 2, 2), (1, 1, 1)),
)

#: As many groups as channels, which is how learned and fixed (trilinear) upsampling is written.
_DEPTHWISE = tuple(
    Layer(
        f"dw{channels}_k{kernel}",
        2,
        channels,
        channels,
        (kernel, kernel, kernel),
        (48, 48, 48),
        (2, 2, 2),
        ((kernel - 1) // 2,) * 3,
        groups=channels,
    )
    for channels in (32, 64, 128)
    for kernel in (2, 3, 4)
)

#: One layer of each kind, small enough for a CPU to go through all of them in seconds.
_QUICK = (
    Layer("quick_k2s2", 1, 32, 16, (2, 2, 2), (24, 24, 24), (2, 2, 2)),
    Layer("quick_k3s2", 1, 32, 16, (3, 3, 3), (16, 16, 16), (2, 2, 2), (1, 1, 1), (1, 1, 1)),
    Layer("quick_k4s2", 2, 32, 16, (4, 4, 4), (12, 12, 12), (2, 2, 2), (1, 1, 1)),
    Layer("quick_k3s1", 1, 16, 16, (3, 5, 7), (8, 12, 16), (1, 1, 1)),
    Layer("quick_grouped", 2, 32, 32, (3, 3, 3), (12, 12, 12), (2, 2, 2), (1, 1, 1), (1, 1, 1), groups=4),
    Layer("quick_depthwise", 1, 32, 32, (3, 3, 3), (16, 16, 16), (2, 2, 2), (1, 1, 1), (1, 1, 1), groups=32),
    Layer("quick_dilated", 1, 16, 32, (3, 3, 3), (12, 16, 16), (2, 2, 2), (1, 1, 1), dilation=(2, 2, 2)),
)

#: Every layer that has a name.
LAYERS: dict[str, Layer] = {layer.name: layer for layer in (*_KERNELBENCH, *_DECODERS, *_DEPTHWISE, *_QUICK)}

#: The layers that ``--preset`` chooses. "all" leaves out "quick", whose layers say nothing that the others don't.
PRESETS: dict[str, tuple[Layer, ...]] = {
    "quick": _QUICK,
    "kernelbench": _KERNELBENCH,
    "decoders": _DECODERS,
    "depthwise": _DEPTHWISE,
    "all": (*_KERNELBENCH, *_DECODERS, *_DEPTHWISE),
}

#: The layers of the published tables.
PUBLISHED = (*_KERNELBENCH, *_DECODERS)
