"""The formats that tests run, and random experts in them.

Legend: S rows of experts, E experts.
"""

from collections.abc import Sequence

import torch

from vllm_moe_offload.kernels.formats import ExpertFormat
from vllm_moe_offload.kernels.quantised_mlp import QuantisedWeights
from vllm_moe_offload.layout import ExpertLayout

_HALF = torch.float16
_FP8 = {"elements": "e4m3", "scale_dtype": torch.float32}

FORMATS = {
    "fp8 block": ExpertFormat("fp8", **_FP8, scale_rows=128, scale_terms=128, inputs="group"),
    "fp8 block of 64": ExpertFormat("fp8", **_FP8, scale_rows=64, scale_terms=64, inputs="group"),
    "fp8 channel": ExpertFormat("fp8", **_FP8, inputs="token"),
    "fp8 tensor": ExpertFormat("fp8", **_FP8, scale_rows=0, halves=2, inputs="static"),
    "fp8 tensor, dynamic": ExpertFormat("fp8", **_FP8, scale_rows=0, halves=2, inputs="token"),
    "fp8 weights only": ExpertFormat("fp8", **_FP8, scale_rows=128, scale_terms=128),
    "int4 group 32": ExpertFormat("int4", "uint4", torch.bfloat16, scale_terms=32),
    "int4 group 64, zeros": ExpertFormat("int4", "uint4", _HALF, scale_terms=64, zeros=True),
    "int4 group 32, zeros": ExpertFormat("int4", "uint4", _HALF, scale_terms=32, zeros=True),
    "int4 group 128": ExpertFormat("int4", "uint4", torch.bfloat16, scale_terms=128),
    "int4 channel": ExpertFormat("int4", "uint4", torch.float32),
    "int8 group 128": ExpertFormat("int8", "uint8", torch.bfloat16, scale_terms=128),
    "int8 channel, zeros": ExpertFormat("int8", "uint8", torch.bfloat16, zeros=True),
    "mxfp4": ExpertFormat("mxfp4", "e2m1", torch.uint8, scale_terms=32),
    "nvfp4": ExpertFormat(
        "nvfp4", "e2m1", torch.float8_e4m3fn, scale_terms=16, global_scale=True, halves=2
    ),
}  # fmt: skip

NAN_BYTE = 0xFF
"""NaN in e4m3, E8M0, and, repeated, in float16, bfloat16 and float32."""


def layout_of(
    form: ExpertFormat, columns: int, hidden: int, intermediate: int, bias: torch.dtype | None
) -> ExpertLayout:
    return ExpertLayout.pack(form.tensors(columns, hidden, intermediate, bias))


def random_rows(
    form: ExpertFormat,
    rows: Sequence[int],
    num_rows: int,
    columns: int,
    hidden: int,
    intermediate: int,
    *,
    bias: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> QuantisedWeights:
    """Random experts in the chosen rows, NaN in all other bytes."""
    layout = layout_of(form, columns, hidden, intermediate, bias)
    packed = torch.full((num_rows, layout.row_bytes), NAN_BYTE, dtype=torch.uint8)
    for name, view in layout.views(packed).items():
        for row in rows:
            view[row] = _random(form, name, view[row])
    return QuantisedWeights.of(form, layout.views(packed.to(device)))


def _random(form: ExpertFormat, name: str, like: torch.Tensor) -> torch.Tensor:
    kind = name.partition("_")[2]
    normal, uniform = torch.randn(like.shape), 0.5 + torch.rand(like.shape)
    if kind == "scale":
        return _random_scale(form, like, uniform)
    if kind in ("global", "input"):
        return uniform * {"global": 0.001, "input": 0.01}[kind]
    if like.dtype == torch.uint8:
        return torch.randint(0, 256, like.shape, dtype=torch.uint8)
    size = 60 if kind == "weight" else 1
    return (normal * size).clamp(-448, 448).to(like.dtype)


def _random_scale(form: ExpertFormat, like: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    if like.dtype == torch.uint8:
        return torch.randint(121, 125, like.shape, dtype=torch.uint8)
    if like.dtype == torch.float8_e4m3fn:
        return (uniform * 80).to(like.dtype)
    return (uniform * 0.3 / {"e4m3": 64, "uint4": 5, "uint8": 70}[form.elements]).to(like.dtype)
