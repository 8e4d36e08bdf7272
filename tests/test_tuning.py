"""Measuring for "auto": `tune`, `convt3d tune`, and the file that the measurements are kept in."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import convt3d_gemm
from cases import BOUNDS, OPERATORS, relative_error
from convt3d_gemm import ConvTranspose3d, conv_transpose3d, decision, measurements, tune, tuning
from convt3d_gemm.binding import has_backend
from convt3d_gemm.cli import main
from convt3d_gemm.measurements import Measurements, cache_folder, key_of
from convt3d_gemm.parameters import Parameters
from convt3d_gemm.problem import Problem

needs_cpu = pytest.mark.skipif(not has_backend("cpu"), reason="this build has no CPU backend")
PARAMETERS = Parameters((2, 2, 2), (0, 0, 0), (0, 0, 0), (1, 1, 1), 1)
DEVICE_NAME = "A Processor (R) of 3 GHz"
FILE_NAME = "A-Processor-R-of-3-GHz.json"


def problem(batch: int = 1, operator: str = "forward") -> Problem:
    sizes = torch.Size((batch, 4, 3, 4, 5)), torch.Size((4, 2, 2, 2, 2))
    return Problem.of(operator, *sizes, PARAMETERS, torch.empty(0))


# ---- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"CONVT3D_CACHE_DIR": "/own", "XDG_CACHE_HOME": "/xdg", "HOME": "/home/me"}, "/own"),
        ({"XDG_CACHE_HOME": "/xdg", "HOME": "/home/me"}, "/xdg/convt3d-gemm"),
        ({"HOME": "/home/me"}, "/home/me/.cache/convt3d-gemm"),
        ({"CONVT3D_CACHE_DIR": "", "XDG_CACHE_HOME": "", "HOME": "/home/me"}, "/home/me/.cache/convt3d-gemm"),
    ],
)
def test_folder(variables: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONVT3D_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(folder)


def test_what_is_added_is_found_again(cache: Path) -> None:
    file = Measurements(DEVICE_NAME)
    assert file.path == cache / FILE_NAME
    assert file.find(problem()) == {}
    assert file.add({problem(): {"gemm": 1.5, "native": 2.0}, problem(2): {"native": 3.0}})
    for again in (file, Measurements(DEVICE_NAME)):
        assert again.find(problem()) == {"gemm": 1.5, "native": 2.0}
        assert again.find(problem(2)) == {"native": 3.0}
        assert again.find(problem(3)) == {}
        assert again.find(problem(operator="grad_input")) == {}
    assert Measurements("another").find(problem()) == {}
    assert Measurements(DEVICE_NAME).add({problem(): {"gemm": 9.0}})
    assert Measurements(DEVICE_NAME).find(problem()) == {"gemm": 9.0}
    assert Measurements(DEVICE_NAME).find(problem(2)) == {"native": 3.0}

    content = json.loads((cache / FILE_NAME).read_text())
    assert content["device"] == DEVICE_NAME
    assert content["versions"] == {
        "convt3d_gemm": convt3d_gemm.__version__,
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
    }
    assert sorted(path.name for path in cache.iterdir()) == [FILE_NAME, FILE_NAME.replace("json", "lock")]


@pytest.mark.parametrize(
    "different",
    [
        {"operator": "grad_input"},
        {"input_size": torch.Size((1, 4, 3, 4, 6))},
        {"weight_size": torch.Size((4, 2, 2, 2, 3))},
        {"parameters": PARAMETERS._replace(dilation=(1, 1, 2))},
        {"parameters": PARAMETERS._replace(output_padding=(0, 0, 1))},
        {"memory_format": torch.channels_last_3d},
        {"dtype": torch.float64},
        {"tf32": True},
        {"threads": 77},
    ],
    ids=lambda different: next(iter(different)),
)
def test_keys_tell_problems_apart(different: dict[str, Any]) -> None:
    assert key_of(problem()._replace(**different)) != key_of(problem())
    assert key_of(problem()._replace(limit=12345)) == key_of(problem())


def written(**changes: object) -> str:
    """A file as this package writes it, with changes."""
    content = {
        "format": 1,
        "device": DEVICE_NAME,
        "versions": measurements._versions(),
        "measurements": {key_of(problem()): {"gemm": 1.0, "native": 2.0}},
    }
    return json.dumps({**content, **changes})


UNUSABLE: dict[str, tuple[str | bytes, str]] = {
    "cut short": (written()[:-20], "not what this package writes"),
    "empty": ("", "not what this package writes"),
    "a list": ("[1, 2]", "not what this package writes"),
    "a number": ("3", "not what this package writes"),
    "null": ("null", "not what this package writes"),
    "nested deeply": ("[" * 100_000, "not what this package writes"),
    "no measurements": ('{"format": 1}', "not what this package writes"),
    "measurements of a list": (written(measurements=[1]), "not what this package writes"),
    "times of a list": (written(measurements={"a": [1]}), "not what this package writes"),
    "a time below zero": (written(measurements={"a": {"gemm": -1.0}}), "gemm takes -1.0"),
    "a time of NaN": (written(measurements={"a": {"gemm": float("nan")}}), "gemm takes nan"),
    "a time in words": (written(measurements={"a": {"gemm": "fast"}}), "gemm takes 'fast'"),
    "bytes": (b"\xff\xfe\x00", "it can't be read"),
    "another format": (written(format=2), "it is of another format 2"),
    "another device": (written(device="toaster"), "it is of another device toaster"),
    "another version": (
        written(versions={**measurements._versions(), "torch": "1.0"}),
        "it is of another versions",
    ),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_what_can_not_be_used_is_ignored_and_replaced(name: str, cache: Path) -> None:
    content, why = UNUSABLE[name]
    path = cache / FILE_NAME
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = path.read_bytes()
    file = Measurements(DEVICE_NAME)
    with pytest.warns(UserWarning, match="is ignored") as caught:
        assert file.find(problem()) == {}
    assert len(caught) == 1
    assert str(path) in str(caught[0].message)
    assert why in str(caught[0].message)
    assert file.find(problem()) == {}  # without a second warning
    assert path.read_bytes() == before
    with pytest.warns(UserWarning, match="is ignored"):
        assert file.add({problem(): {"gemm": 4.0}})
    assert Measurements(DEVICE_NAME).find(problem()) == {"gemm": 4.0}


def test_a_folder_in_the_files_place(cache: Path) -> None:
    (cache / FILE_NAME).mkdir()
    file = Measurements(DEVICE_NAME)
    with pytest.warns(UserWarning, match="it can't be read"):
        assert file.find(problem()) == {}


def test_a_folder_that_can_not_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere, so that a file in the folder's place has to do."""
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("CONVT3D_CACHE_DIR", str(tmp_path / "taken" / "folder"))
    file = Measurements(DEVICE_NAME)
    with pytest.warns(UserWarning, match="measurements are not kept") as caught:
        assert not file.add({problem(): {"gemm": 1.0}})
    assert "taken" in str(caught[0].message)
    assert file.find(problem()) == {"gemm": 1.0}


def test_a_write_that_fails_leaves_the_file_as_it_was(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Measurements(DEVICE_NAME)
    file.add({problem(): {"gemm": 1.0}})
    before = file.path.read_bytes()

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.warns(UserWarning, match="No space left"):
            assert not file.add({problem(2): {"gemm": 2.0}})
    assert file.path.read_bytes() == before
    assert file.find(problem()) == {"gemm": 1.0}
    assert file.find(problem(2)) == {"gemm": 2.0}
    assert [path.suffix for path in cache.iterdir() if path.suffix == ".tmp"] == []


WRITERS, WRITES = 4, 8


def _write(writer: int, started: Any) -> None:
    file = Measurements(DEVICE_NAME)
    started.wait()
    for number in range(WRITES):
        assert file.add({problem(1 + WRITES * writer + number): {"gemm": 1.0 + writer}})


def test_several_processes_write_at_once(cache: Path) -> None:
    """None of them loses what another has written, and the file is whole whenever it is read."""
    context = multiprocessing.get_context("spawn")
    started = context.Barrier(WRITERS + 1)
    processes = [context.Process(target=_write, args=(writer, started)) for writer in range(WRITERS)]
    for process in processes:
        process.start()
    started.wait(timeout=120)
    while any(process.is_alive() for process in processes):
        Measurements(DEVICE_NAME).find(problem())  # a warning would be an error
    for process in processes:
        process.join()
        assert process.exitcode == 0
    file = Measurements(DEVICE_NAME)
    found = [file.find(problem(1 + number)) for number in range(WRITERS * WRITES)]
    assert found == [{"gemm": 1.0 + number // WRITES} for number in range(WRITERS * WRITES)]


# ---- tune ------------------------------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    """Layers of every origin: torch's, this package's, and the functions."""

    def __init__(self) -> None:
        super().__init__()
        self.theirs = torch.nn.ConvTranspose3d(4, 6, 3, stride=2)
        self.norm = torch.nn.BatchNorm3d(6)
        self.ours = ConvTranspose3d(6, 4, 2, 2, groups=2, bias=False)
        self.plain = torch.nn.Conv3d(4, 4, 3)
        self.flat = torch.nn.ConvTranspose2d(4, 4, 2)
        self.weight = torch.nn.Parameter(torch.randn(4, 3, 1, 1, 1))

    def forward(self, input: Tensor) -> Tensor:
        hidden: Tensor = self.norm(self.theirs(input, output_size=(8, 8, 8)))
        hidden = self.plain(self.ours(hidden))
        self.flat(hidden[:, :, 0])
        return conv_transpose3d(hidden, self.weight) + torch.nn.functional.conv_transpose3d(hidden, self.weight)


LAYERS = [
    "N2,Cin4,Cout6,k3,in3,s2,p0,op1,d1,g1",
    "N2,Cin6,Cout4,k2,in8,s2,p0,op0,d1,g2",
    "N2,Cin4,Cout3,k1,in14,s1,p0,op0,d1,g1",
]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Problem, tuple[str, ...]]]:
    """Nothing is timed: gemm takes 3 ms, direct 2, native 1; and these are the problems that were asked about."""
    seen: list[tuple[Problem, tuple[str, ...]]] = []

    def measured(problem: Problem, algorithms: tuple[str, ...], *, seconds: float) -> dict[str, float | str]:
        seen.append((problem, algorithms))
        return {"gemm": 3.0, "direct": 2.0, "native": 1.0}

    monkeypatch.setattr(tuning, "measure", measured)
    return seen


@needs_cpu
@pytest.mark.usefixtures("cache")
def test_every_transposed_convolution_of_a_model_is_found(quick: list[tuple[Problem, tuple[str, ...]]]) -> None:
    model = Model()
    tune(model, torch.randn(2, 4, 3, 3, 3))
    assert [(each.layer, each.operator) for each, _ in quick] == [
        (layer, operator) for layer in LAYERS for operator in OPERATORS
    ]
    assert {algorithms for _, algorithms in quick} == {("gemm", "direct", "native")}
    assert {(each.precision, each.layout, each.device.type) for each, _ in quick} == {("float32", "ncdhw", "cpu")}


class InInference(Model):
    """Calls what composes a convolution, and not the convolution itself."""

    @torch.inference_mode()
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = super().forward(input)
        return output


@needs_cpu
@pytest.mark.usefixtures("cache")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("kind", ["in inference", "within inference", "traced", "exported"])
def test_models_of_other_kinds(kind: str, quick: list[tuple[Problem, tuple[str, ...]]]) -> None:
    input = torch.randn(2, 4, 3, 3, 3)
    model: Any = (InInference if kind == "within inference" else Model)().eval()
    if kind == "traced":
        model = torch.jit.trace(model, input)
    elif kind == "exported":
        model = torch.export.export(model, (input,)).module()
    with torch.inference_mode(kind == "in inference"):
        tune(model, input, training=False)
    assert [each.layer for each, _ in quick] == list(LAYERS)


@needs_cpu
@pytest.mark.usefixtures("cache")
def test_dtype_and_layout_are_those_that_are_computed_on(quick: list[tuple[Problem, tuple[str, ...]]]) -> None:
    model = torch.nn.Sequential(torch.nn.ConvTranspose3d(4, 6, 3), ConvTranspose3d(6, 4, 2, 2)).eval()
    input = torch.randn(1, 4, 3, 3, 3).contiguous(memory_format=torch.channels_last_3d)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tune(model, (input,))
    assert [(each.layer, each.operator, each.precision, each.layout) for each, _ in quick] == [
        ("N1,Cin4,Cout6,k3,in3,s1,p0,op0,d1,g1", "forward", "bfloat16", "ndhwc"),
        ("N1,Cin6,Cout4,k2,in5,s2,p0,op0,d1,g1", "forward", "bfloat16", "ndhwc"),
    ]


@needs_cpu
@pytest.mark.usefixtures("cache", "quick")
def test_the_model_stays_as_it_was() -> None:
    model = Model()
    model.ours.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tune(model, torch.randn(2, 4, 3, 3, 3))
    assert model.training
    assert model.norm.training
    assert not model.ours.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@needs_cpu
@pytest.mark.parametrize(("training", "count"), [(None, 12), (True, 12), (False, 3)])
@pytest.mark.usefixtures("cache")
def test_gradients_are_measured_for_training(
    training: bool | None, count: int, quick: list[tuple[Problem, tuple[str, ...]]]
) -> None:
    tune(Model(), torch.randn(2, 4, 3, 3, 3), training=training)
    assert len(quick) == count


@needs_cpu
def test_tuned_auto_picks_the_fastest(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, and in the next process; however little it is ahead, and whatever the cost model says."""
    fastest = {"forward": "direct", "grad_input": "gemm", "grad_weight": "native", "grad_input_weight": "gemm"}

    def measured(problem: Problem, algorithms: tuple[str, ...], *, seconds: float) -> dict[str, float | str]:
        return {name: 0.99 if name == fastest[problem.operator] else 1.0 for name in algorithms}

    monkeypatch.setattr(tuning, "measure", measured)
    layer = ConvTranspose3d(4, 2, 2, 2)
    input = torch.randn(1, 4, 3, 4, 5)
    tuned = tune(layer, input)
    assert tuned.kept is not None
    assert Path(tuned.kept).parent == cache
    decisions = {made.problem.operator: made for made in tuned.decisions}
    assert {operator: made.pick for operator, made in decisions.items()} == {
        operator: (name,) for operator, name in fastest.items()
    }
    assert {made.source for made in tuned.decisions} == {"tuned"}
    assert decisions["forward"].reason == "measured here: 0.99 ms, native 1 ms"

    decision.forget_decisions()  # as a new process
    explained = convt3d_gemm.explain(input, layer.weight, None, layer.stride)
    assert {operator: each.pick for operator, each in explained.operators.items()} == {
        operator: (name,) for operator, name in fastest.items()
    }
    assert explained.operators["forward"].source == "tuned"


@needs_cpu
def test_a_first_use_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what fails has no time."""
    asked = []

    def measured(of: Problem, algorithms: tuple[str, ...], *, seconds: float, repeats: int) -> dict[str, float | str]:
        asked.append(of)
        return {"gemm": "out of memory", "direct": 1.0, "native": 2.0}

    monkeypatch.setattr(tuning, "measure", measured)
    tuning._measured_at_first_use.cache_clear()
    try:
        for _ in range(2):
            assert tuning._measured_at_first_use(problem()) == {"direct": 1.0, "native": 2.0}
    finally:
        tuning._measured_at_first_use.cache_clear()
    assert asked == [problem()]


@pytest.mark.cuda
@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("algorithm", ["auto", "native"])
def test_first_uses_on_a_gpu(algorithm: str) -> None:
    """Of a training step: measured on the way, right all the same, and of PyTorch's numbers none is drawn."""
    tuning._measured_at_first_use.cache_clear()
    layer = ConvTranspose3d(24, 12, 3, stride=2, padding=1, algorithm=algorithm, device="cuda", dtype=torch.float64)
    input = torch.randn(2, 24, 5, 6, 7, device="cuda", dtype=torch.float64, requires_grad=True)
    drawn = torch.cuda.get_rng_state()
    with torch.backends.cudnn.flags(benchmark=True):
        output = layer(input)
        results = [output, *torch.autograd.grad(output.sum(), [input, layer.weight])]
        sources = {
            each.source
            for each in convt3d_gemm.explain(input, layer.weight, None, 2, 1).operators.values()
            if each.operator in ("forward", "grad_input_weight")
        }
    assert sources == {"first use"}
    assert torch.equal(torch.cuda.get_rng_state(), drawn)
    reference = torch.nn.functional.conv_transpose3d(input, layer.weight, layer.bias, 2, 1)
    expected = [reference, *torch.autograd.grad(reference.sum(), [input, layer.weight])]
    assert relative_error(results, [each.detach() for each in expected]) <= BOUNDS[torch.float64]


@pytest.mark.cuda
@pytest.mark.usefixtures("cache")
def test_a_first_use_during_capture() -> None:
    """Nothing is measured then, which would break the graph."""
    tuning._measured_at_first_use.cache_clear()
    weight = torch.randn(8, 8, 2, 2, 2, device="cuda")
    input = torch.randn(1, 8, 6, 7, 8, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.backends.cudnn.flags(benchmark=True, allow_tf32=False):
        torch.nn.functional.conv_transpose3d(input, weight, stride=2)  # PyTorch's own libraries need it
        with torch.cuda.graph(graph):
            output = conv_transpose3d(input, weight, stride=2)
        graph.replay()
        expected = torch.nn.functional.conv_transpose3d(input.double(), weight.double(), stride=2)
    assert tuning._measured_at_first_use.cache_info().misses == 0
    assert relative_error([output], [expected]) <= BOUNDS[torch.float32]


@needs_cpu
def test_measurements_of_another_number_of_threads_do_not_count(cache: Path) -> None:
    path = decision.measurements_of(torch.device("cpu"))
    path.add({problem()._replace(threads=77): {"gemm": 1e-6, "direct": 1.0, "native": 1.0}})
    decision.forget_decisions()
    assert decision.decide(problem()).source != "tuned"
    assert decision.decide(problem()._replace(threads=77)).pick == ("gemm",)


@needs_cpu
@pytest.mark.usefixtures("cache")
def test_what_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(problem: Problem, algorithms: tuple[str, ...], *, seconds: float) -> dict[str, float | str]:
        return {"gemm": "out of memory", "direct": 2.0, "native": 3.0}

    monkeypatch.setattr(tuning, "measure", measured)
    tuned = tune(ConvTranspose3d(4, 2, 2, 2).eval(), torch.randn(1, 4, 3, 4, 5))
    [made] = tuned.decisions
    assert (made.pick, made.times) == (("direct",), {("direct",): 2.0, ("native",): 3.0})
    assert tuned.failures == {(made.problem, "gemm"): "out of memory"}
    assert "gemm failed: out of memory" in str(tuned)
    assert "direct (direct 2 ms, native 3 ms)" in str(tuned)


@needs_cpu
def test_tuning_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("CONVT3D_CACHE_DIR", str(tmp_path / "taken"))
    decision.forget_decisions()
    monkeypatch.setattr(tuning, "measure", lambda *_, **__: {"gemm": 1.0, "direct": 2.0, "native": 3.0})
    with pytest.warns(UserWarning, match="measurements are not kept"):
        tuned = tune(ConvTranspose3d(4, 2, 2, 2).eval(), torch.randn(1, 4, 3, 4, 5))
    assert tuned.kept is None
    assert tuned.decisions[0].pick == ("gemm",)
    assert "not kept" in str(tuned)
    decision.forget_decisions()


@needs_cpu
@pytest.mark.usefixtures("cache")
def test_real_times() -> None:
    tuned = tune(ConvTranspose3d(8, 4, 3, 2, 1), torch.randn(1, 8, 6, 6, 6), seconds=0.02)
    assert [made.problem.operator for made in tuned.decisions] == OPERATORS
    assert tuned.failures == {}
    for made in tuned.decisions:
        assert {("gemm",), ("direct",), ("native",)} <= set(made.times)
        assert all(1e-3 < time < 1e4 for time in made.times.values())
        assert made.pick == next(iter(made.times))


@pytest.mark.usefixtures("cache")
def test_a_model_without_any() -> None:
    tuned = tune(torch.nn.Linear(2, 2), torch.ones(1, 2))
    assert tuned.decisions == ()
    assert str(tuned) == "no transposed 3-D convolution was found"


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        tune(conv_transpose3d, torch.ones(1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seconds must be above 0, got 0"):
        tune(torch.nn.Linear(2, 2), torch.ones(1, 2), seconds=0)
    with pytest.raises(RuntimeError, match="expected"):
        tune(torch.nn.ConvTranspose3d(3, 2, 2), torch.ones(1, 2, 2, 2, 2))


@needs_cpu
def test_tune_on_the_command_line(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--layer", "Cin4,Cout2,k2,in3x4x5,s2", "--dtype", "float32,float64"]
    assert main(["tune", *arguments, "--seconds", "0.01"]) == 0
    out, err = capsys.readouterr()
    assert err.count("[") == 8
    assert "[8/8] grad_input_weight of N1,Cin4,Cout2,k2,in3x4x5,s2,p0,op0,d1,g1, float64, NCDHW, on cpu" in err
    assert f"kept in {cache}" in out
    assert main(["explain", *arguments]) == 0
    assert capsys.readouterr().out.count("because measured here: ") == 8
    assert main(["tune", *arguments, "--forward-only", "--seconds", "0.01"]) == 0
    assert capsys.readouterr().err.count("[") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "kb72", "--device", "tpu"], "tpu"),
        (["--layer", "kb72", "--device", "cuda:99"], "there is no cuda:99"),
        (["--layer", "kb99"], "no layer is called 'kb99'"),
        (["--layer", "kb72", "--dtype", "float99"], "no dtype is called 'float99'"),
    ],
)
@pytest.mark.parametrize("command", ["tune", "explain"])
def test_bad_arguments_on_the_command_line(
    command: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert main(["tune", "--device", "cpu", "--layer", "kb72", "--seconds", "0"]) == 2
