"""Split a machine's memory for a model, and bound the speed. Pure arithmetic.

The slots are those that the plugin itself would make of the options in the plan's command line:
the same code divides them.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vllm_moe_offload.budget import Budget, LayerDemand, plan_budget
from vllm_moe_offload.config import MoeOffloadConfig
from vllm_moe_offload.plan.model import Model, element_size
from vllm_moe_offload.plan.tensors import MoeLayer
from vllm_moe_offload.predictors.sizes import table_bytes
from vllm_moe_offload.sizes import GIB

GPU_UTILISATION = 0.92
"""Share of a GPU that vLLM uses by default; CUDA's own context lives in the rest."""

HIT_RATIOS = (0.0, 0.5, 0.75, 0.9)

LONG_STEP_TOKENS = 8192
"""A larger step of prefill to compare with vLLM's default."""

_HOST_RESERVE = 4 * GIB


def gpu_reserve(gpu_bytes: int) -> int:
    """Bytes set aside for activations and CUDA graphs: a large GPU takes larger steps."""
    return max(3 * GIB // 2, gpu_bytes // 25)


def default_step_tokens(gpu_bytes: int) -> int:
    """Tokens of a step of prefill, by ``vllm serve``'s default for the size of the GPU."""
    if gpu_bytes >= 160 * GIB:
        return 16384
    return 8192 if gpu_bytes >= 70 * GIB else 2048


@dataclass(frozen=True)
class Request:
    """The machine, and what is to be served on it.

    ``layers`` are the decoder layers whose experts are offloaded, None for all; the experts of
    the others stay on the GPU.
    """

    model: str
    gpu_bytes: int
    host_bytes: int
    max_model_len: int
    concurrency: int
    dtype: str
    pcie_bytes_per_s: float
    layers: tuple[int, ...] | None = None
    predictor: str = "none"


@dataclass(frozen=True)
class Plan:
    """Where every byte goes. ``options`` are the plugin's, None for a dense model."""

    model: Model
    request: Request
    budget: Budget
    options: MoeOffloadConfig | None

    @cached_property
    def offloaded(self) -> tuple[MoeLayer, ...]:
        """The layers whose experts are in the pool."""
        return _offloaded(self.model, self.request)

    @cached_property
    def rows(self) -> tuple[int, ...]:
        """Bytes of an expert's row by offloaded layer."""
        size = element_size(self.request.dtype)
        return tuple(layer.row_bytes(size) for layer in self.offloaded)

    @cached_property
    def resident_bytes(self) -> int:
        """GPU memory for dense weights and for the experts of layers that are not offloaded."""
        return _resident_bytes(self.model, self.request)

    @cached_property
    def kv_bytes(self) -> int:
        """GPU memory for the KV cache of all sequences at their full length."""
        return _kv_bytes(self.model, self.request)

    @property
    def predictor_bytes(self) -> int:
        """GPU memory for the predictor's tables."""
        return _predictor_bytes(self.model, self.request)

    @property
    def reserve_bytes(self) -> int:
        """GPU memory for activations and CUDA graphs."""
        return gpu_reserve(self.request.gpu_bytes)

    @property
    def gpu_needed(self) -> int:
        """GPU memory in use by the plan."""
        return self.needed_with(self.budget)

    def needed_with(self, budget: Budget) -> int:
        """GPU memory in use with other slots and staging."""
        others = self.resident_bytes + self.kv_bytes + self.predictor_bytes + self.reserve_bytes
        return others + budget.device_bytes

    @cached_property
    def automatic(self) -> Budget:
        """What the plugin makes of ``gpu_gb=auto``, its default, without the KV cache's memory."""
        free = max(0, self.gpu_usable - self.resident_bytes)
        demands = _demands(self.model, self.request)
        return plan_budget(demands, MoeOffloadConfig(), device_free=free)

    @property
    def can_borrow(self) -> bool:
        """Whether ``gpu_gb=auto`` can take slots from the KV cache, as far as the model tells."""
        return bool(self.offloaded) and self.model.kv_cache.why_not_shared is None

    @property
    def gpu_usable(self) -> int:
        """GPU memory that vLLM uses."""
        return _usable(self.request)

    @property
    def host_needed(self) -> int:
        """Host memory for the pool, the system and vLLM's processes."""
        return self.budget.pool_bytes + _HOST_RESERVE

    @property
    def fits(self) -> bool:
        """Whether the GPU and the host hold it."""
        return self.gpu_needed <= self.gpu_usable and self.host_needed <= self.request.host_bytes

    @property
    def slots_per_layer(self) -> int:
        """Slots of a layer at the start, 0 for a dense model."""
        return max(self.budget.slots, default=0)

    @property
    def all_in_slots(self) -> bool:
        """Whether no expert ever crosses PCIe while serving."""
        counts = tuple(layer.num_experts for layer in self.offloaded)
        return self.budget.slots == counts

    @property
    def step_tokens(self) -> int:
        """Tokens of a step of prefill."""
        return default_step_tokens(self.request.gpu_bytes)


def make_plan(model: Model, request: Request) -> Plan:
    """Give every layer as many slots as the GPU has room for beside everything else."""
    demands = _demands(model, request)
    if not demands:
        return Plan(model, request, plan_budget([], MoeOffloadConfig()), None)
    free = _usable(request) - _resident_bytes(model, request) - _kv_bytes(model, request)
    free -= _predictor_bytes(model, request) + gpu_reserve(request.gpu_bytes)
    options = _options(demands, free, request)
    return Plan(model, request, plan_budget(demands, options), options)


def serve_command(plan: Plan, *, borrowing: bool = False) -> str:
    """Return the command line that serves the model as planned.

    Args:
        plan: what is served.
        borrowing: leave the slots' size out, so that they borrow what the KV cache leaves.
    """
    request = plan.request
    words = ["vllm", "serve", request.model]
    if plan.options is not None:
        words += ["--plugin", "moe-offload"]
        left_out = {"gpu_gb", "cache_fraction"} if borrowing else set()
        given = plan.options.model_dump(exclude_defaults=True, exclude=left_out)
        for name, value in given.items():
            words += [f"--moe-offload-{name.replace('_', '-')}", str(value).removesuffix(".0")]
    words += ["--max-model-len", str(request.max_model_len)]
    words += ["--max-num-seqs", str(request.concurrency)]
    if request.dtype != "auto":
        words += ["--dtype", request.dtype]
    return shlex.join(words)


def decode_tokens_per_s(plan: Plan, hit_ratio: float, sequences: int = 1) -> float:
    """Bound the decode rate of all sequences together by the bytes that cross PCIe.

    Args:
        plan: of an MoE model.
        hit_ratio: share of the active experts that is in a slot, below 1.
        sequences: decoding at once, routed independently and evenly.
    """
    moved = sum(
        row * _active(layer.num_experts, plan.model.top_k, sequences)
        for row, layer in zip(plan.rows, plan.offloaded, strict=True)
    )
    return sequences * plan.request.pcie_bytes_per_s / (moved * (1 - hit_ratio))


def sweep_bytes(plan: Plan) -> int:
    """Bytes that cross PCIe in one step of prefill: every expert that has no slot."""
    missing = (layer.num_experts - slots
               for layer, slots in zip(plan.offloaded, plan.budget.slots, strict=True))  # fmt: skip
    return sum(count * row for count, row in zip(missing, plan.rows, strict=True))


def prefill_tokens_per_s(plan: Plan, step_tokens: int) -> float | None:
    """Bound the prefill rate in steps of this many tokens; None if nothing crosses PCIe."""
    moved = sweep_bytes(plan)
    return step_tokens * plan.request.pcie_bytes_per_s / moved if moved else None


def _offloaded(model: Model, request: Request) -> tuple[MoeLayer, ...]:
    chosen = request.layers
    return tuple(layer for layer in model.layers if chosen is None or layer.number in chosen)


def _demands(model: Model, request: Request) -> list[LayerDemand]:
    size = element_size(request.dtype)
    return [
        LayerDemand(layer.name, layer.num_experts, layer.row_bytes(size))
        for layer in _offloaded(model, request)
    ]


def _predictor_bytes(model: Model, request: Request) -> int:
    return table_bytes(request.predictor, len(_offloaded(model, request)), model.num_experts)


def _resident_bytes(model: Model, request: Request) -> int:
    size = element_size(request.dtype)
    offloaded = {layer.name for layer in _offloaded(model, request)}
    experts = (layer.total for layer in model.layers if layer.name not in offloaded)
    return sum(volume.num_bytes(size) for volume in (model.weights.dense, *experts))


def _kv_bytes(model: Model, request: Request) -> int:
    return model.kv_cache.bytes_needed(
        request.max_model_len,
        request.concurrency,
        step_tokens=default_step_tokens(request.gpu_bytes),
        element_size=element_size(request.dtype),
    )


def _usable(request: Request) -> int:
    return int(request.gpu_bytes * GPU_UTILISATION)


def _options(demands: Sequence[LayerDemand], free: int, request: Request) -> MoeOffloadConfig:
    """The plugin's options that use this many bytes for slots and staging."""
    chosen: dict[str, Any] = {"predictor": request.predictor}
    if request.layers is not None:
        chosen["layers"] = ranges(request.layers)
    streaming = plan_budget(demands, MoeOffloadConfig(cache_fraction=0))
    if free >= streaming.pool_bytes:
        return MoeOffloadConfig(cache_fraction=1, **chosen)
    increment = sum(demand.row_bytes for demand in demands)
    slots = max(0, free - streaming.device_bytes) // increment
    if slots == 0:
        return MoeOffloadConfig(cache_fraction=0, **chosen)
    return MoeOffloadConfig(gpu_gb=_gib_for(slots, increment), **chosen)


def _gib_for(slots: int, increment: int) -> float:
    """The shortest decimal number of GiB that holds this many slots and not one more."""
    digits = 2
    while True:
        unit = 10**digits
        value = -(-slots * increment * unit // GIB) / unit
        if int(value * GIB) // increment == slots:
            return value
        digits += 1


def _active(num_experts: int, top_k: int, sequences: int) -> float:
    """Expected number of distinct experts that independent, even routing uses in a layer."""
    return num_experts * (1 - (1 - min(top_k, num_experts) / num_experts) ** sequences)


def ranges(numbers: Sequence[int]) -> str:
    """Write ascending numbers as the option ``layers`` takes them: 0-11,20."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)
