"""What "auto" picks: the cost model, the decision and its fallbacks, and `explain`."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import convt3d_gemm
from cases import BOUNDS, LAYOUTS, NAMED, OPERATORS, Case, native, ours, relative_error, workspace_limit
from convt3d_gemm import _C, conv_transpose3d, costs, decision, explain, library
from convt3d_gemm.bench.layers import LAYERS, PRESETS, Layer, parse_layer
from convt3d_gemm.binding import has_backend
from convt3d_gemm.cli import main
from convt3d_gemm.costs import COORDINATES, Costs, Hardware, costs_for, distance, place_of, problem_of
from convt3d_gemm.parameters import Parameters
from convt3d_gemm.problem import Problem

H200 = Hardware("cuda", "NVIDIA H200", (9, 0), 132)
CPU = torch.device("cpu")

needs_cpu = pytest.mark.skipif(not has_backend("cpu"), reason="this build has no CPU backend")
pytestmark = pytest.mark.usefixtures("cache")


def plan_for_h200(of: Problem) -> _C.Plan:
    target = _C.Target.cuda(compute_capability=90, multiprocessors=132, shared_memory=228 << 10)
    return library.plan_for(target, "direct", of)


def problem(case: Case | Layer, operator: str = "forward", dtype: torch.dtype = torch.float32) -> Problem:
    if isinstance(case, Layer):
        sizes, channels, kernel = case.input_shape, case.out_channels // case.groups, case.kernel_size
    else:
        sizes = (case.batch, case.in_channels, *case.size)
        channels, kernel = case.out_channels // case.groups, case.kernel
    parameters = Parameters(case.stride, case.padding, case.output_padding, case.dilation, case.groups)
    like = torch.empty(0, dtype=dtype)
    weight_size = torch.Size((sizes[1], channels, *kernel))
    return Problem.of(operator, torch.Size(sizes), weight_size, parameters, like)


def entry(**times: dict[str, float]) -> dict[str, Any]:
    """A class of the table that expects each algorithm to take so many times its work at the best rates."""
    return {
        "type": "cpu",
        "device": "made up",
        "capability": [0, 0],
        "least_capability": [0, 0],
        "units": 1,
        "source": "a test",
        "copy_rate": 1e9,
        "multiply_rates": {"float32": 1e10, "bfloat16": 1e10, "float64": 1e10},
        "launch_seconds": 1e-5,
        "margin": 0.1,
        "reach": 1.0,
        "agreeing": 0,
        "fits": {
            operator: {name: {"mean": math.log(factor), "weights": []} for name, factor in factors.items()}
            for operator, factors in times.items()
        },
        # Far from everything: it says which settings are known, and is no layer's neighbour.
        "measured": [
            ["N1,Cin1,Cout1,k9,in1,s1,p0,op0,d1,g1", precision, layout, {}]
            for precision in ("float32", "bfloat16", "float64")
            for layout in ("ncdhw", "ndhwc")
        ],
    }


@pytest.fixture
def expecting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Gives the CPU a cost model: `entry` of the arguments, with changes."""

    def expect(changes: dict[str, Any] | None = None, /, **times: dict[str, float]) -> None:
        made = Costs("made up", {**entry(**times), **(changes or {})})
        monkeypatch.setattr(decision, "costs_of", lambda device: made)
        decision.forget_decisions()

    yield expect
    decision.forget_decisions()


# ---- problems --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NAMED])
def test_sizes_of_a_problem(name: str) -> None:
    case = NAMED[name]
    tensors = case.tensors(CPU, torch.float32, torch.contiguous_format, seed=0)
    of_case = problem(case)
    assert of_case.output_size == tuple(tensors.grad_output.shape)
    elements = tensors.input.numel() + tensors.weight.numel() + tensors.grad_output.numel()
    assert of_case.tensor_bytes == 4 * elements
    both = of_case._replace(operator="grad_input_weight")
    assert both.tensor_bytes == 4 * (elements + tensors.input.numel() + tensors.weight.numel())
    assert both.operations == 2 * of_case.operations
    again = problem_of("forward", of_case.layer, "float32", "ncdhw")
    assert again[:6] == of_case[:6]


@pytest.mark.parametrize("layer", PRESETS["all"], ids=lambda layer: layer.name)
def test_a_problem_is_spelled_like_a_layer(layer: Layer) -> None:
    made = problem(layer)
    assert made.layer == layer.specification
    assert parse_layer(made.layer).input_shape == layer.input_shape
    assert made.operations == layer.flops("forward")
    assert made.tensor_bytes == 4 * layer.elements_moved("forward")


def test_columns() -> None:
    kb72 = problem(LAYERS["kb72"])
    assert kb72.column_bytes == 8 * 32 * 105 * (12 * 24 * 48) * 4
    assert kb72._replace(dtype=torch.bfloat16).column_bytes == kb72.column_bytes  # float32, as several are added up
    assert kb72._replace(dtype=torch.bfloat16, operator="grad_weight").column_bytes == kb72.column_bytes // 2
    assert problem(NAMED["pointwise"]).column_bytes == 0
    assert problem(NAMED["pointwise, strided"]).column_bytes == 2 * 6 * (4 * 5 * 6) * 4


# ---- the cost model --------------------------------------------------------------------------------------------------


def test_expected_times() -> None:
    """By hand: the work at the best rates, times the exponential."""
    made = Costs("made up", entry(forward={"gemm": 2.0, "direct": 3.0, "native": 1.0}))
    of_case = problem(NAMED["plain"])
    seconds = 1e-5 + of_case.operations / 1e10 + of_case.tensor_bytes / 1e9
    columns = 2 * of_case.column_bytes / 1e9
    expected = {"gemm": 2e3 * (seconds + columns), "direct": 3e3 * seconds, "native": 1e3 * seconds}
    assert made.predict(of_case) == pytest.approx(expected)
    assert made.predict(of_case._replace(operator="grad_input")) == {}
    assert made.predict(of_case._replace(dtype=torch.float16)) == {}
    assert made.floor(of_case) == pytest.approx(1e3 * max(of_case.operations / 1e10, of_case.tensor_bytes / 1e9))
    faster = Costs("made up", entry(forward={"native": 1.0}), speed=2.0)
    assert faster.predict(of_case)["native"] == pytest.approx(1e3 * (1e-5 + (seconds - 1e-5) / 2))


def test_places_are_made_of_coordinates() -> None:
    of_case = problem(NAMED["two groups"])
    named = dict(zip(COORDINATES, place_of(of_case), strict=True))
    assert named["input channels of a group"] == 1
    assert named["output channels of a group"] == pytest.approx(math.log2(3))
    assert named["groups"] == pytest.approx(0.7)
    assert named["taps"] == pytest.approx(math.log2(27))
    assert named["stride"] == 3
    assert named["kernel = stride"] == named["dilated"] == named["half"] == 0
    assert named["ieee"] == 4
    half = of_case._replace(dtype=torch.float16)
    # Also of rows of 9 elements, of 2 bytes each instead of 4.
    assert distance(place_of(of_case), place_of(half)) == pytest.approx(math.hypot(3, 4, 0.3))


def test_both_gradients_are_expected_to_take_what_each_takes() -> None:
    made = Costs("made up", entry(grad_input={"direct": 2.0, "native": 1.0}, grad_weight={"direct": 3.0, "gemm": 1.0}))
    of_case = problem(NAMED["plain"], "grad_input_weight")
    first, second = (made.predict(of_case._replace(operator=part)) for part in ("grad_input", "grad_weight"))
    assert made.predict(of_case) == {"direct": pytest.approx(first["direct"] + second["direct"])}


def test_neighbours_correct_what_is_expected() -> None:
    """A measured layer like this one takes twice what the fit says; so will this one, nearly."""
    near, far = problem(NAMED["plain"]), problem(LAYERS["gan_first"])
    fit = entry(forward={"native": 1.0})
    plain = Costs("made up", entry(forward={"native": 1.0}))
    twice = 2 * plain.predict(near)["native"]
    fit["fits"]["forward"]["native"]["weights"] = [*[0.0] * len(fit["measured"]), math.log(2)]
    fit["measured"] = [*fit["measured"], [near.layer, "float32", "ncdhw", {"forward": {"native": twice}}]]
    corrected = Costs("made up", {**fit, "reach": 0.5})
    assert corrected.predict(near)["native"] == pytest.approx(twice)
    like = near._replace(input_size=torch.Size((2, 4, 4, 5, 7)))
    assert 1.6 < corrected.predict(like)["native"] / plain.predict(like)["native"] < 2
    assert corrected.predict(far)["native"] == pytest.approx(plain.predict(far)["native"])
    assert corrected.measured(near) == {"native": twice}
    assert corrected.measured(like) == {}


def test_classes_of_devices() -> None:
    sm90 = {**entry(), "type": "cuda", "device": "NVIDIA H200", "capability": [9, 0], "least_capability": [8, 0]}
    table = {
        "classes": {
            "large": {**sm90, "units": 132},
            "small": {**sm90, "device": "NVIDIA A10", "capability": [8, 6], "units": 72},
            "cpu": entry(),
        }
    }

    def found(type: str, name: str, capability: tuple[int, int], units: int) -> Costs | None:
        return costs_for(Hardware(type, name, capability, units), table)

    same = found("cuda", "NVIDIA H200", (9, 0), 132)
    assert same is not None
    assert (same.name, same.margin, same.margin_of_measured, same.copy_rate) == ("large", 0.1, 0.02, 1e9)
    other = found("cuda", "NVIDIA L4", (8, 9), 36)
    assert other is not None
    assert other.name == "large"
    assert other.margin_of_measured == pytest.approx(0.17)
    assert other.margin == pytest.approx(0.25)
    assert other.copy_rate == pytest.approx(1e9 * 36 / 132)
    nearer = found("cuda", "NVIDIA A40", (8, 6), 84)
    assert nearer is not None
    assert nearer.name == "small"
    assert found("cuda", "Tesla V100", (7, 0), 80) is None
    processor = found("cpu", "any", (0, 0), 4)
    assert processor is not None
    assert (processor.name, processor.multiply_rates["float32"]) == ("cpu", 4e10)
    assert processor.margin_of_measured == pytest.approx(0.17)


# ---- the table that the package has ----------------------------------------------------------------------------------


def test_the_table_fits_the_model() -> None:
    table = json.loads(Path(costs.__file__).with_name("costs.json").read_text())
    assert table["format"] == 1
    assert "cpu" in {each["type"] for each in table["classes"].values()}
    assert "cuda" in {each["type"] for each in table["classes"].values()}
    for each in table["classes"].values():
        for operator, fits in each["fits"].items():
            assert operator in OPERATORS
            assert "native" in fits or operator == "grad_input_weight"
            assert ("direct" in fits) == ("clock_rate" not in each)
            for name, fit in fits.items():
                assert len(fit["weights"]) == len(each["measured"]), name
                assert all(map(math.isfinite, [fit["mean"], *fit["weights"]]))
        assert each["reach"] > 0
        if "clock_rate" in each:
            assert 1e9 < each["clock_rate"] < 3e9
            assert each["shared_memory"] > 0
        for layer, precision, layout, times in each["measured"]:
            assert problem_of("forward", layer, precision, layout).layer == layer
            assert all(0 < time < 1e6 for by_name in times.values() for time in by_name.values())


@pytest.mark.parametrize("layer", PRESETS["all"], ids=lambda layer: layer.name)
@pytest.mark.parametrize("operator", ["forward", "grad_input", "grad_weight"])
def test_published_layers_are_picked_as_they_were_measured(layer: Layer, operator: str) -> None:
    table = costs_for(H200)
    assert table is not None
    times = table.measured(problem(layer, operator)._replace(tf32=True))
    assert {"direct", "native"} <= set(times)
    candidates = decision.candidates_of({operator: times}, library_and_native())
    pick = decision.pick_of(candidates, table.margin_of_measured)
    assert times[pick[0]] <= 1.02 * min(times.values())
    assert times[pick[0]] <= times["native"]


def library_and_native() -> list[str]:
    return [*library.ALGORITHMS, "native"]


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_layer_has_expected_times(operator: str) -> None:
    """Finite ones, and not absurd, far from all that was measured."""
    table = costs_for(H200)
    assert table is not None
    for case in NAMED.values():
        if case.batch:
            times = table.predict(problem(case, operator)._replace(tf32=True), plan_for_h200)
            assert set(times) == {"gemm", "direct", "native"}
            assert all(1e-4 < time < 1e3 for time in times.values()), case


def test_direct_is_expected_to_take_what_its_plan_expects() -> None:
    """Where the class has a clock rate and the plan a model; for both gradients, what each of them takes."""
    with_plans = {**entry(forward={"gemm": 2.0, "native": 1.0}), "clock_rate": 1.5e9}
    with_plans["multiply_rates"]["tf32"] = 1e12
    with_plans["measured"].append(["N1,Cin1,Cout1,k9,in1,s1,p0,op0,d1,g1", "tf32", "ncdhw", {}])
    costs = Costs("made up", with_plans)
    times = {}
    for operator in OPERATORS:
        of_layer = problem(LAYERS["nnunet_mid"], operator)._replace(tf32=True)
        cycles = plan_for_h200(of_layer).expected_cycles
        times[operator] = costs.predict(of_layer, plan_for_h200)
        launches = 2 if operator == "grad_input_weight" else 1
        assert times[operator]["direct"] == pytest.approx(launches * 1e-2 + cycles / 1.5e6)
    assert times["grad_input_weight"]["direct"] == times["grad_input"]["direct"] + times["grad_weight"]["direct"]
    assert set(times["forward"]) == {"gemm", "direct", "native"}
    # Work that is done faster is no reason for a clock to be.
    faster = Costs("made up", with_plans, speed=2.0)
    of_layer = problem(LAYERS["nnunet_mid"])._replace(tf32=True)
    assert faster.predict(of_layer, plan_for_h200)["direct"] == times["forward"]["direct"]
    assert faster.predict(of_layer, plan_for_h200)["native"] < times["forward"]["native"]


def test_families_without_a_model_are_expected_to_take_what_they_took() -> None:
    families = {"direct depthwise": 3.0, "native": 1.0}
    costs = Costs("made up", {**entry(forward=families, grad_input={"native": 1.0}), "clock_rate": 1.5e9})
    depthwise, wide = problem(NAMED["depthwise"]), problem(LAYERS["nnunet_mid"], dtype=torch.float64)
    assert costs.predict(depthwise, plan_for_h200)["direct"] == pytest.approx(3 * costs.work(depthwise, "direct"))
    assert "direct" not in costs.predict(depthwise._replace(operator="grad_input"), plan_for_h200)
    assert plan_for_h200(wide).configuration == "simt"
    assert "direct" not in costs.predict(wide, plan_for_h200)  # never measured
    without_clock = Costs("made up", entry(forward={"direct": 2.0, "native": 1.0}))
    assert without_clock.predict(depthwise)["direct"] == pytest.approx(2 * costs.work(depthwise, "direct"))


# ---- decisions -------------------------------------------------------------------------------------------------------


@needs_cpu
@pytest.mark.parametrize(
    ("factors", "pick", "reason"),
    [
        ({"gemm": 0.01, "direct": 0.5, "native": 1.0}, "gemm", "expected: "),
        ({"gemm": 9.0, "direct": 0.5, "native": 1.0}, "direct", "expected: "),
        ({"gemm": 9.0, "direct": 2.0, "native": 1.0}, "native", "no other is faster"),
        ({"gemm": 9.0, "direct": 0.95, "native": 1.0}, "native", "are not 10% ahead"),
        ({"gemm": 9.0, "direct": 0.9, "native": 1.0}, "direct", "native"),
        ({"direct": 0.1, "gemm": 0.1}, "native", "nothing like it was ever measured"),
        ({}, "native", "nothing like it was ever measured"),
    ],
)
def test_picks(factors: dict[str, float], pick: str, reason: str, expecting: Callable[..., None]) -> None:
    expecting(forward=factors)
    made = decision.decide(problem(NAMED["plain"]))
    assert made.pick == (pick,)
    assert reason in made.reason
    assert (made.call is None) == (pick == "native")
    assert made.call is None or made.call.algorithm == pick
    assert list(made.times.values()) == sorted(made.times.values())


@needs_cpu
def test_each_operator_is_decided_alone(expecting: Callable[..., None]) -> None:
    slow, fast = {"gemm": 9.0, "direct": 9.0, "native": 1.0}, {"gemm": 9.0, "direct": 0.1, "native": 1.0}
    expecting(forward=fast, grad_input=slow, grad_weight=fast)
    picks = {operator: decision.decide(problem(NAMED["plain"], operator)).pick for operator in OPERATORS}
    assert picks == {
        "forward": ("direct",),
        "grad_input": ("native",),
        "grad_weight": ("direct",),
        "grad_input_weight": ("native", "direct"),
    }


@needs_cpu
@pytest.mark.parametrize(
    ("both", "pick"), [({"gemm": 0.001}, ("gemm",)), ({"gemm": 9.0}, ("gemm", "direct")), ({}, ("gemm", "direct"))]
)
def test_gemm_for_both_gradients(both: dict[str, float], pick: tuple[str, ...], expecting: Callable[..., None]) -> None:
    """Its columns are made once for both, which may be faster than the best of each."""
    expecting(
        grad_input={"gemm": 0.01, "direct": 9.0, "native": 9.0},
        grad_weight={"gemm": 0.1, "direct": 0.1, "native": 9.0},
        grad_input_weight=both,
    )
    assert decision.decide(problem(NAMED["plain"], "grad_input_weight")).pick == pick


@needs_cpu
def test_a_measured_layer_is_not_predicted(expecting: Callable[..., None]) -> None:
    of_case = problem(NAMED["plain"])
    for gemm, pick in ((0.97, "gemm"), (0.99, "native")):
        times = {"forward": {"native": 1.0, "gemm": gemm, "direct": 2.0}}
        expecting({"measured": [[of_case.layer, "float32", "ncdhw", times]]}, forward={"direct": 1e-3, "native": 1.0})
        made = decision.decide(of_case)
        assert (made.pick, made.source) == ((pick,), "table")
        assert made.times == {("gemm",): gemm, ("native",): 1.0, ("direct",): 2.0}
    assert made.reason == "measured on this class of device: 1 ms, and gemm's 0.99 ms are not 2% ahead"


@needs_cpu
def test_what_lost_on_layers_alike_is_doubted(expecting: Callable[..., None]) -> None:
    of_case = problem(NAMED["plain"], "grad_input_weight")
    alike = of_case._replace(input_size=torch.Size((2, 4, 4, 5, 7)))
    times = {
        "grad_input": {"native": 1.0, "gemm": 2.0, "direct": 0.5},
        "grad_weight": {"native": 1.0, "gemm": 0.5, "direct": 1.1},
    }
    factors = {"gemm": 0.001, "direct": 0.5, "native": 9.0}
    for agreeing, pick in ((0, ("gemm",)), (1, ("direct", "gemm"))):
        changes = {"agreeing": agreeing, "measured": [[alike.layer, "float32", "ncdhw", times]]}
        expecting(changes, grad_input=factors, grad_weight=factors)
        made = decision.decide(of_case)
        assert made.pick == pick
        assert next(iter(made.times)) == ("gemm",)
    # direct's 1.6 ms for both are less than native's 2, gemm's 2.5 are not.
    assert made.doubted == {("gemm",), ("gemm", "native"), ("gemm", "direct"), ("native", "direct")}
    alone = decision.decide(of_case._replace(operator="grad_input"))
    assert alone.pick == ("direct",)
    times["grad_input"]["direct"] = 1.2
    expecting(changes, grad_input=factors, grad_weight=factors)
    alone = decision.decide(of_case._replace(operator="grad_input"))
    assert alone.pick == ("native",)
    assert alone.reason.endswith("in doubt: native was faster on a layer like it")


@needs_cpu
def test_what_does_not_fit_is_not_picked(expecting: Callable[..., None]) -> None:
    expecting(grad_weight={"gemm": 0.001, "direct": 0.5, "native": 1.0})
    of_case = problem(NAMED["plain"], "grad_weight")
    assert decision.decide(of_case).pick == ("gemm",)
    tight = of_case._replace(limit=1)
    fitting = [name for name in library.ALGORITHMS if library.planned(name, tight).fits]
    assert "gemm" not in fitting
    made = decision.decide(tight)
    assert made.pick == (("direct",) if "direct" in fitting else ("native",))
    assert "gemm" not in {name for pick in made.times for name in pick}


@needs_cpu
def test_an_unknown_device_gets_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision, "costs_of", lambda device: None)
    made = decision.decide(problem(NAMED["plain"]))
    assert (made.pick, made.source, made.call) == (("native",), "none", None)


@needs_cpu
def test_float16_where_pytorch_has_none(expecting: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    expecting(forward={"native": 1e-3, "gemm": 1.0})
    monkeypatch.setattr(convt3d_gemm.native, "computes_float16_on_cpu", lambda: False)
    made = decision.decide(problem(NAMED["plain"], dtype=torch.float16))
    assert made.pick == ("gemm",)
    assert "no float16" in made.reason
    assert decision.decide(problem(NAMED["plain"], dtype=torch.float32)).pick == ("native",)


@needs_cpu
def test_nothing_to_compute(expecting: Callable[..., None]) -> None:
    expecting(forward={"native": 1.0, "gemm": 1.0})
    made = decision.decide(problem(NAMED["empty batch"]))
    assert made.source == "none"
    assert made.reason == "there is nothing to compute"


@needs_cpu
def test_a_decision_is_made_once(expecting: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    """And leaves one line in the log."""
    expecting(forward={"gemm": 9.0, "direct": 0.1, "native": 1.0})
    case = NAMED["plain"]
    tensors = case.tensors(CPU, torch.float32, torch.contiguous_format, seed=1)
    with caplog.at_level(logging.DEBUG, "convt3d_gemm"):
        for _ in range(3):
            conv_transpose3d(tensors.input, tensors.weight, **case.parameters)
    assert len(caplog.messages) == 1
    said = re.fullmatch(
        r"forward of N2,Cin4,Cout6,k3,in4x5x6,s2,p1,op0,d1,g1, float32, NCDHW, on cpu: direct, "
        r"because expected: [0-9.]+ ms, native [0-9.]+ ms",
        caplog.messages[0],
    )
    assert said
    with workspace_limit(1 << 20), caplog.at_level(logging.DEBUG, "convt3d_gemm"):
        conv_transpose3d(tensors.input, tensors.weight, **case.parameters)
    assert len(caplog.messages) == 2  # another limit is another question


@needs_cpu
def test_first_uses_are_measured(cache: Path, expecting: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """After what was tuned, and before table and model; not during capture, and not where native has no time."""
    expecting(**{operator: {"gemm": 1e-3, "direct": 1.0, "native": 1.0} for operator in OPERATORS[:3]})
    times = {"gemm": 2.0, "direct": 0.99, "native": 1.0}
    measured = []

    def measure(of: Problem) -> dict[str, float]:
        measured.append(of.operator)
        return times

    monkeypatch.setattr(decision, "_measure", measure)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    of_case = problem(NAMED["plain"])
    for _ in range(2):
        made = decision._decided(of_case, True)
        assert (made.pick, made.source) == (("direct",), "first use")
        assert made.reason == "measured at first use: 0.99 ms, native 1 ms"
    assert measured == ["forward"]
    both = of_case._replace(operator="grad_input_weight")
    assert decision._decided(both, True).pick == ("direct",)
    assert measured == ["forward", "grad_input_weight", "grad_input", "grad_weight"]
    assert decision._decided(of_case, False).source == "model"

    decision.forget_decisions()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert decision._decided(of_case, True).source == "model"
    decision.forget_decisions()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    del times["native"]
    assert decision._decided(of_case, True).source == "model"
    decision.forget_decisions()
    decision.measurements_of(CPU).add({of_case: {"gemm": 1.0, "native": 2.0}})
    measured.clear()
    assert (decision._decided(of_case, True).pick, measured) == (("gemm",), [])


@pytest.mark.parametrize(
    ("device", "benchmark", "deterministic", "expected"),
    [
        ("cuda:0", True, False, True),
        ("cuda:0", False, False, False),
        ("cuda:0", True, True, False),
        ("cpu", True, False, False),
    ],
)
def test_first_uses_are_measured_where_cudnn_measures(
    device: str, benchmark: bool, deterministic: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    of_case = problem(NAMED["plain"])._replace(device=torch.device(device))
    with monkeypatch.context() as patch:
        patch.setattr(decision, "_decided", lambda of, at_first_use: asked.append(at_first_use))
        with torch.backends.cudnn.flags(benchmark=benchmark, deterministic=deterministic):
            decision.decide(of_case)
        patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        with torch.backends.cudnn.flags(benchmark=benchmark):
            decision.decide(of_case)
    assert asked == [expected, False]


@needs_cpu
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("first", ["gemm", "direct", "native"])
@pytest.mark.parametrize("second", ["gemm", "direct", "native"])
def test_every_pair_computes_both_gradients(
    first: str, second: str, layout: torch.memory_format, expecting: Callable[..., None]
) -> None:
    """In the layout that is promised, whatever the gradient's own."""
    slow = dict.fromkeys(("gemm", "direct", "native"), 1e3)
    expecting({"margin": 0.0}, grad_input={**slow, first: 0.01}, grad_weight={**slow, second: 0.01})
    case = NAMED["odd sizes"]
    tensors = case.tensors(CPU, torch.float64, layout, seed=2)
    made = decision.decide(problem(case, "grad_input_weight", torch.float64)._replace(memory_format=layout))
    assert made.pick == ((first,) if first == second else (first, second))
    expected = native(case, tensors, "grad_input_weight", torch.float64)
    for grad_output in (tensors.grad_output, tensors.grad_output.contiguous()):
        parameters = case.operator_parameters("auto")
        results = torch.ops.convt3d_gemm.grad_input_weight(grad_output, tensors.input, tensors.weight, *parameters)
        assert relative_error(results, expected) <= BOUNDS[torch.float64]
        for result in results:
            assert result.is_contiguous(memory_format=layout)


@needs_cpu
@pytest.mark.parametrize("operator", OPERATORS)
def test_native_where_memory_is_short(
    operator: str, expecting: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = {"gemm": 1e-3, "direct": 1.0, "native": 1.0}
    expecting(forward=fast, grad_input=fast, grad_weight=fast, grad_input_weight={"gemm": 1e-3})
    case = NAMED["plain"]
    tensors = case.tensors(CPU, torch.float32, torch.contiguous_format, seed=3)
    tried = []

    def no_memory(call: library.Call) -> object:
        tried.append(call.algorithm)
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(library, "_allocate_workspace", no_memory)
    results = ours(case, tensors, operator, "auto")
    assert tried == ["gemm"]
    assert relative_error(results, native(case, tensors, operator, torch.float64)) <= BOUNDS[torch.float32]
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        ours(case, tensors, operator, "gemm")


@needs_cpu
def test_other_errors_are_passed_on(expecting: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    expecting(forward={"gemm": 1e-3, "native": 1.0})
    case = NAMED["plain"]
    tensors = case.tensors(CPU, torch.float32, torch.contiguous_format, seed=3)

    def broken(*_: object) -> Tensor:
        raise RuntimeError("broken")

    monkeypatch.setattr(library, "forward", broken)
    with pytest.raises(RuntimeError, match=r"^broken$"):
        ours(case, tensors, "forward", "auto")


@needs_cpu
@pytest.mark.parametrize("pick", ["gemm", "direct", "native"])
def test_compiled(pick: str, expecting: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The decision is made where the operator runs, not where it is traced."""
    factors = {name: 0.001 if name == pick else 1e3 for name in ("gemm", "direct", "native")}
    expecting(**{operator: factors for operator in OPERATORS[:3]})
    case = NAMED["plain"]
    tensors = case.tensors(CPU, torch.float64, torch.contiguous_format, seed=4)
    weight = tensors.weight.requires_grad_()

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=False)
    def compiled(input: Tensor) -> Tensor:
        return conv_transpose3d(input.sin(), weight, **case.parameters).cos()

    def eager(input: Tensor) -> Tensor:
        return torch.nn.functional.conv_transpose3d(input.sin(), weight, **case.parameters).cos()

    made: list[str] = []
    original = decision._made

    def noted(problem: Problem, *others: Any) -> decision.Decision:
        result = original(problem, *others)
        made.append(f"{problem.operator} {' + '.join(result.pick)}")
        return result

    monkeypatch.setattr(decision, "_made", noted)
    input = tensors.input.requires_grad_()
    results, expected = (
        [output, *torch.autograd.grad(output.sum(), [input, weight])] for output in (compiled(input), eager(input))
    )
    assert made == [f"forward {pick}", f"grad_input_weight {pick}"]
    assert relative_error(results, [tensor.detach() for tensor in expected]) <= BOUNDS[torch.float64]


# ---- explain ---------------------------------------------------------------------------------------------------------


@needs_cpu
def test_explain(expecting: Callable[..., None]) -> None:
    of_case = problem(NAMED["plain"])
    times = {
        "forward": {"native": 3.0, "gemm": 2.0, "direct": 1.0},
        "grad_input": {"native": 3.0, "gemm": 4.0, "direct": 5.0},
        "grad_weight": {"native": 3.0, "gemm": 2.5, "direct": 2.0},
        "grad_input_weight": {"gemm": 5.5},
    }
    expecting({"measured": [[of_case.layer, "float32", "ncdhw", times]]})
    case = NAMED["plain"]
    tensors = case.tensors(CPU, torch.float32, torch.contiguous_format, seed=5)
    explained = explain(tensors.input, tensors.weight, **case.parameters)

    assert explained.layer == "N2,Cin4,Cout6,k3,in4x5x6,s2,p1,op0,d1,g1"
    assert list(explained.operators) == OPERATORS
    forward = explained.operators["forward"]
    assert (forward.pick, forward.source) == (("direct",), "table")
    assert forward.operations == 2 * 2 * 4 * 120 * 6 * 27
    assert forward.column_bytes == 2 * 6 * 27 * 120 * 4
    # 311040 operations at 1e10 a second; 36480 bytes at 1e9 take longer.
    assert forward.tensor_bytes == 4 * (960 + 648 + 2 * 6 * 7 * 9 * 11)
    assert forward.floor == pytest.approx(1e-6 * forward.tensor_bytes)
    assert forward.workspace_bytes["gemm"] >= forward.column_bytes // 2
    both = explained.operators["grad_input_weight"]
    assert both.pick == ("native", "direct")
    assert both.times == {
        ("native", "direct"): 5.0,
        ("gemm",): 5.5,
        ("native",): 6.0,
        ("direct",): 7.0,
    }

    text = str(explained)
    assert text.startswith("N2,Cin4,Cout6,k3,in4x5x6,s2,p1,op0,d1,g1, float32, NCDHW, on cpu (")
    assert "cost model: class made up (a test)" in text
    assert "forward: direct, because measured on this class of device: 1 ms, native 3 ms" in text
    assert "  311 k operations and 39.7 kB to read and write: at least 0.0397 ms on this device" in text
    assert re.search(r"  gemm: 2 ms, 50.4 times the floor \(columns of 156 kB, workspace [0-9.]+ kB\)", text)
    assert "grad_input: native, because measured on this class of device: 3 ms, and no other is faster" in text
    assert "grad_input_weight: native + direct, because measured on this class of device: 5 ms, native 6 ms" in text


@needs_cpu
def test_explain_says_what_the_plan_of_direct_expects(expecting: Callable[..., None]) -> None:
    expecting(**{operator: {"direct": 0.1, "native": 1.0} for operator in OPERATORS[:3]})
    case = NAMED["plain"]
    tensors = case.tensors(CPU, torch.float32, torch.contiguous_format, seed=5)
    forward = explain(tensors.input, tensors.weight, **case.parameters).operators["forward"]
    assert forward.expected_cycles == 0  # on a CPU
    assert "cycles" not in str(forward)
    on_gpu = str(dataclasses.replace(forward, expected_cycles=816896.4))
    assert re.search(r"  direct: .* \(its plan expects 817 k clock cycles, workspace ", on_gpu)


def test_explain_refuses_what_no_convolution_satisfies() -> None:
    with pytest.raises(RuntimeError, match="2 channels"):
        explain(torch.ones(1, 3, 2, 2, 2), torch.ones(2, 2, 2, 2, 2))
    with pytest.raises(RuntimeError, match="meta"):
        explain(torch.ones(1, 2, 2, 2, 2, device="meta"), torch.ones(2, 2, 2, 2, 2, device="meta"))


@needs_cpu
def test_explain_on_the_command_line(capsys: pytest.CaptureFixture[str], expecting: Callable[..., None]) -> None:
    expecting(**{operator: {"direct": 0.1, "native": 1.0} for operator in OPERATORS[:3]})
    arguments = ["explain", "--device", "cpu", "--layer", "Cin4,Cout2,k2,in3x4x5,s2", "--layer", "quick_k3s2"]
    assert main([*arguments, "--dtype", "float64,float16", "--layout", "ndhwc"]) == 0
    out = capsys.readouterr().out
    for start in (
        "N1,Cin4,Cout2,k2,in3x4x5,s2,p0,op0,d1,g1, float64, NDHWC, on cpu (",
        "N1,Cin4,Cout2,k2,in3x4x5,s2,p0,op0,d1,g1, float16, NDHWC, on cpu (",
        f"{LAYERS['quick_k3s2'].specification}, float64, NDHWC, on cpu (",
    ):
        assert start in out
    assert out.count("forward: direct, because expected: ") == 2
    assert out.count("grad_input_weight: direct, because expected: ") == 2
    assert out.count("forward: native, because nothing like it was ever measured") == 2  # float16


def test_explain_needs_a_layer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain"]) == 2
    assert capsys.readouterr().err == "convt3d explain: name a layer with --layer, or several with --preset\n"
