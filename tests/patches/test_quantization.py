"""Whose error a quantisation gets that vLLM refuses, by real configurations."""

import json
import shutil

import pytest
from pydantic import ValidationError

from vllm_moe_offload.errors import OffloadError

GPTQ = {"quant_method": "gptq", "bits": 3, "group_size": 32, "desc_act": False, "sym": True}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}


@pytest.fixture
def configure(checkpoint, tmp_path):
    from vllm.engine.arg_utils import EngineArgs

    def run(quantization, **kwargs):
        path = shutil.copytree(checkpoint("mixtral"), tmp_path / "model")
        config = json.loads((path / "config.json").read_text())
        config["quantization_config"] = quantization
        (path / "config.json").write_text(json.dumps(config))
        return EngineArgs(str(path), **{"dtype": "bfloat16", **kwargs}).create_engine_config()

    return run


def test_ours_with_the_plugin(configure):
    with pytest.raises(OffloadError, match=r"auto_gptq.*bits=3.*MXFP4") as error:
        configure(GPTQ, plugin="moe-offload")
    assert isinstance(error.value.__cause__, ValidationError)


def test_vllms_without_the_plugin(configure):
    with pytest.raises(ValidationError, match="bits=3"):
        configure(GPTQ)


def test_vllms_for_another_option(configure):
    """What works would be no answer to a wrong --dtype."""
    with pytest.raises(ValidationError, match=r"torch\.float32 is not supported"):
        configure(FP8, plugin="moe-offload", dtype="float32")


def test_vllms_for_another_failure(configure):
    with pytest.raises(ValidationError, match="max_model_len"):
        configure(FP8, plugin="moe-offload", max_model_len=10**9)
