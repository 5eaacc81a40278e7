"""Results as points: tokens a second by batch, and the time to the first token."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plots import FORMAT, save


def draw(result: dict[str, Any], path: Path) -> Path | None:
    """Draw the measured systems beside the result file ``path``.

    Returns:
        The figure's file, None if nothing was measured.
    """
    from matplotlib.figure import Figure

    rows = [row for row in result["systems"] if row["status"] == "measured"]
    if not rows:
        return None
    figure = Figure(figsize=(9, 1.4 + 0.4 * len(rows)), layout="constrained")
    rates, waits = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for batch in result["batches"]:
        values = [row["decode_tokens_per_s"][str(batch)] for row in rows]
        _points(rates, values, f"batch {batch}")
    _points(waits, [row["first_token_s"] and row["first_token_s"] * 1e3 for row in rows], None)
    rates.set_yticks(range(len(rows)), [row["system"] for row in rows])
    rates.invert_yaxis()
    rates.set_xlabel("decoded tokens/s")
    waits.set_xlabel(f"first token of {result['long_prompt']}, ms")
    figure.legend(
        *rates.get_legend_handles_labels(), loc="outside upper center", ncols=9, fontsize="small"
    )
    return save(figure, path.with_suffix(f".{FORMAT}"))


def _points(axes: Any, values: Sequence[float | None], label: str | None) -> None:
    """One point a system, in its row; none where the value is not known."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    known = [(value, place) for place, value in enumerate(values) if value is not None]
    axes.scatter([value for value, _ in known], [place for _, place in known], label=label)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(visible=True, alpha=0.3)
