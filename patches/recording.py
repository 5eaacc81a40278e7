"""Recording in a worker: which row of a step is whose, and a warm start.

Reads: ``SchedulerOutput``, and the batch that the model runner keeps after a step:
    ``GPUModelRunner.input_batch`` of vllm.v1.worker.gpu_model_runner (first runner),
    ``GPUModelRunner.execute_model_state`` of vllm.v1.worker.gpu.model_runner (second runner).
Versions: 0.32, 0.33.
Why: the scheduler knows which request runs how many tokens from where, and the runner alone in
    which order they stand in the batch.
How: called between steps by the patch of the worker; copies nothing but a few numbers a request.
Can go: when vLLM tells a plugin the rows of a step.
"""

from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.logger import init_logger

from vllm_moe_offload import __version__
from vllm_moe_offload.config import MoeOffloadConfig
from vllm_moe_offload.engine import OffloadEngine
from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.offloaded_layer import LayerSpec
from vllm_moe_offload.recorder import HotSet, Recorder, StepRows, TraceInfo, warm_start_path
from vllm_moe_offload.recorder.hot_set import SECTION as HOT_SET
from vllm_moe_offload.warm_start import ModelIdentity, Section, WarmStartFile

logger = init_logger("vllm.moe_offload")


def tokens_to_log(vllm_config: Any, model_config: Any, config: MoeOffloadConfig) -> int:
    """Tokens of the largest step if this worker records this model, else 0.

    All workers of a tensor-parallel group see the same ids, so the first one records. A draft
    model's tokens are not those of the sequence.
    """
    is_target = model_config is vllm_config.model_config
    if config.trace_path is None or not is_target or get_tensor_model_parallel_rank() != 0:
        return 0
    return int(vllm_config.scheduler_config.max_num_batched_tokens)


class Recording:
    """What a worker with ``trace_path`` does beside serving.

    Args:
        worker: vLLM's worker; its model has been loaded.
        engine: the engine of the model that is served.

    Raises:
        OffloadError: ``trace_path`` cannot be written to.
    """

    def __init__(self, worker: Any, engine: OffloadEngine) -> None:
        assert engine.config.trace_path is not None
        config, model = engine.config, worker.vllm_config.model_config
        directory, pipeline = Path(engine.config.trace_path), get_pp_group()
        self._engine = engine
        self._identity = _identity(model.model, engine)
        self._warm_start = WarmStartFile(
            warm_start_path(directory, pipeline.rank_in_group), self._identity
        )
        self._requests = RequestTable(drafts=worker.vllm_config.speculative_config is not None)
        self._recorder: Recorder | None = None
        if engine.step_log is not None:
            self._recorder = Recorder(
                engine.step_log,
                directory,
                stage=pipeline.rank_in_group,
                info=TraceInfo(
                    num_experts=max(self._identity.num_experts),
                    model=model.model,
                    source=f"vllm-moe-offload {__version__}, "
                    f"stage {pipeline.rank_in_group} of {pipeline.world_size}",
                ),
                warm_start=self._warm_start,
                interval_s=config.trace_interval_s,
                file_bytes=int(config.trace_file_mb * (1 << 20)),
                warn=logger.warning,
            )

    def start(self) -> None:
        """Fill the slots with what was hot before, and begin to record."""
        hot_set = HotSet(len(self._identity.layers), max(self._identity.num_experts))
        sections = self._load(hot_set)
        if sections:
            filled = self._engine.fill_slots(list(hot_set.score_LE))
            logger.info(
                "moe-offload: the %d hottest experts of %s are in slots",
                filled, self._warm_start.path,
            )  # fmt: skip
        learners = self._warm(sections)
        if self._recorder:
            self._recorder.start(hot_set, sections, learners)

    def note(self, runner: Any, scheduler_output: Any, output: Any) -> None:
        """Record the step that the runner has just queued. Never raises."""
        if self._recorder is None:
            return
        try:
            rows, positions_T = self._requests.rows(runner, scheduler_output, output)
            self._recorder.record(rows, scheduler_output.total_num_scheduled_tokens, positions_T)
        except Exception:
            logger.exception("moe-offload: recording has ended; the server goes on without")
            recorder, self._recorder = self._recorder, None
            recorder.close()

    def settle(self) -> None:
        """Leave nothing on the device that has not been read, and read nothing until it steps."""
        if self._recorder:
            self._recorder.settle()

    def close(self) -> None:
        """Write what has been recorded."""
        if self._recorder:
            self._recorder.close()

    def _load(self, hot_set: HotSet) -> dict[str, Section]:
        """Read the warm start, or say why not and go on without."""
        try:
            sections = self._warm_start.load() or {}
            if sections:
                hot_set.restore(sections.get(HOT_SET, {}))
        except OffloadError as error:
            self._warm_start.refuse()
            logger.warning("%s The slots start empty.", error)
            return {}
        return dict(sections)

    def _warm(self, sections: dict[str, Section]) -> dict[str, Callable[[], Section]]:
        """Give learners what they have learned before; returns how to ask them for it again."""
        found: dict[str, Callable[[], Section]] = {}
        for name, (what, learner) in self._learners().items():
            try:
                if name in sections:
                    learner.from_arrays(sections[name])
            except OffloadError as error:
                self._warm_start.refuse()
                logger.warning("%s The %s starts empty.", error, what)
            if learner.to_arrays():
                found[name] = learner.to_arrays
        return found

    def _learners(self) -> dict[str, tuple[str, Any]]:
        """By the name of their section, what learns and what it is called."""
        engine, found = self._engine, dict[str, tuple[str, Any]]()
        if engine.predictor is not None:
            found[f"predictor_{engine.config.predictor}"] = ("predictor", engine.predictor)
        # One worker writes for all; where each holds other experts, they learn different things.
        if engine.eviction is not None and all(_holds_all(spec) for spec in engine.specs):
            found[f"policy_{engine.config.policy}"] = ("eviction policy", engine.eviction)
        return found


class RequestTable:
    """Numbers vLLM's requests, and tells which rows of a step are whose.

    Args:
        drafts: whether requests may carry speculated tokens.
    """

    def __init__(self, *, drafts: bool) -> None:
        self._drafts = drafts
        self._number_of: dict[str, int] = {}
        self._numbers = count()

    def rows(self, runner: Any, scheduler_output: Any, output: Any) -> tuple[StepRows, Any]:
        """Describe a step that has been queued.

        Args:
            runner: the model runner that ran it, before it samples.
            scheduler_output: what the runner was told to run.
            output: what it returned.

        Returns:
            The rows, and the tokens' positions on the device if only these are exact.
        """
        state = getattr(runner, "execute_model_state", None)
        # The first runner may have run less than it was told, and kept what it ran.
        scheduled = getattr(state, "scheduler_output", scheduler_output)
        ended = tuple(
            self._number_of.pop(request)
            for request in scheduled.finished_req_ids
            if request in self._number_of
        )
        begun = self._begin(scheduled.scheduled_new_reqs)
        if not scheduled.total_num_scheduled_tokens:
            return StepRows(begun=begun, ended=ended), None
        requests, starts, positions_T = _batch(runner, state, scheduled, output)
        counts = [scheduled.num_scheduled_tokens[request] for request in requests]
        numbers = [self._number_of[request] for request in requests]
        if not self._drafts:
            return StepRows(numbers, starts, counts, None, begun, ended), None
        speculated = scheduled.scheduled_spec_decode_tokens
        drafts = [len(speculated.get(request, ())) for request in requests]
        return StepRows(numbers, starts, counts, drafts, begun, ended), positions_T

    def _begin(self, requests: Sequence[Any]) -> tuple[tuple[int, int], ...]:
        """Number requests, with the lengths of their prompts; resumed ones have a number."""
        begun = []
        for request in requests:
            if request.req_id not in self._number_of:
                number = self._number_of[request.req_id] = next(self._numbers)
                begun.append((number, _prompt_length(request)))
        return tuple(begun)


def _batch(runner: Any, state: Any, scheduled: Any, output: Any) -> tuple[list[str], Any, Any]:
    """Requests in the order of their rows, where each starts, and all positions on the device.

    With asynchronous scheduling and drafts, the second runner's host does not know how many
    drafts of the step before were right; its device does.
    """
    if hasattr(runner, "input_batch"):
        batch = runner.input_batch
        return list(batch.req_ids), batch.num_computed_tokens_cpu[: batch.num_reqs].copy(), None
    if state is not None:
        batch = state.input_batch
        positions_T = batch.positions[: scheduled.total_num_scheduled_tokens]
        return batch.req_ids, batch.num_computed_tokens_np, positions_T
    # A pooling model has already been pooled.
    requests = output.model_runner_output.req_ids
    cached = scheduled.scheduled_cached_reqs
    start_of = {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
    start_of |= zip(cached.req_ids, cached.num_computed_tokens, strict=True)
    return requests, [start_of[request] for request in requests], None


def _prompt_length(request: Any) -> int:
    tokens = request.prompt_token_ids
    if tokens is None:
        tokens = () if request.prompt_embeds is None else request.prompt_embeds
    return len(tokens)


def _holds_all(spec: LayerSpec) -> bool:
    """Whether all experts that a layer's router chooses from are in this worker."""
    return spec.routing is not None and spec.num_experts == spec.routing.num_experts


def _identity(model: str, engine: OffloadEngine) -> ModelIdentity:
    specs = [(spec.name, spec.routing) for spec in engine.specs if spec.routing is not None]
    return ModelIdentity(
        model=model,
        layers=tuple(name for name, _ in specs),
        num_experts=tuple(routing.num_experts for _, routing in specs),
        top_k=tuple(routing.top_k for _, routing in specs),
    )
