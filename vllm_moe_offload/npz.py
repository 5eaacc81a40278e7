"""Arrays in one ``.npz`` file: written whole or not at all, and read with suspicion."""

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_moe_offload.errors import OffloadError


def save(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write the file; a crash leaves the old one or none, never half of one.

    Raises:
        OSError: the disk is full, or the directory is not there or not writable.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with unfinished.open("wb") as file:
            np.savez_compressed(file, **arrays)
            file.flush()
            # Some file systems rename before they write, which a power failure would show.
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def load(path: Path, subject: str, remedy: str) -> dict[str, NDArray[Any]]:
    """Read all arrays; nothing in the file is ever executed.

    Args:
        path: the file.
        subject: what it should be, for the message.
        remedy: what to do if it is not.

    Raises:
        OffloadError: there is no such file, or it is damaged.
    """
    if not path.exists():
        raise OffloadError(subject, path, "there is no such file", "Check the path")
    try:
        if not zipfile.is_zipfile(path):
            raise OffloadError(subject, path, "it is no .npz file, or its end is lost", remedy)
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except OffloadError:
        raise
    # The libraries below do not agree on how damage shows.
    except Exception as error:
        raise OffloadError(subject, path, f"it cannot be read: {error}", remedy) from error
