"""Results as bars: tokens a second by batch, and the time to the first token."""

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
    figure = Figure(figsize=(9, 3.2 + 0.3 * len(rows)), layout="constrained")
    rates, waits = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    places = range(len(rows))
    batches = result["batches"]
    height = 0.8 / len(batches)
    for number, batch in enumerate(batches):
        values = [row["decode_tokens_per_s"][str(batch)] or 0 for row in rows]
        offsets = [place - 0.4 + height * (number + 0.5) for place in places]
        rates.barh(offsets, values, height, label=f"batch {batch}")
    waits.barh(places, [row["first_token_s"] * 1e3 for row in rows], 0.6, color="grey")
    rates.set_yticks(places, [row["system"] for row in rows])
    rates.invert_yaxis()
    rates.set_xlabel("decoded tokens/s")
    waits.set_xlabel(f"first token of a prompt of {result['long_prompt']} tokens, ms")
    for axes in (rates, waits):
        axes.set_xscale("log")
        axes.grid(visible=True, axis="x", which="both", alpha=0.2)
    figure.legend(*rates.get_legend_handles_labels(), loc="outside upper right", fontsize="small")
    return save(figure, path.with_suffix(f".{FORMAT}"))
