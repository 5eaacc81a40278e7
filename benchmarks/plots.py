"""How time grows, drawn from a result file of the suite ``growth``.

Three figures: against the batch of a decode step, the length of a prompt, and the share of the
experts in slots. Solid lines are measured, dotted ones the bound: the time of the same case with
all experts on the GPU, or that of the moved bytes at the rate of the link, whichever is larger.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from requirements import size_of

Row = dict[str, Any]

FORMAT = "svg"


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """Draw the figures of one result file.

    Returns:
        The files, for those figures that the rows are enough for.
    """
    rows = [row for row in result["rows"] if not row.get("confined") and "seconds" in row]
    return [
        path
        for path in (
            _by_size(rows, "decode", "sequences in the batch", folder / f"growth-batch.{FORMAT}"),
            _by_size(rows, "prefill", "tokens of the prompt", folder / f"growth-prompt.{FORMAT}"),
            _by_share(rows, folder / f"growth-cache.{FORMAT}"),
        )
        if path is not None
    ]


def _by_size(rows: Iterable[Row], case: str, label: str, path: Path) -> Path | None:
    chosen = [row for row in rows if row["case"] == case]
    if len({size_of(row) for row in chosen}) < 2:
        return None
    figure, axes = _figure(label)
    axes.set_xscale("log", base=2)
    for name, group in _grouped(chosen, lambda row: row["configuration"]):
        line = sorted(group, key=size_of)
        sizes = [size_of(row) for row in line]
        drawn = axes.plot(sizes, _times(line), marker="o", markersize=3, label=name)
        _bound(axes, sizes, line, drawn[0].get_color())
    return _saved(figure, axes, path)


def _by_share(rows: Iterable[Row], path: Path) -> Path | None:
    chosen = [row for row in rows if row["server"] == "plugin" and _marked(row)]
    if len({row["share"] for row in chosen}) < 2:
        return None
    figure, axes = _figure("share of the experts in slots, %")
    for name, group in _grouped(chosen, lambda row: f"{row['case']} {size_of(row)}"):
        line = sorted(group, key=lambda row: row["share"])
        shares = [100 * row["share"] for row in line]
        drawn = axes.plot(shares, _times(line), marker="o", markersize=3, label=name)
        _bound(axes, shares, line, drawn[0].get_color())
    return _saved(figure, axes, path)


def _marked(row: Row) -> bool:
    """Of many sizes a few, so that the lines can be told apart."""
    return size_of(row) in ((1, 8, 32, 256) if row["case"] == "decode" else (128, 8192, 32_768))


def _grouped(rows: list[Row], name_of: Callable[[Row], str]) -> list[tuple[str, list[Row]]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(name_of(row), []).append(row)
    return list(groups.items())


def _times(rows: Iterable[Row]) -> list[float]:
    return [row["seconds"] * 1e3 for row in rows]


def _bound(axes: Any, places: list[Any], rows: list[Row], colour: Any) -> None:
    known = [
        (place, max(row["resident_seconds"], row["copy_bound_seconds"]) * 1e3)
        for place, row in zip(places, rows, strict=True)
        if "copy_bound_seconds" in row
    ]
    if known:
        axes.plot(*zip(*known, strict=True), linestyle=":", color=colour, linewidth=1)


def _figure(label: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.set_yscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel("ms")
    axes.grid(visible=True, which="both", alpha=0.2)
    return figure, axes


def _saved(figure: Any, axes: Any, path: Path) -> Path:
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return save(figure, path)


def save(figure: Any, path: Path) -> Path:
    """Write a figure and return its path."""
    import matplotlib

    # The same rows give the same file: no date, no random names.
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, format=FORMAT, metadata={"Date": None})
    return path
