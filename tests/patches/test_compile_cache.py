"""The key of vLLM's compile cache, by real configurations."""

import pytest


@pytest.fixture
def hash_of(checkpoint):
    from vllm.engine.arg_utils import EngineArgs

    def compute(**kwargs):
        args = EngineArgs(str(checkpoint("mixtral")), dtype="float32", **kwargs)
        config = args.create_engine_config()
        before = dict(config.additional_config)
        value = config.compute_hash()
        assert config.additional_config == before
        return value

    return compute


def test_options_do_not_change_the_key(hash_of):
    few = hash_of(plugin="moe-offload", moe_offload={"cache_fraction": 0.25})
    many = hash_of(plugin="moe-offload", moe_offload={"cache_fraction": 0.5})
    assert few == many


def test_layers_change_the_key(hash_of):
    """What is left to vLLM may be padded, and what is offloaded is not."""
    some, others, every, default = (
        hash_of(plugin="moe-offload", moe_offload=options)
        for options in ({"layers": "0"}, {"layers": "1"}, {"layers": "all"}, {})
    )
    assert len({some, others, every}) == 3
    assert every == default


def test_the_plugin_changes_the_key(hash_of):
    assert hash_of() != hash_of(plugin="moe-offload")


def test_the_start_up_plan_keeps_options_apart(hash_of, monkeypatch):
    from vllm import envs

    monkeypatch.setattr(envs, "VLLM_ENABLE_STARTUP_PLAN", True, raising=False)
    few = hash_of(plugin="moe-offload", moe_offload={"cache_fraction": 0.25})
    many = hash_of(plugin="moe-offload", moe_offload={"cache_fraction": 0.5})
    assert few != many
