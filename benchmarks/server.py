"""A vLLM server whose steps are taken and timed one at a time, with made-up weights."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shapes import Shape

PROMPT_TOKENS = 4
"""Length of the prompts that only start a decode."""


def fill_dummies_quickly() -> list[Any]:
    """Give all experts of all layers of a size the same dummy weights.

    Drawing them on the host would take minutes, copying takes seconds.

    Returns:
        What was filled; empty if vLLM draws its dummy weights elsewhere by now.
    """
    from vllm.model_executor.model_loader import dummy_loader

    original = dummy_loader.initialize_single_dummy_weight
    drawn: dict[Any, Any] = {}
    filled: list[Any] = []

    def initialize(parameter: Any, *args: Any, **kwargs: Any) -> None:
        if parameter.device.type != "cpu" or parameter.ndim != 3:
            original(parameter, *args, **kwargs)
            return
        filled.append(parameter)
        key = (parameter.shape[1:], parameter.dtype)
        if key not in drawn:
            drawn[key] = parameter.data.new_empty(1, *parameter.shape[1:])
            original(drawn[key], *args, **kwargs)
        parameter.data.copy_(drawn[key].expand_as(parameter))

    dummy_loader.initialize_single_dummy_weight = initialize
    return filled


class Server:
    """An ``LLM`` whose steps are taken one at a time."""

    def __init__(self, folder: Path, shape: Shape, job: dict[str, Any]) -> None:
        from vllm import LLM

        settings = dict(job["settings"])
        if names := settings.get("cpu_offload_params"):
            settings["cpu_offload_params"] = set(names)  # JSON has none
        self._shape = shape
        self._offloaded = "plugin" in settings
        settings = {"enable_prefix_caching": False, **settings}
        self.llm = LLM(
            str(shape.write(folder)), load_format="dummy", skip_tokenizer_init=True, **settings
        )
        self._engine = self.llm.llm_engine
        self._requests = 0

    def decode(
        self,
        batch: int,
        steps: int,
        warm_up: int = 8,
        *,
        begin: Callable[[], None] | None = None,
    ) -> dict[str, Any]:
        """Mean time of a decode step and the bytes that it moved.

        Args:
            batch: sequences.
            steps: that are timed.
            warm_up: steps before them; the prompts' is the first, unless ``begin`` is given.
            begin: called between the prompts' step and all others.
        """
        self.start_decode(batch, steps + warm_up)
        if begin is not None:
            self._engine.step()
            self.synchronize()
            begin()
        for _ in range(warm_up):
            self._engine.step()
        self.synchronize()
        before = self.stats()
        start = time.perf_counter()
        for _ in range(steps):
            self._engine.step()
        # With asynchronous scheduling a step is in flight here, as one was at the start.
        self.synchronize()
        seconds = (time.perf_counter() - start) / steps
        row = {"case": "decode", "batch": batch, "seconds": seconds}
        row |= moved(before, self.stats(), steps)
        self.finish()
        return row

    def prefill(self, tokens: int, repeats: int, warm_up: int = 1) -> dict[str, Any]:
        """Median time to the first token of one long prompt and the bytes that it moved."""
        times = []
        before = self.stats()
        for repeat in range(warm_up + repeats):
            if repeat == warm_up:
                before = self.stats()
            self.add(self._prompt(tokens), 1)
            self.synchronize()
            start = time.perf_counter()
            self.finish()
            times.append(time.perf_counter() - start)
        seconds = statistics.median(times[warm_up:])
        row = {"case": "prefill", "tokens": tokens, "seconds": seconds}
        return row | moved(before, self.stats(), repeats)

    def start_decode(self, batch: int, steps: int) -> None:
        """Add requests that outlast so many steps, the prefill among them."""
        for _ in range(batch):
            self.add(self._prompt(PROMPT_TOKENS), steps + 2)

    def add(self, prompt: list[int], max_tokens: int) -> None:
        """Add a request that generates exactly so many tokens."""
        from vllm import SamplingParams

        sampling = SamplingParams(
            max_tokens=max_tokens, temperature=0, ignore_eos=True, detokenize=False
        )
        self._requests += 1
        self._engine.add_request(str(self._requests), {"prompt_token_ids": prompt}, sampling)

    def step(self) -> None:
        """Take one step."""
        self._engine.step()

    def finish(self) -> None:
        """Run until no request is left."""
        while self._engine.has_unfinished_requests():
            self._engine.step()

    def stats(self) -> dict[str, int] | None:
        """What the plugin counts, None without it."""
        if not self._offloaded:
            return None
        (stats,) = self.llm.collective_rpc("moe_offload_stats")
        return stats

    def worker(self) -> Any:
        """The worker of vLLM, which is in this process."""
        return self._engine.engine_core.engine_core.model_executor.driver_worker.worker

    def offload_engine(self) -> Any:
        """The plugin's engine, which is in this process."""
        (engine,) = self.worker().moe_offload_engines
        return engine

    @staticmethod
    def synchronize() -> None:
        """Wait for the device."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def _prompt(self, length: int) -> list[int]:
        return [(7 * i + 3 * self._requests) % (self._shape.vocabulary - 8) for i in range(length)]


def moved(before: Any, after: Any, steps: int) -> dict[str, float]:
    """What the plugin has moved between two readings, a step; nothing without it."""
    if before is None or after is None:
        return {}
    change = {n: after[n] - before[n] for n in after if isinstance(after[n], int | float)}
    ahead = change["prefetch_hits"]
    return {
        # Of the experts that had to be moved, those that were there in time.
        "ahead_ratio": ahead / max(1, ahead + change["misses"]),
        "bytes": change["bytes_moved"] / steps,
        "hit_ratio": change["hits"] / max(1, change["active"]),
        "coverage": change["found"] / max(1, change["foreseeable"]),
        # What the link needs for these bytes, hidden or not.
        "transfer_seconds": change["transfer_seconds"] / steps,
    }
