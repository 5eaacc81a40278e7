"""Recorder: takes each step's log, and has two threads turn it into files.

Legend: T tokens, L layers, K choices a token.
"""

import atexit
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vllm_moe_offload.recorder.complaints import Complaints
from vllm_moe_offload.recorder.directory import prepare_directory, trace_stem
from vllm_moe_offload.recorder.files import TraceFiles, TraceInfo
from vllm_moe_offload.recorder.hot_set import SECTION, HotSet
from vllm_moe_offload.recorder.learners import Learners
from vllm_moe_offload.recorder.ring import DeviceRing, entry_bytes
from vllm_moe_offload.recorder.sequences import SequenceSorter, SortedTokens
from vllm_moe_offload.recorder.steps import RecordedStep, StepRows
from vllm_moe_offload.step_log import StepLog
from vllm_moe_offload.warm_start import Section, WarmStartFile

DRAIN_S = 0.2
"""How often the ring is emptied: seldom enough that the thread does not get in the way of the
one that runs the steps, often enough that a small ring does."""

RING_STEPS = 2
"""Largest steps that the ring holds; they last longer than ``DRAIN_S``."""

RING_BYTES = 8 << 20
"""The ring has at least this size: some thousand decode steps."""

JOIN_S = 30.0
"""How long closing waits for a disk that does not answer."""


class Recorder:
    """Records the steps of one engine while it serves.

    ``record``, ``settle`` and ``close`` belong to the thread that runs the steps. Whatever goes
    wrong on the way to the files ends in a line through ``warn``, never in an error there.

    Args:
        step_log: where the engine leaves the ids of a step.
        directory: where the files go; it is made if it is not there.
        stage: pipeline stage of the worker, part of the files' names.
        info: what the traces say about themselves.
        warm_start: where the hot set is kept.
        interval_s: seconds between two writes.
        file_bytes: size of a complete trace before compression.
        warn: takes a line for the log.

    Raises:
        OffloadError: the directory cannot be written to.
    """

    def __init__(
        self,
        step_log: StepLog,
        directory: Path,
        *,
        stage: int,
        info: TraceInfo,
        warm_start: WarmStartFile,
        interval_s: float,
        file_bytes: int,
        warn: Callable[[str], None],
    ) -> None:
        prepare_directory(directory)
        num_layers, _, _ = step_log.ids_LTK.shape
        self._interval_s = interval_s
        self._complaints = Complaints(interval_s, warn)
        self._step_log = step_log
        self._ring = DeviceRing(_ring_bytes(step_log), step_log.ids_LTK.device)
        self._inbox = _Inbox()
        self._sorter = SequenceSorter(info.num_experts)
        self._files = TraceFiles(
            directory,
            trace_stem(stage),
            info,
            max_bytes=file_bytes,
            complain=self._complaints.say,
        )
        self._hot_set = HotSet(num_layers, info.num_experts)
        self._warm_start = warm_start
        self._sections: Mapping[str, Section] = {}
        self._learners = Learners({}, self._complaints.say)
        self._has_learnt = False
        self._recording = False
        self._closing = threading.Event()
        self._work = threading.Event()
        self._drainer = self._thread(self._drain, "drain")
        self._writer = self._thread(self._write, "write")
        self.dropped_steps = 0
        """Steps that the ring had no room for."""

    def start(
        self,
        hot_set: HotSet,
        sections: Mapping[str, Section],
        learners: Mapping[str, Callable[[], Section]] | None = None,
    ) -> None:
        """Begin to record: warm-up is over, and what comes now is traffic.

        Args:
            hot_set: what is known already; the recorder goes on from it.
            sections: everything that the warm start held, to be kept with it.
            learners: what gives the sections that others learn, asked by the writing thread
                and by ``settle``.
        """
        self._hot_set, self._sections = hot_set, sections
        self._learners = Learners(learners or {}, self._complaints.say)
        self._recording = True
        atexit.register(self.close)
        self._drainer.start()
        self._writer.start()

    def record(self, rows: StepRows, num_tokens: int, positions_T: Tensor | None = None) -> None:
        """Note the step that has just been queued on the current stream.

        Args:
            rows: whose tokens it ran.
            num_tokens: how many, without padding.
            positions_T: positions of the tokens on the device, where the host does not know
                them.
        """
        if not self._recording:
            return
        if num_tokens:
            self._learners.wake()  # A step without tokens may come to a worker that sleeps.
        tensors = [self._step_log.tokens(num_tokens)] if num_tokens else []
        if num_tokens and positions_T is not None:
            tensors.append(positions_T)
        if not self._ring.put(rows, tensors):
            self.dropped_steps += 1
            self._ring.put(rows.without_tokens(), [])

    def settle(self) -> None:
        """Empty the ring and read nothing until the next tokens; waits for the device."""
        if self._recording:
            self._empty_ring()
        self._learners.rest()

    def close(self) -> None:
        """Write all that was recorded and end the threads. Idempotent."""
        if self._closing.is_set() or not self._writer.is_alive():
            return
        self._recording = False
        atexit.unregister(self.close)
        self._closing.set()
        self._work.set()
        self._writer.join(JOIN_S)
        if self._writer.is_alive():
            self._complaints.insist("the disk has not taken the last interval of the recording yet")

    def _thread(self, body: Callable[[], None], name: str) -> threading.Thread:
        def run() -> None:
            try:
                body()
            except Exception as error:
                self._recording = False
                self._complaints.insist(f"recording has ended: {type(error).__name__}: {error}")

        return threading.Thread(target=run, name=f"moe-offload-{name}", daemon=True)

    def _drain(self) -> None:
        while not self._closing.wait(DRAIN_S):
            # Where the writer does not keep up the ring runs full, and steps are dropped.
            if self._inbox.num_bytes <= self._ring.num_bytes:
                self._empty_ring()
        self._empty_ring()

    def _empty_ring(self) -> None:
        self._inbox.fill_from(self._ring)
        if self._inbox.num_bytes > self._ring.num_bytes // 2:
            self._work.set()

    def _write(self) -> None:
        due = time.monotonic() + self._interval_s
        while not self._closing.is_set():
            self._work.wait(max(0.0, due - time.monotonic()))
            self._work.clear()
            self._sort()
            if time.monotonic() >= due:
                due = time.monotonic() + self._interval_s
                self._save()
        self._drainer.join(JOIN_S)
        self._sort()
        self._keep(self._sorter.finish())
        self._save()

    def _sort(self) -> None:
        steps = self._inbox.take()
        recorded = [step.ids_TLK for step in steps if step.ids_TLK is not None]
        if recorded:
            self._hot_set.update(np.concatenate(recorded))
            self._has_learnt = True
        self._keep(self._sorter.add(steps))

    def _keep(self, tokens: SortedTokens | None) -> None:
        if tokens is not None:
            self._files.add(tokens)

    def _save(self) -> None:
        self._files.save()
        if self._has_learnt:
            self._save_warm_start()
        self._complaints.losses(
            {
                "steps that the ring had no room for": self.dropped_steps,
                "tokens that the disk did not take": self._files.lost_tokens,
                "tokens whose router left choices open": self._sorter.incomplete,
            }
        )

    def _save_warm_start(self) -> None:
        try:
            learned = self._learners.sections()
            self._warm_start.save({**self._sections, **learned, SECTION: self._hot_set.section()})
        except OSError as error:
            self._complaints.say(f"cannot write {self._warm_start.path}: {error.strerror or error}")
        else:
            self._has_learnt = False


class _Inbox:
    """Steps on the host that wait to be sorted."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._steps: list[RecordedStep] = []
        self.num_bytes = 0

    def fill_from(self, ring: DeviceRing) -> None:
        with self._lock:
            for rows, arrays in ring.take():
                step = RecordedStep(rows, *arrays)
                self._steps.append(step)
                self.num_bytes += 0 if step.ids_TLK is None else step.ids_TLK.nbytes

    def take(self) -> list[RecordedStep]:
        with self._lock:
            steps, self._steps, self.num_bytes = self._steps, [], 0
        return steps


def _ring_bytes(step_log: StepLog) -> int:
    tokens = step_log.max_tokens
    # Positions come with the ids where the host does not know them.
    largest = entry_bytes([step_log.tokens(tokens).nbytes, tokens * torch.int64.itemsize])
    return max(RING_BYTES, RING_STEPS * largest)
