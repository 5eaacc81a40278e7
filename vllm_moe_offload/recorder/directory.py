"""The directory of recordings: is it there, can it be written, what are its files called."""

import os
import tempfile
import time
import uuid
from pathlib import Path

from vllm_moe_offload.errors import OffloadError


def prepare_directory(directory: Path) -> None:
    """Make the directory and write to it once.

    Raises:
        OffloadError: it is not possible.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OffloadError(
            "trace_path",
            directory,
            f"it cannot be written to ({reason})",
            "Give a directory that vLLM may write to, or leave trace_path out",
        ) from error


def trace_stem(stage: int) -> str:
    """Begin the names of one recorder's files; no two recorders share it.

    Args:
        stage: pipeline stage of the worker.
    """
    moment = time.strftime("%Y%m%dT%H%M%S")
    return f"{moment}-{os.getpid()}-{uuid.uuid4().hex[:6]}-stage{stage}"


def warm_start_path(directory: Path, stage: int) -> Path:
    """Where a stage's warm start is kept; not among the ``.npz`` files, which are all traces."""
    return directory / f"stage{stage}.warm-start"
