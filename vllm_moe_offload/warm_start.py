"""Warm start: what a server has learnt, in one file for the next one.

The file has named sections, so that each learner keeps its own and none knows of the others.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_moe_offload import npz
from vllm_moe_offload.errors import OffloadError

VERSION = 1

_REMEDY = "Delete it or give another trace_path"

Section = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class ModelIdentity:
    """What must be the same for a warm start to fit.

    Routing is a matter of the weights, not of how they are stored: neither the data type nor
    the number of GPUs is part of it.

    Args:
        model: name or path of the checkpoint.
        layers: names of its MoE layers in this worker.
        num_experts: experts that each layer's router chooses from.
        top_k: experts a token.
    """

    model: str
    layers: tuple[str, ...]
    num_experts: tuple[int, ...]
    top_k: tuple[int, ...]

    def arrays(self) -> dict[str, Any]:
        """As arrays of the file."""
        return {
            "model": np.str_(self.model),
            "layers": np.array(self.layers, np.str_),
            "num_experts": np.array(self.num_experts, np.int64),
            "top_k": np.array(self.top_k, np.int64),
        }

    def differences(self, arrays: Section) -> list[str]:
        """Names of what is not the same in a file."""
        return [name for name, value in self.arrays().items()
                if name not in arrays or not np.array_equal(arrays[name], value)]  # fmt: skip


class WarmStartFile:
    """Reads and writes the warm start of one model.

    Args:
        path: the file.
        identity: the model.
    """

    def __init__(self, path: Path, identity: ModelIdentity) -> None:
        self.path = path
        self._identity = identity
        self._foreign = False

    def load(self) -> dict[str, dict[str, NDArray[Any]]] | None:
        """Return the sections by name, None if there is no file yet.

        Raises:
            OffloadError: the file is damaged, of another version or of another model. Saving
                then keeps it under another name.
        """
        if not self.path.exists():
            return None
        self._foreign = True
        arrays = npz.load(self.path, "warm start", _REMEDY)
        version = arrays.get("version")
        if version is None or version.shape != () or version.tolist() != VERSION:
            self._refuse(f"its version is not {VERSION}")
        if names := self._identity.differences(arrays):
            self._refuse(f"it belongs to another model, which differs in {', '.join(names)}")
        self._foreign = False
        return _sections(arrays)

    def refuse(self) -> None:
        """Keep what is in the file when it is next saved."""
        self._foreign = True

    def save(self, sections: Mapping[str, Section]) -> None:
        """Write all sections, or nothing.

        Raises:
            OSError: the disk refuses.
        """
        if self._foreign and self.path.exists():
            self.path.replace(self.path.with_name(f"{self.path.name}.old"))
        self._foreign = False
        arrays = {
            f"{name}/{key}": array
            for name, section in sections.items()
            for key, array in section.items()
        }
        npz.save(self.path, {"version": np.int64(VERSION), **self._identity.arrays(), **arrays})

    def _refuse(self, problem: str) -> None:
        raise OffloadError("warm start", self.path, problem, _REMEDY)


def _sections(arrays: Section) -> dict[str, dict[str, NDArray[Any]]]:
    sections: dict[str, dict[str, NDArray[Any]]] = {}
    for name, array in arrays.items():
        section, slash, key = name.partition("/")
        if slash:
            sections.setdefault(section, {})[key] = array
    return sections
