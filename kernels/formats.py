"""How the weights of an expert are stored: the formats that slots hold, and what they mean.

A weight matrix [N, K] is stored as codes of 4 or 8 bits and scales that share tiles of it. The
codes of a row are consecutive in K; of two 4-bit codes in a byte the lower bits come first. That
is the order of compressed-tensors, MXFP4 and nvfp4 checkpoints; other orders are brought into it
when a checkpoint is loaded.

The formats are those of the OCP Microscaling Formats specification 1.0 (section 5: E8M0 scales;
5.3.3: E2M1), of the FP8 paper (Micikevicius et al. 2022, section 3: E4M3), and of uniform affine
quantisation with scale and zero point.

Legend: S rows of experts, N rows and K terms of a matrix, C bytes of the codes of a row, R scales
along N, G scales along K, H hidden size, I intermediate size.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

BITS = {"e4m3": 8, "e2m1": 4, "uint4": 4, "uint8": 8}
"""Bits of a code by the name of its elements."""

INPUTS = ("group", "token", "static")
"""How activations may be rounded to e4m3 before a product: with a scale for as many values of a
token as share a scale of the weights, with one for every token, or with the checkpoint's one."""

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class ExpertFormat:
    """The format of both matrices of an expert.

    ``scale_rows`` and ``scale_terms`` are the sizes of a tile with one scale; 0 stands for a
    whole row of tiles. ``halves`` says that gate and up have global or per-tensor scales of
    their own. ``inputs`` is one of ``INPUTS``, or None where activations stay as they are.
    """

    name: str
    elements: str
    scale_dtype: torch.dtype
    scale_rows: int = 1
    scale_terms: int = 0
    zeros: bool = False
    global_scale: bool = False
    halves: int = 1
    inputs: str | None = None

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return BITS[self.elements]

    @property
    def midpoint(self) -> int:
        """The code that means zero where no zero points are stored."""
        return {"uint4": 8, "uint8": 128}.get(self.elements, 0)

    def scales(self, rows: int, terms: int, halves: int) -> tuple[int, int]:
        """Number of scales of a matrix along its rows and terms."""
        along_rows = -(-rows // self.scale_rows) if self.scale_rows else halves
        return along_rows, -(-terms // self.scale_terms) if self.scale_terms else 1

    def tensors(
        self, columns: int, hidden: int, intermediate: int, bias: torch.dtype | None = None
    ) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
        """Name, shape and type of every tensor of an expert's row.

        Args:
            columns: rows of the first matrix, gate and up together.
            hidden: terms of the first matrix, rows of the second.
            intermediate: terms of the second matrix.
            bias: type of the biases, None without them.
        """
        for name, rows, terms, halves in (
            ("w13", columns, hidden, self.halves), ("w2", hidden, intermediate, 1),
        ):  # fmt: skip
            codes = torch.float8_e4m3fn if self.elements == "e4m3" else torch.uint8
            yield f"{name}_weight", (rows, terms * self.bits // 8), codes
            yield f"{name}_scale", self.scales(rows, terms, halves), self.scale_dtype
            if self.zeros:
                packed = rows * self.bits // 8
                yield f"{name}_zero", (packed, self.scales(rows, terms, 1)[1]), torch.uint8
            if self.global_scale:
                yield f"{name}_global", (halves,), torch.float32
            if self.inputs == "static":
                yield f"{name}_input", (), torch.float32
            if bias is not None:
                yield f"{name}_bias", (rows,), bias


@dataclass(frozen=True)
class QuantisedMatrix:
    """One matrix of all rows of experts; strided views are fine.

    ``codes`` [S, N, C], ``scale`` [S, R, G] with uint8 for E8M0, ``zero`` [S, N bits / 8, G] with
    the codes of neighbouring n in a byte, ``global_scale`` [S, 1 or 2] for equal parts of N,
    ``input_scale`` [S], ``bias`` [S, N].
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    global_scale: Tensor | None = None
    input_scale: Tensor | None = None
    bias: Tensor | None = None


def dequantise(matrix: QuantisedMatrix, form: ExpertFormat, row: int) -> Tensor:
    """Return the weights of one row of experts as float32 [N, K]. All steps are exact but one.

    Where codes, zero point and scale meet in one product, that product is rounded to float32.
    """
    values_NK = _values(matrix, form, row)
    rows, terms = values_NK.shape
    scale_RG = _scale_values(matrix.scale[row])
    along_rows, along_terms = scale_RG.shape
    scale_NK = scale_RG.repeat_interleave(form.scale_rows or rows // along_rows, 0)[:rows]
    scale_NK = scale_NK.repeat_interleave(form.scale_terms or terms, 1)[:, :terms]
    assert along_terms == 1 or form.scale_terms
    weights_NK = values_NK * scale_NK
    if matrix.global_scale is not None:
        parts = matrix.global_scale[row]
        weights_NK = weights_NK * parts.repeat_interleave(rows // parts.numel())[:, None]
    return weights_NK


def _values(matrix: QuantisedMatrix, form: ExpertFormat, row: int) -> Tensor:
    codes_NC = matrix.codes[row]
    if form.elements == "e4m3":
        return codes_NC.view(torch.float8_e4m3fn).float()
    codes_NK = unpack_4_bits(codes_NC) if form.bits == 4 else codes_NC
    if form.elements == "e2m1":
        table = torch.tensor(_E2M1 + tuple(-v for v in _E2M1), device=codes_NC.device)
        return table[codes_NK.long()]
    if matrix.zero is None:
        return codes_NK.float() - form.midpoint
    zero = matrix.zero[row]
    zero_NG = unpack_4_bits(zero.T).T if form.bits == 4 else zero
    group = form.scale_terms or codes_NK.shape[1]
    return codes_NK.float() - zero_NG.float().repeat_interleave(group, 1)[:, : codes_NK.shape[1]]


def _scale_values(scale: Tensor) -> Tensor:
    if scale.dtype == torch.uint8:
        return torch.exp2(scale.double() - 127).masked_fill(scale == 255, torch.nan).float()
    return scale.float()


def unpack_4_bits(codes_NC: Tensor) -> Tensor:
    """Split every byte of the last dimension into two codes, the lower bits first."""
    return torch.stack((codes_NC & 0xF, codes_NC >> 4), -1).flatten(-2)


def pack_4_bits(codes_NK: Tensor) -> Tensor:
    """Undo ``unpack_4_bits``."""
    pairs = codes_NK.unflatten(-1, (-1, 2)).to(torch.uint8)
    return pairs[..., 0] | pairs[..., 1] << 4


E4M3_MAX = 448.0

SMALLEST_TOKEN_SCALE = 1.0 / (E4M3_MAX * 512.0)
"""Least scale of a token, which keeps its values in the normal range."""

SMALLEST_GROUP_MAXIMUM = 1e-10
"""Least maximum of a group, so that a group of zeros has a scale as well."""


def quantise_torch(
    x_RK: Tensor, inputs: str, group: int = 0, input_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Round activations to e4m3 as a format asks.

    Args:
        x_RK: rows of activations.
        inputs: one of ``INPUTS``.
        group: for "group", neighbouring values with one scale; the last group may be short.
        input_scale: for "static", one float32.

    Returns:
        e4m3 [R, K] and float32 scales [R, G], one a group or one a row.
    """
    x = x_RK.float()
    if inputs == "static":
        assert input_scale is not None
        scale_RG = input_scale.reshape(1, 1).expand(x.shape[0], 1)
        return _e4m3(x * (1.0 / scale_RG)), scale_RG
    if inputs == "token":
        scale_RG = x.abs().amax(1, keepdim=True) * (1.0 / E4M3_MAX)
        scale_RG = scale_RG.clamp(min=SMALLEST_TOKEN_SCALE)
        return _e4m3(x / scale_RG), scale_RG
    padding = -x.shape[1] % group
    groups = F.pad(x, (0, padding)).unflatten(1, (-1, group))
    largest_RG = groups.abs().amax(2).clamp(min=SMALLEST_GROUP_MAXIMUM)
    scale_RG = largest_RG * (1.0 / E4M3_MAX)
    return _e4m3((groups / scale_RG[..., None]).flatten(1)[:, : x.shape[1]]), scale_RG


def _e4m3(values: Tensor) -> Tensor:
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
