"""What fits, the bounds, the smallest changes and the command line, on models made by hand."""

import math
import shlex
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_moe_offload.budget import LayerDemand, plan_budget
from vllm_moe_offload.config import MoeOffloadConfig
from vllm_moe_offload.plan.changes import smallest_changes
from vllm_moe_offload.plan.kv_cache import KvCache, LayerCache
from vllm_moe_offload.plan.model import Model
from vllm_moe_offload.plan.planner import (
    GPU_UTILISATION,
    HIT_RATIOS,
    Plan,
    Request,
    decode_tokens_per_s,
    default_step_tokens,
    make_plan,
    prefill_tokens_per_s,
    ranges,
    serve_command,
    sweep_bytes,
)
from vllm_moe_offload.plan.tensors import MoeLayer, Volume, Weights
from vllm_moe_offload.predictors.sizes import table_bytes
from vllm_moe_offload.sizes import GIB

PARAMETERS = 3 * 2048 * 768
"""Of one expert of Qwen3-30B-A3B."""


def model(*, layers=48, experts=128, top_k=8, parameters=PARAMETERS, dense=1 << 30) -> Model:
    """By default the shape of Qwen3-30B-A3B, a billion dense parameters, 16 bit."""
    row = (Volume(0, parameters * 2 // 3), Volume(0, parameters // 3))
    moe_layers = tuple(
        MoeLayer(f"model.layers.{number}.mlp.experts", experts, experts * parameters * 2,
                 parameters * 2, row, Volume(0, experts * parameters))
        for number in range(layers)
    )  # fmt: skip
    expert_bytes = layers * experts * parameters * 2
    weights = Weights(2 * dense, expert_bytes, 0, Volume(0, dense), moe_layers, ("BF16",))
    cache = KvCache(tuple(LayerCache(2 * 4 * 128) for _ in range(48)), 0)
    return Model("Qwen3MoeForCausalLM", weights, top_k, cache, 40960, None)


QWEN3 = model()
REQUEST = Request("Qwen/Qwen3-30B-A3B", 24 * GIB, 64 * GIB, 8192, 4, "auto", 25e9)


def plan(changed: Model = QWEN3, **fields) -> Plan:
    return make_plan(changed, replace(REQUEST, **fields))


def options_of(command: str) -> tuple[dict[str, str], MoeOffloadConfig]:
    """Options of a command line: those of vLLM, and the plugin's as it parses them."""
    words = shlex.split(command)
    assert words[:2] == ["vllm", "serve"]
    options = dict(zip(words[3::2], words[4::2], strict=True))
    own = {name.removeprefix("--moe-offload-").replace("-", "_"): value
           for name, value in options.items() if name.startswith("--moe-offload-")}  # fmt: skip
    others = {n: v for n, v in options.items() if not n.startswith("--moe-offload-")}
    return others, MoeOffloadConfig.parse(own)


def test_qwen3_on_a_small_machine():
    small = plan()
    assert small.fits
    assert small.kv_bytes == 4 * 8192 * 48 * 2 * 4 * 128 * 2
    assert small.budget.pool_bytes == 48 * 128 * PARAMETERS * 2  # the row needs no padding
    free = int(24 * GIB * 0.92) - 2 * GIB - small.kv_bytes - 3 * GIB // 2
    free -= small.budget.staging_bytes
    assert small.slots_per_layer == free // (48 * PARAMETERS * 2)
    assert small.gpu_usable - 48 * PARAMETERS * 2 < small.gpu_needed <= small.gpu_usable
    assert smallest_changes(small) == []


@given(
    layers=st.integers(1, 60),
    experts=st.integers(1, 300),
    parameters=st.integers(1, 1 << 23).map(lambda count: 3 * count),
    gpu=st.integers(1, 200),
)
def test_command_line_gives_the_slots_of_the_plan(layers, experts, parameters, gpu):
    made = plan(model(layers=layers, experts=experts, parameters=parameters), gpu_bytes=gpu * GIB)
    others, config = options_of(serve_command(made))
    assert config == made.options
    demands = [LayerDemand(m.name, m.num_experts, row)
               for m, row in zip(made.offloaded, made.rows, strict=True)]  # fmt: skip
    assert plan_budget(demands, config) == made.budget
    assert others.keys() == {"--plugin", "--max-model-len", "--max-num-seqs"}
    over = made.gpu_needed - made.gpu_usable
    assert over <= 0 or made.slots_per_layer == 0
    if not made.all_in_slots and over <= 0:
        assert -over < sum(made.rows)  # not one more slot a layer would fit


def test_command_line_names_the_served_type():
    made = plan(model(layers=4), dtype="float32", concurrency=2)
    others, _ = options_of(serve_command(made))
    assert others == {"--plugin": "moe-offload", "--max-model-len": "8192",
                      "--max-num-seqs": "2", "--dtype": "float32"}  # fmt: skip


def test_model_name_is_quoted():
    assert "serve 'a b' --plugin" in serve_command(plan(model="a b"))


@pytest.mark.parametrize("predictor", ["none", "gate", "markov", "eam"])
@pytest.mark.parametrize("gib", [31 / 4, 24, 140])
def test_predictors_take_their_tables_from_the_slots(predictor, gib):
    without, made = (plan(predictor=name, gpu_bytes=int(gib * GIB)) for name in ("none", predictor))
    taken = table_bytes(predictor, 48, 128)
    assert made.predictor_bytes == taken
    assert made.gpu_needed - made.budget.device_bytes == (
        without.gpu_needed - without.budget.device_bytes + taken
    )
    assert made.fits
    _, options = options_of(serve_command(made))
    assert options.predictor == predictor


def test_predictor_that_takes_a_slot():
    """A GPU that is full to the last byte."""
    full = plan()
    usable = full.gpu_needed + table_bytes("markov", 48, 128) - 1
    gpu_bytes = math.ceil(usable / GPU_UTILISATION)
    assert plan(gpu_bytes=gpu_bytes).slots_per_layer == full.slots_per_layer
    made = plan(gpu_bytes=gpu_bytes, predictor="markov")
    assert made.slots_per_layer == full.slots_per_layer - 1


@given(layers=st.integers(1, 60), experts=st.integers(1, 300), gpu=st.integers(1, 200))
def test_automatic_size_is_what_the_plugin_takes(layers, experts, gpu):
    made = plan(model(layers=layers, experts=experts), gpu_bytes=gpu * GIB)
    demands = [LayerDemand(m.name, m.num_experts, row)
               for m, row in zip(made.offloaded, made.rows, strict=True)]  # fmt: skip
    # The engine finds the dense weights on the GPU when it asks for the free memory.
    free = max(0, made.gpu_usable - made.resident_bytes)
    options = MoeOffloadConfig.parse({"gpu_gb": "auto"})
    assert made.automatic == plan_budget(demands, options, device_free=free)
    others = made.gpu_needed - made.budget.device_bytes
    assert made.needed_with(made.automatic) == others + made.automatic.device_bytes


def test_automatic_size_on_a_small_gpu():
    assert plan(gpu_bytes=140 * GIB).automatic.slots == (32,) * 48
    made = plan(gpu_bytes=16 * GIB)
    assert 0 < made.automatic.slots[0] < 32
    assert made.automatic.slot_bytes <= (made.gpu_usable - made.resident_bytes) / 2


@pytest.mark.parametrize(
    ("cache", "reason"),
    [
        (KvCache((LayerCache(8), LayerCache(8)), 0), None),
        (KvCache((LayerCache(8), LayerCache(8, window=4)), 0), "full attention"),
        (KvCache((LayerCache(8),), 1), "full attention"),
        (KvCache((LayerCache(8), LayerCache(9)), 0), "differ in size"),
        (KvCache((LayerCache(8, 4), LayerCache(8)), 0), "differ in size"),
    ],
)
def test_models_whose_kv_cache_experts_can_borrow(cache, reason):
    assert (cache.why_not_shared is None) == (reason is None)
    assert (reason or "") in (cache.why_not_shared or "")
    made = plan(replace(QWEN3, kv_cache=cache))
    assert made.can_borrow == (reason is None)


def test_command_that_borrows():
    made = plan(predictor="markov")
    ours, options = options_of(serve_command(made, borrowing=True))
    assert ours == options_of(serve_command(made))[0]
    assert options == MoeOffloadConfig(predictor="markov")
    assert options.wants_to_borrow


def test_all_in_slots():
    large = plan(gpu_bytes=140 * GIB)
    assert large.fits
    assert large.all_in_slots
    assert (large.slots_per_layer, large.budget.staging_bytes) == (128, 0)
    assert "--moe-offload-cache-fraction 1 " in serve_command(large)
    assert prefill_tokens_per_s(large, 2048) is None


def test_no_slots():
    tight = plan(gpu_bytes=31 * GIB // 4)
    assert tight.fits
    assert tight.slots_per_layer == 0
    assert "--moe-offload-cache-fraction 0 " in serve_command(tight)
    assert sweep_bytes(tight) == tight.budget.pool_bytes


@pytest.mark.parametrize("hit_ratio", HIT_RATIOS)
def test_decode_bound(hit_ratio):
    moved = 48 * 8 * PARAMETERS * 2 * (1 - hit_ratio)
    assert decode_tokens_per_s(plan(), hit_ratio) == pytest.approx(25e9 / moved)


def test_decode_bound_of_many_sequences():
    made = plan()
    rates = [decode_tokens_per_s(made, 0, count) for count in (1, 2, 8, 10_000)]
    assert rates == sorted(rates)
    all_experts = 128 / 8  # once every expert is active, more sequences move no more bytes
    assert rates[-1] == pytest.approx(rates[0] * 10_000 / all_experts)


def test_prefill_bound():
    made = plan()
    moved = 48 * (128 - made.slots_per_layer) * PARAMETERS * 2
    assert prefill_tokens_per_s(made, 2048) == pytest.approx(2048 * 25e9 / moved)


@pytest.mark.parametrize(("gib", "tokens"), [(24, 2048), (80, 8192), (141, 8192), (180, 16384)])
def test_step_of_prefill(gib, tokens):
    assert default_step_tokens(gib * GIB) == tokens


def check_changes(made: Plan) -> list[str]:
    """Each change fits, its command line says so, and one unit less would not fit."""
    assert not made.fits
    changes = smallest_changes(made)
    assert changes
    for change in changes:
        if change.plan is not None:
            assert change.plan.fits
            assert change.plan.request != made.request
    return [change.text for change in changes]


def test_fewer_and_shorter_sequences():
    made = plan(concurrency=64)
    texts = check_changes(made)
    fewer, shorter = (change.plan.request for change in smallest_changes(made)[:2])
    assert fewer == replace(made.request, concurrency=fewer.concurrency)
    assert not plan(concurrency=fewer.concurrency + 1).fits
    assert shorter == replace(made.request, max_model_len=shorter.max_model_len)
    assert not plan(concurrency=64, max_model_len=shorter.max_model_len + 256).fits
    assert texts[0] == f"--concurrency {fewer.concurrency} instead of 64"
    assert texts[1] == f"--max-model-len {shorter.max_model_len} instead of 8192"
    assert "a GPU of" in texts[2]
    assert len(texts) == 3


def test_fewer_and_shorter_at_once():
    texts = check_changes(plan(gpu_bytes=39 * GIB // 8, concurrency=8, max_model_len=32768))
    assert texts[0].startswith("--concurrency 1 instead of 8 and --max-model-len ")


def test_more_host_memory_or_smaller_experts():
    made = plan(host_bytes=32 * GIB)
    texts = check_changes(made)
    needed = math.ceil(made.host_needed / GIB)
    assert texts == [
        f"{needed} GiB of host memory instead of 32 GiB",
        "a checkpoint whose experts take at most 8.2 bits a weight",
    ]


def test_more_experts_on_the_gpu():
    made = plan(gpu_bytes=48 * GIB, host_bytes=32 * GIB)
    texts = check_changes(made)
    change = smallest_changes(made)[0]
    last = change.plan.request.layers[-1]
    assert texts[0] == f"only layers 0-{last} offloaded, the other experts on the GPU"
    assert f"--moe-offload-layers 0-{last} " in serve_command(change.plan)
    one_more = make_plan(QWEN3, replace(made.request, layers=tuple(range(last + 2))))
    assert not one_more.fits
    _, config = options_of(serve_command(change.plan))
    assert [config.includes(number) for number in (0, last, last + 1)] == [True, True, False]


def test_no_plugin_if_only_the_gpu_is_large():
    made = plan(gpu_bytes=80 * GIB, host_bytes=5 * GIB)
    assert check_changes(made)[0] == "no plugin, as the GPU holds all experts"
    command = serve_command(smallest_changes(made)[0].plan)
    assert "moe-offload" not in command


def test_narrower_type():
    texts = check_changes(plan(dtype="float32"))
    assert texts[0] == "--dtype bfloat16"
    assert "bits a weight" not in " ".join(texts)


def test_both_memories_too_small():
    texts = check_changes(plan(concurrency=64, host_bytes=48 * GIB))
    assert texts[0].startswith("--concurrency ")
    assert all("58 GiB of host memory instead of 48 GiB" in text for text in texts)


def test_nothing_but_hardware():
    texts = check_changes(plan(gpu_bytes=2 * GIB, host_bytes=8 * GIB))
    assert len(texts) == 1
    assert "of host memory" in texts[0]
    assert "a GPU of" in texts[0]


def test_dense_model():
    dense = plan(model(layers=0))
    assert dense.fits
    assert dense.budget.device_bytes == dense.slots_per_layer == 0
    command = "vllm serve Qwen/Qwen3-30B-A3B --max-model-len 8192 --max-num-seqs 4"
    assert serve_command(dense) == command
    texts = check_changes(plan(model(layers=0, dense=16 * GIB)))
    assert len(texts) == 1
    assert "a GPU of" in texts[0]


@pytest.mark.parametrize(
    ("numbers", "text"), [([3], "3"), ([0, 1, 2, 5, 7, 8], "0-2,5,7-8"), ([1, 3], "1,3")]
)
def test_ranges(numbers, text):
    assert ranges(numbers) == text
    config = MoeOffloadConfig(layers=text)
    assert [n for n in range(10) if config.includes(n)] == numbers
