"""The command line: `convt3d info` and `convt3d bench`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import convt3d_gemm
from convt3d_gemm.bench import command, report, tables
from convt3d_gemm.bench.ceilings import Ceilings
from convt3d_gemm.bench.competitors import ALGORITHMS, DEFAULT_ALGORITHMS, Algorithm
from convt3d_gemm.bench.layers import PRESETS, Layer, Operator, parse_layer
from convt3d_gemm.bench.measure import Result
from convt3d_gemm.bench.timing import Clock, Timing
from convt3d_gemm.cli import main

SMALL = "Cin4,Cout2,k2,in3x4x5,s2"
RATES = {"float32": 2e12, "float64": 1e12, "float16": 4e12, "bfloat16": 5e12}


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring them takes seconds, and what depends on them would have no known answer."""

    def ceilings(clock: Clock, dtypes: Sequence[torch.dtype]) -> Ceilings:
        return Ceilings(1e10, {dtype: RATES[tables.dtype_name(dtype)] for dtype in dtypes})

    monkeypatch.setattr(command, "measure_ceilings", ceilings)


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Operator, torch.dtype, tuple[str, ...]]]:
    """What would be measured: nothing is, and the layers, operators, dtypes and algorithms end up here."""
    seen: list[tuple[str, Operator, torch.dtype, tuple[str, ...]]] = []

    def measure(
        layer: Layer, operator: Operator, dtype: torch.dtype, algorithms: Sequence[Algorithm], *_: object
    ) -> list[Result]:
        seen.append((layer.name, operator, dtype, tuple(algorithm.name for algorithm in algorithms)))
        return [result_of(algorithm.name, layer=layer, operator=operator, dtype=dtype) for algorithm in algorithms]

    monkeypatch.setattr(command, "measure", measure)
    return seen


def result_of(
    algorithm: str,
    *,
    layer: Layer | None = None,
    operator: Operator = "forward",
    dtype: torch.dtype = torch.float32,
    median: float = 2.0,
    speedup: float = 1.0,
) -> Result:
    return Result(
        layer=layer or parse_layer("kb72"),
        operator=operator,
        dtype=dtype,
        precision="ieee",
        layout="ncdhw",
        algorithm=algorithm,
        status="ok",
        floor=0.5,
        error_bound=2e-6,
        timing=Timing(median, 0.9 * median, 1.1 * median, repeats=5, calls=1),
        error=1.25e-7,
        speedup=speedup,
    )


# info -------------------------------------------------------------------------------------------------------


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    said = {line.split("  ")[0]: line.split("  ")[-1].strip() for line in capsys.readouterr().out.splitlines()}
    built = convt3d_gemm.build_info()
    assert said["convt3d-gemm"] == built["version"]
    assert said["PyTorch"].startswith(torch.__version__)
    assert said["CBLAS"] == (built["cblas"] or "none")
    assert said["threads"] == str(torch.get_num_threads())
    assert said["workspace limit"] == f"{convt3d_gemm.get_workspace_limit() / 2**20:.0f} MiB"
    assert ("no CUDA backend" in said) == ("cuda" not in said["backends"].split(", "))


def test_info_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    known = json.loads(capsys.readouterr().out)
    assert known["build"] == convt3d_gemm.build_info()
    assert known["versions"]["torch"] == torch.__version__
    assert len(known["gpus"]) == torch.cuda.device_count()
    assert known["workspace_limit_bytes"] == convt3d_gemm.get_workspace_limit()


def test_only_bench_needs_rich(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.delitem(sys.modules, "convt3d_gemm.bench.report")
    assert main(["info"]) == 0
    capsys.readouterr()
    assert main(["bench"]) == 2
    assert capsys.readouterr().err == 'convt3d bench needs rich: pip install "convt3d-gemm[bench]"\n'


# bench: what it measures ------------------------------------------------------------------------------------


def test_bench_on_a_cpu_is_quick(cases: list[tuple[str, Operator, torch.dtype, tuple[str, ...]]]) -> None:
    assert main(["bench", "--device", "cpu"]) == 0
    assert cases == [(layer.name, "forward", torch.float32, DEFAULT_ALGORITHMS) for layer in PRESETS["quick"]]


def test_bench_of_everything_asked_for(
    cases: list[tuple[str, Operator, torch.dtype, tuple[str, ...]]],
) -> None:
    asked = f"--layer kb72 --layer {SMALL} --layer kb72 --dtype float16,float64 --dtype float16 --backward"
    assert main(["bench", "--device", "cpu", *asked.split(), "--algorithm", "aten,gemm"]) == 0
    assert cases == [
        (layer, operator, dtype, ("aten", "gemm"))
        for layer in ("kb72", SMALL)
        for operator in ("forward", "grad_input", "grad_weight", "grad_input_weight")
        for dtype in (torch.float16, torch.float64)
    ]


def test_bench_of_a_preset_and_a_layer(
    cases: list[tuple[str, Operator, torch.dtype, tuple[str, ...]]],
) -> None:
    assert main(["bench", "--device", "cpu", "--preset", "all", "--layer", SMALL]) == 0
    assert [case[0] for case in cases] == [*(layer.name for layer in PRESETS["all"]), SMALL]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: command"),
        (["bench", "--layer", "Cin4"], "no layer is called 'Cin4'"),
        (["bench", "--layer", "Cin4,Cout4,k2,in8,s0"], "stride must be at least 1, got (0, 0, 0)"),
        (["bench", "--dtype", "float32,int8"], "no dtype is called 'int8': there are float32, float64"),
        (["bench", "--algorithm", "fft"], "no algorithm is called 'fft': there are native, gemm, direct, auto, aten"),
        (["bench", "--device", "mps"], "must be cpu, cuda or cuda:N, got mps"),
        (["bench", "--device", "cuda:99"], "CUDA device"),
        (["bench", "--repeats", "0"], "must be above 0, got 0"),
        (["bench", "--seconds", "nan"], "must be above 0, got nan"),
        (["bench", "--layout", "ncdhw,nchw"], "no layout is called 'nchw': there are ncdhw, ndhwc"),
        (["bench", "--json", "/no/such/folder/results.json"], "cannot write a file at /no/such"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


# bench: what it shows ---------------------------------------------------------------------------------------


def test_bench_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.json"
    arguments = ["bench", "--device", "cpu", "--layer", SMALL, "--backward", "--dtype", "float32,float64"]
    assert main([*arguments, "--repeats", "3", "--json", str(file)]) == 0

    out, err = capsys.readouterr()
    assert "ceilings: copy 10 GB/s (read and written), GEMM 2 TFLOP/s float32 (IEEE), 1 TFLOP/s float64" in out
    for operator in ("forward", "grad_input", "grad_weight", "grad_input + grad_weight"):
        assert f"\n{operator}, float32 (IEEE), NCDHW" in out
        assert f"\n{operator}, float64, NCDHW" in out
    assert "[8/8, " in err
    assert err.count("native ") == err.count("gemm ") == err.count("direct ") == err.count("aten ") == 8

    written = json.loads(file.read_text())
    assert written["command_line"].startswith(f"convt3d bench --device cpu --layer {SMALL} --backward")
    assert written["date"].endswith("+00:00")
    assert written["versions"]["torch"] == torch.__version__
    assert written["build"] == convt3d_gemm.build_info()
    assert written["device"]["threads"] == torch.get_num_threads()
    assert written["settings"]["repeats"] == 3
    assert written["ceilings"] == {
        "copy_bytes_per_second": 1e10,
        "gemm_flops_per_second": {"float32": 2e12, "float64": 1e12},
    }
    layer = parse_layer(SMALL)
    assert len(written["results"]) == 32
    for result in written["results"]:
        assert result["status"] == "ok", result["reason"]
        assert parse_layer(result["specification"]).output_shape == layer.output_shape
        assert result["gflop"] == layer.flops(result["operator"]) / 1e9
        assert 0 <= result["error"] <= result["error_bound"]
        milliseconds = result["milliseconds"]
        assert milliseconds["lower_quartile"] <= milliseconds["median"] <= milliseconds["upper_quartile"]
        assert milliseconds["repeats"] == 3
        # 1e10 bytes a second are the tighter ceiling for so small a layer.
        size = {"float32": 4, "float64": 8}[result["dtype"]]
        assert result["floor_milliseconds"] == pytest.approx(layer.elements_moved(result["operator"]) * size / 1e7)
        assert result["floor_fraction"] == pytest.approx(result["floor_milliseconds"] / milliseconds["median"])
    assert written["settings"]["layouts"] == ["ncdhw"]
    assert written["found"] == written["networks"] == []
    native, *ours, aten = written["results"][:4]
    assert aten["algorithm"] == "aten"
    assert (native["algorithm"], native["speedup"], native["workspace_bytes"]) == ("native", 1.0, None)
    assert [result["algorithm"] for result in ours] == ["gemm", "direct"]
    for result in ours:
        assert result["speedup"] == pytest.approx(native["milliseconds"]["median"] / result["milliseconds"]["median"])
        assert result["workspace_bytes"] >= 0


def test_bench_with_a_wrong_algorithm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    native = ALGORITHMS["native"]
    wrong = Algorithm("gemm", lambda layer, x, w: native.forward(layer, x, w) * 1.001, native.gradients)
    monkeypatch.setitem(ALGORITHMS, "gemm", wrong)
    file = tmp_path / "results.json"
    assert main(["bench", "--device", "cpu", "--layer", SMALL, "--repeats", "3", "--json", str(file)]) == 1
    out = capsys.readouterr().out
    assert "WRONG (1) 1.0e-03" in out
    assert "(1) error 1.0e-03, at most 2.0e-06 allowed" in out
    native_result, wrong_result, *_ = json.loads(file.read_text())["results"]
    assert native_result["status"] == "ok"
    assert wrong_result["status"] == "wrong"
    assert wrong_result["error"] == pytest.approx(1e-3, rel=1e-3)
    assert wrong_result["milliseconds"] is wrong_result["tflops"] is wrong_result["speedup"] is None


def test_an_interrupted_bench_shows_what_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(layer: Layer, *_: object) -> list[Result]:
        if layer.name != "quick_k2s2":
            raise KeyboardInterrupt
        return [result_of(algorithm, layer=layer) for algorithm in DEFAULT_ALGORITHMS]

    monkeypatch.setattr(command, "measure", measure)
    assert main(["bench", "--device", "cpu"]) == 130
    out = capsys.readouterr().out
    assert "interrupted after 1 of 7 measurements" in out
    assert "quick_k2s2" in out
    assert "quick_k3s2" not in out


def test_wins_and_losses_print_alike() -> None:
    console = report.make_console()
    with console.capture() as capture:
        for table in tables.layer_tables(
            [
                result_of("native"),
                result_of("gemm", median=1.0, speedup=2.0),
                result_of("aten", median=8.0, speedup=0.25),
            ]
        ):
            console.print(report.rendered(table))
    rows = [line.split() for line in capture.get().splitlines()]
    # kb72 is 5.945 GFLOP and moves 127.5 MB, and the floor of these results is 0.5 ms.
    assert ["kb72", "5.95", "native", "2.000", "10%", "2.97", "63.75", "0.250", "-", "1.2e-07", "1.00x"] in rows
    assert ["gemm", "1.000", "10%", "5.95", "127.5", "0.500", "-", "1.2e-07", "2.00x"] in rows
    assert ["aten", "8.000", "10%", "0.743", "15.94", "0.062", "-", "1.2e-07", "0.25x"] in rows
