"""A server of the suite ``budget`` over time: boundary, hits, use of the KV cache, and speed."""

from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from plots import save

Row = dict[str, Any]

SHOWN = "auto"

NARROW = 0.08
"""Share of the whole time below which a phase has no room for its name."""


def draw(result: dict[str, Any], path: Path) -> Path | None:
    """Draw the server that moves its boundary.

    Returns:
        The file, None if it was not measured.
    """
    series = next(
        (row["samples"] for row in result["phases"]
         if row["case"] == "samples" and row["configuration"] == SHOWN),
        [],
    )  # fmt: skip
    if len(series) < 2:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 8), layout="constrained")
    blocks, hits, speed = figure.subplots(3, sharex=True)
    seconds = [row["seconds"] for row in series]
    _blocks(blocks, seconds, series)
    middle = [(a["seconds"] + b["seconds"]) / 2 for a, b in pairwise(series)]
    hits.plot(middle, [_ratio(a, b) for a, b in pairwise(series)])
    hits.set_ylabel("hit ratio")
    hits.set_ylim(0, 1)
    speed.plot(middle, [_speed(a, b) for a, b in pairwise(series)])
    speed.set_ylabel("generated tokens/s")
    speed.set_yscale("symlog", linthresh=10)
    speed.set_xlabel("seconds")
    for axes in (blocks, hits, speed):
        axes.grid(visible=True, alpha=0.2)
        _phases(axes, series)
    for name, rows in groupby(series, key=lambda row: row["phase"]):
        start, *_, end = [row["seconds"] for row in rows] * 2
        if end - start > NARROW * (seconds[-1] - seconds[0]):
            blocks.annotate(name, (start, 1.02), xycoords=("data", "axes fraction"))
    return save(figure, path)


def _blocks(axes: Any, seconds: list[float], series: list[Row]) -> None:
    total = series[0]["blocks"]
    axes.fill_between(
        seconds, [row["first_block"] for row in series], total, alpha=0.3, label="experts"
    )
    axes.fill_between(
        seconds, 0, [row["used_blocks"] for row in series], alpha=0.5, label="requests"
    )
    axes.plot(seconds, [row["first_block"] for row in series], label="boundary")
    axes.set_ylabel("KV blocks")
    axes.set_ylim(0, total)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def _phases(axes: Any, series: list[Row]) -> None:
    for before, after in pairwise(series):
        if before["phase"] != after["phase"]:
            axes.axvline(after["seconds"], color="black", linewidth=0.8, alpha=0.5)


def _ratio(before: Row, after: Row) -> float:
    active = after["active"] - before["active"]
    return (after["hits"] - before["hits"]) / active if active > 0 else float("nan")


def _speed(before: Row, after: Row) -> float:
    return (after["generated"] - before["generated"]) / (after["seconds"] - before["seconds"])
