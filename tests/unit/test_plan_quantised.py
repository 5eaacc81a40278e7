"""A plan of a quantised checkpoint has the rows that the engine will have."""

import json

import pytest
from formats_of_tests import FORMATS, layout_of

from vllm_moe_offload.checkpoints import make_checkpoint
from vllm_moe_offload.plan.checkpoint import read_checkpoint
from vllm_moe_offload.plan.model import describe
from vllm_moe_offload.quantised_checkpoints import quantise_checkpoint

SIZE = 128
SAME = {"fp8": "fp8 block", "w4a16": "int4 group 32", "nvfp4": "nvfp4"}


@pytest.mark.parametrize("form", SAME)
def test_rows(tmp_path, form):
    plain = make_checkpoint(
        tmp_path / "plain", "qwen3_moe", num_layers=2, hidden_size=SIZE, intermediate_size=SIZE
    )
    path = quantise_checkpoint(plain, tmp_path / form, form)
    assert "quantization_config" in json.loads((path / "config.json").read_text())
    (first, *_) = describe(read_checkpoint(path)).layers
    layout = layout_of(FORMATS[SAME[form]], 2 * SIZE, SIZE, SIZE, None)
    assert first.row_bytes(2) == layout.row_bytes


def test_rows_of_gpt_oss(tmp_path):
    import torch

    plain = make_checkpoint(
        tmp_path / "plain", "gpt_oss", num_layers=2, hidden_size=SIZE, intermediate_size=SIZE
    )
    path = quantise_checkpoint(plain, tmp_path / "mxfp4", "mxfp4")
    (first, *_) = describe(read_checkpoint(path)).layers
    layout = layout_of(FORMATS["mxfp4"], 2 * SIZE, SIZE, SIZE, torch.bfloat16)
    assert first.row_bytes(2) == layout.row_bytes
