"""The options are public: a change here is a change for users, so make it on purpose."""

from vllm_moe_offload.config import KEY, MoeOffloadConfig

OPTIONS = {
    "gpu_gb": "auto",
    "cache_fraction": None,
    "kv_floor": 0.1,
    "kv_policy": "auto",
    "staging_mb": "auto",
    "policy": "adaptive",
    "predictor": "none",
    "prefetch_mb": "auto",
    "layers": "all",
    "stats_interval_s": 60.0,
    "trace_path": None,
    "trace_file_mb": 64.0,
    "trace_interval_s": 60.0,
    "allow_dense": False,
}


def test_names_are_frozen():
    assert set(MoeOffloadConfig.model_fields) == set(OPTIONS)


def test_defaults_are_frozen():
    assert MoeOffloadConfig().model_dump() == OPTIONS


def test_key_is_frozen():
    assert KEY == "moe_offload"


def test_every_option_is_described():
    assert all(field.description for field in MoeOffloadConfig.model_fields.values())
