"""Compile the kernels for GPUs of several kinds, with Triton's own compiler, which needs none.

    python -P tests/kernels/compile_ahead.py OUT

OUT gets in JSON the names of all kernels, and of every build the target, the kernel, what for, and
its shared memory in bytes or the compiler's error. Tensors have types and shapes but no memory.

Legend: T tokens, K choices a token, L layers, E experts, S slots, H hidden size, I intermediate
size, N stored matrices, M tokens of the largest step that is predicted.
"""

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count, cycle
from pathlib import Path
from typing import Any

import torch
from triton import AsyncCompileMode, knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime._async_compile import FutureKernel

from vllm_moe_offload.kernels import (
    compilation,
    expert_mlp,
    gather,
    gpu,
    learn,
    predict,
    prefetch,
    resolve,
    tally,
)
from vllm_moe_offload.kernels.activation import Activation
from vllm_moe_offload.kernels.dispatch import Dispatch
from vllm_moe_offload.kernels.expert_mlp import ExpertWeights, TileConfig, tile_config
from vllm_moe_offload.kernels.formats import ExpertFormat
from vllm_moe_offload.kernels.learn import AdaptiveTables
from vllm_moe_offload.kernels.quantised_mlp import QuantisedWeights, Step, quantise_inputs
from vllm_moe_offload.predictors.markov import MarkovPredictor

sys.path.append(str(Path(__file__).parents[1] / "support"))

from formats_of_tests import FORMATS, layout_of

KIB = 1024
META = torch.device("meta")
THREADS = 2
T, K, L, E, N, M = 16, 8, 3, 32, 32, 32
H, I = 2880, 768  # noqa: E741 - the first ends within a tile of 128 terms, the second with one
FLOAT = torch.float32
SILU, CLAMPED = Activation("silu"), Activation("swigluoai")
PAIRS = sorted(k << n for n in range(16) for k in (1, 3))
"""Pairs of steps of all sizes, with less than one for each expert and with hundreds."""

TILES_OF_VLLM = [
    TileConfig(16, 64, 128, 1, 4, 4), TileConfig(32, 64, 128, 1, 4, 3),
    TileConfig(32, 128, 64, 1, 4, 3), TileConfig(64, 128, 64, 1, 8, 3),
    TileConfig(128, 128, 64, 16, 8, 3), TileConfig(64, 64, 32, 8, 4, 3),
]  # fmt: skip
"""Those that vLLM chooses for a GPU without a tuned table, the last one if results may not depend
on the batch: ``get_default_config`` in vllm.model_executor.layers.fused_moe.fused_moe."""


@dataclass(frozen=True)
class Target:
    """A kind of GPU, and the shared memory that a program may have there.

    See the technical specifications by compute capability in the CUDA C++ Programming Guide.
    """

    capability: int
    shared_bytes: int

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Types of hidden states."""
        return (torch.bfloat16, torch.float16) if self.capability >= 80 else (torch.float16,)

    @property
    def has_e4m3(self) -> bool:
        """Whether kernels may take it."""
        return self.capability >= 89

    def formats(self) -> dict[str, ExpertFormat]:
        """What the formats are there, but for those that become another one."""
        if self.capability == 89:
            # The others compile as for 80.
            return {n: f for n, f in FORMATS.items() if f.inputs or f.name == "nvfp4"}
        if self.has_e4m3:
            return FORMATS
        plain: dict[str, ExpertFormat] = {}
        for name, form in FORMATS.items():
            if (rounds_nothing := replace(form, inputs=None)) not in plain.values():
                plain[name] = rounds_nothing
        return plain

    def some(self, tiles: list[Any], form: ExpertFormat | None = None) -> list[Any]:
        """All tiles where shared memory is small, but once, else those for fewest and most pairs.

        Kernels for 80, 89 and 120 take the same memory.
        """
        tiles = list(dict.fromkeys(tiles))
        is_thorough = self.capability == 80 or (self.capability == 89 and form and form.inputs)
        return tiles if is_thorough else [tiles[0], tiles[-1]][: len(self.dtypes)]


TARGETS = (
    Target(75, 64 * KIB),  # T4, RTX 20
    Target(80, 99 * KIB),  # A100, and RTX 30, for which kernels are the same and which has less
    Target(89, 99 * KIB),  # RTX 40
    Target(90, 227 * KIB),  # H100, H200
    Target(120, 99 * KIB),  # RTX 50
)


class Driver:
    """What a launch asks before it compiles; nothing that could run anything."""

    target = TARGETS[0]

    def get_current_device(self) -> int:
        """Another one for every target, as Triton keeps what it has compiled by device."""
        return self.target.capability

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.target.capability, 32)


class Builds:
    """Stands in for all launches, and notes what they compile."""

    def __init__(self) -> None:
        self.purpose = ""
        self._builds: list[tuple[Target, str, str, Any]] = []
        for kernel in compilation.kernels():
            kernel.run = self._instead_of(kernel.fn.__name__, kernel.run)

    def _instead_of(self, name: str, run: Any) -> Any:
        def compile_only(*args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            build = run(*args, grid=grid, warmup=True, **kwargs)
            self._builds.append((Driver.target, name, self.purpose, build))

        return compile_only

    def found(self) -> Iterator[dict[str, Any]]:
        """All builds, when they are done."""
        for target, kernel, purpose, build in self._builds:
            shared, error = None, None
            try:
                # A build that was asked for before is not in the future any more.
                done = build.result() if isinstance(build, FutureKernel) else build
                shared = done.metadata.shared
            except Exception as problem:
                error = str(problem)[:2000]
            yield {"target": target.capability, "kernel": kernel, "purpose": purpose,
                   "shared": shared, "error": error}  # fmt: skip


@contextmanager
def compiled_for(target: Target) -> Iterator[None]:
    """Let launches inside compile for a target."""
    Driver.target = target
    gpu.has_e4m3 = lambda _: target.has_e4m3
    gpu.shared_bytes = lambda _: target.shared_bytes
    with ThreadPoolExecutor(THREADS) as pool, AsyncCompileMode(pool, ignore_errors=True):
        yield


def of(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device=META)


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Hidden states, router weights, ids, and rows of experts."""
    return of(T, H, dtype=dtype), of(T, K, dtype=FLOAT), of(T, K), of(E)


def products(target: Target, builds: Builds) -> None:
    """Experts of 16 bits, whose types take turns, and of 32."""
    tiles = [tile_config(E, 2 * I, H, pairs, torch.float16) for pairs in PAIRS] + TILES_OF_VLLM
    pairs_of = list(zip(target.some(tiles), cycle(target.dtypes)))
    for config, dtype in [*pairs_of, (tile_config(E, 2 * I, H, T * K, FLOAT), FLOAT)]:
        out = of(T, K, H, dtype=dtype)
        weights = ExpertWeights(of(E, 2 * I, H, dtype=dtype), of(E, H, I, dtype=dtype))
        builds.purpose = f"{dtype}, {config}"
        lists = Dispatch.empty(T * K, E, config.block_m, META)
        expert_mlp.expert_mlp(*inputs(dtype), weights, SILU, out, config=config, dispatch=lists)
        expert_mlp.combine(out, of(T, K), of(T, H, dtype=dtype))


def quantised_products(target: Target, builds: Builds) -> None:
    """Experts in all formats, where types and products take turns."""
    number = count()
    for name, form in target.formats().items():
        bias, activation = (torch.bfloat16, CLAMPED) if name == "mxfp4" else (None, SILU)
        layout = layout_of(form, 2 * I, H, I, bias)
        rows = of(E, layout.row_bytes, dtype=torch.uint8)
        weights = QuantisedWeights.of(form, layout.views(rows))
        tiles = target.some([weights.tiles(E, pairs, torch.float16) for pairs in PAIRS], form)
        for config, dtype in zip(tiles, cycle(target.dtypes)):
            builds.purpose = f"{name}, {dtype}, {config}"
            lists = Dispatch.empty(T * K, E, config.block_m, META)
            x, weight, _, row_of_E = inputs(dtype)
            step = Step(x, weight, row_of_E, weights, activation, False, lists, config)
            if next(number) % 2 == 0:
                step.gate_up(quantise_inputs(x, form, config))
            else:
                step.down(step.between(of(T * K, I, dtype=dtype)), of(T * K, H, dtype=dtype))


def bookkeeping(builds: Builds) -> None:
    """What a step does beside its products."""
    builds.purpose = "bookkeeping"
    learned = AdaptiveTables.empty([E] * L, [E // 4] * L, META)
    ids, work = of(T, K), resolve.WorkList.empty(E, META)
    tables = resolve.ResidencyTables.empty(E, E // 4, META, learned.order(0, E))
    lists = Dispatch.empty(T * K, E, 16, META)
    resolve.resolve(
        ids, tables, work, evict=True, dispatch=lists, slot_of_AE=of(3, E),
        log=resolve.IdLog(ids, of(T, K, dtype=torch.int16)),
        padding=resolve.Padding(of(T, dtype=torch.bool), of(T, K)),
    )  # fmt: skip
    many = of(2048 // K, K)
    more = Dispatch.empty(many.numel(), E, 16, META)
    resolve.resolve(many, tables, work, evict=False, dispatch=more)  # sorts in launches of its own
    resolve.wave_map(work, 0, of(E), rows=4)
    tally.tally(ids, of(E), work.counters, 4, dispatch=lists)
    learn.learn(learned)
    rows = of(4, 8192, dtype=torch.uint8)
    gather.gather(rows, rows, of(4), of(4), of(1))
    look_ahead(tables, work)


def look_ahead(tables: resolve.ResidencyTables, work: resolve.WorkList) -> None:
    """Every kind of predictor, by itself or within the launch that fetches."""
    markov = MarkovPredictor(L, E, META).tables
    counts, norms = of(L, E, N, dtype=torch.int16), of(L, N, dtype=FLOAT)
    eam = predict.EamTables(counts, norms, of(1), of(M, N))
    gate = predict.GateLogits(of(T, E, dtype=FLOAT), of(256))
    side = prefetch.LayerAhead(tables, work, of(E, dtype=torch.int8))
    outlook = prefetch.Outlook(of(1), of(L, M, K), of(E))
    for source in (markov, gate):
        predict.demand(of(T, K), source, 1, outlook.demand_E, outlook.rows)
    prefetch.look_ahead(of(2, K), 1, side, side, eam, outlook)
    predict.learn_transitions(of(L, M, K), T, markov)


def main(out: Path) -> None:
    """Compile everything for every target."""
    driver.set_active(Driver())
    # What ptxas makes quicker is not looked at.
    knobs.nvidia.disable_ptxas_opt = True
    knobs.compilation.disable_line_info = True
    builds = Builds()
    for target in TARGETS:
        with compiled_for(target):
            if target.capability != 89:  # all of it compiles as for 80
                bookkeeping(builds)
            products(target, builds)
            quantised_products(target, builds)
    names = [kernel.fn.__name__ for kernel in compilation.kernels()]
    out.write_text(json.dumps({"kernels": names, "builds": list(builds.found())}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
