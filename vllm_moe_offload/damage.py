"""Find weights and scales that no undamaged checkpoint holds, before they become answers.

Legend: E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_moe_offload.kernels.formats import ExpertFormat, dequantise
from vllm_moe_offload.kernels.quantised_mlp import QuantisedWeights


@dataclass(frozen=True)
class Damage:
    """A tensor of an expert with an impossible value."""

    tensor: str
    expert: int
    problem: str
    half: int = 0
    """Which half of the tensor's rows: gate or up."""


def damaged_weights(views: dict[str, Tensor]) -> list[Damage]:
    """Look for NaN and infinity in all weights, e4m3 codes and biases [E, ...] of a layer.

    Every expert is reduced to a number or two, which reads memory at nearly its full rate: that is
    little beside the disk that the weights have just come from.
    """
    found = []
    for name, view in views.items():
        if not view.is_floating_point() or _is_scale(name):
            continue
        suspect_E = _has_nan_code(view) if view.dtype.itemsize == 1 else _sums_to_no_number(view)
        for expert in suspect_E.nonzero().flatten().tolist():
            found += _not_finite(name, expert, view[expert])
    return sorted(found, key=lambda damage: damage.expert)


def _sums_to_no_number(weights: Tensor) -> Tensor:
    """Experts with a sum that is not finite: for finite terms it is, unless it overflows."""
    return ~torch.stack([expert.sum() for expert in weights]).isfinite()


def _has_nan_code(codes: Tensor) -> Tensor:
    """Experts with an e4m3 NaN: 0x7F is the largest signed byte, 0xFF the largest unsigned one."""
    return torch.stack(
        [(codes.view(kind).flatten(1).amax(1) == torch.iinfo(kind).max)
         for kind in (torch.int8, torch.uint8)]
    ).any(0)  # fmt: skip


def _not_finite(name: str, expert: int, weights: Tensor) -> list[Damage]:
    rows = weights.reshape(weights.shape[0], -1)
    if rows.dtype.itemsize == 1:
        rows = rows.to(torch.bfloat16)  # Torch asks codes one by one whether they are finite.
    bad = (~rows.isfinite()).nonzero()
    if not bad.numel():
        return []  # the sum itself was too large for its type
    row, column = bad[0].tolist()
    problem = "NaN" if rows[row, column].isnan() else "infinity"
    return [Damage(name, expert, problem, half=2 * row // rows.shape[0])]


def _is_scale(name: str) -> bool:
    return name.partition("_")[2] in ("scale", "global", "input")


def damaged_input_scales(scales: dict[str, Tensor]) -> list[Damage]:
    """Look at scales of activations, [E] or [E, 2]: every one is a number above zero."""
    found = []
    for name, scale in scales.items():
        flat_EV = scale.reshape(scale.shape[0], -1)
        for expert in (~(flat_EV.isfinite() & (flat_EV > 0))).any(1).nonzero().flatten().tolist():
            values = flat_EV[expert].tolist()
            half, value = next((h, v) for h, v in enumerate(values) if not 0 < v < float("inf"))
            found.append(Damage(name, expert, f"{value:g}", half))
    return found


def damaged_scales(form: ExpertFormat, views: dict[str, Tensor]) -> list[Damage]:
    """Look at all scales [E, ...] of a layer.

    NaN and infinity are damage everywhere, negative scales where a format has none: integers may
    have negative scales, floats carry their sign in the codes. A scale of zero is damage where
    weights under it are not all zero.
    """
    found = []
    for name, view in views.items():
        if not _is_scale(name) or name.endswith("_input"):
            continue
        for problem, bad_E in _tests(form, view.reshape(view.shape[0], -1)):
            found += [Damage(name, e, problem) for e in bad_E.nonzero().flatten().tolist()]
        found += _vanished(form, views, name)
    return sorted(found, key=lambda damage: damage.expert)


def _tests(form: ExpertFormat, scales: Tensor) -> list[tuple[str, Tensor]]:
    if scales.dtype == torch.uint8:
        # The products have no room for scales above 2^33, see kernels/_decode_triton.py.
        huge = (scales > 160) & (scales < 255)
        return [("NaN", (scales == 255).any(1)), ("a scale above 2^33", huge.any(1))]
    values = scales.float()
    tests = [("NaN", values.isnan().any(1)), ("infinity", values.isinf().any(1))]
    if form.elements.startswith("e"):
        tests.append(("a negative value", (values < 0).any(1)))
    return tests


def _vanished(form: ExpertFormat, views: dict[str, Tensor], name: str) -> list[Damage]:
    """Experts in which a scale of zero hides weights."""
    view = views[name]
    if view.dtype == torch.uint8:
        return []
    experts = (view.float() == 0).reshape(view.shape[0], -1).any(1).nonzero().flatten().tolist()
    hidden = []
    for expert in experts:
        row = {n: v[expert : expert + 1].clone() for n, v in views.items()}
        whole = dict(row)
        # With ones in place of the zeros, weights that appear were hidden by them.
        row[name] = torch.where(row[name].float() == 0, 1.0, row[name].float()).to(view.dtype)
        before, after = (QuantisedWeights.of(form, each) for each in (whole, row))
        for a, b in ((before.w13, after.w13), (before.w2, after.w2)):
            if not torch.equal(dequantise(a, form, 0) != 0, dequantise(b, form, 0) != 0):
                hidden.append(Damage(name, expert, "zero over weights that are not"))
                break
    return hidden
