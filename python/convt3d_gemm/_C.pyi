"""The C++ library, over addresses of tensors. The rest of the package is its only caller."""

from typing import overload

class DataType:
    float64: DataType
    float32: DataType
    float16: DataType
    bfloat16: DataType

class Layout:
    ncdhw: Layout
    ndhwc: Layout

class Precision:
    ieee: Precision
    tf32: Precision

class Operator:
    forward: Operator
    grad_input: Operator
    grad_weight: Operator
    grad_input_weight: Operator
    grad_bias: Operator

class Algorithm:
    gemm: Algorithm
    direct: Algorithm

class Problem:
    """One transposed 3-D convolution; raises RuntimeError where its parameters do not fit together."""

    def __init__(
        self,
        *,
        batch: int,
        in_channels: int,
        out_channels: int,
        groups: int,
        input: tuple[int, int, int],
        kernel: tuple[int, int, int],
        stride: tuple[int, int, int],
        padding: tuple[int, int, int],
        output_padding: tuple[int, int, int],
        dilation: tuple[int, int, int],
        layout: Layout,
        dtype: DataType,
        precision: Precision,
    ) -> None: ...
    @property
    def output(self) -> list[int]: ...

class Target:
    @staticmethod
    def cpu(threads: int) -> Target: ...
    @overload
    @staticmethod
    def cuda(device: int) -> Target: ...
    #: A GPU that need not be there, to plan for; ValueError unless all are positive.
    @overload
    @staticmethod
    def cuda(*, compute_capability: int, multiprocessors: int, shared_memory: int) -> Target: ...
    #: 90 for 9.0; 0 for a CPU. Kernels are chosen by it.
    compute_capability: int
    #: Bytes of a multiprocessor, for all blocks that share it; 0 for a CPU.
    @property
    def shared_memory(self) -> int: ...

class Plan:
    """How one operator of a problem is computed: by which kernels, and in pieces that fit a workspace."""

    def __init__(
        self,
        problem: Problem,
        operator: Operator,
        target: Target,
        workspace_limit: int,
        algorithm: Algorithm = ...,
    ) -> None: ...
    #: The kernels of algorithm "direct": of each its family, and which one of it where it has several.
    @property
    def configuration(self) -> str: ...
    #: Of a multiprocessor's clock, that a GPU's direct kernels are expected to take; 0 where a family has no model.
    @property
    def expected_cycles(self) -> float: ...
    @property
    def workspace_bytes(self) -> int: ...
    @property
    def column_bytes(self) -> int: ...
    @property
    def partial_bytes(self) -> int: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def fits(self) -> bool: ...
    @property
    def samples(self) -> int: ...
    @property
    def channels(self) -> int: ...
    @property
    def output_planes(self) -> int: ...
    @property
    def voxels(self) -> int: ...
    @property
    def splits(self) -> int: ...
    @property
    def partials(self) -> int: ...
    @property
    def reduction(self) -> int: ...
    # Below, tensors are addresses; `device` and `stream` say where CUDA work goes, `threads` how many CPU work may use.
    def forward(
        self,
        input: int,
        weight: int,
        bias: int,
        output: int,
        workspace: int,
        device: int,
        stream: int,
        threads: int,
        /,
    ) -> None: ...
    def grad_input(
        self,
        grad_output: int,
        weight: int,
        grad_input: int,
        workspace: int,
        device: int,
        stream: int,
        threads: int,
        /,
    ) -> None: ...
    def grad_weight(
        self,
        grad_output: int,
        input: int,
        grad_weight: int,
        workspace: int,
        device: int,
        stream: int,
        threads: int,
        /,
    ) -> None: ...
    def grad_input_weight(
        self,
        grad_output: int,
        input: int,
        weight: int,
        grad_input: int,
        grad_weight: int,
        workspace: int,
        device: int,
        stream: int,
        threads: int,
        /,
    ) -> None: ...
    def grad_bias(
        self,
        grad_output: int,
        grad_bias: int,
        workspace: int,
        device: int,
        stream: int,
        threads: int,
        /,
    ) -> None: ...

def build_info() -> dict[str, object]: ...
