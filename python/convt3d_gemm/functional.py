"""`conv_transpose3d`, with the arguments of its namesake in torch.nn.functional."""

from __future__ import annotations

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from convt3d_gemm import operators
from convt3d_gemm.compatibility import is_compiling
from convt3d_gemm.parameters import Parameters, SizeArgument
from convt3d_gemm.selection import check_algorithm, operands_of_call

__all__ = ["conv_transpose3d"]


def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: SizeArgument = 1,
    padding: SizeArgument = 0,
    output_padding: SizeArgument = 0,
    groups: int = 1,
    dilation: SizeArgument = 1,
    *,
    algorithm: str = "auto",
) -> Tensor:
    """Transposed 3-D convolution, differentiable any number of times.

    Per dimension the output's size is (I - 1) * stride - 2 * padding + dilation * (k - 1) + output_padding + 1, as
    https://pytorch.org/docs/stable/generated/torch.nn.ConvTranspose3d.html gives it.

    Args:
        input: (N, Cin, D, H, W), or (Cin, D, H, W) for one sample; N may be 0. float64, float32, float16 or bfloat16,
            on a CPU or a CUDA device. channels_last_3d is kept. float32 on CUDA multiplies in TF32 exactly where
            PyTorch's own convolution would (`torch.backends.cudnn`).
        weight: (Cin, Cout / groups, kd, kh, kw), in the input's dtype and on its device.
        bias: (Cout,), or None.
        stride: one int, or three for depth, height and width; at least 1.
        padding: voxels cut off each side of the full output; at least 0.
        output_padding: voxels added to the far side; smaller than stride or dilation.
        groups: number of blocks that channels fall into, each connected only within itself; divides Cin and Cout.
        dilation: spacing of the kernel's taps; at least 1.
        algorithm: "gemm" (columns, then col2vol), "direct" (straight from the tensors, without columns), "native"
            (PyTorch's own), or "auto": the fastest of these, as measured by `tune` or as a cost model expects. While
            `torch.backends.cudnn.benchmark` is on, "auto" on CUDA measures what was not tuned when it is first met.

    Returns:
        (N, Cout, OD, OH, OW), or (Cout, OD, OH, OW) for an input of one sample.

    Raises:
        ValueError: an algorithm that there is not, or a parameter that does not fit in 64 bits.
        TypeError: an argument of the wrong type.
        RuntimeError: sizes, dtypes, devices or parameters that no convolution satisfies, as PyTorch raises it.
        NotImplementedError: an integer or complex dtype.
    """
    if has_torch_function_variadic(input, weight, bias):
        arguments = (input, weight, bias, stride, padding, output_padding, groups, dilation)
        return handle_torch_function(conv_transpose3d, arguments[:3], *arguments, algorithm=algorithm)
    check_algorithm(algorithm)
    make = Parameters.make if is_compiling() else Parameters.cached
    parameters = make(stride, padding, output_padding, dilation, groups)
    input, weight, bias = operands_of_call(input, weight, bias)
    dimensions = input.dim()
    if dimensions == 5:
        output: Tensor = operators.forward(input, weight, bias, parameters, algorithm)
        return output
    if dimensions != 4:
        raise RuntimeError(
            "input must have 5 dimensions (N, Cin, D, H, W), or 4 (Cin, D, H, W) for one sample, "
            f"got size {tuple(input.shape)}"
        )
    output = operators.forward(input.unsqueeze(0), weight, bias, parameters, algorithm)
    return output.squeeze(0)
