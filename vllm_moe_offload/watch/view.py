"""One frame of the terminal."""

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vllm_moe_offload.sizes import format_rate, format_size
from vllm_moe_offload.watch.change import Change, hit_ratio
from vllm_moe_offload.watch.sample import LayerSample, Sample

_BAR = 10
_GOOD, _FAIR = 0.9, 0.5


def frame(
    url: str, sample: Sample, change: Change | None, *, age_s: float, problem: str | None = None
) -> RenderableType:
    """Draw a reading and what has changed since the one before.

    Args:
        url: of the server.
        sample: the newest reading.
        change: since the reading before it, None if there is none.
        age_s: seconds since the counters were read.
        problem: why there is no newer reading.
    """
    parts: list[RenderableType] = [_title(url, sample, age_s), _figures(sample, change)]
    if problem is not None:
        parts.append(Text(problem, style="bold red"))
    return Group(*parts, Text(), _layers(sample, change))


def _title(url: str, sample: Sample, age_s: float) -> Text:
    models = ", ".join(sample.models)
    workers = "1 worker" if sample.workers == 1 else f"{sample.workers} workers"
    policies = ", ".join(f"{name} {value}" for name, value in sorted(sample.policies.items()))
    age = f"counted {age_s:.0f} s ago" if age_s >= 1 else "counted just now"
    title = Text(models, style="bold")
    return title.append(f"  {url}\n{workers}, {policies}, {age}", style="not bold")


def _figures(sample: Sample, change: Change | None) -> Table:
    layers = list(sample.layers.values())
    table = Table.grid(padding=(0, 2))
    table.add_row("tokens/s", _tokens(sample, change))
    since_start = f"{_percent(hit_ratio(layers))} since the start"
    table.add_row("hit ratio", f"{_percent(change.hit_ratio if change else None)}, {since_start}")
    table.add_row("moved", _moved(sample, change))
    share = change.transfer_share / sample.workers if change else None
    table.add_row("transfers", f"{_percent(share)} of the time")
    if sample.foreseeable:
        table.add_row("foreseen", _foreseen(sample))
    resident, slots = (sum(getattr(x, field) for x in layers) for field in ("resident", "slots"))
    in_use = f"{resident:.0f} of {slots:.0f} in use, {format_size(int(sample.slot_bytes))}"
    table.add_row("slots", in_use)
    if sample.kv_blocks:
        left = sample.boundary_block / sample.kv_blocks
        lent = format_size(int(sample.lent_bytes))
        table.add_row("KV cache", f"{left:.0%} below the boundary, {lent} lent to experts")
    return table


def _tokens(sample: Sample, change: Change | None) -> str:
    requests = f"{sample.running:.0f} requests running, {sample.waiting:.0f} waiting"
    if change is None:
        return f"-, {requests}"
    return f"{change.generated_per_s:.1f} generated, {change.prompt_per_s:.1f} prompt, {requests}"


def _moved(sample: Sample, change: Change | None) -> str:
    link = sample.link_bytes_per_s
    bound = "PCIe bound not known" if link is None else f"PCIe bound {format_rate(link)}"
    if change is None:
        return f"-, {bound}"
    causes = ", ".join(
        f"{cause} {format_rate(moved)}" for cause, moved in change.bytes_per_s_by_cause.items()
    )
    share = "" if link is None else f"{change.bytes_per_s / link:.0%} of the "
    return f"{format_rate(change.bytes_per_s)} ({causes}), {share}{bound}"


def _foreseen(sample: Sample) -> str:
    coverage = f"{_percent(sample.predicted_hits / sample.foreseeable)} of active experts"
    if not sample.prefetched:
        return f"{coverage}, none moved ahead"
    precision = _percent(sample.prefetch_hits / sample.prefetched)
    return f"{coverage}, {precision} of those moved ahead were read"


def _layers(sample: Sample, change: Change | None) -> Columns:
    recent = change.hit_ratio_by_layer if change else {}
    width = max(map(len, sample.layers), default=0)
    cells = [
        _cell(layer.rjust(width), recent.get(layer), counts)
        for layer, counts in sample.layers.items()
    ]
    return Columns(cells, padding=(0, 3), column_first=True)


def _cell(name: str, recent: float | None, counts: LayerSample) -> Text:
    """A layer's bar: bright for the last seconds, dim for the whole time if it was idle."""
    shown = hit_ratio([counts]) if recent is None else recent
    filled = round(_BAR * (shown or 0))
    style = "red" if (shown or 0) < _FAIR else "green" if (shown or 0) >= _GOOD else "yellow"
    bar = Text(f"layer {name} ").append("█" * filled, style="dim" if recent is None else style)
    bar.append("░" * (_BAR - filled), style="dim")
    percent = _percent(shown).rjust(4)
    return bar.append(f" {percent} {counts.resident:.0f}/{counts.slots:.0f}")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
