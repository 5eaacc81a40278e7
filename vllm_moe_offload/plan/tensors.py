"""Tell routed experts from everything else by tensor names and shapes, and measure both.

Checkpoints store experts one by one (``...experts.3.up_proj.weight``) or stacked, the expert
being the first dimension (``...experts.gate_up_proj``, ``...moe.input_linear.weight``).
Shared experts, routers and their biases are dense: every token uses them.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vllm_moe_offload.headers import StoredTensor

TENSOR_ALIGNMENT = 256
ROW_ALIGNMENT = 4096
"""Bytes, as in ``layout``, which imports torch and so cannot be asked here."""

_PER_EXPERT = re.compile(r"^(?P<layer>.+\.experts?)\.(?:expert_)?(?P<expert>\d+)\.(?P<tensor>.+)$")
_STACKED = re.compile(r"^(?P<layer>.+\.experts?)\.(?P<tensor>.+)$")
_STACKED_LINEAR = re.compile(
    r"^(?P<layer>.+)\.(?P<tensor>(input_linear|output_linear|(gate|up|down|gate_up)_proj)\b.*)$"
)
_ROUTER = re.compile(r"(^|\.)(gate|router|wg)(\.|$)|correction_bias|shared")

_DOWN = re.compile(r"(^|\.)(down_proj|output_linear|w2|fc2|wo|linear_1)(?=[._]|$)(?P<kind>.*)")
_UP = re.compile(
    r"(^|\.)(gate_up_proj|gate_proj|up_proj|input_linear|w1|w3|w13|fc1|wi|linear|linear_v)"
    r"(?=[._]|$)(?P<kind>.*)"
)

_IN_NO_ROW = ("weight_shape", "g_idx", "input_global_scale")
"""Tensors of an expert that no row holds: they say nothing, or nothing that a product needs."""

_DECODER_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)\.")
_OTHER_TOWER = re.compile(r"vision|visual|audio|encoder|vit\b")
_UNUSED = re.compile(r"(^|\.)mtp[^.]*\.|^(talker|code2wav|token2wav)\.")
FLOATS = ("F64", "F32", "F16", "BF16")


class Volume(NamedTuple):
    """A number of bytes, of which a part depends on the data type that the model is served in."""

    fixed_bytes: int
    elements: int
    """Elements of weights that are cast to the served type."""

    def num_bytes(self, element_size: int) -> int:
        """Bytes if an element of the served type has this many."""
        return self.fixed_bytes + self.elements * element_size


NOTHING = Volume(0, 0)


def add(first: Volume, second: Volume) -> Volume:
    """Both together."""
    return Volume(first.fixed_bytes + second.fixed_bytes, first.elements + second.elements)


@dataclass(frozen=True)
class MoeLayer:
    """The routed experts of one decoder layer.

    ``expert_bytes`` is the size of the largest expert as stored, ``row`` what each tensor of its
    row takes, ``total`` all of them.
    """

    name: str
    num_experts: int
    stored_bytes: int
    expert_bytes: int
    row: tuple[Volume, ...]
    total: Volume

    @property
    def number(self) -> int | None:
        """Which decoder layer it is, if the name says so."""
        found = _DECODER_LAYER.findall(f"{self.name}.")
        return int(found[0]) if found else None

    def row_bytes(self, element_size: int) -> int:
        """Bytes of an expert's row in the pool, every tensor and the row aligned."""
        tensors = (_round_up(part.num_bytes(element_size), TENSOR_ALIGNMENT) for part in self.row)
        return _round_up(sum(tensors), ROW_ALIGNMENT)


@dataclass(frozen=True)
class Weights:
    """All tensors of a checkpoint, sorted; bytes are as stored.

    ``unused_bytes`` belong to parts that vLLM does not load for the model itself, such as the
    layers that only draft tokens; they are included in the other two.
    """

    dense_bytes: int
    expert_bytes: int
    unused_bytes: int
    dense: Volume
    layers: tuple[MoeLayer, ...]
    expert_dtypes: tuple[str, ...]


def sort_tensors(
    tensors: Iterable[StoredTensor],
    *,
    num_experts: int,
    num_layers: int,
    is_quantised: bool,
    left_out: Sequence[str],
) -> Weights:
    """Sort a checkpoint's tensors.

    Args:
        tensors: everything that the files hold.
        num_experts: experts a layer by the config, 0 if it does not say.
        num_layers: decoder layers by the config; higher ones are draft layers.
        is_quantised: whether the weights stay in their stored types.
        left_out: last parts of the names of an expert's tensors that no row holds.
    """
    tensors = list(tensors)
    num_experts = num_experts or _count_experts(tensors)
    dense, dense_bytes, unused_bytes = NOTHING, 0, 0
    layers: dict[str, _LayerSum] = defaultdict(_LayerSum)
    for tensor in tensors:
        part = _expert_part(tensor, num_experts)
        if part is not None:
            volume = _volume(tensor, is_quantised)
            is_in_row = tensor.name.rpartition(".")[2] not in left_out
            layers[part.layer].add(tensor, part, volume if is_in_row else None)
        else:
            dense_bytes += tensor.num_bytes
        if is_unused(tensor.name, num_layers):
            unused_bytes += tensor.num_bytes
        elif part is None:
            dense = add(dense, _volume(tensor, is_quantised))
    used = {name: layer for name, layer in layers.items() if not is_unused(f"{name}.", num_layers)}
    return Weights(
        dense_bytes=dense_bytes,
        expert_bytes=sum(layer.stored_bytes for layer in layers.values()),
        unused_bytes=unused_bytes,
        dense=dense,
        layers=tuple(layer.finish(name) for name, layer in sorted(used.items(), key=_by_number)),
        expert_dtypes=tuple(sorted(set().union(*(layer.dtypes for layer in used.values())))),
    )


def left_out_of_rows(quantization: Mapping[str, Any]) -> tuple[str, ...]:
    """Last parts of the names of an expert's tensors that no row holds.

    Args:
        quantization: the config's entry on it, empty if it has none.
    """
    more = []
    if quantization.get("quant_method") == "gptq" and quantization.get("sym", True):
        more.append("qzeros")  # every one is the midpoint
    if "nvfp4" in str(quantization.get("quant_algo", "")).lower():
        more.append("input_scale")  # weights alone are quantised here
    return (*_IN_NO_ROW, *more)


class _Part(NamedTuple):
    """Which expert tensor a stored tensor is; a stacked one has no ``expert``."""

    layer: str
    expert: int | None
    tensor: str
    num_experts: int


def _expert_part(tensor: StoredTensor, num_experts: int) -> _Part | None:
    name, shape = tensor.name, tensor.shape
    if match := _PER_EXPERT.match(name):
        return _Part(match["layer"], int(match["expert"]), match["tensor"], num_experts)
    if not shape or not num_experts or shape[0] % num_experts != 0:
        return None
    if match := _STACKED.match(name):
        is_linear = len(shape) == 2 and _row_tensor(match["tensor"]) != match["tensor"]
        is_expert = not _ROUTER.search(match["tensor"])
        is_expert = is_expert and (shape[0] == num_experts or is_linear)
    elif match := _STACKED_LINEAR.match(name):
        in_moe = "moe" in match["layer"].split(".")[-1]
        is_expert = shape[0] == num_experts and len(shape) >= (2 if in_moe else 3)
    else:
        return None
    return _Part(match["layer"], None, match["tensor"], num_experts) if is_expert else None


def _count_experts(tensors: Iterable[StoredTensor]) -> int:
    """Experts a layer by the tensors alone."""
    count = 0
    for tensor in tensors:
        if match := _PER_EXPERT.match(tensor.name):
            count = max(count, int(match["expert"]) + 1)
        elif len(tensor.shape) >= 3 and _STACKED.match(tensor.name):
            count = max(count, tensor.shape[0])
    return count


@dataclass
class _LayerSum:
    """Adds up the tensors of one layer; sizes by expert, None for those of every expert."""

    num_experts: int = 0
    stored_bytes: int = 0
    dtypes: set[str] = field(default_factory=set)
    bytes_of: dict[int | None, int] = field(default_factory=lambda: defaultdict(int))
    parts_of: dict[int | None, dict[str, Volume]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(lambda: NOTHING))
    )

    def add(self, tensor: StoredTensor, part: _Part, volume: Volume | None) -> None:
        """Count a tensor of this layer, with its volume in a row if a row holds it."""
        share = part.num_experts if part.expert is None else 1
        self.num_experts = max(self.num_experts, share, (part.expert or 0) + 1)
        self.stored_bytes += tensor.num_bytes
        self.dtypes.add(tensor.dtype)
        self.bytes_of[part.expert] += tensor.num_bytes // share
        if volume is None:
            return
        own = Volume(volume.fixed_bytes // share, volume.elements // share)
        parts = self.parts_of[part.expert]
        key = _row_tensor(part.tensor)
        parts[key] = add(parts[key], own)

    def finish(self, name: str) -> MoeLayer:
        """Return what was added up."""
        common = self.parts_of.pop(None, {})
        common_bytes = self.bytes_of.pop(None, 0)
        largest = max(self.bytes_of, key=self.bytes_of.__getitem__, default=None)
        row = (*common.values(), *self.parts_of.get(largest, {}).values())
        return MoeLayer(
            name=name,
            num_experts=self.num_experts,
            stored_bytes=self.stored_bytes,
            expert_bytes=common_bytes + self.bytes_of.get(largest, 0),
            row=row,
            total=_total(common, self.parts_of, self.num_experts),
        )


def _total(
    common: Mapping[str, Volume], own: Mapping[int | None, Mapping[str, Volume]], num_experts: int
) -> Volume:
    volumes = [Volume(v.fixed_bytes * num_experts, v.elements * num_experts)
               for v in common.values()]  # fmt: skip
    volumes += [volume for parts in own.values() for volume in parts.values()]
    return Volume(sum(v.fixed_bytes for v in volumes), sum(v.elements for v in volumes))


def _row_tensor(name: str) -> str:
    """Which tensor of a row a checkpoint's tensor becomes: gate and up are one, w13."""
    for side, pattern in (("w2", _DOWN), ("w13", _UP)):
        if match := pattern.search(name):
            return f"{side}{match['kind']}"
    return name


def _volume(tensor: StoredTensor, is_quantised: bool) -> Volume:
    if is_quantised or tensor.dtype not in FLOATS:
        return Volume(tensor.num_bytes, 0)
    return Volume(0, math.prod(tensor.shape))


def is_unused(name: str, num_layers: int) -> bool:
    """Whether a tensor belongs to a part that vLLM does not load for the model itself."""
    if _UNUSED.search(name):
        return True
    match = _DECODER_LAYER.search(name)
    return (
        match is not None
        and int(match[1]) >= num_layers
        and not _OTHER_TOWER.search(name[: match.start()])
    )


def _by_number(item: tuple[str, object]) -> list[tuple[int, str]]:
    """Sort names with their numbers in order: layer 10 after layer 9."""
    return list(_words(item[0]))


def _words(name: str) -> Iterator[tuple[int, str]]:
    for word in name.split("."):
        yield (int(word), "") if word.isdigit() else (-1, word)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
