import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from vllm_moe_offload.config import MoeOffloadConfig
from vllm_moe_offload.errors import OffloadError

REMEDIES = {
    "gpu_gb": "Give a positive number of GiB, or auto",
    "cache_fraction": "Give a number from 0",
    "kv_floor": "Give a share of the KV cache from 0 to 1",
    "kv_policy": "Give auto or fixed",
    "staging_mb": "Give a positive number of MiB, or auto",
    "policy": "Give adaptive or lru",
    "prefetch_mb": "Give a number of MiB, 0 to only count",
    "layers": "Give all, or decoder layer numbers such as 0-11,20",
    "stats_interval_s": "Give a number of seconds",
    "trace_path": "Give a directory that vLLM may write to",
    "trace_file_mb": "Give a positive number of MiB",
    "trace_interval_s": "Give a number of seconds, 0.1 or more",
    "allow_dense": "Give true or false",
}
NUMERIC = [
    "gpu_gb", "cache_fraction", "kv_floor", "staging_mb", "prefetch_mb", "stats_interval_s",
    "trace_file_mb", "trace_interval_s",
]  # fmt: skip
NO_NUMBERS = [
    math.nan, math.inf, -math.inf, "nan", "inf", "eight", "", "8 GiB", "1,5", [], [8], {}, True,
    1e300, 10**400, -1, -0.001, "-3",
]  # fmt: skip

ranges = st.tuples(st.integers(0, 12), st.integers(0, 12)).map(lambda pair: tuple(sorted(pair)))


def refusal(options: object) -> OffloadError:
    with pytest.raises(OffloadError) as caught:
        MoeOffloadConfig.parse(options)
    return caught.value


def check_refused(name: str, value: object) -> None:
    message = str(refusal({name: value}))
    assert f"{name} = {value}: " in message
    assert REMEDIES[name] in message


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
@pytest.mark.parametrize("name", NUMERIC)
def test_bad_number(name, value):
    check_refused(name, value)


@pytest.mark.parametrize("name", ["gpu_gb", "staging_mb"])
@pytest.mark.parametrize("value", [0, 0.0, "0", None, "all"], ids=repr)
def test_bad_size(name, value):
    check_refused(name, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gpu_gb", 100_001),
        ("staging_mb", 1e9),
        ("stats_interval_s", 1e12),
        ("cache_fraction", 1.001),
        ("cache_fraction", "auto"),
        ("kv_floor", 1.001),
        ("kv_floor", "auto"),
        ("kv_policy", "dynamic"),
        ("kv_policy", None),
        ("stats_interval_s", "auto"),
        ("trace_file_mb", 0),
        ("trace_file_mb", "auto"),
        ("trace_interval_s", 0),
        ("trace_interval_s", 0.09),
        ("trace_path", ""),
        ("trace_path", "  "),
        ("trace_path", 3),
        ("trace_path", True),
    ],
)
def test_out_of_range(name, value):
    check_refused(name, value)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("gpu_gb", "2.5", 2.5),
        ("gpu_gb", 100_000, 100_000.0),
        ("gpu_gb", "auto", "auto"),
        ("cache_fraction", 0, 0.0),
        ("cache_fraction", "1", 1.0),
        ("cache_fraction", None, None),
        ("kv_floor", "0", 0.0),
        ("kv_floor", 1, 1.0),
        ("kv_policy", "fixed", "fixed"),
        ("staging_mb", 1e-3, 1e-3),
        ("staging_mb", "auto", "auto"),
        ("stats_interval_s", 0, 0.0),
        ("policy", "lru", "lru"),
        ("policy", "adaptive", "adaptive"),
        ("allow_dense", True, True),
    ],
)
def test_good_value(name, value, expected):
    assert getattr(MoeOffloadConfig.parse({name: value}), name) == expected


def test_path_means_the_same_in_every_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    for path, expected in {
        "traces": str(tmp_path / "traces"),
        "/a/../b/": "/b",
        "~/traces": "/home/somebody/traces",
    }.items():
        config = MoeOffloadConfig.parse({"trace_path": path})
        assert config.trace_path == expected
        assert MoeOffloadConfig.parse(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("options", [{"trace_file_mb": 8}, {"trace_interval_s": 5}])
def test_trace_options_without_a_path(options):
    ((name, value),) = options.items()
    message = str(refusal(options))
    assert f"{name} = {float(value)}: nothing is recorded without trace_path" in message
    assert MoeOffloadConfig.parse({**options, "trace_path": "/t"}).trace_path == "/t"


@pytest.mark.parametrize("value", ["perhaps", 2, None, []], ids=repr)
def test_bad_flag(value):
    check_refused("allow_dense", value)


@pytest.mark.parametrize("value", ["", "LRU", "belady", 1, None, True], ids=repr)
def test_bad_policy(value):
    check_refused("policy", value)


@pytest.mark.parametrize(
    "value",
    ["", "none", "-1", "1-", "-", "0,,1", "0;1", "1.5", "0-1-2", "all,1", "5-3", "0,9-8", 3, None],
    ids=repr,
)
def test_bad_layers(value):
    check_refused("layers", value)


def test_layers_that_are_no_numbers_are_explained_in_words():
    with pytest.raises(OffloadError, match="layers = a: it is not written as this option is"):
        MoeOffloadConfig.parse({"layers": "a"})


@given(st.lists(ranges, min_size=1), st.sampled_from([",", ", ", " ,"]))
def test_layers(chosen, comma):
    config = MoeOffloadConfig.parse(
        {"layers": comma.join(str(a) if a == b else f"{a}-{b}" for a, b in chosen)}
    )
    expected = {layer for first, last in chosen for layer in range(first, last + 1)}
    assert {layer for layer in range(20) if config.includes(layer)} == expected
    assert config.last_layer() == max(expected)


@pytest.mark.parametrize("text", ["all", " all "])
def test_all_layers(text):
    config = MoeOffloadConfig.parse({"layers": text})
    assert config.includes(0)
    assert config.includes(1000)
    assert config.last_layer() is None


def test_two_sizes():
    message = str(refusal({"gpu_gb": 4, "cache_fraction": 0.5}))
    assert "cache_fraction = 0.5" in message
    assert "gpu_gb = 4.0" in message
    assert "Give one of the two" in message


@pytest.mark.parametrize("size", [{"gpu_gb": 4}, {"cache_fraction": 0.5}])
@pytest.mark.parametrize("option", [{"kv_floor": 0.3}, {"kv_policy": "fixed"}])
def test_sharing_beside_slots_of_their_own(size, option):
    ((size_name, amount),), ((name, value),) = size.items(), option.items()
    message = str(refusal({**size, **option}))
    assert f"{name} = {value}: with {size_name} = {float(amount)} the slots have memory" in message
    assert f"Drop {size_name}, or drop this option" in message
    assert MoeOffloadConfig.parse(option).wants_to_borrow
    assert not MoeOffloadConfig.parse(size).wants_to_borrow


def test_fraction_beside_automatic_size():
    config = MoeOffloadConfig.parse({"gpu_gb": "auto", "cache_fraction": 0.5})
    assert config.cache_fraction == 0.5


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("gpu_gib", "gpu_gb"),
        ("gpu-gb", "gpu_gb"),
        ("cachefraction", "cache_fraction"),
        ("staging", "staging_mb"),
        ("layer", "layers"),
        ("stats_interval", "stats_interval_s"),
        ("tracepath", "trace_path"),
        ("dense", "allow_dense"),
    ],
)
def test_unknown_name(name, near):
    message = str(refusal({"gpu_gb": 1, name: 1}))
    assert f"option = {name}: " in message
    assert f"Did you mean {near}." in message


@pytest.mark.parametrize("name", ["zzz", 3, ""], ids=repr)
def test_unknown_name_without_a_near_one(name):
    message = str(refusal({name: 1}))
    assert f"option = {name}: " in message
    assert all(known in message for known in MoeOffloadConfig.model_fields)


@pytest.mark.parametrize("options", [8, "gpu_gb", [("gpu_gb", 8)], None], ids=repr)
def test_options_that_are_no_mapping(options):
    message = str(refusal(options))
    assert f"moe_offload = {options}: " in message
    assert 'Give {"gpu_gb": 8}' in message


def test_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        MoeOffloadConfig().gpu_gb = 3.0


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "gpu_gb": st.floats(1e-6, 100_000) | st.just("auto"),
            "staging_mb": st.floats(1e-6, 100_000_000) | st.just("auto"),
            "layers": st.sampled_from(["all", "3", "0-4,9"]),
            "stats_interval_s": st.floats(0, 1e6),
            "trace_path": st.sampled_from(["/somewhere", "here"]),
            "allow_dense": st.booleans(),
        },
    )
)
def test_travels_as_json(options):
    config = MoeOffloadConfig.parse(options)
    assert MoeOffloadConfig.parse(json.loads(json.dumps(config.model_dump(mode="json")))) == config


@pytest.mark.parametrize("value", ["oracle", "", None, True, 1, []], ids=repr)
def test_unknown_predictor(value):
    assert "Give none, gate, markov or eam" in str(refusal({"predictor": value}))


@pytest.mark.parametrize("value", [0, 32, "32"])
def test_prefetch_needs_a_predictor(value):
    message = str(refusal({"prefetch_mb": value}))
    assert "nothing is fetched ahead without a predictor" in message
    config = MoeOffloadConfig.parse({"prefetch_mb": value, "predictor": "markov"})
    assert config.prefetch_mb == float(value)
