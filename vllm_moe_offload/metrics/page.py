"""The statistics page of a worker: one small file that API servers of the same host read."""

import json
import multiprocessing
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from vllm_moe_offload.counts import LayerCounts
from vllm_moe_offload.lifeline import Claim, is_orphaned

FOLDER = "MOE_OFFLOAD_STATS_DIR"
"""Environment variable through which the processes of one server know the folder of pages."""

_PREFIX = "vllm-moe-offload-"
_SUFFIX = ".json"
_CLAIM = ".claim"

_made: tempfile.TemporaryDirectory[str] | None = None
_claim: Claim | None = None


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
    in one direction, None if it is not known. ``boundary_block`` is the first of the KV cache's
    ``kv_blocks`` that experts hold, None where it is not shared.
    """

    worker: Worker
    time: float
    layers: list[LayerCounts]
    pool_bytes: int
    slot_bytes: int
    staging_bytes: int
    policies: dict[str, str] = field(default_factory=dict)
    pcie_bytes_per_s: float | None = None
    lent_bytes: int = 0
    boundary_block: int | None = None
    kv_blocks: int | None = None

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


def claim_page(path: Path) -> Claim:
    """Say that the page is that of this process, and count for nothing once it is gone."""
    return Claim(path.with_suffix(_CLAIM))


def read_pages() -> list[Page]:
    """Read the pages of all workers of this server, but not of those that were killed."""
    folder = os.environ.get(FOLDER)
    paths = sorted(Path(folder).glob(f"*{_SUFFIX}")) if folder else []
    pages = []
    for path in paths:
        if is_orphaned(path.with_suffix(_CLAIM)):
            continue
        try:
            pages.append(Page.read(path))
        except FileNotFoundError:
            continue  # its worker has just ended
    return pages


def open_folder() -> None:
    """Make the folder of pages that the processes started from here on share. Idempotent.

    A process that multiprocessing started belongs to the server of its parent and keeps the
    folder; any other is the first of a server of its own, whatever environment it inherited.
    Folders of servers that were killed are removed.
    """
    global _made, _claim  # noqa: PLW0603
    inherited = multiprocessing.parent_process() is not None and FOLDER in os.environ
    if _made is None and not inherited:
        _remove_orphans(Path(tempfile.gettempdir()))
        _made = tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True)
        _claim = Claim(Path(_made.name) / _CLAIM)
        os.environ[FOLDER] = _made.name


def _remove_orphans(place: Path) -> None:
    for folder in place.glob(f"{_PREFIX}*"):
        if is_orphaned(folder / _CLAIM):
            shutil.rmtree(folder, ignore_errors=True)


def layer_label(name: str) -> str:
    """Label a layer by its number in the model: the first in its name."""
    return next((part for part in name.split(".") if part.isdigit()), name)
