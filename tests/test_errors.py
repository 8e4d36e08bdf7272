"""Bad input: an exception of PyTorch's type that names the argument, what was given and what is allowed."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import ALGORITHMS, LAYOUTS, NAMED, OPERATORS, Case, ours, workspace_limit
from convt3d_gemm import (
    ConvTranspose3d,
    algorithms,
    build_info,
    conv_transpose3d,
    get_workspace_limit,
    set_workspace_limit,
    settings,
    workspace_bytes,
)
from convt3d_gemm.binding import missing_backend

REFERENCE: Callable[..., Tensor] = torch.nn.functional.conv_transpose3d

Changes = Mapping[str, Callable[[Tensor], Any]]


@dataclass(frozen=True)
class BadCall:
    """How it differs from a good call, what it raises, and what the message says among other things."""

    raises: type[Exception]
    says: tuple[str, ...]
    changes: Changes = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def arguments(self, device: torch.device) -> dict[str, Any]:
        tensors = {
            "input": torch.ones(2, 4, 3, 5, 4, device=device),
            "weight": torch.ones(4, 6, 3, 3, 3, device=device),
            "bias": torch.ones(6, device=device),
        }
        changed = {name: change(tensors[name]) for name, change in self.changes.items()}
        return tensors | changed | dict(self.parameters)


def tensors(raises: type[Exception], *says: str, **changes: Callable[[Tensor], Any]) -> BadCall:
    return BadCall(raises, says, changes)


def parameters(raises: type[Exception], *says: str, **parameters: Any) -> BadCall:
    return BadCall(raises, says, parameters=parameters)


def all_of(dtype: torch.dtype) -> dict[str, Callable[[Tensor], Tensor]]:
    return dict.fromkeys(("input", "weight", "bias"), lambda tensor: tensor.to(dtype))


BAD_CALLS = {
    # rank
    "input of rank 3": tensors(RuntimeError, "input", "5 dimensions", "(3, 5, 4)", input=lambda t: t[0, 0]),
    "input of rank 6": tensors(RuntimeError, "input", "(1, 2, 4, 3, 5, 4)", input=lambda t: t[None]),
    "input of rank 0": tensors(RuntimeError, "input", "size ()", input=lambda t: t.sum()),
    "weight of rank 4": tensors(RuntimeError, "weight", "(6, 3, 3, 3)", weight=lambda t: t[0]),
    "weight of rank 1": tensors(RuntimeError, "weight", "(4,)", weight=lambda t: t[:, 0, 0, 0, 0]),
    "weight of rank 0": tensors(RuntimeError, "weight", "size ()", weight=lambda t: t.sum()),
    "weight of rank 6": tensors(RuntimeError, "weight", "(1, 4, 6, 3, 3, 3)", weight=lambda t: t[None]),
    "bias of rank 2": tensors(RuntimeError, "bias", "6", "(1, 6)", bias=lambda t: t[None]),
    "bias of rank 0": tensors(RuntimeError, "bias", "6", "()", bias=lambda t: t[0]),
    # sizes
    "input's channels": tensors(RuntimeError, "4 channels", "(2, 3, 3, 5, 4)", input=lambda t: t[:, 1:]),
    "weight's channels": tensors(RuntimeError, "3 channels", "(3, 6, 3, 3, 3)", weight=lambda t: t[1:]),
    "bias's length": tensors(RuntimeError, "bias", "6", "(5,)", bias=lambda t: t[1:]),
    "no voxels": tensors(RuntimeError, "input", "width", "(3, 5, 0)", input=lambda t: t[..., :0]),
    "no taps": tensors(RuntimeError, "weight", "height", "(3, 0, 3)", weight=lambda t: t[:, :, :, :0]),
    "no output channels": tensors(RuntimeError, "weight", "0", weight=lambda t: t[:, :0], bias=lambda t: t[:0]),
    "no channels": tensors(RuntimeError, "input", "0", input=lambda t: t[:, :0], weight=lambda t: t[:0]),
    # groups
    "groups that don't divide": parameters(RuntimeError, "groups", "groups=3", "4 channels", groups=3),
    "groups of zero": parameters(RuntimeError, "groups", "at least 1", "got 0", groups=0),
    "groups below zero": parameters(RuntimeError, "groups", "at least 1", "got -2", groups=-2),
    "groups of a float": parameters(TypeError, "groups", "an int", "float", groups=1.0),
    "groups of a bool": parameters(TypeError, "groups", "an int", "bool", groups=True),
    "groups of a tuple": parameters(TypeError, "groups", "an int", "tuple", groups=(1,)),
    "groups of None": parameters(TypeError, "groups", "an int", "NoneType", groups=None),
    # values
    "stride of zero": parameters(RuntimeError, "stride", "at least 1", "(0, 0, 0)", stride=0),
    "stride below zero": parameters(RuntimeError, "stride", "at least 1", "(1, -1, 2)", stride=(1, -1, 2)),
    "dilation of zero": parameters(RuntimeError, "dilation", "at least 1", "(1, 0, 1)", dilation=(1, 0, 1)),
    "dilation below zero": parameters(RuntimeError, "dilation", "at least 1", "(-2, -2, -2)", dilation=-2),
    "padding below zero": parameters(RuntimeError, "negative padding", "(0, 0, -1)", padding=(0, 0, -1)),
    "output_padding below zero": parameters(
        RuntimeError, "negative output_padding", "(-1, -1, -1)", output_padding=-1, stride=2
    ),
    "output_padding of stride": parameters(
        RuntimeError, "output_padding", "(0, 2, 0)", "(2, 2, 2)", output_padding=(0, 2, 0), stride=2
    ),
    "output_padding of dilation": parameters(
        RuntimeError, "output_padding", "(3, 3, 3)", "(2, 2, 2)", output_padding=3, stride=2, dilation=3
    ),
    "no output": parameters(RuntimeError, "output", "depth", "at least 1", "-1", "(3, 0, 0)", padding=(3, 0, 0)),
    # lengths of tuples
    "stride of two": parameters(RuntimeError, "stride", "three", "(1, 2)", stride=(1, 2)),
    "stride of four": parameters(RuntimeError, "stride", "three", "[1, 1, 1, 1]", stride=[1, 1, 1, 1]),
    "stride of none": parameters(RuntimeError, "stride", "three", "()", stride=()),
    "padding of two": parameters(RuntimeError, "padding", "three", "(0, 0)", padding=(0, 0)),
    "output_padding of two": parameters(RuntimeError, "output_padding", "three", "(0, 0)", output_padding=(0, 0)),
    "dilation of five": parameters(RuntimeError, "dilation", "three", "(1, 1, 1, 1, 1)", dilation=(1,) * 5),
    # types
    "stride of a float": parameters(TypeError, "stride", "int", "float", stride=2.0),
    "stride of floats": parameters(TypeError, "stride", "int", "float", stride=(2.0, 2.0, 2.0)),
    "stride of a bool": parameters(TypeError, "stride", "int", "bool", stride=True),
    "stride of bools": parameters(TypeError, "stride", "int", "bool", stride=(True, True, True)),
    "stride of None": parameters(TypeError, "stride", "int", "NoneType", stride=None),
    "stride of a string": parameters(TypeError, "stride", "int", "str", stride="2"),
    "padding of a string": parameters(TypeError, "padding", "int", "str", padding="same"),
    "padding of strings": parameters(TypeError, "padding", "int", "str", padding=("1", "1", "1")),
    "output_padding of a float": parameters(TypeError, "output_padding", "int", "float", output_padding=0.0),
    "dilation of a set": parameters(TypeError, "dilation", "int", "set", dilation={1}),
    "input of a list": tensors(TypeError, "input", "Tensor", "list", input=Tensor.tolist),
    "input of None": tensors(TypeError, "input", "Tensor", "NoneType", input=lambda t: None),
    "weight of a number": tensors(TypeError, "weight", "Tensor", "int", weight=lambda t: 3),
    "bias of a list": tensors(TypeError, "bias", "Tensor", "list", bias=Tensor.tolist),
    "bias of a bool": tensors(TypeError, "bias", "Tensor", "bool", bias=lambda t: False),
    # dtypes, devices and layouts of tensors
    "weight's dtype": tensors(RuntimeError, "weight", "input", "float64", "float32", weight=Tensor.double),
    "bias's dtype": tensors(RuntimeError, "bias", "input", "float16", "float32", bias=Tensor.half),
    "input's dtype": tensors(RuntimeError, "weight", "input", "bfloat16", input=Tensor.bfloat16),
    "integer weight": tensors(RuntimeError, "weight", "int64", weight=Tensor.long),
    "int64": tensors(NotImplementedError, "input", "float", "int64", **all_of(torch.int64)),
    "int8": tensors(NotImplementedError, "input", "float", "int8", **all_of(torch.int8)),
    "bool": tensors(NotImplementedError, "input", "float", "bool", **all_of(torch.bool)),
    "complex64": tensors(NotImplementedError, "input", "float", "complex64", **all_of(torch.complex64)),
    "float8": tensors(NotImplementedError, "input", "float16", "e5m2", **all_of(torch.float8_e5m2)),
    "weight's device": tensors(RuntimeError, "weight", "device", "meta", weight=lambda t: t.to("meta")),
    "bias's device": tensors(RuntimeError, "bias", "device", "meta", bias=lambda t: t.to("meta")),
    "input's device": tensors(RuntimeError, "input", "device", "meta", input=lambda t: t.to("meta")),
    "sparse input": tensors(RuntimeError, "input", "dense", "sparse_coo", input=Tensor.to_sparse),
    "sparse weight": tensors(RuntimeError, "weight", "dense", "sparse_coo", weight=Tensor.to_sparse),
    # what does not fit in 64 bits
    "stride past 64 bits": parameters(ValueError, "stride", "64 bits", str(2**63), stride=2**63),
    "padding past 64 bits": parameters(ValueError, "padding", "64 bits", str(-(2**64)), padding=-(2**64)),
    "stride of 2^62": parameters(RuntimeError, "stride", str(2**62), stride=2**62),
    "dilation of 2^62": parameters(RuntimeError, "dilation", str(2**62), dilation=(1, 2**62, 1)),
    "padding of 2^62": parameters(RuntimeError, "padding", str(2**62), padding=2**62),
    "stride of 2^31 - 1": parameters(RuntimeError, "64 bits", "stride", str(2**31 - 1), stride=2**31 - 1),
    "dilation of 2^30": parameters(RuntimeError, "64 bits", "dilation", str(2**30), dilation=2**30),
    "input of 2^61": tensors(
        RuntimeError, "64 bits", str(2**59), input=lambda t: t[:, :, :1, :1, :1].expand(-1, -1, 2**59, 1, 1)
    ),
    "columns of 2^63": tensors(
        RuntimeError,
        "64 bits",
        "column",
        str(2**25),
        input=lambda t: t[:1, :, :1, :1, :1].expand(1, 4, 2**25, 1, 1),
        weight=lambda t: t[:, :, :1, :1, :1].expand(4, 6, 2**33, 1, 1),
    ),
}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "auto"])
@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(name: str, algorithm: str, requires_grad: bool, device: torch.device) -> None:
    if algorithm == "direct" and name.startswith("columns"):
        pytest.skip("makes no columns")
    bad = BAD_CALLS[name]
    arguments = bad.arguments(device)
    for tensor in arguments.values():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            tensor.requires_grad_(requires_grad)
    with pytest.raises(bad.raises) as caught:
        conv_transpose3d(**arguments, algorithm=algorithm)
    assert caught.type is bad.raises
    missing = [part for part in bad.says if part not in str(caught.value)]
    assert not missing, f"{caught.value} does not say {missing}"


#: Of the above, by PyTorch: complex numbers, a meta tensor beside others, and integers on a CPU.
PYTORCH_COMPUTES = {
    "cpu": {"int64", "complex64", "weight's device", "bias's device", "input's device"},
    "cuda": {"complex64", "weight's device", "bias's device", "input's device"},
}


@pytest.mark.parametrize("name", [name for name in BAD_CALLS if "2^61" not in name and "2^63" not in name])
def test_exceptions_are_of_pytorch_type(name: str, device: torch.device) -> None:
    """Where PyTorch raises."""
    if torch.__version__ < "2.9" and name.endswith("past 64 bits"):
        pytest.skip("PyTorch before 2.9 raises RuntimeError, later ones ValueError")
    if device.type == "cuda" and name == "no output channels":
        pytest.skip("PyTorch computes it on a GPU, and 'native' leaves it to PyTorch")
    arguments = BAD_CALLS[name].arguments(device)
    with pytest.raises(Exception) as ours:  # noqa: PT011  (the next line says which)
        conv_transpose3d(**arguments, algorithm="native")
    if name in PYTORCH_COMPUTES[device.type]:
        REFERENCE(**arguments)
        assert ours.type is BAD_CALLS[name].raises
    else:
        with pytest.raises(Exception) as theirs:  # noqa: PT011
            REFERENCE(**arguments)
        assert issubclass(ours.type, theirs.type)
        assert issubclass(BAD_CALLS[name].raises, theirs.type)


@pytest.mark.parametrize("stride", [(2.0, 2.0, 2.0), (2, 2, 2.0), 2.0])
def test_types_are_checked_beside_equal_values(stride: Any) -> None:
    """A good call before does not make the bad one good, although 2 == 2.0."""
    input, weight = torch.ones(1, 1, 2, 2, 2), torch.ones(1, 1, 2, 2, 2)
    for good in (2, (2, 2, 2)):
        assert conv_transpose3d(input, weight, stride=good).shape == (1, 1, 4, 4, 4)
    with pytest.raises(TypeError, match="float"):
        conv_transpose3d(input, weight, stride=stride)


@pytest.mark.parametrize("bad", ["fft", "", "GEMM", None, 3, ["gemm"]])
def test_unknown_algorithm(bad: Any) -> None:
    input, weight = torch.ones(1, 1, 2, 2, 2), torch.ones(1, 1, 2, 2, 2)
    calls: list[Callable[[], object]] = [
        lambda: conv_transpose3d(input, weight, algorithm=bad),
        lambda: conv_transpose3d(input.requires_grad_(), weight, algorithm=bad),
        lambda: ConvTranspose3d(1, 1, 2, algorithm=bad),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="algorithm") as caught:
            call()
        assert all(repr(name) in str(caught.value) for name in (*algorithms(), bad))


@pytest.mark.parametrize(
    ("keyword", "value", "allowed"),
    [
        ("operator", "backward", "'forward', 'grad_input', 'grad_weight', 'grad_input_weight'"),
        ("operator", None, "'forward', 'grad_input', 'grad_weight', 'grad_input_weight'"),
        ("algorithm", "native", "'gemm', 'direct'"),
        ("algorithm", "auto", "'gemm', 'direct'"),
        ("algorithm", ["gemm"], "'gemm', 'direct'"),
    ],
)
def test_bad_keywords_of_workspace_bytes(keyword: str, value: Any, allowed: str) -> None:
    with pytest.raises(ValueError, match="must be one of") as caught:
        workspace_bytes(torch.ones(1, 1, 2, 2, 2), torch.ones(1, 1, 2, 2, 2), **{keyword: value})
    assert str(caught.value) == f"{keyword} must be one of {allowed}, got {value!r}"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", ["input of rank 3", "weight of rank 4", "input's channels", "stride of zero"])
def test_bad_calls_of_workspace_bytes(name: str, algorithm: str, device: torch.device) -> None:
    with pytest.raises(BAD_CALLS[name].raises):
        workspace_bytes(**BAD_CALLS[name].arguments(device), algorithm=algorithm)


# ---- the workspace limit -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "raises"),
    [
        (0, ValueError),
        (-1, ValueError),
        (2**62, ValueError),
        (1.5, TypeError),
        ("1", TypeError),
        (None, TypeError),
        (True, TypeError),
    ],
)
def test_bad_workspace_limit(limit: Any, raises: type[Exception]) -> None:
    before = get_workspace_limit()
    with pytest.raises(raises, match=rf"limit must be .* got {limit if raises is ValueError else ''}"):
        set_workspace_limit(limit)
    assert get_workspace_limit() == before


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "many", "", "1 GB", "1e20"])
def test_bad_environment(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVT3D_WORKSPACE_MB", text)
    with pytest.raises(ValueError, match="CONVT3D_WORKSPACE_MB must be a positive number of mebibytes") as caught:
        runpy.run_path(str(settings.__file__))
    assert str(caught.value).endswith(f"got {text!r}")


def test_bad_environment_at_import() -> None:
    result = subprocess.run(
        [sys.executable, "-c", "import convt3d_gemm"],
        env=os.environ | {"CONVT3D_WORKSPACE_MB": "many"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "CONVT3D_WORKSPACE_MB must be a positive number of mebibytes, got 'many'" in result.stderr


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_gemm_that_does_not_fit(operator: str, layout: torch.memory_format, device: torch.device) -> None:
    case = NAMED["plain"]
    tensors = case.tensors(device, torch.float32, layout, seed=1)
    with workspace_limit(1), pytest.raises(RuntimeError, match="'gemm' needs a workspace of at least") as caught:
        ours(case, tensors, operator, "gemm")
    message = str(caught.value)
    needed = int(message.split("at least ")[1].split()[0])
    for part in ("the limit is 1", str(tuple(tensors.input.shape)), "set_workspace_limit", "'direct'", "'native'"):
        assert part in message
    with workspace_limit(needed):
        ours(case, tensors, operator, "gemm")
    with workspace_limit(needed - 1), pytest.raises(RuntimeError, match=f"at least {needed} bytes"):
        ours(case, tensors, operator, "gemm")


# ---- builds and devices ------------------------------------------------------------------------------------


def test_missing_backends_say_what_to_do() -> None:
    assert "CONVT3D_CUDA=ON pip install" in missing_backend("cuda")
    assert str(build_info()["cuda_missing"]) in missing_backend("cuda")
    assert "scipy-openblas32" in missing_backend("cpu")
    assert "meta" in missing_backend("meta")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_device_without_a_backend(algorithm: str) -> None:
    meta = torch.ones(1, 1, 2, 2, 2, device="meta")
    with pytest.raises(RuntimeError, match=f"algorithm '{algorithm}': .* cpu and cuda tensors, .* on meta"):
        workspace_bytes(meta, meta, algorithm=algorithm)


@pytest.mark.skipif("cuda" in build_info()["backends"], reason="has a CUDA backend")  # type: ignore[operator]
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and a build without the backend")
def test_cuda_tensor_in_a_build_for_cpu() -> None:
    input, weight = torch.ones(1, 1, 2, 2, 2, device="cuda"), torch.ones(1, 1, 2, 2, 2, device="cuda")
    for algorithm in ALGORITHMS:
        with pytest.raises(RuntimeError, match=f"algorithm '{algorithm}': .*CONVT3D_CUDA=ON pip install"):
            conv_transpose3d(input, weight, algorithm=algorithm)
    with pytest.warns(UserWarning, match="CONVT3D_CUDA=ON pip install"):
        conv_transpose3d(input, weight)


@pytest.mark.cuda
@pytest.mark.parametrize("algorithm", algorithms())
def test_cpu_beside_cuda(algorithm: str) -> None:
    input, weight, bias = torch.ones(1, 1, 2, 2, 2), torch.ones(1, 1, 2, 2, 2), torch.ones(1)
    with pytest.raises(RuntimeError, match="weight must be on the same device as input, got cuda:0 and cpu"):
        conv_transpose3d(input, weight.cuda(), bias, algorithm=algorithm)
    with pytest.raises(RuntimeError, match="bias must be on the same device as input, got cpu and cuda:0"):
        conv_transpose3d(input.cuda(), weight.cuda(), bias, algorithm=algorithm)


# ---- the operators called directly -------------------------------------------------------------------------

SIZE, KERNEL = (4, 5, 6), (3, 3, 3)


@dataclass(frozen=True)
class Operands:
    """What the operators are called with; the changed ones are bad."""

    input: Any
    weight: Any
    bias: Any
    grad_output: Any
    input_size: Any = SIZE
    kernel_size: Any = KERNEL
    parameters: Any = ()

    def call(self, operator: str) -> Any:
        operators = torch.ops.convt3d_gemm
        if operator == "forward":
            return operators.forward(self.input, self.weight, self.bias, *self.parameters)
        if operator == "grad_input":
            return operators.grad_input(self.grad_output, self.weight, self.input_size, *self.parameters)
        if operator == "grad_weight":
            return operators.grad_weight(self.grad_output, self.input, self.kernel_size, *self.parameters)
        return operators.grad_input_weight(self.grad_output, self.input, self.weight, *self.parameters)


def good_operands(algorithm: str = "gemm", **changed: Any) -> Operands:
    case = replace(Case(), **changed)
    tensors = Case().tensors(torch.device("cpu"), torch.float32, torch.contiguous_format, seed=1)
    return Operands(
        tensors.input,
        tensors.weight,
        tensors.bias,
        tensors.grad_output,
        parameters=case.operator_parameters(algorithm),
    )


ALL = set(OPERATORS)
GRADIENTS = ALL - {"forward"}

#: Which operators reject it, and how the operands become bad.
BAD_OPERANDS: dict[str, tuple[set[str], Callable[[Operands], Operands]]] = {
    "grad_output too narrow": (GRADIENTS, lambda o: replace(o, grad_output=o.grad_output[..., 1:])),
    "grad_output too deep": (
        GRADIENTS,
        lambda o: replace(o, grad_output=torch.cat([o.grad_output, o.grad_output], 2)),
    ),
    "grad_output of fewer channels": (
        GRADIENTS - {"grad_weight"},
        lambda o: replace(o, grad_output=o.grad_output[:, 1:]),
    ),
    "grad_output of fewer samples": (
        {"grad_weight", "grad_input_weight"},
        lambda o: replace(o, grad_output=o.grad_output[:1]),
    ),
    "grad_output of rank 4": (GRADIENTS, lambda o: replace(o, grad_output=o.grad_output[0])),
    "grad_output of rank 1": (GRADIENTS, lambda o: replace(o, grad_output=o.grad_output[0, 0, 0, 0])),
    "grad_output of rank 0": (GRADIENTS, lambda o: replace(o, grad_output=o.grad_output.sum())),
    "grad_output of integers": (GRADIENTS, lambda o: replace(o, grad_output=o.grad_output.long())),
    "grad_output in float64": (GRADIENTS, lambda o: replace(o, grad_output=o.grad_output.double())),
    "grad_output on meta": (GRADIENTS, lambda o: replace(o, grad_output=o.grad_output.to("meta"))),
    "grad_output sparse": (GRADIENTS, lambda o: replace(o, grad_output=o.grad_output.to_sparse())),
    "grad_output of a string": (GRADIENTS, lambda o: replace(o, grad_output="grad_output")),
    "input of rank 4": (ALL - {"grad_input"}, lambda o: replace(o, input=o.input[0])),
    "input of rank 0": (ALL - {"grad_input"}, lambda o: replace(o, input=o.input.sum())),
    "input too wide": ({"grad_weight", "grad_input_weight"}, lambda o: replace(o, input=o.input[..., 1:])),
    "input on meta": (ALL - {"grad_input"}, lambda o: replace(o, input=o.input.to("meta"))),
    "input of fewer channels": ({"forward", "grad_input_weight"}, lambda o: replace(o, input=o.input[:, 1:])),
    "input without voxels": (ALL - {"grad_input"}, lambda o: replace(o, input=o.input[..., :0])),
    "input in float16": (ALL - {"grad_input"}, lambda o: replace(o, input=o.input.half())),
    "weight of rank 4": (ALL - {"grad_weight"}, lambda o: replace(o, weight=o.weight[0])),
    "weight of rank 0": (ALL - {"grad_weight"}, lambda o: replace(o, weight=o.weight.sum())),
    "weight too narrow": (
        {"grad_input", "grad_input_weight"},
        lambda o: replace(o, weight=o.weight[..., 1:]),
    ),
    "weight on meta": (ALL - {"grad_weight"}, lambda o: replace(o, weight=o.weight.to("meta"))),
    "weight in float64": (ALL - {"grad_weight"}, lambda o: replace(o, weight=o.weight.double())),
    "bias too short": ({"forward"}, lambda o: replace(o, bias=o.bias[1:])),
    "bias on meta": ({"forward"}, lambda o: replace(o, bias=o.bias.to("meta"))),
    "input_size of another convolution": ({"grad_input"}, lambda o: replace(o, input_size=(4, 5, 7))),
    "input_size of zero": ({"grad_input"}, lambda o: replace(o, input_size=(0, 5, 6))),
    "input_size below zero": ({"grad_input"}, lambda o: replace(o, input_size=(-4, 5, 6))),
    "input_size of 2^40": ({"grad_input"}, lambda o: replace(o, input_size=(2**40,) * 3)),
    "input_size of two": ({"grad_input"}, lambda o: replace(o, input_size=(4, 5))),
    "input_size of strings": ({"grad_input"}, lambda o: replace(o, input_size=("4", "5", "6"))),
    "kernel_size of another convolution": ({"grad_weight"}, lambda o: replace(o, kernel_size=(3, 3, 5))),
    "kernel_size of zero": ({"grad_weight"}, lambda o: replace(o, kernel_size=(3, 0, 3))),
    "kernel_size below zero": ({"grad_weight"}, lambda o: replace(o, kernel_size=(3, 3, -3))),
    "kernel_size of 2^40": ({"grad_weight"}, lambda o: replace(o, kernel_size=(2**40,) * 3)),
    "kernel_size of five": ({"grad_weight"}, lambda o: replace(o, kernel_size=(1, 1, 3, 3, 3))),
    "stride of two": (ALL, lambda o: replace(o, parameters=((2, 2), *o.parameters[1:]))),
    "stride of a string": (ALL, lambda o: replace(o, parameters=("2", *o.parameters[1:]))),
    "stride of zero": (ALL, lambda o: replace(o, parameters=((2, 0, 2), *o.parameters[1:]))),
    "stride of 2^62": (ALL, lambda o: replace(o, parameters=((2, 2**62, 2), *o.parameters[1:]))),
    "groups of zero": (ALL, lambda o: replace(o, parameters=(*o.parameters[:4], 0, *o.parameters[5:]))),
    "groups below zero": (ALL, lambda o: replace(o, parameters=(*o.parameters[:4], -1, *o.parameters[5:]))),
    "groups that don't divide": (
        ALL,
        lambda o: replace(o, parameters=(*o.parameters[:4], 3, *o.parameters[5:])),
    ),
    "groups of others' sizes": (
        ALL,
        lambda o: replace(o, parameters=(*o.parameters[:4], 4, *o.parameters[5:])),
    ),
    "algorithm unknown": (ALL, lambda o: replace(o, parameters=(*o.parameters[:-1], "fft"))),
    "algorithm of a number": (ALL, lambda o: replace(o, parameters=(*o.parameters[:-1], 3))),
    "too few arguments": (ALL, lambda o: replace(o, parameters=o.parameters[:-1])),
}


#: What a message may name as well, where two arguments do not fit each other.
ALSO_NAMED = {
    "input": ("input", "grad_output"),
    "weight": ("weight", "input", "grad_output"),
    "input_size": ("input", "grad_output"),
    "kernel_size": ("kernel", "weight", "grad_output"),
    "groups": ("groups", "bias", "grad_output"),
    "too": ("algorithm",),
}


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "auto"])
@pytest.mark.parametrize(
    ("name", "operator"),
    [(name, operator) for name, (which, _) in BAD_OPERANDS.items() for operator in sorted(which)],
)
def test_bad_operands(name: str, operator: str, algorithm: str) -> None:
    operands = good_operands(algorithm)
    operands.call(operator)
    with pytest.raises((RuntimeError, TypeError, ValueError)) as caught:
        BAD_OPERANDS[name][1](operands).call(operator)
    named = name.partition(" ")[0]
    assert any(part in str(caught.value) for part in ALSO_NAMED.get(named, (named,)))


@pytest.mark.parametrize("operator", OPERATORS)
def test_bad_operands_on_meta(operator: str) -> None:
    """Nothing computes there, but nothing crashes either."""
    for name, (which, change) in BAD_OPERANDS.items():
        bad = change(good_operands())
        if operator not in which:
            continue
        tensors = {
            field: getattr(bad, field).to("meta")
            for field in ("input", "weight", "bias", "grad_output")
            if isinstance(getattr(bad, field), Tensor) and not getattr(bad, field).is_sparse
        }
        try:
            results = replace(bad, **tensors).call(operator)
        except (RuntimeError, TypeError, ValueError):
            continue
        assert all(result.is_meta for result in ([results] if isinstance(results, Tensor) else results)), name
