"""What do the products over quantised experts cost, by tiles, and how far from the memory's bound?

    python benchmarks/quantised_layers.py --out benchmarks/results/quantised-layers.json

Layers with weights of their own, so that none is in the L2 cache, all experts in slots, uniform
routing; steps of decode are one CUDA graph over all layers. Every product is timed by itself. The
bound is the active experts' bytes by the rate at which the GPU reads.

Legend: T tokens, K choices a token, E experts, L layers.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps it off

from layers import DEVICE, graphed, seconds

from vllm_moe_offload.kernels.activation import Activation
from vllm_moe_offload.kernels.dispatch import Dispatch, dispatch
from vllm_moe_offload.kernels.formats import ExpertFormat
from vllm_moe_offload.kernels.quantised_mlp import (
    QuantisedInputs,
    QuantisedWeights,
    Step,
    quantise_inputs,
    quantised_mlp_torch,
)
from vllm_moe_offload.kernels.quantised_tiles import QuantisedTiles
from vllm_moe_offload.layout import ExpertLayout

BATCHES = (1, 8, 32, 128)
CHUNK = 8192
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """Layers of a model's experts in a format."""

    form: ExpertFormat
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    layers: int
    activation: Activation
    biased: bool = False

    @property
    def layout(self) -> ExpertLayout:
        """An expert's row."""
        sizes = 2 * self.intermediate, self.hidden, self.intermediate
        return ExpertLayout.pack(self.form.tensors(*sizes, DTYPE if self.biased else None))

    def bytes_of(self, matrix: str) -> int:
        """Bytes of one of an expert's two matrices."""
        return sum(s.num_bytes for s in self.layout.tensors if s.name.startswith(matrix))


_FP8 = ExpertFormat(
    "fp8", "e4m3", torch.float32, scale_rows=128, scale_terms=128, inputs="group"
)  # fmt: skip
_INT4 = ExpertFormat("int4", "uint4", DTYPE, scale_terms=128)
_MXFP4 = ExpertFormat("mxfp4", "e2m1", torch.uint8, scale_terms=32)
_QWEN = (128, 8, 2048, 768, 16, Activation("silu"))

SHAPES = {
    "fp8": Shape(_FP8, *_QWEN),
    "int4": Shape(_INT4, *_QWEN),
    "int4-32": Shape(replace(_INT4, scale_terms=32), *_QWEN),
    "mxfp4": Shape(_MXFP4, 128, 4, 2880, 2880, 8, Activation("swigluoai"), biased=True),
    # For trying this out where there is no GPU.
    "tiny": Shape(_INT4, 4, 2, 128, 128, 1, Activation("silu")),
}


def candidates(shape: Shape, tokens: int) -> Iterator[QuantisedTiles]:
    """Tiles worth a try, where activations are rounded both ways."""
    if tokens > max(BATCHES):
        tiles = [(128, 128, 64, 8, 8, 3), (128, 128, 64, 8, 8, 4), (128, 256, 64, 8, 8, 3),
                 (64, 128, 64, 8, 4, 3), (64, 256, 64, 8, 8, 3)]  # fmt: skip
        if shape.form.bits == 8:
            tiles = [(128, 128, 128, 8, 8, 3), (128, 128, 128, 8, 4, 3), (64, 128, 128, 8, 4, 3),
                     (64, 128, 128, 8, 4, 4), (128, 256, 128, 8, 8, 3)]  # fmt: skip
    else:
        tiles = [
            (16, 32, 128, 1, 2, 4), (16, 64, 128, 1, 4, 4), (16, 64, 128, 1, 2, 4),
            (16, 64, 128, 1, 2, 6), (16, 64, 128, 1, 4, 6), (16, 128, 128, 1, 4, 3),
            (16, 128, 128, 1, 4, 5), (16, 128, 128, 1, 8, 4),
        ]  # fmt: skip
        if shape.form.bits == 4:
            tiles = [(16, 64, 128, 1, 2, 4), (16, 64, 128, 1, 2, 6), (16, 128, 128, 1, 4, 3)]
            turned = [
                (8, 64, 128, 1, 2, 4), (8, 64, 128, 1, 2, 6), (8, 32, 128, 1, 1, 6),
                (8, 128, 128, 1, 4, 3), (8, 128, 128, 1, 4, 4), (8, 128, 128, 1, 2, 3),
                (8, 64, 256, 1, 4, 3), (16, 64, 128, 1, 2, 4), (16, 128, 128, 1, 4, 3),
            ]  # fmt: skip
            yield from (QuantisedTiles(*tile, swapped=True) for tile in turned)
        if tokens == max(BATCHES):
            tiles += [(32, 64, 128, 1, 4, 4), (32, 128, 128, 1, 4, 3)]
    for tile in tiles:
        yield QuantisedTiles(*tile)
        if shape.form.inputs == "group" and tile[0] == 16:
            yield QuantisedTiles(*tile, rounds_inside=True)


class Layers:
    """Random experts, all in slots, with one step's routing for each layer."""

    def __init__(self, shape: Shape, tokens: int, weights: list[QuantisedWeights]) -> None:
        self.shape, self.tokens, self.weights = shape, tokens, weights
        self.x_TH = torch.randn(tokens, shape.hidden, dtype=DTYPE, device=DEVICE)
        scores = torch.rand(len(weights), tokens, shape.experts, device=DEVICE)
        self.ids_LTK = scores.topk(shape.top_k, dim=-1).indices.int()
        self.weight_TK = torch.full((tokens, shape.top_k), 1 / shape.top_k, device=DEVICE)
        self.row_of_E = torch.arange(shape.experts, dtype=torch.int32, device=DEVICE)
        self.out_PH = self.x_TH.new_empty(tokens * shape.top_k, shape.hidden)

    def steps(self, tiles: QuantisedTiles) -> list[Step]:
        """One step of every layer, its pairs sorted."""
        found = []
        for ids_TK, weights in zip(self.ids_LTK, self.weights, strict=True):
            lists = Dispatch.empty(ids_TK.numel(), self.shape.experts, tiles.block_m, DEVICE)
            dispatch(ids_TK, lists)
            found.append(
                Step(self.x_TH, self.weight_TK, self.row_of_E % weights.num_rows, weights,
                     self.shape.activation, False, lists, tiles)
            )  # fmt: skip
        return found

    def bound_bytes(self, matrix: str) -> float:
        """Bytes of active experts a layer."""
        active = [ids_TK.unique().numel() for ids_TK in self.ids_LTK]
        return self.shape.bytes_of(matrix) * sum(active) / len(active)


def random_weights(shape: Shape, rows: int) -> QuantisedWeights:
    """Experts whose codes are random and whose scales make values near one."""
    layout, form = shape.layout, shape.form
    packed = torch.randint(0, 256, (rows, layout.row_bytes), dtype=torch.uint8, device=DEVICE)
    if form.elements == "e4m3":
        packed &= 0xBF  # no NaN
    for name, view in layout.views(packed).items():
        if name.endswith("scale"):
            view.copy_(torch.randint(118, 122, view.shape, device=DEVICE)
                       if view.dtype == torch.uint8 else torch.rand(view.shape) * 0.02)  # fmt: skip
        elif name.endswith("bias"):
            view.copy_(torch.rand(view.shape))
    return QuantisedWeights.of(form, layout.views(packed))


def compile_one(job: tuple[str, QuantisedTiles]) -> str | None:
    """Compile both products for a tile, so that the kernel cache has them."""
    name, tiles = job
    shape = SHAPES[name]
    try:
        for step in Layers(shape, 2, [random_weights(shape, 1)]).steps(tiles):
            run_step(step, step.x_TH.new_empty(2 * shape.top_k, shape.hidden))
        torch.cuda.synchronize() if DEVICE.type == "cuda" else None
    except Exception as error:
        return f"{name} {astuple(tiles)}: {type(error).__name__} {error}"[:300]
    return None


def run_step(step: Step, out_PH: torch.Tensor) -> None:
    """Compute a step."""
    inputs = quantise_inputs(step.x_TH, step.weights.format, step.config)
    step.down(step.between(step.gate_up(inputs)), out_PH)


def timed(layers: Layers, tiles: QuantisedTiles) -> dict[str, Any]:
    """Microseconds a layer of each product, and of all with the rounding beside them."""
    steps = layers.steps(tiles)
    inputs = quantise_inputs(layers.x_TH, layers.shape.form, tiles)
    inner = [step.between(step.gate_up(inputs)) for step in steps]

    def over_layers(run: Callable[[Step, QuantisedInputs], Any]) -> float:
        def step_all() -> None:
            for step, between in zip(steps, inner, strict=True):
                run(step, between)

        step_all()
        run_all = graphed(step_all).replay if layers.tokens <= max(BATCHES) else step_all
        repeats = 15 if layers.tokens <= max(BATCHES) else 3
        return seconds(run_all, repeats) / len(steps) * 1e6

    row = {
        "gate_up_us": over_layers(lambda step, _: step.gate_up(inputs)),
        "down_us": over_layers(lambda step, between: step.down(between, layers.out_PH)),
        "all_us": over_layers(lambda step, _: run_step(step, layers.out_PH)),
    }
    return row | {"difference": differs(layers, steps[0])}


def differs(layers: Layers, step: Step) -> float | None:
    """How far the first layer is from the plain torch form, by length; None for long prompts."""
    if layers.tokens > 8:
        return None
    shape = (layers.tokens, layers.shape.top_k, layers.shape.hidden)
    expected = layers.x_TH.new_empty(shape)
    quantised_mlp_torch(
        layers.x_TH, layers.weight_TK, layers.ids_LTK[0], step.row_of_E, step.weights,
        layers.shape.activation, expected,
    )  # fmt: skip
    run_step(step, layers.out_PH)
    return float((layers.out_PH.view(shape) - expected).norm() / expected.norm())


def stock_us(layers: Layers) -> float | None:
    """Microseconds a layer of vLLM's own Triton kernel, where it takes these tensors."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.fused_moe import config, fused_experts

    if layers.shape.form.name == "fp8":
        make, block = config.fp8_w8a8_moe_quant_config, [128, 128]
    elif layers.shape.form.name == "int4":
        make, block = config.int4_w4a16_moe_quant_config, [0, layers.shape.form.scale_terms]
    else:
        return None
    dense = [[t.contiguous() for t in (w.w13.codes, w.w2.codes, w.w13.scale, w.w2.scale)]
             for w in layers.weights]  # fmt: skip

    def step() -> None:
        for ids_TK, (w13, w2, scale13, scale2) in zip(layers.ids_LTK, dense, strict=True):
            about = make(w1_scale=scale13, w2_scale=scale2, block_shape=block)
            fused_experts(layers.x_TH, w13, w2, layers.weight_TK, ids_TK, quant_config=about)

    with set_current_vllm_config(VllmConfig()):
        step()
        run = graphed(step).replay if layers.tokens <= max(BATCHES) else step
        return seconds(run, 15 if layers.tokens <= max(BATCHES) else 3) / len(dense) * 1e6


def read_rate() -> float:
    """Bytes a second that the GPU reads, from a copy on it, which reads as much as it writes."""
    size = 2**30 if DEVICE.type == "cuda" else 2**24
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(partial(target.copy_, source), 7)


def measure(name: str, rate: float) -> Iterator[dict[str, Any]]:
    """Rows of one shape."""
    shape = SHAPES[name]
    weights = [random_weights(shape, shape.experts) for _ in range(shape.layers)]
    batches = (1, 4) if name == "tiny" else (*BATCHES, CHUNK)
    for tokens in batches:
        layers = Layers(shape, tokens, weights if tokens < CHUNK else weights[:4])
        bound = {m: layers.bound_bytes(m) / rate * 1e6 for m in ("w13", "w2")}
        about = {"shape": name, "tokens": tokens, "gate_up_bound_us": bound["w13"],
                 "down_bound_us": bound["w2"]}  # fmt: skip
        if DEVICE.type == "cuda":
            try:
                yield {**about, "stock_us": stock_us(layers)}
            except Exception as error:
                yield {**about, "stock_error": f"{type(error).__name__} {error}"[:200]}
        for tiles in candidates(shape, tokens):
            *sizes, inside, swapped = astuple(tiles)
            row = {**about, "tiles": sizes, "inside": inside, "swapped": swapped}
            try:
                yield row | timed(layers, tiles)
            except Exception as error:
                yield row | {"error": f"{type(error).__name__} {error}"[:200]}


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Rows as text, those of a case by time."""
    cases: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault((row["shape"], row["tokens"]), []).append(row)
    for (name, tokens), found in cases.items():
        first = found[0]
        stock = next((r["stock_us"] for r in found if r.get("stock_us")), None)
        yield (f"== {name} x {tokens}: bound {first['gate_up_bound_us']:.1f} + "
               f"{first['down_bound_us']:.1f} us, vLLM {stock and round(stock, 1)}")  # fmt: skip
        for row in sorted((r for r in found if "all_us" in r), key=lambda r: r["all_us"]):
            tiles = ",".join(map(str, row["tiles"])) + (" inside" if row["inside"] else "")
            tiles += " swapped" if row["swapped"] else ""
            off = "" if row["difference"] is None else f" off {row['difference']:.1e}"
            times = f"{row['gate_up_us']:.1f} + {row['down_us']:.1f}, {row['all_us']:.1f}"
            yield f"{tiles}: {times}{off}"
        yield from (r.get("error", r.get("stock_error")) for r in found
                    if "error" in r or "stock_error" in r)  # fmt: skip


def main() -> int:
    """Measure the shapes and write one file."""
    from machine import provenance

    args = parse(sys.argv[1:])
    start = time.monotonic()
    jobs = dict.fromkeys(
        (name, tiles) for name in args.shapes for tokens in (1, max(BATCHES), CHUNK)
        for tiles in candidates(SHAPES[name], tokens)
    )  # fmt: skip
    if args.jobs:
        with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
            problems = pool.map(compile_one, jobs, chunksize=1)
        print("\n".join(filter(None, problems)))
        print(f"compiled {len(jobs)} after {time.monotonic() - start:.0f} s", flush=True)
    rate = read_rate()
    rows: list[dict[str, Any]] = []
    for name in args.shapes:
        rows += measure(name, rate)
        print("\n".join(table([row for row in rows if row["shape"] == name])), flush=True)
        print(f"after {time.monotonic() - start:.0f} s", flush=True)
        result = {**provenance(args.commit), "read_gb_s": rate / 1e9, "rows": rows}
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", help="revision, where the tree has no repository")
    parser.add_argument("--shapes", nargs="+", default=["int4", "mxfp4", "fp8"], choices=SHAPES)
    parser.add_argument("--jobs", type=int, default=14, help="processes that compile; 0 for none")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
