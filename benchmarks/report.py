"""Results as tables, for the terminal and for ``README.md``: no figure is typed by hand."""

from collections.abc import Sequence
from typing import Any

from requirements import size_of

OUTCOME = {True: "pass", False: "**FAIL**", None: "not measured"}

Cells = list[list[str]]


def target_table(verdicts: Sequence[dict[str, Any]]) -> Cells:
    """The table of targets, its head first."""
    head = ["case", "target", "measured", "result"]
    return [head] + [
        [
            verdict["case"],
            verdict["target"],
            _worst(verdict["values"]) if len(verdict["values"]) > 8 else _values(verdict["values"]),
            OUTCOME[verdict["passed"]],
        ]
        for verdict in verdicts
    ]


def _values(values: dict[str, float | None]) -> str:
    return ", ".join(f"{name}: {_value(value)}" for name, value in values.items())


def _value(value: float | str | None) -> str:
    return "?" if value is None else value if isinstance(value, str) else f"{value:.3f}"


def _worst(values: dict[str, float | None]) -> str:
    """The span of many values, of which larger is better."""
    known = {name: value for name, value in values.items() if value is not None}
    if not known:
        return ""
    low, high = min(known, key=lambda n: known[n]), max(known, key=lambda n: known[n])
    return f"{known[low]:.2f} times ({low}) to {known[high]:.2f} times ({high})"


def row_table(rows: Sequence[dict[str, Any]]) -> Cells:
    """All rows with their bounds, the head first."""
    head = ["configuration", "case", "ms", "t_res ms", "cpu-offload ms", "GB moved", "GB/s",
            "hits", "t / t_res", "of sum", "of max"]  # fmt: skip
    return [head] + [_cells(row) for row in rows if row.get("case") not in (None, "start")]


def _cells(row: dict[str, Any]) -> list[str]:
    moved = row.get("bytes")
    return [
        row["configuration"],
        f"{row['case']} {size_of(row)}{', confined' if row.get('confined') else ''}",
        f"{row['seconds'] * 1e3:.3f}",
        _milliseconds(row.get("resident_seconds")),
        _milliseconds(row.get("cpu_offload_seconds")),
        "" if moved is None else f"{moved / 1e9:.2f}",
        "" if not moved else f"{moved / row['seconds'] / 1e9:.1f}",
        f"{row['hit_ratio']:.3f}" if "hit_ratio" in row else "",
        *(f"{row[n]:.3f}" if n in row else "" for n in ("to_resident", "of_sum_bound",
                                                        "of_max_bound")),
    ]  # fmt: skip


def comparison_table(rows: Sequence[dict[str, Any]]) -> Cells:
    """Engines over the same steps, the head first."""
    head = ["configuration", "batch", "ms", "tokens/s", "of stock", "hits", "ahead", "covered",
            "GB moved", "GB/s", "hidden"]  # fmt: skip
    return [head] + [_compared(row) for row in rows]


def _compared(row: dict[str, Any]) -> list[str]:
    moved, hits = row.get("bytes"), row.get("hit_ratio")
    return [
        row["configuration"],
        str(row["batch"]),
        f"{row['seconds'] * 1e3:.2f}",
        f"{row['tokens_per_second']:.1f}",
        f"{row['of_stock']:.2f} x" if "of_stock" in row else "",
        "" if hits is None else f"{hits:.3f}",
        f"{row['ahead_ratio']:.3f}" if row.get("ahead_ratio") else "",
        f"{row['coverage']:.3f}" if row.get("coverage") else "",
        "" if moved is None else f"{moved / 1e9:.3f}",
        "" if not moved else f"{moved / row['seconds'] / 1e9:.1f}",
        f"{row['hidden']:.0%}" if "hidden" in row else "",
    ]


def notes(result: dict[str, Any]) -> list[str]:
    """What was replayed, and what engines have said of themselves, as a list of Markdown."""
    if result.get("suite") != "prediction":
        return []
    known = result["learned"] or "nothing"
    about = [
        f"- {result['trace']} in {shape['num_layers']} layers; before it predictors knew {known}."
        for shape in result["shapes"].values()
    ]
    said = {(r["configuration"], line): None for r in result["rows"] for line in r.get("said", [])}
    return ["", *about, *(f"- {configuration}: {line}" for configuration, line in said)]


def rows_of(result: dict[str, Any]) -> Cells:
    """The rows of a result, in the table of its suite."""
    table = comparison_table if result.get("suite") == "prediction" else row_table
    return table(result["rows"])


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.2f}"


def failures(processes: Sequence[dict[str, Any]]) -> list[str]:
    """One line for every process that failed."""
    return [f"{p['configuration']}: {p['exit']}" for p in processes if p["exit"] != 0]


def markdown(result: dict[str, Any]) -> str:
    """A result file as Markdown."""
    machine = result["machine"]
    lines = [
        f"{machine['device']}, {machine['processor']}, torch {machine['torch']}, vLLM "
        f"{machine['vllm']}, commit {result['commit']}. Pinned copies of 9 MiB: "
        f"{max(result['copy_gb_s'], default=0):.1f} GB/s.",
        "",
        *(markdown_table(target_table(result["targets"])) if result["targets"] else []),
        "",
        *markdown_table(rows_of(result)),
        *notes(result),
    ]
    if failed := failures(result["processes"]):
        lines += ["", "Failed: " + "; ".join(failed)]
    return "\n".join(lines)


def markdown_table(cells: Cells) -> list[str]:
    """A table as lines of Markdown."""
    head, *body = cells
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body)]


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    from rich.console import Console

    console = Console(width=160)
    for cells in (rows_of(result), target_table(result["targets"])):
        if len(cells) > 1:
            console.print(terminal_table(cells))
    for line in failures(result["processes"]):
        console.print("failed:", line)


def terminal_table(cells: Cells) -> Any:
    """A table for the terminal."""
    from rich.table import Table

    table = Table(*cells[0])
    for row in cells[1:]:
        table.add_row(*(cell.replace("**", "") for cell in row))
    return table
