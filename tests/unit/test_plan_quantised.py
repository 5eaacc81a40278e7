"""A plan of a quantised checkpoint has its bytes, and the rows that the engine will have."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from formats_of_tests import FORMATS, layout_of
from safetensors import safe_open

from vllm_moe_offload import quantised_checkpoints
from vllm_moe_offload.checkpoints import make_checkpoint
from vllm_moe_offload.layout import TENSOR_ALIGNMENT
from vllm_moe_offload.plan.checkpoint import read_checkpoint
from vllm_moe_offload.plan.model import describe
from vllm_moe_offload.quantised_checkpoints import quantise_checkpoint

SIZE, LAYERS, EXPERTS, TOP_K = 128, 2, 8, 2

SAME = {
    "fp8": FORMATS["fp8 block"],
    "fp8-channel": FORMATS["fp8 channel"],
    "fp8-tensor": FORMATS["fp8 tensor"],
    "w4a16": FORMATS["int4 group 32"],
    "w4a16-zeros": FORMATS["int4 group 64, zeros"],
    "w4a16-channel": replace(FORMATS["int4 channel"], scale_dtype=torch.bfloat16),
    "w8a16": replace(FORMATS["int8 group 128"], scale_terms=32),
    "gptq": FORMATS["int4 group 32"],
    "gptq-8bit": replace(FORMATS["int8 group 128"], scale_terms=32),
    "awq": FORMATS["int4 group 32, zeros"],
    "nvfp4": FORMATS["nvfp4"],
    "nvfp4-packed": FORMATS["nvfp4"],
    "mxfp4": FORMATS["mxfp4"],
    "mxfp4-by-expert": FORMATS["mxfp4"],
}
"""Every format of a checkpoint, as the engine stores it."""


@pytest.fixture(scope="module", params=quantised_checkpoints.FORMATS)
def stored(request, tmp_path_factory) -> tuple[str, Path]:
    """A format and a checkpoint in it."""
    family = "gpt_oss" if request.param == "mxfp4" else "qwen3_moe"
    folder = tmp_path_factory.mktemp(request.param)
    plain = make_checkpoint(
        folder / "plain", family, num_layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K,
        hidden_size=SIZE, intermediate_size=SIZE,
    )  # fmt: skip
    return request.param, quantise_checkpoint(plain, folder / "quantised", request.param)


def test_sizes_are_exact(stored):
    _, path = stored
    assert "quantization_config" in json.loads((path / "config.json").read_text())
    sizes = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as content:
            sizes |= {name: content.get_tensor(name).nbytes for name in content.keys()}  # noqa: SIM118
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    model = describe(read_checkpoint(str(path)))
    assert model.weights.expert_bytes == experts
    assert model.weights.dense_bytes == sum(sizes.values()) - experts
    assert model.weights.unused_bytes == 0
    assert model.expert_bytes == experts // (LAYERS * EXPERTS)
    assert (len(model.layers), model.num_experts, model.top_k) == (LAYERS, EXPERTS, TOP_K)


def places(sizes: Iterable[int]) -> list[int]:
    """What tensors take within a row: a small model's pages would hide a tensor too many."""
    return sorted(-(-size // TENSOR_ALIGNMENT) for size in sizes)


def test_rows_are_those_of_the_engine(stored):
    form, path = stored
    bias = torch.bfloat16 if form == "mxfp4" else None
    layout = layout_of(SAME[form], 2 * SIZE, SIZE, SIZE, bias)
    for layer in describe(read_checkpoint(str(path))).layers:
        assert places(volume.num_bytes(2) for volume in layer.row) == places(
            tensor.num_bytes for tensor in layout.tensors
        )
        assert layer.row_bytes(2) == layout.row_bytes


NOT_MOVED = ("g_idx", "weight_shape", "input_scale", "input_global_scale")
"""What checkpoints store for an expert, and nobody multiplies by."""


@pytest.mark.parametrize("form", quantised_checkpoints.FORMATS)
def test_a_miss_moves_what_the_checkpoint_has_for_an_expert_of_a_real_model(form):
    """Qwen3-30B-A3B's; for gpt-oss-120b's size see the padding of rows."""
    columns, hidden, intermediate = 2 * 768, 2048, 768
    left_out = (*NOT_MOVED, "qzeros") if form.startswith("gptq") else NOT_MOVED
    torch.manual_seed(0)
    stored = 0
    for rows, terms in ((columns // 2, hidden), (columns // 2, hidden), (hidden, intermediate)):
        packed, _ = quantised_checkpoints._QUANTISERS[form](torch.randn(rows, terms))
        stored += sum(part.nbytes for name, part in packed.items() if name not in left_out)
    row_bytes = layout_of(SAME[form], columns, hidden, intermediate, None).row_bytes
    assert stored <= row_bytes < 1.01 * stored
