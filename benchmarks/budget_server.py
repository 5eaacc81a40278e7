"""One process of the suite ``budget``, see ``jobs.py``: a server's phases, or attention alone."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps it off

import routing
import timed_server
from budget import BUDGET_SHAPES
from kv_layout_cost import measure_layouts
from server import Server, fill_dummies_quickly, moved
from shapes import SHAPES
from timed_server import Talk

SAMPLE_S = 0.2
"""Seconds between two points of the plot."""

IDLE_REQUESTS = 8
"""Short requests during which all is lent; one may hold a block that is in the way."""

Row = dict[str, Any]


class PhasedServer(Server):
    """A server that is watched while it lives through phases."""

    def __init__(self, folder: Path, job: dict[str, Any]) -> None:
        super().__init__(folder, SHAPES[job["shape"]], job)
        self._size = job["size"]
        self._vocabulary = SHAPES[job["shape"]].vocabulary - 8
        self._generated = self._prompted = 0
        self._start = self._sampled_at = time.perf_counter()
        self.samples: list[Row] = []
        self._words = 0

    def chat(self, name: str) -> Row:
        """One user's turns, each on top of the whole conversation so far."""
        conversation: list[int] = []
        with self._phase(name) as row:
            for _ in range(self._size["turns"]):
                conversation += self._text(self._size["question"])
                ((wait, answer),) = self._serve([(conversation, self._size["answer"])])
                row["waits_s"].append(wait)
                conversation = conversation + answer
        return row

    def burst(self, name: str) -> Row:
        """Prompts of many users at once, with answers of several lengths."""
        least = self._size["short_answer"]
        asked = [
            (self._text(self._size["prompt"]), least + 5 * user % (2 * least + 1))
            for user in range(self._size["users"])
        ]
        return self._phase_of(name, asked)

    def document(self, name: str) -> Row:
        """One long document and a question about it."""
        asked = [(self._text(self._size["document"]), self._size["answer"])]
        return self._phase_of(name, asked)

    def warm_up(self) -> None:
        """Compile what is compiled late, and fill slots, then forget what was cached."""
        for length in (self._size["question"], self._size["chunk"] + 64):
            self._serve([(self._text(length), 4)])
        self._serve([(self._text(8), 4) for _ in range(32)])
        assert self.llm.reset_prefix_cache()

    def recall(self) -> Row:
        """From an idle server, all lent, to one whose whole KV cache is vLLM's, step by step."""
        lending, borrower = self._core.scheduler.moe_offload_lending, self._borrower
        lender, boundary = lending.lender, lending.lender.boundary
        decisions = _timed(lender, "step_begins", lambda: None)
        lender._policy.decide = lambda _: boundary.max_increments
        for _ in range(IDLE_REQUESTS):
            self._serve([(self._text(8), 8)])
        lent = lender.ledger.lent
        moves = _timed(borrower, "follow", self.synchronize)
        lender._policy.decide = lambda _: 0
        start = time.perf_counter()
        self.add(self._text(8), self._size["recall"])
        while lender.book.confirmed.increments > boundary.min_increments:
            assert self._engine.has_unfinished_requests(), "the cache was not vLLM's by then"
            self.step()
        seconds = time.perf_counter() - start
        self.finish()
        return {
            "case": "recall", "seconds": seconds, "increments": lent,
            "most_increments": boundary.max_increments, "moves": len(moves),
            "bytes": (lent - boundary.min_increments) * boundary.increment_bytes,
            "longest_move_s": max(moves, default=0.0), "longest_decision_s": max(decisions),
        }  # fmt: skip

    @property
    def _core(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def _borrower(self) -> Any:
        return self.offload_engine().borrower

    def _phase_of(self, name: str, asked: Sequence[tuple[list[int], int]]) -> Row:
        with self._phase(name) as row:
            row["waits_s"] += [wait for wait, _ in self._serve(asked)]
        return row

    @contextmanager
    def _phase(self, name: str) -> Iterator[Row]:
        self._name = name
        row: Row = {"case": "phase", "phase": name, "waits_s": []}
        before, generated = self.stats(), self._generated
        start = time.perf_counter()
        yield row
        self.synchronize()
        row["seconds"] = time.perf_counter() - start
        row["generated_tokens"] = self._generated - generated
        row["slots_at_the_end"] = self._borrower.increments
        row |= moved(before, self.stats(), 1)

    def _serve(self, asked: Sequence[tuple[list[int], int]]) -> list[tuple[float, list[int]]]:
        """Serve requests at once; each one's wait for its first token, and its answer."""
        start = time.perf_counter()
        waits: dict[str, float] = {}
        answers: dict[str, list[int]] = {}
        first = self._requests + 1
        for prompt, answer in asked:
            self.add(prompt, answer)
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                tokens = list(output.outputs[0].token_ids)
                if tokens:
                    waits.setdefault(output.request_id, time.perf_counter() - start)
                known = len(answers.get(output.request_id, ()))
                answers[output.request_id] = tokens
                self._generated += len(tokens) - known
            self._sample()
        names = [str(number) for number in range(first, self._requests + 1)]
        lengths = [len(answers.get(name, ())) for name in names]
        assert lengths == [answer for _, answer in asked], "a request failed"
        return [(waits[name], answers[name]) for name in names]

    def _sample(self) -> None:
        now = time.perf_counter()
        if now - self._sampled_at < SAMPLE_S:
            return
        self._sampled_at = now
        counts = self.offload_engine().snapshot() or []
        pool = self._core.scheduler.kv_cache_manager.block_pool
        boundary = self._borrower.boundary
        self.samples.append({
            "seconds": round(now - self._start, 3),
            "phase": getattr(self, "_name", "warm-up"),
            "slots": self._borrower.increments,
            "first_block": boundary.first_block(self._borrower.increments),
            "blocks": boundary.num_blocks,
            "used_blocks": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
            "generated": self._generated,
            "active": sum(layer.active for layer in counts),
            "hits": sum(layer.hits for layer in counts),
        })  # fmt: skip

    def _text(self, length: int) -> list[int]:
        """Tokens that nobody else has used."""
        self._words += 1
        step = 2 * self._words + 1
        return [(step * i + 7919 * self._words) % self._vocabulary for i in range(length)]


def _timed(owner: Any, name: str, synchronize: Callable[[], None]) -> list[float]:
    """Note from now on what each call of a method takes."""
    method, seconds = getattr(owner, name), []

    def timed(*args: Any) -> Any:
        synchronize()
        start = time.perf_counter()
        result = method(*args)
        synchronize()
        seconds.append(time.perf_counter() - start)
        return result

    setattr(owner, name, timed)
    return seconds


def live_through_phases(job: dict[str, Any], folder: Path, talk: Talk) -> None:
    """Time every phase, then what it takes to hand everything back."""
    allow_layouts()
    routing.register(routing.Skewed())
    filled = fill_dummies_quickly()
    server = PhasedServer(folder, job)
    assert filled, "dummy weights were drawn slowly"
    talk.wait_for_turn()
    server.warm_up()
    for name, phase in (
        ("chat", server.chat),
        ("burst", server.burst),
        ("document", server.document),
        ("chat again", server.chat),
    ):
        talk.note(phase(name))
    talk.note({"case": "samples", "samples": list(server.samples)})
    if job["settings"]["moe_offload"]["kv_policy"] == "auto":
        talk.note(server.recall())
        server.offload_engine().check_integrity()


def attention_alone(job: dict[str, Any], _folder: Path, talk: Talk) -> None:
    """Time attention over both layouts."""
    talk.wait_for_turn()
    for row in measure_layouts(tiny=job["tiny"]):
        talk.note(row)


def allow_layouts() -> None:
    """Without a GPU, where this is only tried out, let vLLM put a block's layers side by side.

    Its CPU kernels address blocks by their stride, so they work in that layout too.
    """
    import torch

    if torch.cuda.is_available():
        return
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
    from vllm.v1.kv_cache_layout import KVCacheLayout

    layouts = (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)
    CPUAttentionBackend.supported_kv_cache_layouts = staticmethod(lambda: layouts)


if __name__ == "__main__":
    SHAPES.update(BUDGET_SHAPES)
    timed_server.KINDS |= {"phases": live_through_phases, "layout": attention_alone}
    sys.exit(timed_server.main())
