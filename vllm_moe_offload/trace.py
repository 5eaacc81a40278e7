"""Traces: which experts real traffic activated, in one ``.npz`` file.

Legend: T tokens, L MoE layers, K choices a token, E experts of a layer.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_moe_offload import npz
from vllm_moe_offload.errors import OffloadError

SUFFIX = ".npz"
REQUIRED_KEYS = ("expert_ids", "sequence_starts", "num_experts", "model", "source")
MAX_EXPERTS = 1 << 16
"""What the widest type of ``expert_ids``, uint16, can tell apart."""

_REMEDY = "Give a trace that this package recorded, or record it again"


@dataclass(frozen=True, eq=False)
class Trace:
    """Routed expert ids of whole sequences, token after token.

    Args:
        expert_ids: uint8 or uint16 [T, L, K], MoE layers in order.
        sequence_starts: int64 [sequences + 1], token offsets of the sequences.
        num_experts: experts of every layer.
        model: name of the model.
        source: where the recording comes from.
        is_decode: bool [T] or None if unknown: decode steps rather than prompt tokens.
    """

    expert_ids: NDArray[np.uint8] | NDArray[np.uint16]
    sequence_starts: NDArray[np.int64]
    num_experts: int
    model: str
    source: str
    is_decode: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        problem = next(_problems(self), None)
        if problem:
            raise OffloadError("trace", self.model, problem, _REMEDY)

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.expert_ids.shape[0])

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.expert_ids.shape[1])

    @property
    def top_k(self) -> int:
        """K, as far as recorded."""
        return int(self.expert_ids.shape[2])

    @property
    def num_sequences(self) -> int:
        """Sequences, empty ones included."""
        return int(self.sequence_starts.size) - 1

    def sequence_of_token(self) -> NDArray[np.int64]:
        """Tell which sequence each token belongs to, int64 [T]."""
        lengths = np.diff(self.sequence_starts)
        return np.repeat(np.arange(self.num_sequences), lengths)

    def save(self, path: Path) -> None:
        """Write the file as ``npz.save`` does."""
        arrays: dict[str, Any] = {
            "expert_ids": self.expert_ids,
            "sequence_starts": self.sequence_starts,
            "num_experts": np.int32(self.num_experts),
            "model": np.str_(self.model),
            "source": np.str_(self.source),
        }
        if self.is_decode is not None:
            arrays["is_decode"] = self.is_decode
        npz.save(path, arrays)


def load(path: str | Path) -> Trace:
    """Read a trace.

    Raises:
        OffloadError: there is no such file, it is damaged, or it is not a trace.
    """
    path = Path(path)
    return _from_arrays(path, npz.load(path, "trace", _REMEDY))


def load_all(path: Path) -> list[Trace]:
    """Read a trace, or all of a directory: one for each model and source, file after file.

    Raises:
        OffloadError: as for ``load``, or the directory holds none.
    """
    if not path.is_dir():
        return [load(path)]
    alike: dict[object, list[Trace]] = {}
    for file in sorted(path.glob(f"*{SUFFIX}")):
        trace = load(file)
        shape = (trace.num_layers, trace.top_k, trace.num_experts)
        alike.setdefault((trace.model, trace.source, shape), []).append(trace)
    if not alike:
        raise OffloadError("trace", path, f"there is no {SUFFIX} file in it", "Check the path")
    return [join(traces) for traces in alike.values()]


def join(traces: Sequence[Trace]) -> Trace:
    """Put the sequences of traces of one shape one after the other."""
    decodes = [trace.is_decode for trace in traces if trace.is_decode is not None]
    lengths = np.concatenate([np.diff(trace.sequence_starts) for trace in traces])
    return replace(
        traces[0],
        expert_ids=np.concatenate([trace.expert_ids for trace in traces]),
        sequence_starts=np.cumsum([0, *lengths], dtype=np.int64),
        is_decode=np.concatenate(decodes) if len(decodes) == len(traces) else None,
    )


def _from_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> Trace:
    missing = [key for key in REQUIRED_KEYS if key not in arrays]
    if missing:
        raise OffloadError("trace", path, f"it has no {', '.join(missing)}", _REMEDY)
    scalars = {"num_experts": "iu", "model": "U", "source": "U"}
    for key, kinds in scalars.items():
        if arrays[key].ndim != 0 or arrays[key].dtype.kind not in kinds:
            raise OffloadError("trace", path, f"{key} has the wrong type", _REMEDY)
    try:
        return Trace(
            expert_ids=arrays["expert_ids"],
            sequence_starts=arrays["sequence_starts"],
            num_experts=int(arrays["num_experts"]),
            model=str(arrays["model"]),
            source=str(arrays["source"]),
            is_decode=arrays.get("is_decode"),
        )
    except OffloadError as error:
        raise OffloadError("trace", path, error.problem, error.remedy) from None


def _problems(trace: Trace) -> Iterator[str]:
    """What is wrong with the arrays; what follows a problem may not make sense."""
    ids, starts = trace.expert_ids, trace.sequence_starts
    if ids.dtype not in (np.uint8, np.uint16):
        yield f"expert_ids is {ids.dtype}, not uint8 or uint16"
    if ids.ndim != 3 or 0 in ids.shape[1:]:
        yield f"expert_ids has the shape {ids.shape}, not [tokens, layers, top_k]"
    if not 1 <= trace.num_experts <= MAX_EXPERTS:
        yield f"num_experts is {trace.num_experts}"
    if ids.size and int(ids.max()) >= trace.num_experts:
        yield f"it names expert {int(ids.max())} of {trace.num_experts}"
    if starts.dtype != np.int64 or starts.ndim != 1 or starts.size == 0:
        yield "sequence_starts is not a list of int64"
    if starts[0] != 0 or starts[-1] != len(ids) or bool((np.diff(starts) < 0).any()):
        yield f"sequence_starts does not ascend from 0 to the {len(ids)} tokens"
    decode = trace.is_decode
    if decode is not None and (decode.dtype != np.bool_ or decode.shape != ids.shape[:1]):
        yield "is_decode is not one bool a token"
