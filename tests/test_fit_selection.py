"""benchmarks/fit_selection.py: what it measures, and that its fit finds the rule behind made-up measurements."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from convt3d_gemm import decision
from convt3d_gemm.bench.layers import LAYERS, PRESETS
from convt3d_gemm.binding import has_backend
from convt3d_gemm.choice import forward_of
from convt3d_gemm.costs import Costs
from convt3d_gemm.problem import OPERATORS, Problem

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "fit_selection.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    specification = importlib.util.spec_from_file_location("fit_selection", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["fit_selection"] = module
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def rates(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A GPU that there is not, and that takes no time to describe."""
    described = {
        "type": "cuda",
        "device": "made up",
        "capability": [9, 0],
        "least_capability": [8, 0],
        "units": 132,
        "copy_rate": 4e12,
        "multiply_rates": {"tf32": 4e14, "bfloat16": 8e14, "float16": 8e14, "float32": 5e13},
        "launch_seconds": 5e-6,
    }
    monkeypatch.setattr(script, "describe_class", lambda device: described)
    return described


@pytest.fixture
def use_table(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], Path]:
    """Has the script read and write a table of its own, which begins with these classes."""

    def use(classes: dict[str, Any]) -> Path:
        table = tmp_path / "costs.json"
        table.write_text(json.dumps({"format": 1, "classes": classes}))
        monkeypatch.setattr(script, "TABLE", table)
        return table

    return use


def made_up(problem: Problem, algorithm: str) -> float:
    """Milliseconds: native is slow where there are groups, gemm by its columns, direct where channels are many."""
    moving, multiplying = problem.tensor_bytes / 4e12, problem.operations / 3e14
    if algorithm == "gemm":
        return 1e3 * (1.5 * multiplying + moving + 2.5 * problem.column_bytes / 4e12 + 1e-5)
    channels = problem.weight_size[1]
    if algorithm == "direct":
        return 1e3 * (multiplying * (1 + channels / 64) + 1.5 * moving + 5e-6)
    return 1e3 * (multiplying * (1.2 + 3 * math.log2(problem.parameters.groups)) + 3 * moving + 5e-6)


def write_measurements(
    script: ModuleType,
    device: dict[str, Any],
    file: Path,
    count: int,
    noise: float,
    time_of: Callable[[Problem, str], float] = made_up,
) -> None:
    draw = random.Random(0)
    with file.open("w") as lines:
        lines.write(json.dumps({"device": device}) + "\n")
        problems = script.problems_to_measure(torch.device("cuda", 0), 1, 1, 0)
        for _ in range(count):
            problem, _ = next(problems)
            times = {
                operator: {
                    name: time_of(problem._replace(operator=operator), name) * math.exp(draw.gauss(0, noise))
                    for name in ("gemm", "direct", "native")
                }
                for operator in OPERATORS
            }
            row = {"layer": problem.layer, "precision": problem.precision, "layout": problem.layout}
            lines.write(json.dumps({**row, "times": times, "failures": {}}) + "\n")


def test_fit_finds_the_rule_behind_measurements(
    script: ModuleType,
    rates: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    use_table: Callable[[dict[str, Any]], Path],
) -> None:
    """On layers that it has not seen, although each time is 3 % off; and the table is for this class alone."""
    monkeypatch.setattr(script, "REACHES", (24.0,))
    table = use_table({"other": {**rates, "fits": {}, "measured": []}})
    measured = tmp_path / "measured.jsonl"
    write_measurements(script, rates, measured, count=260, noise=0.03)
    with measured.open("a") as file:
        file.write('{"layer": "N1,Cin')  # a run that was cut short
    assert script.main(["fit", str(measured), "--write"]) == 0
    out, err = capsys.readouterr()
    assert err == f"{measured}:262: cut short, left out\n"
    assert "made up: 260 layers" in out

    summary = next(line for line in out.splitlines() if line.startswith("all "))
    rows, near, _, _, over_native, least, slower = (float(word.strip("%")) for word in summary.split()[1:])
    assert rows == 4 * 260
    assert near > 85
    assert over_native > 1.25
    assert least > 0.5
    assert slower < 30

    classes = json.loads(table.read_text())["classes"]
    assert sorted(classes) == ["made up", "other"]
    costs = Costs("made up", classes["made up"])
    draws = script.problems_to_measure(torch.device("cuda", 0), 1, 1, seed=7)
    ratios = []
    for problem, _ in draws:
        if problem.layer in {layer.specification for layer in PRESETS["all"]}:
            continue
        times = costs.predict(problem)
        candidates = decision.candidates_of({"forward": times}, ["gemm", "direct", "native"])
        doubted = decision.doubted_of(candidates, {"forward": costs.doubted(problem)})
        [pick] = decision.pick_of(candidates, costs.margin, doubted)
        ratios.append(made_up(problem, pick) / min(made_up(problem, name) for name in times))
        if len(ratios) == 60:
            break
    assert sum(ratio < 1.15 for ratio in ratios) >= 54

    # A table's own measurements make the same table again, but for their rounding.
    assert script.main(["fit", "--name", "made up", "--write"]) == 0
    again = json.loads(table.read_text())["classes"]["made up"]
    assert again["measured"] == classes["made up"]["measured"]
    first, second = (each["fits"]["forward"]["gemm"]["mean"] for each in (again, classes["made up"]))
    assert first == pytest.approx(second, abs=0.02)


def test_plans_of_direct_are_fitted_by_a_clock(
    script: ModuleType,
    rates: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    use_table: Callable[[dict[str, Any]], Path],
) -> None:
    """The rate by which they expect what was measured; of other families of kernels there are the measured layers."""
    monkeypatch.setattr(script, "REACHES", (6.0,))
    # The measurements do not say what the class in the table does.
    table = use_table({"made up": {"shared_memory": 228 << 10}})
    plan = script.planner_of({**rates, "shared_memory": 228 << 10})
    assert plan is not None

    def by_plan(problem: Problem, algorithm: str) -> float:
        if algorithm != "direct" or problem.operator == "grad_input_weight":
            return made_up(problem, algorithm)
        cycles = plan(problem).expected_cycles
        return 5e-3 + cycles / 1.5e6 if cycles else 7 * made_up(problem, "native")

    measured = tmp_path / "measured.jsonl"
    write_measurements(script, rates, measured, count=60, noise=0, time_of=by_plan)
    assert script.main(["fit", str(measured), "--write"]) == 0
    assert "made up: 60 layers, and what direct's plans expect" in capsys.readouterr().out
    entry = json.loads(table.read_text())["classes"]["made up"]
    assert entry["clock_rate"] == 1.5e9
    assert entry["shared_memory"] == 228 << 10
    assert "direct" not in entry["fits"]["forward"]
    as_planned = entry["fits"]["forward"]["direct pipelined"]
    assert abs(as_planned["mean"]) < 1e-3
    assert max(map(abs, as_planned["weights"])) < 1e-3
    costs = Costs("made up", entry)
    depthwise = forward_of(LAYERS["dw32_k3"], torch.float32, "ncdhw", True, torch.device("cuda", 0))
    expected = costs.predict(depthwise, plan)["direct"]
    assert expected == pytest.approx(7 * made_up(depthwise, "native"), rel=0.1)
    assert "direct" not in entry["fits"]["grad_input_weight"]

    # Nor is anything forgotten or counted twice when the table's own measurements are fitted.
    assert script.main(["fit", "--name", "made up", "--write"]) == 0
    again = json.loads(table.read_text())["classes"]["made up"]
    assert again["clock_rate"] == pytest.approx(1.5e9, rel=0.01)
    assert list(again) == list(entry)

    # A family that was measured on too few layers has nothing said of it.
    monkeypatch.setattr(script, "ENOUGH_OF_FAMILY", 61)
    assert script.main(["fit", str(measured), "--write"]) == 0
    fits = json.loads(table.read_text())["classes"]["made up"]["fits"]["forward"]
    assert set(fits) == {"gemm", "native"}


def test_measurements_of_two_devices_do_not_mix(script: ModuleType, rates: dict[str, Any], tmp_path: Path) -> None:
    files = [tmp_path / "one", tmp_path / "two"]
    for file, name in zip(files, ("made up", "another"), strict=True):
        write_measurements(script, {**rates, "device": name}, file, count=3, noise=0)
    with pytest.raises(SystemExit, match="measurements of two devices: made up and another"):
        script.main(["fit", *map(str, files)])


@pytest.fixture
def measuring(
    script: ModuleType, rates: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, float | str]]:
    """Nothing is timed: each algorithm takes 1 ms, but gemm fails on kb73."""

    def measured(problem: Problem, algorithms: tuple[str, ...], *, seconds: float) -> dict[str, float | str]:
        fails = "in32x64x128" in problem.layer
        return {name: "out of memory" if fails and name == "gemm" else 1.0 for name in algorithms}

    monkeypatch.setattr(script.tuning, "measure", measured)
    monkeypatch.setattr(script, "release_memory", lambda device: None)  # slower than all else here
    return measured


@pytest.mark.usefixtures("measuring")
def test_measure(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Parts share the layers out, what is done is not done again, failures are noted, and the time is kept to."""
    device = torch.device("cuda", 0)
    parts = [script.problems_to_measure(device, part, 3, 0) for part in (1, 2, 3)]
    taken = [[next(part)[0] for _ in range(60)] for part in parts]
    first, second, third = ({(each.layer, each.precision, each.layout) for each in part} for part in taken)
    assert len(first | second | third) == 180  # none of them is in two parts
    published = {layer.specification for layer in PRESETS["all"]}
    settings = len(script.SETTINGS["cuda"])
    assert sum(layer in published for layer, _, _ in first | second | third) == settings * len(published)
    for problem in (problem for part in taken for problem in part if problem.layer not in published):
        assert 5e7 <= problem.operations <= 6e11
        assert problem.tensor_bytes <= 2e9

    if not has_backend("cpu"):
        return
    file = tmp_path / "measured.jsonl"
    arguments = ["measure", str(file), "--device", "cpu", "--seconds"]
    assert script.main([*arguments, "0.2"]) == 0
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines[0]["device"]["device"] == "made up"
    assert lines[0]["versions"]["torch"] == torch.__version__
    rows = lines[1:]
    assert len(rows) > 20
    assert f"{len(rows)} layers measured in 0 s" in capsys.readouterr().out
    for row in rows:
        if row["failures"]:
            assert row["failures"] == {f"{operator} gemm": "out of memory" for operator in OPERATORS}
            assert row["times"]["forward"] == {"direct": 1.0, "native": 1.0}
        else:
            assert row["times"]["forward"] == {"gemm": 1.0, "direct": 1.0, "native": 1.0}
            assert row["times"]["grad_input_weight"] == {"gemm": 1.0, "direct": 1.0, "native": 1.0}
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines[:20]))
    assert script.main([*arguments, "0.2"]) == 0
    keys = [
        (line["layer"], line["precision"], line["layout"])
        for line in map(json.loads, file.read_text().splitlines())
        if "layer" in line
    ]
    assert len(keys) > 19
    assert len(set(keys)) == len(keys)
