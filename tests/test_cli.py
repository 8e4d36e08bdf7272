"""The command line: `convt3d info` and `convt3d bench`."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
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
from convt3d_gemm.bench.markdown import as_markdown
from convt3d_gemm.bench.measure import Result, Status
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
        (["bench", "--markdown", "/no/such/folder/results.md"], "cannot write a file at /no/such"),
        (["bench", "--json", "/proc/results.json"], "cannot write a file at /proc/results.json"),
        (["bench", "--plot", "results.gif"], "must end in .png, .svg or .pdf, got results.gif"),
        (["bench", "--preset", "slow"], "invalid choice: 'slow'"),
        (["bench", "--model", "monai"], "expected PACKAGE.MODULE:FACTORY"),
        (["bench", "--input", "1x1x0"], "expected numbers joined by x, such as 1x1x96x96x96, got '1x1x0'"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_one_file_does_not_keep_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = tmp_path / "results.md"
    arguments = ["bench", "--device", "cpu", "--layer", SMALL, "--repeats", "3"]
    assert main([*arguments, "--json", "/dev/full", "--markdown", str(tables)]) == 2
    assert "cannot write /dev/full" in capsys.readouterr().err
    assert "native" in tables.read_text()


def test_a_reader_that_has_had_enough() -> None:
    command = "convt3d info --json | head -c 1; exit ${PIPESTATUS[0]}"
    ended = subprocess.run(["bash", "-c", f"exec 2>&1; {command}"], capture_output=True, text=True, check=False)
    assert ended.stdout == "{"
    assert ended.returncode in (0, 141)  # it may have written everything before the reader left


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
            report.show(console, table)
    rows = [line.split() for line in capture.get().splitlines()]
    # kb72 is 5.945 GFLOP and moves 127.5 MB, and the floor of these results is 0.5 ms.
    assert ["kb72", "5.95", "native", "2.000", "10%", "2.97", "63.75", "0.250", "-", "1.2e-07", "1.00x"] in rows
    assert ["gemm", "1.000", "10%", "5.95", "127.5", "0.500", "-", "1.2e-07", "2.00x"] in rows
    assert ["aten", "8.000", "10%", "0.743", "15.94", "0.062", "-", "1.2e-07", "0.25x"] in rows


def test_bench_in_two_layouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.json"
    asked = ["--layer", SMALL, "--algorithm", "native,gemm", "--layout", "ndhwc,ncdhw", "--repeats", "3"]
    assert main(["bench", "--device", "cpu", *asked, "--json", str(file)]) == 0
    out, err = capsys.readouterr()
    assert out.index("forward, float32 (IEEE), NDHWC") < out.index("forward, float32 (IEEE), NCDHW")
    assert f"] {SMALL} forward float32 NDHWC: native " in err
    written = json.loads(file.read_text())
    assert written["settings"]["layouts"] == ["ndhwc", "ncdhw"]
    assert [(result["layout"], result["algorithm"], result["status"]) for result in written["results"]] == [
        (layout, algorithm, "ok") for layout in ("ndhwc", "ncdhw") for algorithm in ("native", "gemm")
    ]


def test_what_is_not_timed_says_why() -> None:
    table = tables.layer_tables(
        [
            result_of("native"),
            without_time("gemm", "out of memory", "out of memory"),
            without_time("direct", "failed", "KeyError: 'x'"),
            without_time("aten", "not applicable", "slow_conv_transpose3d takes no groups"),
        ]
    )[0]
    times = [row[3] for row in table.sections[0]]
    assert [cell.text for cell in times] == ["2.000", "out of memory", "failed (1)", "n/a (2)"]
    assert [cell.kind for cell in times] == ["plain", "missing", "missing", "missing"]
    assert table.notes == ["KeyError: 'x'", "slow_conv_transpose3d takes no groups"]


def without_time(algorithm: str, status: Status, reason: str) -> Result:
    return dataclasses.replace(
        result_of(algorithm), status=status, reason=reason, timing=None, error=None, speedup=None
    )


def test_no_column_is_left_out_of_a_wide_table() -> None:
    layer = dataclasses.replace(parse_layer("kb68"), name="a name of more than twenty-four letters", batch=10**9)
    console = report.make_console()
    with console.capture() as capture:
        for table in tables.layer_tables(
            [result_of("native", layer=layer), without_time("gemm", "out of memory", "before: out of memory")]
        ):
            report.show(console, table)
    lines = capture.get().splitlines()
    assert lines[2].split()[-2:] == ["error", "speed"]
    assert any(line.split()[-2:] == ["1.2e-07", "1.00x"] for line in lines)
    assert any("out of memory (1)" in line for line in lines)


def test_sizes_are_decimal() -> None:
    assert [tables.size(number) for number in (0, 999, 1000, 7_100_000, 80_530_000_000)] == [
        "0 bytes",
        "999 bytes",
        "1.0 kB",
        "7.1 MB",
        "80.5 GB",
    ]


# bench: what it writes --------------------------------------------------------------------------------------


def test_markdown_tables() -> None:
    wrong = dataclasses.replace(result_of("gemm"), status="wrong", reason="error 1|2", timing=None, speedup=None)
    (table,) = tables.layer_tables([result_of("native", layer=parse_layer("quick_k2s2")), wrong])
    table = dataclasses.replace(table, sections=[[table.sections[0][0], *table.sections[1]]])
    assert as_markdown(table).splitlines() == [
        "### forward, float32 (IEEE), NCDHW",
        "",
        "| layer | GFLOP | algorithm | ms | ± | TFLOP/s | GB/s | of floor | workspace | error | speed |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| quick\\_k2s2 | 0.113 | native | 2.000 | 10% | 0.0566 | 4.432 | 0.250 | - | 1.2e-07 | 1.00x |",
        "| kb72 | 5.95 | gemm | - | - | - | - | - | - | **WRONG (1) 1.2e-07** | - |",
        "",
        "(1) error 1\\|2",
    ]


def test_bench_writes_markdown_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    markdown, plot = tmp_path / "results.md", tmp_path / "results.svg"
    asked = ["--layer", SMALL, "--layer", "quick_k3s1", "--repeats", "3", "--dtype", "float32,float64"]
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # letters stay letters
        assert main(["bench", "--device", "cpu", *asked, "--markdown", str(markdown), "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    written = markdown.read_text(encoding="utf-8")
    assert written.count("| native |") == written.count("| aten |") == 4
    assert "- ceilings: copy 10 GB/s (read and written), GEMM 2 TFLOP/s float32 (IEEE), 1 TFLOP/s float64" in written
    assert "quick\\_k3s1" in written
    assert tables.LAYER_LEGEND in written
    assert "quick_k3s1" in out
    drawn = plot.read_text(encoding="utf-8")
    for text in (SMALL, "quick_k3s1", "float64, NCDHW", "native", "gemm", "direct", "aten", "GEMM 2 TFLOP/s"):
        assert text in drawn, text


def test_a_plot_names_what_has_no_time(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    from convt3d_gemm.bench.plot import write_plot

    results = [
        result_of("native"),
        without_time("gemm", "out of memory", "out of memory"),
        dataclasses.replace(without_time("direct", "wrong", "error"), error=1.0),
        without_time("aten", "not applicable", "groups"),
    ]
    file = tmp_path / "plot.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        write_plot(file, "A device", Ceilings(1e12, {torch.float32: 1e14}), results)
    drawn = file.read_text(encoding="utf-8")
    assert "gemm: out of memory, direct: WRONG" in drawn
    assert "Transposed 3-D convolutions on A device" in drawn
    assert "aten" not in drawn
    with pytest.raises(ValueError, match="nothing was measured"):
        write_plot(file, "A device", Ceilings(1e12, {torch.float32: 1e14}), [])


def test_names_under_a_roofline_are_spread() -> None:
    pytest.importorskip("matplotlib")
    from convt3d_gemm.bench.plot import spread

    assert spread([], 0.1) == []
    assert spread([0.3, 0.7], 0.1) == [0.3, 0.7]
    assert spread([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])
    assert spread([0.0, 0.02, 0.9, 1.0], 0.2) == pytest.approx([0.0, 0.2, 0.8, 1.0])
    assert spread([0.5] * 5, 0.9) == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])  # no room: evenly
    places = spread([0.1, 0.15, 0.18, 0.4, 0.41, 0.99], 0.1)
    assert min(b - a for a, b in itertools.pairwise(places)) >= 0.1 - 1e-12


def test_a_plot_needs_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "--device", "cpu", "--plot", str(tmp_path / "plot.png")]) == 2
    said = capsys.readouterr().err
    assert said == 'convt3d bench --plot needs matplotlib: pip install "convt3d-gemm[bench]"\n'


# bench: networks --------------------------------------------------------------------------------------------

NETWORK_FILE = """
import torch

class Net(torch.nn.Module):
    def __init__(self, channels=4):
        super().__init__()
        self.up = torch.nn.ConvTranspose3d(channels, 2, 2, 2)
        self.last = torch.nn.ConvTranspose3d(2, 2, 2, 2)

    def forward(self, x, y):
        return self.last(self.up(x) + y)

def plain():
    return torch.nn.Conv3d(4, 2, 2)
"""


@pytest.fixture
def network_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "net_of_this_test.py"
    file.write_text(NETWORK_FILE)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, file.stem, raising=False)
    return file


def test_bench_of_a_network(network_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = network_file.with_suffix(".json")
    markdown, plot = network_file.with_suffix(".md"), network_file.with_suffix(".svg")
    asked = ["--model", f"{network_file}:Net(channels=3)", "--input", "1x3x4x5x6", "--input", "2x8x10x12"]
    files = ["--json", str(file), "--markdown", str(markdown), "--plot", str(plot)]
    with pytest.importorskip("matplotlib").rc_context({"svg.fonttype": "none"}):
        assert main(["bench", "--device", "cpu", *asked, "--repeats", "3", *files]) == 0
    out, err = capsys.readouterr()
    assert "- Net[0] N1,Cin3,Cout2,k2,in4x5x6,s2,p0,op0,d1,g1: up\n" in markdown.read_text(encoding="utf-8")
    drawn = plot.read_text(encoding="utf-8")
    for text in ("Net[1]", "Net, training step", "whole network, before and after", "before", "auto"):
        assert text in drawn, text
    assert "Net calls 2 transposed 3-D convolutions:\n" in out
    assert "  Net[0] N1,Cin3,Cout2,k2,in4x5x6,s2,p0,op0,d1,g1: up\n" in out
    assert "  Net[1] N1,Cin2,Cout2,k2,in8x10x12,s2,p0,op0,d1,g1: last\n" in out
    assert "\nwhole network, forward, float32 (IEEE), NCDHW" in out
    assert "\nwhole network, training step, float32 (IEEE), NCDHW" in out
    assert "Net, forward, float32 (IEEE), NCDHW: natively, its transposed convolutions" in out
    assert "[4/4, " in err
    assert "] Net training step float32: before " in err
    written = json.loads(file.read_text())
    assert [entry["modules"] for entry in written["found"]] == [["up"], ["last"]]
    assert {result["layer"]["name"] for result in written["results"]} == {"Net[0]", "Net[1]"}
    assert [(result["task"], result["algorithm"]) for result in written["networks"]] == [
        (task, algorithm) for task in ("forward", "training step") for algorithm in ("before", "auto", "gemm", "direct")
    ]
    for result in written["networks"]:
        assert result["status"] == "ok", result["reason"]
        assert result["milliseconds"]["repeats"] == 3
        assert 0 < result["error"] < 1e-6
    assert written["networks"][0]["speedup"] == 1.0


def test_bench_of_a_network_with_the_algorithms_asked_for(
    network_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = network_file.with_suffix(".json")
    asked = [
        "--model",
        f"{network_file}:Net",
        "--input",
        "1x4x2x2x2",
        "--input",
        "1",
        "--algorithm",
        "native,aten,direct",
    ]
    assert main(["bench", "--device", "cpu", *asked, "--repeats", "3", "--json", str(file)]) == 0
    assert [result["algorithm"] for result in json.loads(file.read_text())["networks"]] == ["before", "direct"] * 2


def test_a_network_that_comes_out_wrong_fails_the_bench(
    network_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoil(module: torch.nn.Module, algorithm: str) -> torch.nn.Module:
        module.get_parameter("last.weight").data *= 1.01
        return module

    monkeypatch.setattr("convt3d_gemm.bench.network.replace_conv_transpose3d", spoil)
    asked = ["--model", f"{network_file}:Net", "--input", "1x4x2x2x2", "--input", "1", "--algorithm", "native,gemm"]
    assert main(["bench", "--device", "cpu", *asked, "--repeats", "3"]) == 1
    out = capsys.readouterr().out
    assert out.count("WRONG (1)") == 2
    assert out.count("at most 2.0e-06 allowed") == 2


@pytest.mark.parametrize(
    ("factory", "sizes", "message"),
    [
        ("Net", [], "--model and --input go together"),
        (None, ["1x1x8x8x8"], "--model and --input go together"),
        ("nothing", ["1"], "AttributeError: module 'net_of_this_test' has no attribute 'nothing'"),
        ("plain", ["1x4x8x8x8"], "calls no torch.nn.ConvTranspose3d: there is nothing to compare"),
        ("Net", ["1x5x8x8x8", "1"], "does not take input 1x5x8x8x8, 1: RuntimeError: "),
        ("Net", ["1x4x8x8x8"], "does not take input 1x4x8x8x8: TypeError: "),
    ],
)
def test_networks_that_cannot_be_compared(
    network_file: Path, factory: str | None, sizes: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [] if factory is None else ["--model", f"{network_file}:{factory}"]
    for text in sizes:
        asked += ["--input", text]
    assert main(["bench", "--device", "cpu", *asked]) == 2
    assert message in capsys.readouterr().err


def test_a_network_without_memory_is_a_row_and_the_layers_go_on(
    network_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_memory(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(command, "find_layers", no_memory)
    asked = ["--model", f"{network_file}:Net", "--input", "1", "--layer", SMALL, "--algorithm", "native,gemm"]
    monkeypatch.setattr("convt3d_gemm.bench.network._Variant.make", no_memory)
    assert main(["bench", "--device", "cpu", *asked, "--repeats", "3"]) == 0
    out, err = capsys.readouterr()
    assert "Net runs out of memory when its layers are looked for" in out
    assert "Net forward float32: before out of memory, gemm out of memory" in err
    assert f"{SMALL} forward float32: native " in err
