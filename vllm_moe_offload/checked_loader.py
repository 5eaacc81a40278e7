"""Weight loaders that name an expert's tensor which does not fit, instead of taking part of it.

vLLM's loaders narrow a parameter to what the checkpoint holds, because some kernels pad theirs: a
tensor that is too small would leave the rest of the parameter as it was. Rows of the pool have no
padding, so every size is known.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.headers import REPAIR

Loader = Callable[..., Any]
"""vLLM's: (param, loaded_weight, weight_name, shard_id, expert_id, return_success)."""

NameOf = Callable[[str, str | None, int | None], str]
"""From a parameter's name, the shard and the expert to the name in the checkpoint."""


@dataclass(frozen=True)
class Room:
    """What one tensor of an expert takes of a parameter.

    ``halves`` is 2 where gate and up come one by one and share the parameter, else 1; ``workers``
    may have a part of the tensor each.
    """

    halves: int
    workers: int

    def problem(self, param: Tensor, loaded: Tensor, *, stacked: bool) -> str | None:
        """Why a tensor does not fit, None if it does."""
        if loaded.ndim == param.ndim == 3 and not stacked:
            return None  # of all experts at once; what cannot be copied is found later
        room = _size(param) if stacked else _size(param) // param.shape[0] // self.halves
        if stacked and self.workers > 1:
            return None  # cut for this worker, and the last of several may get less
        if _size(loaded) in (room, room * self.workers):
            return None
        unit = "values" if param.is_floating_point() else "bytes"
        return f"the model's sizes and quantization_config ask for {room * self.workers} {unit}"


def checked_loader(loader: Loader, name_of: NameOf, room: Room | None) -> Loader:
    """Wrap the loader of a parameter that holds something of every expert.

    Args:
        loader: what vLLM would call.
        name_of: for messages.
        room: None if sizes need not match.

    Returns:
        A loader that raises an ``OffloadError`` with the tensor's name if it does not fit.
    """

    @functools.wraps(loader)
    def load(
        param: Tensor,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str | None,
        expert_id: int | None,
        return_success: bool = False,
    ) -> Any:
        about = weight_name, shard_id, expert_id
        problem = room and room.problem(param, loaded_weight, stacked=shard_id is None)
        if problem:
            raise _refusal(name_of(*about), loaded_weight, problem)
        try:
            return loader(param, loaded_weight, *about, return_success)
        except (RuntimeError, ValueError, IndexError, AssertionError) as error:
            problem = f"vLLM cannot load it: {error}"
            raise _refusal(name_of(*about), loaded_weight, problem) from error

    return load


def _size(tensor: Tensor) -> int:
    """Bytes of codes, whatever words they are packed in; the number of scales in any type."""
    return tensor.numel() * (1 if tensor.is_floating_point() else tensor.element_size())


def _refusal(name: str, loaded: Tensor, problem: str) -> OffloadError:
    form = f"it is {tuple(loaded.shape)} of {str(loaded.dtype).removeprefix('torch.')}"
    return OffloadError(
        "checkpoint", name, f"{form}, but {problem}", f"{REPAIR}, its config.json included"
    )
