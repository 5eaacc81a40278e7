"""The statistics page of a worker: one small file that API servers of the same host read."""

import json
import multiprocessing
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from vllm_moe_offload.counts import LayerCounts

FOLDER = "MOE_OFFLOAD_STATS_DIR"
"""Environment variable through which the processes of one server know the folder of pages."""

_SUFFIX = ".json"

_made: tempfile.TemporaryDirectory[str] | None = None


@dataclass(frozen=True)
class Worker:
    """Which worker a page is of; ``engine`` is its number among data-parallel engines."""

    model: str
    engine: int
    rank: int


@dataclass(frozen=True)
class Page:
    """What a worker has counted up to ``time``, in seconds since the epoch.

    ``layers`` are labelled by ``layer_label``. ``pcie_bytes_per_s`` is the rate of the GPU's link
    in one direction, None if it is not known.
    """

    worker: Worker
    time: float
    layers: list[LayerCounts]
    pool_bytes: int
    slot_bytes: int
    staging_bytes: int
    policies: dict[str, str] = field(default_factory=dict)
    pcie_bytes_per_s: float | None = None

    def write(self, path: Path) -> None:
        """Replace the file as a whole, so that nobody reads half of it."""
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(asdict(self)))
        draft.replace(path)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file that ``write`` wrote."""
        fields = json.loads(path.read_text())
        worker = Worker(**fields.pop("worker"))
        layers = [LayerCounts(**layer) for layer in fields.pop("layers")]
        return cls(worker=worker, layers=layers, **fields)


def page_path(worker: Worker) -> Path | None:
    """Where this worker writes its page; None if no server asked for pages."""
    folder = os.environ.get(FOLDER)
    name = f"{worker.engine}-{worker.rank}-{os.getpid()}{_SUFFIX}"
    return Path(folder) / name if folder else None


def read_pages() -> list[Page]:
    """Read the pages of all workers of this server."""
    folder = os.environ.get(FOLDER)
    paths = sorted(Path(folder).glob(f"*{_SUFFIX}")) if folder else []
    pages = []
    for path in paths:
        try:
            pages.append(Page.read(path))
        except FileNotFoundError:
            continue  # its worker has just ended
    return pages


def open_folder() -> None:
    """Make the folder of pages that the processes started from here on share. Idempotent.

    A process that multiprocessing started belongs to the server of its parent and keeps the
    folder; any other is the first of a server of its own, whatever environment it inherited.
    """
    global _made  # noqa: PLW0603
    inherited = multiprocessing.parent_process() is not None and FOLDER in os.environ
    if _made is None and not inherited:
        _made = tempfile.TemporaryDirectory(prefix="vllm-moe-offload-", ignore_cleanup_errors=True)
        os.environ[FOLDER] = _made.name


def layer_label(name: str) -> str:
    """Label a layer by its number in the model: the first in its name."""
    return next((part for part in name.split(".") if part.isdigit()), name)
