"""A plan for people, and the same for programs."""

from collections.abc import Iterable, Iterator
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_moe_offload.plan.changes import Change
from vllm_moe_offload.plan.model import Model, element_size
from vllm_moe_offload.plan.planner import (
    HIT_RATIOS,
    LONG_STEP_TOKENS,
    Plan,
    decode_tokens_per_s,
    prefill_tokens_per_s,
    serve_command,
    sweep_bytes,
)
from vllm_moe_offload.sizes import GIB, format_size


def as_dict(plan: Plan, changes: Iterable[Change]) -> dict[str, Any]:
    """Everything that the plan says, in bytes, tokens and seconds."""
    model, request = plan.model, plan.request
    return {
        "model": request.model,
        "architecture": model.architecture,
        "quantization": model.quantization,
        "dense_bytes": model.weights.dense_bytes,
        "expert_bytes": model.weights.expert_bytes,
        "unused_bytes": model.weights.unused_bytes,
        "bytes_per_expert": model.expert_bytes,
        "row_bytes": max(plan.rows, default=0),
        "moe_layers": len(model.layers),
        "experts_per_layer": model.num_experts,
        "top_k": model.top_k,
        "kv_bytes_per_token": model.kv_cache.bytes_per_token(element_size(request.dtype)),
        "max_model_len": request.max_model_len,
        "concurrency": request.concurrency,
        "slots_per_layer": plan.slots_per_layer,
        "automatic": _automatic(plan) if plan.offloaded else {},
        "fits": plan.fits,
        "gpu": _gpu_memory(plan),
        "host": _host_memory(plan),
        "bounds": _bounds(plan) if plan.offloaded else {},
        "serve": serve_command(plan) if plan.fits else None,
        "serve_borrowing": serve_command(plan, borrowing=True) if _may_borrow(plan) else None,
        "changes": [
            {"change": change.text, "serve": change.plan and serve_command(change.plan)}
            for change in changes
        ],
        "notes": notes(plan),
    }


def _may_borrow(plan: Plan) -> bool:
    """Whether there is a second way to serve: with slots in what the KV cache leaves."""
    return plan.fits and plan.can_borrow and not plan.all_in_slots


def _automatic(plan: Plan) -> dict[str, int]:
    """What the plugin does by default where it cannot borrow from the KV cache."""
    return {
        "slots_per_layer": max(plan.automatic.slots),
        "slot_bytes": plan.automatic.slot_bytes,
        "gpu_needed_bytes": plan.needed_with(plan.automatic),
    }


def _gpu_memory(plan: Plan) -> dict[str, int]:
    return {
        "resident_weights_bytes": plan.resident_bytes,
        "kv_cache_bytes": plan.kv_bytes,
        "predictor_bytes": plan.predictor_bytes,
        "reserve_bytes": plan.reserve_bytes,
        "staging_bytes": plan.budget.staging_bytes,
        "slot_bytes": plan.budget.slot_bytes,
        "needed_bytes": plan.gpu_needed,
        "usable_bytes": plan.gpu_usable,
    }


def _host_memory(plan: Plan) -> dict[str, int]:
    return {
        "pool_bytes": plan.budget.pool_bytes,
        "reserve_bytes": plan.host_needed - plan.budget.pool_bytes,
        "needed_bytes": plan.host_needed,
        "usable_bytes": plan.request.host_bytes,
    }


def _bounds(plan: Plan) -> dict[str, Any]:
    sequences = plan.request.concurrency
    rates = {f"{hit:g}": decode_tokens_per_s(plan, hit) for hit in HIT_RATIOS}
    together = {f"{hit:g}": decode_tokens_per_s(plan, hit, sequences) for hit in HIT_RATIOS}
    return {
        "pcie_bytes_per_s": plan.request.pcie_bytes_per_s,
        "decode_tokens_per_s": rates,
        "decode_tokens_per_s_at_concurrency": together,
        "sweep_s": sweep_bytes(plan) / plan.request.pcie_bytes_per_s,
        "prefill_tokens_per_s": {
            str(tokens): prefill_tokens_per_s(plan, tokens) for tokens in _steps(plan)
        },
    }


def _steps(plan: Plan) -> list[int]:
    return sorted({plan.step_tokens, LONG_STEP_TOKENS})


def notes(plan: Plan) -> list[str]:
    """What the figures leave out, or a reader should know."""
    return [*_model_notes(plan.model), *_plan_notes(plan)]


def _model_notes(model: Model) -> Iterator[str]:
    cache = model.kv_cache
    windows = [layer.window for layer in cache.layers if layer.window]
    if windows:
        yield (
            f"{len(windows)} of {len(cache.layers)} attention layers keep a window of "
            f"{max(windows)} tokens; the KV cache a token is that of a token inside it."
        )
    if cache.state_layers:
        yield (
            f"{cache.state_layers} layers have no KV cache; what they may keep for a whole "
            "sequence is not counted."
        )
    if model.weights.unused_bytes:
        yield (
            f"{format_size(model.weights.unused_bytes)} belong to parts that vLLM does not load by "
            "itself, such as layers that draft tokens; no memory figure has them."
        )
    if len({layer.expert_bytes for layer in model.layers}) > 1:
        yield "Experts differ in size between layers; the largest is given."


def _plan_notes(plan: Plan) -> Iterator[str]:
    if not plan.offloaded:
        return
    if plan.model.quantization is None and max(plan.rows) < plan.model.expert_bytes:
        stored = ", ".join(plan.model.weights.expert_dtypes)
        yield f"Rows are smaller as vLLM serves {stored} in 16 bits; --dtype float32 keeps it."
    if plan.model.quantization is not None:
        yield (
            f"The weights are quantised ({plan.model.quantization}) and stay as stored in pool "
            "and slots; vllm serve refuses the format if this version cannot offload it."
        )
    yield from _notes_on_automatic(plan)
    if plan.all_in_slots:
        yield (
            "All experts have a slot, so nothing crosses PCIe once they are in use: the plugin is "
            "not needed."
        )


def _notes_on_automatic(plan: Plan) -> Iterator[str]:
    automatic = _automatic(plan)
    lacking = automatic["gpu_needed_bytes"] - plan.gpu_usable
    fixed = (
        f"{automatic['slots_per_layer']} of {plan.model.num_experts} experts a layer have a slot, "
        f"{format_size(automatic['slot_bytes'])} in all, "
        + (f"for which {format_size(lacking)} are lacking" if lacking > 0 else "which fits")
    )
    reason = plan.model.kv_cache.why_not_shared
    if reason is None:
        yield "With gpu_gb=auto, the default, experts borrow what the KV cache leaves."
        yield f"Where it cannot be shared, {fixed}."
    else:
        yield f"The KV cache is not shared with experts, as {reason}."
        yield f"With gpu_gb=auto, the default, {fixed}."


def show(plan: Plan, changes: list[Change], console: Console) -> None:
    """Print tables of sizes, memory and bounds, then the answer."""
    console.print(_title(plan), soft_wrap=True)
    console.print(_memory_table(plan))
    if plan.offloaded:
        console.print(_bounds_table(plan))
    for note in notes(plan):
        console.print(Text(f"- {note}", style="dim"), soft_wrap=True)
    if plan.fits:
        console.print(Text(f"\n{_answer(plan)}", style="bold green"))
        console.print(Text(serve_command(plan)), soft_wrap=True)
        if _may_borrow(plan):
            console.print("or let slots borrow whatever the KV cache leaves, as is the default:")
            console.print(Text(serve_command(plan, borrowing=True)), soft_wrap=True)
        return
    console.print(Text(f"\n{_shortage(plan)}", style="bold red"))
    console.print("It would fit with" if changes else "No smaller setting would make it fit.")
    for change in changes:
        console.print(Text(f"- {change.text}", style="bold"), soft_wrap=True)
        if change.plan is not None:
            console.print(Text(f"  {serve_command(change.plan)}"), soft_wrap=True)


def _title(plan: Plan) -> Text:
    model, weights = plan.model, plan.model.weights
    lines = [f"{plan.request.model}: {model.architecture}"]
    if not model.layers:
        lines.append(
            f"A dense model of {format_size(weights.dense_bytes)}: it has no routed experts, so "
            "there is nothing to offload"
        )
    else:
        lines += [
            f"{len(model.layers)} MoE layers of {model.num_experts} experts, {model.top_k} a token",
            f"dense {format_size(weights.dense_bytes)}, "
            f"experts {format_size(weights.expert_bytes)} ({', '.join(weights.expert_dtypes)})",
            f"one expert {format_size(model.expert_bytes)}, "
            f"as a row of the pool {format_size(max(plan.rows))}",
        ]
    kv_bytes = model.kv_cache.bytes_per_token(element_size(plan.request.dtype))
    return Text("\n".join([*lines, f"KV cache {kv_bytes:,} bytes a token"]))


def _memory_table(plan: Plan) -> Table:
    request, budget = plan.request, plan.budget
    table = Table("memory", box=box.SIMPLE_HEAD)
    table.add_column("GiB", justify="right")
    dense = "dense weights" if request.layers is None else "dense weights and experts of layers"
    table.add_row(f"GPU: {dense}", _gib(plan.resident_bytes))
    tokens = f"{request.concurrency} x {request.max_model_len} tokens"
    table.add_row(f"GPU: KV cache for {tokens}", _gib(plan.kv_bytes))
    table.add_row("GPU: reserve for activations and CUDA graphs", _gib(plan.reserve_bytes))
    if plan.offloaded:
        slots = f"{plan.slots_per_layer} of {plan.model.num_experts} experts a layer"
        if plan.predictor_bytes:
            table.add_row(f"GPU: tables of {request.predictor}", _gib(plan.predictor_bytes))
        table.add_row("GPU: staging", _gib(budget.staging_bytes))
        table.add_row(f"GPU: slots at start, {slots}", _gib(budget.slot_bytes))
    usable = f"of {_gib(plan.gpu_usable)} that vLLM uses of {_gib(request.gpu_bytes)}"
    table.add_row(f"GPU: in all, {usable}", _gib(plan.gpu_needed), end_section=True)
    if not plan.offloaded:
        return table
    table.add_row("host: expert pool", _gib(budget.pool_bytes))
    reserve = plan.host_needed - budget.pool_bytes
    table.add_row("host: reserve for the system and vLLM", _gib(reserve))
    table.add_row(f"host: in all, of {_gib(request.host_bytes)}", _gib(plan.host_needed))
    return table


def _bounds_table(plan: Plan) -> Table:
    bounds = _bounds(plan)
    rate = bounds["pcie_bytes_per_s"] / 1e9
    table = Table(f"at most, by PCIe at {rate:g} GB/s", box=box.SIMPLE_HEAD)
    table.add_column("tokens/s", justify="right")
    sequences = plan.request.concurrency
    if sequences > 1:
        table.add_column(f"of {sequences} sequences", justify="right")
    for hit, one in bounds["decode_tokens_per_s"].items():
        cells = [_rate(one)]
        if sequences > 1:
            cells.append(_rate(bounds["decode_tokens_per_s_at_concurrency"][hit]))
        table.add_row(f"decode, {float(hit):.0%} of the active experts in slots", *cells)
    for tokens, value in bounds["prefill_tokens_per_s"].items():
        label = f"prefill, steps of {tokens} tokens"
        label += " (default)" if int(tokens) == plan.step_tokens else " (--max-num-batched-tokens)"
        table.add_row(label, "-" if value is None else _rate(value))
    return table


def _answer(plan: Plan) -> str:
    if plan.options is None:
        return "Fits. No plugin is needed:"
    return "Fits. Serve it with"


def _shortage(plan: Plan) -> str:
    request = plan.request
    missing = [
        (plan.gpu_needed - plan.gpu_usable, "of GPU memory"),
        (plan.host_needed - request.host_bytes, "of host memory"),
    ]
    short = [f"{format_size(count)} {kind}" for count, kind in missing if count > 0]
    return f"Does not fit: it lacks {' and '.join(short)}."


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f}"


def _rate(tokens_per_s: float) -> str:
    return f"{tokens_per_s:,.1f}" if tokens_per_s < 100 else f"{tokens_per_s:,.0f}"
