"""Launch every kernel at small shapes, for NVIDIA's compute-sanitizer to watch.

    compute-sanitizer --tool memcheck --error-exitcode 1 python tests/kernels/sanitize.py

Sizes are such that every mask has something to cut off. Results are compared with the torch forms
on the host, so that besides these kernels nearly nothing runs on the device.
"""

import importlib
import os
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

from vllm_moe_offload import kernels
from vllm_moe_offload.kernels import dispatch, expert_mlp, gather, learn, predict, resolve, tally
from vllm_moe_offload.kernels.activation import Activation
from vllm_moe_offload.kernels.dispatch import Dispatch
from vllm_moe_offload.kernels.expert_mlp import ExpertWeights, TileConfig
from vllm_moe_offload.kernels.learn import AdaptiveTables
from vllm_moe_offload.kernels.prefetch import look_ahead, look_ahead_torch
from vllm_moe_offload.kernels.resolve import ResidencyTables, WorkList

sys.path += [str(Path(__file__).parents[1] / "support"), str(Path(__file__).parent)]

HOST = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAGE = 4096
SCRATCH = ("count_CE", "figures_LN")
TILES = TileConfig(block_m=16, block_n=32, block_k=32, group_m=2, num_warps=4, num_stages=2)


class Launches:
    """Stands in front of a kernel and notes that it was launched."""

    seen: ClassVar[set[str]] = set()

    def __init__(self, name: str, kernel: Any) -> None:
        self._name, self._kernel = name, kernel

    def __getitem__(self, grid: Any) -> Any:
        self.seen.add(self._name)
        return self._kernel[grid]


def all_kernels() -> set[str]:
    """Names of everything in the private modules that is launched by itself."""
    names = set()
    for module in pkgutil.iter_modules(kernels.__path__):
        if module.name.endswith("_triton"):
            found = importlib.import_module(f"{kernels.__name__}.{module.name}")
            names |= {
                name
                for name, value in vars(found).items()
                if name.endswith("_kernel") and value.fn.__module__ == found.__name__
            }
    return names


def watch() -> None:
    """Note launches from here on."""
    names = all_kernels()
    for launcher in pkgutil.iter_modules(kernels.__path__):
        if launcher.name.startswith("_"):
            continue
        module = importlib.import_module(f"{kernels.__name__}.{launcher.name}")
        for name in names & vars(module).keys():
            setattr(module, name, Launches(name, getattr(module, name)))


def routed(tokens: int, choices: int, experts: int) -> torch.Tensor:
    """Ids [T, K] on the host, some inactive."""
    return torch.randint(-1, experts, (tokens, choices), dtype=torch.int32)


def same(device: Any, host: Any, lengths: dict[str, int]) -> None:
    """Compare two records of tensors; ``lengths`` says how much of some of them is defined."""
    for name, expected in vars(host).items():
        if isinstance(expected, torch.Tensor) and name not in SCRATCH:
            stop = lengths.get(name, expected.numel())
            got = getattr(device, name).cpu()
            assert torch.equal(got.flatten()[:stop], expected.flatten()[:stop]), name


def run_dispatch() -> None:
    """Few pairs and several chunks of them."""
    for tokens in (3, 300):
        ids = routed(tokens, 3, 7)
        lists, expected = (Dispatch.empty(ids.numel(), 7, 16, where) for where in (DEVICE, HOST))
        dispatch.dispatch(ids.to(DEVICE), lists)
        dispatch.dispatch_torch(ids, expected)
        blocks = int(expected.num_blocks)
        same(lists, expected, {"sorted_pair": 16 * blocks, "expert_of_block": blocks})


def run_tally() -> None:
    """None, some and many of the pairs active."""
    slot_of_E = torch.tensor([2, -1, 0, -1, -1, 1, -1], dtype=torch.int32)
    counters, expected = (WorkList.empty(7, where).counters for where in (DEVICE, HOST))
    for tokens in (0, 3, 300):
        ids = routed(tokens, 3, 7)
        lists = Dispatch.empty(ids.numel(), 7, 16, DEVICE)
        dispatch.dispatch(ids.to(DEVICE), lists)
        tally.tally(ids, slot_of_E.to(DEVICE), counters, 4, dispatch=lists)
        tally.tally_torch(ids, slot_of_E, expected, 4)
    assert torch.equal(counters.cpu(), expected)


def run_resolve() -> None:
    """With and without pairs to sort, victims to find and slots to give; then a wave's map."""
    for slots in (0, 3, 7):
        tables, expected = (ResidencyTables.empty(7, slots, where) for where in (DEVICE, HOST))
        work, listed = (WorkList.empty(7, where) for where in (DEVICE, HOST))
        for tokens, evict in ((2, True), (3, True), (40, False), (400, True)):
            ids = routed(tokens, 3, 7)
            lists = Dispatch.empty(ids.numel(), 7, 16, DEVICE)
            resolve.resolve(ids.to(DEVICE), tables, work, evict=evict, dispatch=lists)
            resolve.resolve_torch(ids, expected, listed, evict=evict)
            loads, streams = int(listed.num_loads), int(listed.num_streams)
            same(tables, expected, {})
            same(
                work,
                listed,
                {"load_expert_E": loads, "load_slot_E": loads, "stream_expert_E": streams},
            )
        row_of_E, rows = (torch.empty(7, dtype=torch.int32, device=d) for d in (DEVICE, HOST))
        resolve.wave_map(work, 1, row_of_E, rows=2)
        resolve.wave_map_torch(listed, 1, rows, rows=2)
        assert torch.equal(row_of_E.cpu(), rows)


def run_learn() -> None:
    """Steps of two unlike layers that evict by what the steps before have taught."""
    sizes = ((7, 3), (5, 2))
    both = [AdaptiveTables.empty(*zip(*sizes, strict=True), where) for where in (DEVICE, HOST)]
    layers = [
        (
            ResidencyTables.empty(e, s, tables.use_LE.device, tables.order(number, e)),
            WorkList.empty(e, tables.use_LE.device),
        )
        for tables in both
        for number, (e, s) in enumerate(sizes)
    ]
    for _ in range(6):  # a sequel is learned from the fifth on
        for number, (experts, _slots) in enumerate(sizes):
            ids = routed(1, 3, experts)
            (tables, work), (expected, listed) = layers[number], layers[number + 2]
            resolve.resolve(ids.to(DEVICE), tables, work, evict=True)
            resolve.resolve_torch(ids, expected, listed, evict=True)
            same(tables, expected, {})
        learn.learn(both[0])
        learn.learn_torch(both[1])
        same(*both, {})


def run_gather() -> None:
    """Out of host memory that is mapped for the device, to named and to consecutive rows."""
    source = torch.randint(256, (5, 3 * PAGE), dtype=torch.uint8)
    mapped = source.pin_memory() if DEVICE.type == "cuda" else source
    for target_row in (torch.tensor([2, 0, 1], dtype=torch.int32), None):
        target, expected = (
            torch.zeros(3, 3 * PAGE, dtype=torch.uint8, device=where) for where in (DEVICE, HOST)
        )
        rows, length = torch.tensor([4, 1, 3]).int(), torch.tensor([3]).int()
        where = None if target_row is None else target_row.to(DEVICE)
        gather.gather(mapped, target, rows.to(DEVICE), where, length.to(DEVICE), first=1)
        gather.gather_torch(source, expected, rows, target_row, length, first=1)
        assert torch.equal(target.cpu(), expected)


def run_expert_mlp() -> None:
    """Sizes that no tile divides, with biases, some experts absent; then the sum."""
    hidden, intermediate, experts = 48, 40, 5
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
        weights = ExpertWeights(
            w13_SNH=torch.randn(4, 2 * intermediate, hidden) / 7,
            w2_SHI=torch.randn(4, hidden, intermediate) / 7,
            b13_SN=torch.randn(4, 2 * intermediate),
            b2_SH=torch.randn(4, hidden),
        )
        weights = ExpertWeights(**{name: t.to(dtype) for name, t in vars(weights).items()})
        there = ExpertWeights(**{name: t.to(DEVICE) for name, t in vars(weights).items()})
        ids, row_of_E = routed(9, 3, experts), torch.tensor([3, -1, 0, 2, 1]).int()
        x, weight = torch.randn(9, hidden).to(dtype), torch.rand(9, 3)
        out, expected = (
            torch.zeros(9, 3, hidden, dtype=dtype, device=where) for where in (DEVICE, HOST)
        )
        silu, on_device = Activation("silu"), [t.to(DEVICE) for t in (x, weight, ids, row_of_E)]
        expert_mlp.expert_mlp(*on_device, there, silu, out, config=TILES)
        expert_mlp.expert_mlp_torch(x, weight, ids, row_of_E, weights, silu, expected)
        torch.testing.assert_close(out.cpu(), expected, rtol=tolerance, atol=tolerance)
        y, total = (torch.zeros(9, hidden, dtype=dtype, device=where) for where in (DEVICE, HOST))
        expert_mlp.combine(out, ids.to(DEVICE), y)
        expert_mlp.combine_torch(out.cpu(), ids, total)
        torch.testing.assert_close(y.cpu(), total, rtol=tolerance, atol=tolerance)


def run_quantised() -> None:
    """Experts in fp8 blocks, whose inputs are rounded too; tests compare the results."""
    import test_quantised_engine as quantised

    form = quantised.FORMATS["fp8 block"]
    for share in (0, 1):
        quantised.run(form, share, [quantised.draw(4, DEVICE)], DEVICE)


def run_look_ahead() -> None:
    """Every kind of predictor, in one launch and in two; then what a step teaches."""
    import test_prefetch as prefetch

    for kind in prefetch.KINDS:
        for tokens in (2, 17):
            case = prefetch.Case(tokens, kind, 7, 3, tokens, 3, 2, 0.1, torch.int32, 1)
            own, following = (prefetch.random_side(case, HOST) for _ in range(2))
            ids, source = prefetch.routed(case, HOST), prefetch.source_of(case, HOST)
            sides = (own, following, source, prefetch.outlook(case, HOST))
            there = tuple(prefetch.copy(side, DEVICE) for side in sides)
            look_ahead(ids.to(DEVICE), 1, *there)
            look_ahead_torch(ids, 1, *sides)
            for side, expected in zip(there, sides, strict=True):
                prefetch.assert_same(prefetch.copy(side, HOST), expected)
    tables = prefetch.markov_tables(7, HOST)
    there = prefetch.copy(tables, DEVICE)
    ids_LTK = torch.stack([routed(9, 3, 7) for _ in range(prefetch.L)])
    predict.learn_transitions(ids_LTK.to(DEVICE), 9, there)
    predict.learn_transitions_torch(ids_LTK, 9, tables)
    prefetch.assert_same(prefetch.copy(there, HOST), tables)


def runs() -> Iterator[Any]:
    """Everything there is to run."""
    yield from (run_dispatch, run_tally, run_resolve, run_learn, run_look_ahead, run_gather)
    yield from (run_expert_mlp, run_quantised)


def main() -> int:
    """Run all kernels."""
    torch.manual_seed(0)
    watch()
    for run in runs():
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
    known = all_kernels()
    assert len(known) >= len(list(runs())), "kernels are found by their names' endings"
    missing = known - Launches.seen
    print(f"launched {', '.join(sorted(Launches.seen))} on {DEVICE}")
    assert not missing, f"never launched: {', '.join(sorted(missing))}"
    return 0


if __name__ == "__main__":
    sys.exit(main())
