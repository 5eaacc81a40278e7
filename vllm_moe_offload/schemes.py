"""What each of vLLM's quantised fused-MoE methods stores, and how it becomes rows of the pool.

vLLM's loaders write a checkpoint into the parameters that a method creates, tensor by tensor and
in the checkpoint's own bits. Here every such parameter gets its place in an expert's row. Where a
checkpoint's order of codes is not the one of ``kernels.formats``, the bytes are put in order
inside the row after loading, a few experts at a time. The facts are those of vLLM 0.32 and 0.33,
read from attributes; vLLM itself is not imported.

Legend: E experts, N rows and K terms of a matrix, C bytes, G groups of terms with one scale.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.kernels.formats import ExpertFormat, pack_4_bits
from vllm_moe_offload.layout import ExpertLayout

WORKING = (
    "16-bit and 32-bit experts; fp8 (e4m3) with scales for blocks, channels or tensors; 4-bit and "
    "8-bit integers from symmetric GPTQ without act-order, AWQ and compressed-tensors "
    "pack-quantized; MXFP4; and nvfp4"
)
"""What works, for messages."""

EXPERTS_AT_ONCE = 8
"""Experts whose codes are put in order together: enough for all cores, little memory."""

_GROUPS = (16, 32, 64, 128)

Order = Callable[[Tensor], Tensor]
"""From [E, ...] as a loader fills it to the kernels' order; the bytes are as many."""


@dataclass(frozen=True)
class Scheme:
    """How one method's parameters make up a row.

    ``places`` names the parameter behind each of the format's tensors, ``orders`` says which of
    these tensors have to be put in order. Parameters in ``transposed`` have gate and up side by
    side instead of one above the other. Of ``maxima`` a layer has one number, the largest of a
    parameter that is kept outside the rows, which is written into every row.
    """

    format: ExpertFormat
    places: Mapping[str, str]
    orders: Mapping[str, Order] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()
    maxima: Mapping[str, str] = field(default_factory=dict)

    def layouts(
        self,
        parameters: Mapping[str, Tensor],
        columns: int,
        hidden: int,
        intermediate: int,
        bias: torch.dtype | None,
    ) -> tuple[ExpertLayout, ExpertLayout]:
        """Return an expert's row as the kernels read it, and as the loader fills it.

        Args:
            parameters: what the method has created, [E, ...] each.
            columns: rows of the first matrix.
            hidden: terms of the first matrix.
            intermediate: terms of the second matrix.
            bias: type of the biases, None without them.
        """
        scales = {name: parameters[self.places[f"{name}_scale"]] for name in ("w13", "w2")}
        filled: list[tuple[str, tuple[int, ...], torch.dtype]] = []
        read: list[tuple[str, tuple[int, ...], torch.dtype]] = []
        for name, shape, wanted in self.format.tensors(columns, hidden, intermediate, bias):
            matrix, _, kind = name.partition("_")
            # Scales keep the type that vLLM gives them, which is the model's for integers.
            dtype = scales[matrix].dtype if kind == "scale" else wanted
            read.append((name, shape, dtype))
            if name in self.maxima:
                filled.append((name, shape, dtype))
                continue
            parameter = parameters[self.places.get(name, name)]
            filled.append(
                (self.places.get(name, name), tuple(parameter.shape[1:]), parameter.dtype)
            )
        rows = ExpertLayout.pack(read), ExpertLayout.pack(filled)
        sizes = [[(spec.offset, spec.num_bytes) for spec in row.tensors] for row in rows]
        assert sizes[0] == sizes[1], f"parameters do not have the bytes of the format: {sizes}"
        return rows

    def put_in_order(
        self, filled: Mapping[str, Tensor], read: Mapping[str, Tensor], parameters: Any
    ) -> None:
        """Turn loaded rows into what the kernels read, in place.

        Args:
            filled: tensors [E, ...] as the loader filled them, by parameter.
            read: the same memory by the format's names.
            parameters: mapping of the parameters that are not in the rows.
        """
        for name, order in self.orders.items():
            source, target = filled[self.places[name]], read[name]
            for first in range(0, source.shape[0], EXPERTS_AT_ONCE):
                some = slice(first, first + EXPERTS_AT_ONCE)
                # Flat, for a dimension of size one keeps a stride that views stumble over.
                ordered = order(source[some].clone()).flatten()
                # Bytes are compared and copied, so that types of one size may meet.
                into = target[some].view(torch.uint8)
                into.copy_(ordered.view(torch.uint8).view(into.shape))
        for name, parameter in self.maxima.items():
            read[name].fill_(parameters[parameter].max())


def scheme_of(method: Any, prefix: str, *, rounds_inputs: bool) -> Scheme:
    """Describe what a method stores.

    Args:
        method: vLLM's quantised fused-MoE method, not yet with weights.
        prefix: the layer's name, for messages.
        rounds_inputs: whether the device multiplies e4m3; without it weights alone are rounded,
            as in stock vLLM.

    Raises:
        OffloadError: the format is not among those that work.
    """
    kind = type(method).__name__
    if kind not in _SCHEMES:
        raise refusal(kind, prefix, "this way of quantising them is not supported")
    return _SCHEMES[kind](method, prefix, rounds_inputs)


def refusal(value: object, prefix: str, problem: str) -> OffloadError:
    """The error for experts that cannot be offloaded, with the list of what works."""
    return OffloadError(
        "quantization",
        value,
        f"the experts of {prefix} cannot be offloaded: {problem}",
        f"Use a checkpoint with {WORKING}, or drop --plugin moe-offload",
    )


def _plain(*parts: str, **named: str) -> dict[str, str]:
    """Places of both matrices from the endings of their parameters' names."""
    kinds = {**{part: part for part in parts}, **named}
    return {f"{m}_{kind}": f"{m}_{ending}" for m in ("w13", "w2") for kind, ending in kinds.items()}


def _power_of_two(value: int, prefix: str, what: str, least: int = _GROUPS[0]) -> None:
    sizes = [size for size in _GROUPS if size >= least]
    if value not in sizes:
        listed = ", ".join(map(str, sizes))
        raise refusal(value, prefix, f"{what} are supported in sizes of {listed} alone")


# fp8


def _fp8_block(shape: Any, scale: str, prefix: str, rounds_inputs: bool) -> Scheme:
    rows, terms = shape
    # Rounded activations are multiplied 32 terms at a time, and sums have one scale.
    _power_of_two(terms, prefix, "blocks of fp8 scales", least=32 if rounds_inputs else 16)
    form = ExpertFormat(
        "fp8", "e4m3", torch.float32, scale_rows=rows, scale_terms=terms,
        inputs="group" if rounds_inputs else None,
    )  # fmt: skip
    return Scheme(form, _plain("weight", scale=scale))


def _fp8_tensor(method: Any, static: bool, rounds_inputs: bool) -> Scheme:
    # A scale for all tokens of a step would make an answer depend on its neighbours, so that
    # tokens have one each where the checkpoint holds none, as in vLLM's batch-invariant mode.
    inputs = ("static" if static else "token") if rounds_inputs else None
    form = ExpertFormat(
        "fp8", "e4m3", torch.float32, scale_rows=0, halves=_halves(method), inputs=inputs
    )
    maxima = {"w13_input": "w13_input_scale", "w2_input": "w2_input_scale"}
    return Scheme(
        form, _plain("weight", scale="weight_scale"), maxima=maxima if inputs == "static" else {}
    )


def _halves(method: Any) -> int:
    return 2 if method.moe.is_act_and_mul else 1


def _fp8(method: Any, prefix: str, rounds_inputs: bool) -> Scheme:
    if not method.quant_config.is_checkpoint_fp8_serialized:
        raise refusal("fp8", prefix, "the checkpoint is not quantised itself")
    if method.block_quant:
        return _fp8_block(method.moe_block_shape, "weight_scale_inv", prefix, rounds_inputs)
    return _fp8_tensor(method, method.quant_config.activation_scheme == "static", rounds_inputs)


def _compressed_fp8(method: Any, prefix: str, rounds_inputs: bool) -> Scheme:
    strategy = _value(method.weight_quant.strategy)
    if strategy == "block":
        return _fp8_block(method.weight_block_size, "weight_scale", prefix, rounds_inputs)
    if strategy == "tensor":
        return _fp8_tensor(method, method.static_input_scales, rounds_inputs)
    form = ExpertFormat("fp8", "e4m3", torch.float32, inputs="token" if rounds_inputs else None)
    return Scheme(form, _plain("weight", scale="weight_scale"))


def _value(strategy: Any) -> str:
    """An enumeration's value, or the string itself."""
    return str(getattr(strategy, "value", strategy))


# Integers


def _integers(bits: int, group: int | None, zeros: bool, prefix: str) -> ExpertFormat:
    if bits not in (4, 8):
        raise refusal(f"{bits} bits", prefix, "integers are supported with 4 and 8 bits")
    terms = 0 if group is None or group < 0 else group
    if terms:
        _power_of_two(terms, prefix, "groups of integers")
    # The type of the scales is that of the parameters, see Scheme.layouts.
    return ExpertFormat(f"int{bits}", f"uint{bits}", torch.bfloat16, scale_terms=terms, zeros=zeros)


def _compressed_integers(method: Any, prefix: str, _: bool) -> Scheme:
    if _value(method.weight_quant.actorder) in ("group", "ActivationOrdering.GROUP"):
        raise refusal("actorder = group", prefix, "groups in activation order are not supported")
    zeros = not method.symmetric
    form = _integers(method.num_bits, method.group_size, zeros, prefix)
    kinds = {"weight": "weight_packed", "scale": "weight_scale"}
    if not zeros:
        return Scheme(form, _plain(**kinds))
    places = _plain(**kinds, zero="weight_zero_point")
    order = _words_of_rows(form.bits)
    return Scheme(form, places, {"w13_zero": order, "w2_zero": order})


def _words_of_rows(bits: int) -> Order:
    """From words of codes of neighbouring rows [E, N bits / 32, G] to bytes of them."""

    def order(words: Tensor) -> Tensor:
        codes_ENG = _unpack(words.transpose(1, 2), bits).transpose(1, 2)
        return _pack_rows(codes_ENG, bits)

    return order


def _unpack(words: Tensor, bits: int) -> Tensor:
    """Split int32 words of the last dimension into codes, the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    codes = words.unsqueeze(-1) >> shifts & (1 << bits) - 1
    return codes.to(torch.uint8).flatten(-2)


def _pack_rows(codes_ENG: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return codes_ENG
    return pack_4_bits(codes_ENG.transpose(1, 2)).transpose(1, 2)


def _turned(words: Tensor) -> Tensor:
    """From [E, terms in words, N] to [E, N, terms in words]."""
    return words.transpose(1, 2)


def _gptq(method: Any, prefix: str, _: bool) -> Scheme:
    config = method.quant_config
    if config.desc_act and config.group_size != -1:
        raise refusal("desc_act = true", prefix, "GPTQ's act-order is not supported")
    form = _integers(config.weight_bits, config.group_size, not config.is_sym, prefix)
    if form.zeros:
        raise refusal("sym = false", prefix, "GPTQ with zero points is not supported")
    places = _plain(weight="qweight", scale="scales")
    return Scheme(form, places, dict.fromkeys(places, _turned), frozenset(places.values()))


_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Place in an AWQ word of the codes of eight neighbouring columns."""


def _refuse_awq_without_zeros(zeros: bool, prefix: str) -> None:
    # Its files hold zero points all the same, which would be left out.
    if not zeros:
        raise refusal("zero_point = false", prefix, "AWQ without zero points is not supported")


def _awq(method: Any, prefix: str, _: bool) -> Scheme:
    config = method.quant_config
    _refuse_awq_without_zeros(config.zero_point, prefix)
    form = _integers(config.weight_bits, config.group_size, True, prefix)
    places = _plain(weight="qweight", scale="scales", zero="qzeros")

    def columns(words: Tensor) -> Tensor:
        """From [E, K or G, N in words] to codes [E, N, K or G]."""
        codes = _unpack(words, 4).unflatten(-1, (-1, 8))[..., list(_AWQ_ORDER)]
        return codes.flatten(-2).transpose(1, 2)

    by_kind: dict[str, Order] = {
        "weight": lambda words: pack_4_bits(columns(words)),
        "zero": lambda words: _pack_rows(columns(words), 4),
        "scale": _turned,
    }
    orders = {name: by_kind[name.partition("_")[2]] for name in places}
    return Scheme(form, places, orders, frozenset(places.values()))


def _wna16(method: Any, prefix: str, _: bool) -> Scheme:
    config = method.quant_config
    if config.linear_quant_method != "gptq":
        _refuse_awq_without_zeros(config.has_zp, prefix)
    form = _integers(config.weight_bits, config.group_size, config.has_zp, prefix)
    kinds = {"weight": "qweight", "scale": "scales"} | ({"zero": "qzeros"} if form.zeros else {})
    return Scheme(form, _plain(**kinds))


# 4-bit floats


def _mxfp4(*_: Any) -> Scheme:
    form = ExpertFormat("mxfp4", "e2m1", torch.uint8, scale_terms=32)
    return Scheme(form, _plain("weight", scale="weight_scale"))


def _nvfp4_format(method: Any) -> ExpertFormat:
    return ExpertFormat(
        "nvfp4", "e2m1", torch.float8_e4m3fn, scale_terms=16, global_scale=True,
        halves=_halves(method),
    )  # fmt: skip


def _modelopt_nvfp4(method: Any, prefix: str, _: bool) -> Scheme:
    if method.quant_config.group_size != 16:
        raise refusal(method.quant_config.group_size, prefix, "nvfp4 has groups of 16")
    kinds = {"scale": "weight_scale", "global": "weight_scale_2"}
    return Scheme(_nvfp4_format(method), _plain("weight", **kinds))


def _compressed_nvfp4(method: Any, _prefix: str, _: bool) -> Scheme:
    kinds = {"weight": "weight_packed", "scale": "weight_scale", "global": "weight_global_scale"}
    # These checkpoints hold what weights were multiplied by.
    inverse = dict.fromkeys(("w13_global", "w2_global"), torch.reciprocal)
    return Scheme(_nvfp4_format(method), _plain(**kinds), inverse)


_SCHEMES: dict[str, Callable[[Any, str, bool], Scheme]] = {
    "Fp8MoEMethod": _fp8,
    "CompressedTensorsW8A8Fp8MoEMethod": _compressed_fp8,
    "CompressedTensorsWNA16MoEMethod": _compressed_integers,
    "AutoGPTQMoEMethod": _gptq,
    "AutoAWQMoEMethod": _awq,
    "MoeWNA16Method": _wna16,
    "GptOssMxfp4MoEMethod": _mxfp4,
    "Mxfp4MoEMethod": _mxfp4,
    "ModelOptNvFp4FusedMoE": _modelopt_nvfp4,
    "CompressedTensorsW4A4Nvfp4MoEMethod": _compressed_nvfp4,
}
