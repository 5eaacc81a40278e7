"""The smallest changes that would make a model fit, each tried by planning again."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from vllm_moe_offload.plan.model import Model, element_size
from vllm_moe_offload.plan.planner import Plan, Request, make_plan, ranges
from vllm_moe_offload.sizes import GIB, format_size

_LENGTH_STEP = 256
_MIN_LENGTH = 512
_MAX_GIB = 1 << 20

_Knob = Callable[[Model, Request], Request | None]


@dataclass(frozen=True)
class Change:
    """A change in words, and the plan with it; None where only other files would tell."""

    text: str
    plan: Plan | None


def smallest_changes(plan: Plan) -> list[Change]:
    """Find changes of which any one makes the plan fit, the cheapest first.

    Options come before hardware. If no single change is enough, each comes with the host memory
    that it needs beside it. Empty if the plan fits.
    """
    if plan.fits:
        return []
    model, request = plan.model, plan.request
    more_host = replace(request, host_bytes=_enough_host(plan))
    found = list(_fitting(model, request))
    if not found and more_host != request:
        found = list(_fitting(model, more_host))
    changes = [Change(_difference(request, other), make_plan(model, other)) for other in found]
    return changes + list(_smaller_experts(plan))


def _fitting(model: Model, request: Request) -> Iterator[Request]:
    knobs: tuple[_Knob, ...] = (
        _fewer_sequences,
        _shorter_sequences,
        _both,
        _narrower_type,
        _more_on_gpu,
        _larger_host,
        _larger_gpu,
    )
    for knob in knobs:
        changed = knob(model, request)
        if changed is not None:
            yield changed


def _fits(model: Model, request: Request) -> bool:
    return make_plan(model, request).fits


def _fewer_sequences(model: Model, request: Request) -> Request | None:
    def with_count(count: int) -> Request:
        return replace(request, concurrency=request.concurrency - count)

    return _first(model, with_count, request.concurrency - 1)


def _shorter_sequences(model: Model, request: Request) -> Request | None:
    steps = math.ceil(request.max_model_len / _LENGTH_STEP)

    def with_count(count: int) -> Request:
        length = (steps - count) * _LENGTH_STEP
        return replace(request, max_model_len=min(length, request.max_model_len))

    return _first(model, with_count, steps - _MIN_LENGTH // _LENGTH_STEP)


def _both(model: Model, request: Request) -> Request | None:
    """One short sequence, where neither is enough alone."""
    if request.concurrency == 1 or _fewer_sequences(model, request) is not None:
        return None
    if _shorter_sequences(model, request) is not None:
        return None
    return _shorter_sequences(model, replace(request, concurrency=1))


def _narrower_type(model: Model, request: Request) -> Request | None:
    if element_size(request.dtype) == 2:
        return None
    changed = replace(request, dtype="bfloat16")
    return changed if _fits(model, changed) else None


def _more_on_gpu(model: Model, request: Request) -> Request | None:
    """Keep all experts on the GPU or else those of the last layers, as few as the host needs."""
    numbers = [layer.number for layer in model.layers]
    known = tuple(number for number in numbers if number is not None)
    if request.layers is not None or len(known) < len(numbers):
        return None

    def with_count(count: int) -> Request:
        return replace(request, layers=known[: len(known) - count])

    if known and _fits(model, with_count(len(known))):
        return with_count(len(known))
    # Too few overflow the host and too many the GPU, so the first that fits the host decides.
    for count in range(1, len(known)):
        plan = make_plan(model, with_count(count))
        if plan.host_needed <= request.host_bytes:
            return plan.request if plan.fits else None
    return None


def _larger_host(model: Model, request: Request) -> Request | None:
    enough = _enough_host(make_plan(model, request))
    changed = replace(request, host_bytes=enough)
    return changed if enough > request.host_bytes and _fits(model, changed) else None


def _enough_host(plan: Plan) -> int:
    """Whole GiB of host memory that hold the pool, at least as much as there is."""
    return max(plan.request.host_bytes, math.ceil(plan.host_needed / GIB) * GIB)


def _larger_gpu(model: Model, request: Request) -> Request | None:
    first = math.floor(request.gpu_bytes / GIB)

    def with_count(count: int) -> Request:
        return replace(request, gpu_bytes=(first + count) * GIB)

    return _first(model, with_count, _MAX_GIB)


def _first(model: Model, with_count: Callable[[int], Request], largest: int) -> Request | None:
    """Try the smallest count from 1 that fits, given that every larger one does too."""
    if largest < 1 or not _fits(model, with_count(largest)):
        return None
    low, high = 1, largest
    while low < high:
        middle = (low + high) // 2
        if _fits(model, with_count(middle)):
            high = middle
        else:
            low = middle + 1
    return with_count(high)


def _smaller_experts(plan: Plan) -> Iterator[Change]:
    """How narrow the experts of another checkpoint would have to be for this host."""
    request = plan.request
    only_host_is_short = plan.gpu_needed <= plan.gpu_usable
    if plan.model.quantization is not None or not only_host_is_short:
        return
    pool = plan.budget.pool_bytes
    room = request.host_bytes - (plan.host_needed - pool)
    bits = math.floor(8 * element_size(request.dtype) * room / pool * 10) / 10
    if 2 <= bits < 16:  # more is a matter of --dtype
        yield Change(f"a checkpoint whose experts take at most {bits:g} bits a weight", None)


def _difference(before: Request, after: Request) -> str:
    parts = []
    if after.concurrency != before.concurrency:
        parts.append(f"--concurrency {after.concurrency} instead of {before.concurrency}")
    if after.max_model_len != before.max_model_len:
        parts.append(f"--max-model-len {after.max_model_len} instead of {before.max_model_len}")
    if after.dtype != before.dtype:
        parts.append(f"--dtype {after.dtype}")
    if after.layers == ():
        parts.append("no plugin, as the GPU holds all experts")
    elif after.layers is not None and after.layers != before.layers:
        parts.append(f"only layers {ranges(after.layers)} offloaded, the other experts on the GPU")
    if after.host_bytes != before.host_bytes:
        least, given = format_size(after.host_bytes), format_size(before.host_bytes)
        parts.append(f"{least} of host memory instead of {given}")
    if after.gpu_bytes != before.gpu_bytes:
        least, given = format_size(after.gpu_bytes), format_size(before.gpu_bytes)
        parts.append(f"a GPU of {least} instead of {given}")
    return " and ".join(parts)
