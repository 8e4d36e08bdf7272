"""What direct's plans expect, for a GPU that need not be there."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cases import (
    BOXED,
    COPIED,
    CUBES,
    FILLED_RUNS,
    HALF_TYPES,
    MANY_RUNS,
    MANY_TILES,
    POINTS,
    TF32_TOO,
    WINDOWS,
    Case,
)
from convt3d_gemm import _C, library
from convt3d_gemm.costs import problem_of
from convt3d_gemm.parameters import Triple
from convt3d_gemm.problem import Problem

H200 = {"compute_capability": 90, "multiprocessors": 132, "shared_memory": 228 << 10}
A100 = {"compute_capability": 80, "multiprocessors": 108, "shared_memory": 164 << 10}
PARTS = ("forward", "grad_input", "grad_weight")


def planned(
    operator: str, layer: str, precision: str = "tf32", gpu: dict[str, int] = H200, layout: str = "ncdhw"
) -> _C.Plan:
    problem = problem_of(operator, layer, precision, layout)._replace(limit=1 << 30)
    return library.plan_for(_C.Target.cuda(**gpu), "direct", problem)


@pytest.mark.parametrize("gpu", [H200, A100], ids=["H200", "A100"])
@pytest.mark.parametrize("operator", PARTS)
def test_expected_cycles_grow_with_the_work(operator: str, gpu: dict[str, int]) -> None:
    def expected(batch: int) -> float:
        plan = planned(operator, f"N{batch},Cin64,Cout32,k3,in32,s2,p1,op1,d1,g1", gpu=gpu)
        family = "pipelined" if gpu is H200 and operator != "grad_weight" else "tensor"
        assert plan.configuration.split()[0] == family
        return plan.expected_cycles

    assert 1e3 < expected(1) < expected(8) / 2 < expected(64) / 8
    assert expected(64) == pytest.approx(8 * expected(8), rel=0.3)


def test_expected_cycles_of_both_gradients_are_those_of_each() -> None:
    layer = "N4,Cin64,Cout32,k3,in32,s2,p1,op1,d1,g1"
    first, second, both = (planned(operator, layer) for operator in (*PARTS[1:], "grad_input_weight"))
    assert both.configuration == f"{first.configuration}, {second.configuration}"
    assert both.expected_cycles == pytest.approx(first.expected_cycles + second.expected_cycles)


def test_rows_without_taps_are_part_of_what_is_expected() -> None:
    # Stride 2 with dilation 2: seven of eight output voxels have no tap, and are written before the others are summed.
    with_gaps = planned("forward", "N16,Cin32,Cout64,k3,in16x32x32,s2,p1,op0,d2,g1")
    without = planned("forward", "N16,Cin32,Cout64,k3,in16x32x32,s1,p1,op0,d1,g1")
    filled_bytes = 16 * 64 * 33 * 65 * 65 * 4
    assert with_gaps.expected_cycles > without.expected_cycles + 0.9 * filled_bytes * 6 / 8 / 2350


def layer_of(case: Case) -> str:
    def triple(numbers: Triple) -> str:
        return "x".join(map(str, numbers))

    return (
        f"N{case.batch},Cin{case.in_channels},Cout{case.out_channels},k{triple(case.kernel)},in{triple(case.size)},"
        f"s{triple(case.stride)},p{triple(case.padding)},op{triple(case.output_padding)},d{triple(case.dilation)},"
        f"g{case.groups}"
    )


@pytest.mark.parametrize("name", MANY_TILES)
def test_half_types_are_handed_over_where_tiles_are_many(name: str) -> None:
    operator, case = MANY_TILES[name]
    for precision in TF32_TOO:
        configuration = planned(operator, layer_of(case), precision).configuration
        assert configuration.startswith("pipelined ")
        assert configuration.endswith(" handing over") == (precision != "tf32")


@pytest.mark.parametrize("name", MANY_RUNS)
def test_runs_are_handed_over_where_they_begin_anywhere(name: str) -> None:
    operator, case, precisions = MANY_RUNS[name]
    for precision in TF32_TOO:
        configuration = planned(operator, layer_of(case), precision).configuration
        assert configuration.endswith(" handing over runs") == (precision in precisions)


@pytest.mark.parametrize("name", FILLED_RUNS)
def test_rows_without_taps_are_parts_of_runs(name: str) -> None:
    for precision in TF32_TOO:
        configuration = planned("forward", layer_of(FILLED_RUNS[name]), precision).configuration
        assert configuration.endswith(" handing over filled runs")


@pytest.mark.parametrize("name", WINDOWS)
def test_planes_of_the_source_serve_all_slots(name: str) -> None:
    operator, case = WINDOWS[name]
    for layout in ("ncdhw", "ndhwc"):
        assert " with windows" in planned(operator, layer_of(case), layout=layout).configuration
    taps = dataclasses.replace(case, kernel=(4, *case.kernel[1:]))
    assert " with windows" not in planned(operator, layer_of(taps)).configuration


@pytest.mark.parametrize("name", CUBES)
def test_neighbours_of_the_source_serve_all_residues(name: str) -> None:
    case = CUBES[name]
    assert " with cubes" in planned("forward", layer_of(case)).configuration
    for other in (
        dataclasses.replace(case, kernel=(3, 3, 4)),
        dataclasses.replace(case, padding=(0, 0, 0)),
        dataclasses.replace(case, stride=(1, 2, 2), output_padding=(0, 1, 1)),
    ):
        assert " with cubes" not in planned("forward", layer_of(other)).configuration


@pytest.mark.parametrize("name", POINTS)
def test_all_taps_of_a_point_are_multiplied_at_once(name: str) -> None:
    case = POINTS[name]
    assert " with points" in planned("forward", layer_of(case)).configuration
    for other in (
        dataclasses.replace(case, kernel=(3, 2, 2)),
        dataclasses.replace(case, padding=(1, 1, 1)),
        dataclasses.replace(case, output_padding=(0, 0, 1)),
        dataclasses.replace(case, batch=20 * case.batch),
    ):
        assert " with points" not in planned("forward", layer_of(other)).configuration


def test_points_have_as_few_blocks_of_columns_as_fill_the_chip() -> None:
    for columns in (24, 32):
        configuration = planned("forward", layer_of(POINTS[f"{columns} columns"])).configuration
        assert configuration.startswith(f"pipelined 8x{columns}x1 boxed")


def test_rows_that_begin_anywhere_have_cubes_in_small_volumes() -> None:
    for size, has_cubes in (("32x64x128", True), ("64x128x256", False)):
        configuration = planned("forward", f"N4,Cin32,Cout32,k3,in{size},s2,p1,op0,d1,g1", "tf32").configuration
        assert (" with cubes" in configuration) == has_cubes


@pytest.mark.parametrize("name", [*COPIED, *BOXED])
def test_floats_are_copied_as_boxes(name: str) -> None:
    case = {**COPIED, **BOXED}[name]
    assert " boxed" in planned("forward", layer_of(case)).configuration
    assert " boxed" not in planned("forward", layer_of(case), "float32").configuration
    depth, height, width = case.size
    other = dataclasses.replace(case, size=(depth, height, width + 1))
    assert " boxed" not in planned("forward", layer_of(other)).configuration


@pytest.mark.parametrize("precision", HALF_TYPES)
@pytest.mark.parametrize("name", COPIED)
def test_sources_are_copied_where_all_taps_read_the_same_voxels(name: str, precision: str) -> None:
    case = COPIED[name]
    assert " copied" in planned("forward", layer_of(case), precision).configuration
    depth, height, width = case.size
    for other in (
        dataclasses.replace(case, padding=(0, 0, 1)),
        dataclasses.replace(case, size=(depth, height, width + 1)),
        dataclasses.replace(case, kernel=(case.kernel[0] + 1, case.kernel[1] + 1, case.kernel[2] + 1)),
    ):
        assert " copied" not in planned("forward", layer_of(other), precision).configuration
    assert " copied" not in planned("grad_input", layer_of(case), precision).configuration


@pytest.mark.parametrize("operator", [*PARTS, "grad_input_weight"])
@pytest.mark.parametrize(
    ("layer", "precision", "family"),
    [
        ("N4,Cin32,Cout32,k3,in16,s2,p1,op1,d1,g32", "tf32", "depthwise"),
        ("N4,Cin32,Cout32,k3,in16,s2,p1,op1,d1,g1", "float64", "simt"),
    ],
)
def test_families_without_a_model_expect_nothing(operator: str, layer: str, precision: str, family: str) -> None:
    plan = planned(operator, layer, precision)
    assert plan.expected_cycles == 0
    assert set(plan.configuration.split(", ")) == {family}


def test_one_family_without_a_model_leaves_both_gradients_without_an_expectation() -> None:
    layer = "N1,Cin320,Cout256,k4,in2x4x4,s2,p1,op0,d1,g2"  # a float32 sum over few voxels
    assert planned("grad_input", layer, "float32").expected_cycles > 0
    both = planned("grad_input_weight", layer, "float32")
    assert both.configuration.endswith(", simt")
    assert both.expected_cycles == 0


def test_other_plans_expect_nothing() -> None:
    problem: Problem = problem_of("forward", "N4,Cin64,Cout32,k3,in32,s2,p1,op1,d1,g1", "float32", "ncdhw")
    assert library.plan_for(_C.Target.cuda(**H200), "gemm", problem).expected_cycles == 0
    assert library.plan_for(_C.Target.cpu(2), "direct", problem).expected_cycles == 0


def test_targets_that_need_not_be_there() -> None:
    target = _C.Target.cuda(**H200)
    assert (target.compute_capability, target.shared_memory) == (90, 228 << 10)
    assert _C.Target.cpu(2).shared_memory == 0
    for name in H200:
        for value in (0, -1):
            with pytest.raises(ValueError, match=f"^{name} must be positive, got {value}$"):
                _C.Target.cuda(**{**H200, name: value})
        with pytest.raises(TypeError, match=name):
            _C.Target.cuda(**{**H200, name: 1 << 40})
        with pytest.raises(TypeError, match=name):
            _C.Target.cuda(**{key: value for key, value in H200.items() if key != name})


def test_a_plan_for_a_gpu_that_is_not_there_is_no_call() -> None:
    problem = problem_of("forward", "N1,Cin4,Cout2,k2,in3,s2,p0,op0,d1,g1", "float32", "ncdhw")
    with pytest.raises(RuntimeError, match="meta"):
        library.planned("direct", problem)
    with pytest.raises(NotImplementedError, match=r"got torch\.int32"):
        library.plan_for(_C.Target.cuda(**H200), "direct", problem._replace(dtype=torch.int32))
