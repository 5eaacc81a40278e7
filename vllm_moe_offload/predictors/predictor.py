"""What the engine wants of a predictor.

Legend: T tokens, K choices a token, L layers, E experts, H hidden size, M tokens of the largest
step that is predicted.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.kernels.predict import Source

Arrays = Mapping[str, NDArray[Any]]


class Predictor(Protocol):
    """Tables on the device, and how they are learned.

    ``source`` and ``learn`` are called within a step, so they only queue work; ``refresh`` is
    called between two steps and never waits for the device either.
    """

    def source(self, layer: int, x_TH: Tensor) -> Source:
        """What the kernels read to predict the layer after ``layer``.

        Args:
            layer: number of the layer that has been routed.
            x_TH: its input.
        """
        ...

    def learn(self, ids_LTK: Tensor, num_tokens: int) -> None:
        """Take in a step.

        Args:
            ids_LTK: int32 [L, M, K], routed ids; negative ones are inactive.
            num_tokens: how many rows of each layer belong to the step.
        """
        ...

    def refresh(self) -> None:
        """Bring what was learned into the tables."""
        ...

    def forget(self) -> None:
        """Learn anew: what came so far were made-up steps."""
        ...

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """What a warm start keeps; waits for the device. Another thread may ask."""
        ...

    def from_arrays(self, arrays: Arrays) -> None:
        """Go on from what a warm start kept.

        Raises:
            OffloadError: the arrays are damaged or belong to another model.
        """
        ...


def checked(arrays: Arrays, name: str, shape: tuple[int | None, ...]) -> NDArray[np.int64]:
    """Return an array of counts.

    Args:
        arrays: what a warm start kept.
        name: of the array.
        shape: with None for any size.

    Raises:
        OffloadError: it is not there, has another shape, or holds something else.
    """
    array = arrays.get(name)
    if array is None or array.ndim != len(shape):
        problem = "there is no such table of this model"
    elif any(size not in (None, found) for size, found in zip(shape, array.shape, strict=True)):
        problem = f"its shape is {array.shape}, which is not this model's"
    elif array.dtype.kind not in "iu" or (array.size and int(array.min()) < 0):
        problem = "it holds something else than counts"
    elif array.size and int(array.max()) > np.iinfo(np.int32).max:
        problem = "it counts more than can be"
    else:
        return array.astype(np.int64)
    raise OffloadError("predictor", name, f"of the warm start {problem}", "Delete the file")
