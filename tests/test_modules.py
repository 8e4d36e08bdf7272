"""`ConvTranspose3d` beside torch's, and swapping the layers of a model."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import ALGORITHMS, BOUNDS, LAYOUTS, relative_error, tf32
from convt3d_gemm import ConvTranspose3d, algorithms, replace_conv_transpose3d

CONSTRUCTIONS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "kernel only": ((4, 6, 3), {}),
    "all by position": ((4, 6, (3, 2, 1), (2, 3, 1), (1, 0, 0), (1, 2, 0), 2, False, (2, 1, 3)), {}),
    "all by name": (
        (),
        {
            "in_channels": 6,
            "out_channels": 6,
            "kernel_size": 3,
            "stride": 2,
            "padding": 1,
            "output_padding": 1,
            "groups": 6,
            "bias": True,
            "dilation": 2,
            "padding_mode": "zeros",
            "device": "cpu",
            "dtype": torch.float64,
        },
    ),
    "float64": ((2, 2, 2, 2), {"dtype": torch.float64, "bias": False}),
}


def pair(name: str, algorithm: str = "gemm") -> tuple[nn.ConvTranspose3d, ConvTranspose3d]:
    """Torch's layer and this package's, made from the same seed."""
    arguments, keywords = CONSTRUCTIONS[name]
    torch.manual_seed(3)
    theirs = nn.ConvTranspose3d(*arguments, **keywords)
    torch.manual_seed(3)
    return theirs, ConvTranspose3d(*arguments, **keywords, algorithm=algorithm)


def input_of(layer: nn.ConvTranspose3d, *batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(*batch, layer.in_channels, 3, 4, 5, generator=generator).to(layer.weight)


def assert_same(result: Tensor, expected: Tensor) -> None:
    assert result.dtype == expected.dtype
    assert relative_error([result], [expected.double()]) <= BOUNDS[expected.dtype]


# ---- the module --------------------------------------------------------------------------------------------


def test_constructor_signature() -> None:
    theirs = list(inspect.signature(nn.ConvTranspose3d).parameters.values())
    ours = list(inspect.signature(ConvTranspose3d).parameters.values())
    assert [(p.name, p.kind, p.default) for p in ours[:-1]] == [(p.name, p.kind, p.default) for p in theirs]
    assert str(ours[-1]) == "algorithm: 'str' = 'auto'"
    assert ours[-1].kind is inspect.Parameter.KEYWORD_ONLY


def test_forward_signature() -> None:
    theirs, ours = inspect.signature(nn.ConvTranspose3d.forward), inspect.signature(ConvTranspose3d.forward)
    assert [(p.name, p.default) for p in ours.parameters.values()] == [
        (p.name, p.default) for p in theirs.parameters.values()
    ]


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_same_parameters_and_attributes(name: str) -> None:
    theirs, ours = pair(name)
    assert isinstance(ours, nn.ConvTranspose3d)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value)
        assert ours.state_dict()[key].dtype == value.dtype
    for attribute in theirs.__constants__:
        assert getattr(ours, attribute) == getattr(theirs, attribute)


@pytest.mark.parametrize("algorithm", algorithms())
@pytest.mark.parametrize("batch", [(2,), (), (0,)])
@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_same_output(name: str, batch: tuple[int, ...], algorithm: str) -> None:
    theirs, ours = pair(name, algorithm)
    assert_same(ours(input_of(theirs, *batch)), theirs(input_of(theirs, *batch)))


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_state_dict_loads_both_ways(name: str) -> None:
    theirs, ours = pair(name)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_same(ours(input_of(ours, 2)), theirs(input_of(ours, 2)))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.uniform_()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_same(ours(input_of(ours, 2)), theirs(input_of(ours, 2)))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("batch", [(2,), ()])
@pytest.mark.parametrize("size", [(5, 7, 9), (6, 8, 10), (5, 8, 9), [6, 7, 10], torch.Size((5, 7, 10)), "whole"])
def test_output_size(size: Any, batch: tuple[int, ...], algorithm: str) -> None:
    torch.manual_seed(5)
    theirs = nn.ConvTranspose3d(4, 3, 3, stride=2, padding=1)
    ours = ConvTranspose3d(4, 3, 3, stride=2, padding=1, algorithm=algorithm)
    ours.load_state_dict(theirs.state_dict())
    input = input_of(theirs, *batch)
    if size == "whole":
        size = (*batch, 3, 6, 7, 9)
    output = ours(input, output_size=size)
    assert output.shape[-3:] == tuple(size)[-3:]
    assert_same(output, theirs(input, output_size=size))
    assert_same(ours(input, size), theirs(input, size))


@pytest.mark.parametrize("size", [(4, 7, 9), (7, 7, 9), (5, 7), (1, 1, 1, 5, 7, 9), (2, 3, 4, 7, 9)])
def test_bad_output_size(size: tuple[int, ...]) -> None:
    theirs = nn.ConvTranspose3d(4, 3, 3, stride=2, padding=1)
    ours = ConvTranspose3d(4, 3, 3, stride=2, padding=1)
    with pytest.raises(ValueError, match="output") as expected:
        theirs(input_of(theirs, 2), output_size=size)
    with pytest.raises(ValueError, match="output") as caught:
        ours(input_of(theirs, 2), output_size=size)
    assert str(caught.value) == str(expected.value)


def test_bad_construction() -> None:
    for mode in ("reflect", "circular"):
        with pytest.raises(ValueError, match='Only "zeros" padding mode') as expected:
            nn.ConvTranspose3d(2, 2, 2, padding_mode=mode)
        with pytest.raises(ValueError, match='Only "zeros" padding mode') as caught:
            ConvTranspose3d(2, 2, 2, padding_mode=mode)
        assert str(caught.value) == str(expected.value)
    with pytest.raises(ValueError, match="divisible by groups"):
        ConvTranspose3d(3, 2, 2, groups=2)
    with pytest.raises(TypeError, match="colour"):
        ConvTranspose3d(2, 2, 2, colour="red")  # type: ignore[call-arg]


def test_padding_mode_set_afterwards() -> None:
    theirs, ours = pair("kernel only")
    theirs.padding_mode = ours.padding_mode = "reflect"
    for layer in (theirs, ours):
        with pytest.raises(ValueError, match="Only `zeros` padding mode is supported"):
            layer(input_of(theirs, 1))


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_repr(name: str) -> None:
    theirs, ours = pair(name)
    assert repr(ours) == f"{repr(theirs)[:-1]}, algorithm='gemm')"


@pytest.mark.parametrize("algorithm", algorithms())
def test_copies_keep_everything(algorithm: str) -> None:
    _, ours = pair("all by position", algorithm)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    copies = [
        copy.copy(ours),
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(buffer, weights_only=False),
    ]
    expected = ours(input_of(ours, 2))
    for other in copies:
        assert type(other) is ConvTranspose3d
        assert other.algorithm == algorithm
        assert torch.equal(other(input_of(ours, 2)), expected)


def test_saved_by_an_older_release_without_algorithm() -> None:
    _, ours = pair("kernel only")
    restored = copy.copy(ours)
    del restored.__dict__["algorithm"]
    assert restored.algorithm == "auto"
    assert_same(restored(input_of(ours, 2)), ours(input_of(ours, 2)))


def test_state_dict_through_a_file() -> None:
    theirs, ours = pair("kernel only")
    buffer = io.BytesIO()
    torch.save(theirs.state_dict(), buffer)
    buffer.seek(0)
    fresh = ConvTranspose3d(4, 6, 3, algorithm="gemm")
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(fresh(input_of(ours, 2)), ours(input_of(ours, 2)))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_to_device_dtype_and_layout(layout: torch.memory_format, algorithm: str, device: torch.device) -> None:
    theirs, ours = pair("kernel only", algorithm)
    theirs.to(device, torch.float64).to(memory_format=layout)  # type: ignore[call-overload]
    ours.to(device, torch.float64).to(memory_format=layout)  # type: ignore[call-overload]
    input = input_of(theirs, 2).contiguous(memory_format=layout)
    output = ours(input)
    assert output.device.type == device.type
    assert output.is_contiguous(memory_format=layout)
    assert_same(output, theirs(input))


def test_on_the_meta_device() -> None:
    layer = ConvTranspose3d(4, 6, 3, stride=2, device="meta")
    assert layer(torch.empty(2, 4, 3, 4, 5, device="meta")).shape == (2, 6, 7, 9, 11)
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert layer(torch.ones(2, 4, 3, 4, 5)).isfinite().all()


# ---- swapping layers ---------------------------------------------------------------------------------------


class Subclass(nn.ConvTranspose3d):
    """A layer whose forward does more."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return super().forward(input, output_size) + 1


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(2, 4, 1)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.ConvTranspose3d(4, 4, 2, 2), nn.BatchNorm3d(4), nn.ReLU()) for _ in range(2)]
        )
        self.by_name = nn.ModuleDict({"grouped": nn.ConvTranspose3d(4, 4, 3, padding=1, groups=2)})
        self.special = Subclass(4, 4, 1)
        self.shared = self.by_name["grouped"]

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.stem(input)
        for block in self.blocks:
            hidden = block(hidden)
        output: Tensor = self.special(self.shared(self.by_name["grouped"](hidden)))
        return output


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if isinstance(layer, nn.ConvTranspose3d)]


@pytest.mark.parametrize("algorithm", algorithms())
def test_replacement(algorithm: str, device: torch.device) -> None:
    torch.manual_seed(6)
    model = Model().to(device, torch.float64).eval()
    input = torch.randn(2, 2, 2, 3, 2, dtype=torch.float64).to(device)
    expected = model(input)
    before = dict(model.named_parameters(remove_duplicate=False))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    assert replace_conv_transpose3d(model, algorithm) is model

    swapped = [layer for layer in layers_of(model) if type(layer) is ConvTranspose3d]
    assert len(swapped) == 3
    assert {layer.algorithm for layer in swapped} == {algorithm}
    assert type(model.special) is Subclass
    assert type(model.stem) is nn.Conv3d
    assert model.shared is model.by_name["grouped"]
    after = dict(model.named_parameters(remove_duplicate=False))
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert_same(model(input), expected)

    torch.autograd.backward(model(input).sum())
    optimizer.step()
    assert not torch.equal(model.state_dict()["blocks.0.0.weight"], state["blocks.0.0.weight"])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_root_itself(algorithm: str) -> None:
    theirs, _ = pair("kernel only")
    expected = theirs(input_of(theirs, 2))
    returned = replace_conv_transpose3d(theirs, algorithm)
    assert isinstance(returned, ConvTranspose3d)
    assert_same(returned(input_of(theirs, 2)), expected)


def test_replacing_again_changes_the_algorithm() -> None:
    model = replace_conv_transpose3d(nn.Sequential(nn.ConvTranspose3d(2, 2, 2)), "gemm")
    for algorithm in ("direct", "native"):
        replace_conv_transpose3d(model, algorithm)
        assert [layer.algorithm for layer in model] == [algorithm]
    replace_conv_transpose3d(model)
    assert [layer.algorithm for layer in model] == ["auto"]


def test_a_model_without_such_layers() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(2, 2, 2), nn.Conv3d(2, 2, 2), nn.ConvTranspose1d(2, 2, 2))
    types = [type(layer) for layer in model]
    assert [type(layer) for layer in replace_conv_transpose3d(model)] == types


def test_hooks_are_kept() -> None:
    model = nn.Sequential(nn.ConvTranspose3d(2, 3, 2, dtype=torch.float64))
    calls: list[str] = []
    layer: Any = model[0]
    layer.register_forward_pre_hook(lambda *_: calls.append("forward_pre"))
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_full_backward_pre_hook(lambda *_: calls.append("backward_pre"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    layer.register_state_dict_pre_hook(lambda *_: calls.append("state_dict_pre"))
    layer.register_load_state_dict_post_hook(lambda *_: calls.append("load_state_dict"))
    weight_hook = layer.weight.register_hook(lambda grad: calls.append("weight"))
    replace_conv_transpose3d(model, "gemm")
    input = torch.ones(1, 2, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.backward(model(input).sum())
    assert calls[:3] == ["forward_pre", "forward", "backward_pre"]
    assert sorted(calls[3:]) == ["backward", "weight"]
    calls.clear()
    model.load_state_dict(model.state_dict())
    assert calls == ["state_dict_pre", "load_state_dict"]
    weight_hook.remove()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_mode_and_dtype_are_kept(dtype: torch.dtype, training: bool) -> None:
    model = nn.Sequential(nn.ConvTranspose3d(2, 3, 2)).to(dtype).train(training)
    model[0].weight.requires_grad_(False)
    replace_conv_transpose3d(model)
    assert model[0].training is training
    assert model[0].weight.dtype is dtype
    assert model[0].weight.requires_grad is False
    assert model[0].bias.requires_grad is True


def test_lazy_layers_are_left_alone() -> None:
    """They become torch's layer at their first call; replacing after it swaps them."""
    model = nn.Sequential(nn.LazyConvTranspose3d(3, 2, stride=2))
    assert type(replace_conv_transpose3d(model, "gemm")[0]) is nn.LazyConvTranspose3d
    input = torch.randn(1, 2, 2, 3, 2)
    expected = model(input)
    assert type(replace_conv_transpose3d(model, "gemm")[0]) is ConvTranspose3d
    assert_same(model(input), expected)


#: Those in `parametrizations` change the layer's class; the older ones use a hook.
NORMALISATIONS = {
    "spectral": nn.utils.parametrizations.spectral_norm,
    "weight": nn.utils.parametrizations.weight_norm,
    "spectral, by a hook": nn.utils.spectral_norm,
    "weight, by a hook": nn.utils.weight_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize("first", ["replace", "normalise"])
@pytest.mark.parametrize("normalise", NORMALISATIONS.values(), ids=NORMALISATIONS)
def test_normalised_layers(normalise: Any, first: str) -> None:
    """Reparametrised before or after, a layer gives what PyTorch's does, and so do its gradients."""

    def run(swap: bool) -> list[Tensor]:
        torch.manual_seed(7)
        model = nn.Sequential(nn.ConvTranspose3d(3, 2, 3, 2, dtype=torch.float64))
        if swap and first == "replace":
            replace_conv_transpose3d(model, "gemm")
        torch.manual_seed(8)
        normalise(model[0])
        if swap and first == "normalise":
            replace_conv_transpose3d(model, "gemm")
        output = model(torch.ones(1, 3, 2, 2, 2, dtype=torch.float64))
        torch.autograd.backward(output.square().sum())
        return [output, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]

    expected = run(swap=False)
    results = run(swap=True)
    assert len(expected) > 2
    assert relative_error(results, expected) <= BOUNDS[torch.float64]


def test_parametrised_layers_are_swapped() -> None:
    """Their class is one that torch made up, not a subclass that does something else; copies share it."""
    layer = nn.utils.parametrizations.weight_norm(nn.ConvTranspose3d(3, 2, 3))
    other = copy.deepcopy(layer)
    special = nn.utils.parametrizations.weight_norm(Subclass(3, 2, 3))
    replace_conv_transpose3d(nn.ModuleList([layer, special]), "gemm")
    assert isinstance(layer, ConvTranspose3d)
    assert layer.algorithm == "gemm"
    assert not isinstance(other, ConvTranspose3d)
    assert not isinstance(special, ConvTranspose3d)
    assert replace_conv_transpose3d(layer, "native").algorithm == "native"
    assert torch.equal(copy.deepcopy(layer)(input_of(other, 1)), other(input_of(other, 1)))
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is ConvTranspose3d


@pytest.mark.parametrize("bad", ["fft", None, 1])
def test_algorithm_is_validated_before_anything_changes(bad: Any) -> None:
    model = nn.Sequential(nn.ConvTranspose3d(2, 2, 2))
    with pytest.raises(ValueError, match="algorithm must be one of 'auto', 'gemm', 'direct', 'native'"):
        replace_conv_transpose3d(model, bad)
    assert type(model[0]) is nn.ConvTranspose3d


@pytest.mark.parametrize("bad", [None, torch.ones(1), nn.ConvTranspose3d, [nn.ConvTranspose3d(1, 1, 1)]])
def test_what_is_not_a_module(bad: Any) -> None:
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module, got"):
        replace_conv_transpose3d(bad)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_copies_of_a_replaced_model(algorithm: str) -> None:
    torch.manual_seed(9)
    model = replace_conv_transpose3d(Model().eval(), algorithm)
    input = torch.randn(1, 2, 2, 2, 2)
    with tf32(False):
        assert torch.equal(copy.deepcopy(model)(input), model(input))
        assert torch.equal(pickle.loads(pickle.dumps(model))(input), model(input))
