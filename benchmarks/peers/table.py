"""Results as a table: no figure is typed by hand."""

from collections.abc import Iterable
from typing import Any

from report import Cells, markdown_table

GIB = 1 << 30

_UNKNOWN = "machine too busy"
"""The client did not get to run often enough to time anything."""


def cells(result: dict[str, Any]) -> Cells:
    """The table, its head first."""
    batches = result["batches"]
    head = [
        "system", f"first token of {result['long_prompt']}, ms",
        *(f"tokens/s at {batch}" for batch in batches),
        "GPU GiB", "host GiB", "host taken GiB", "same text",
    ]  # fmt: skip
    return [head] + [_row(row, batches, len(head)) for row in result["systems"]]


def _row(row: dict[str, Any], batches: Iterable[int], width: int) -> list[str]:
    if row["status"] != "measured":
        return [row["system"], row["status"], *[""] * (width - 2)]
    rates = (row["decode_tokens_per_s"][str(batch)] for batch in batches)
    wait = row["first_token_s"]
    memory = (row[name] for name in ("gpu_bytes", "host_bytes", "host_taken_bytes"))
    return [
        row["system"],
        _UNKNOWN if wait is None else f"{wait * 1e3:.1f}",
        *(_UNKNOWN if rate is None else f"{rate:.1f}" for rate in rates),
        *(f"{size / GIB:.2f}" for size in memory),
        _agreement(row),
    ]


def _agreement(row: dict[str, Any]) -> str:
    found = row.get("agreement")
    if found is None:
        return "reference" if row.get("is_reference") else "no reference"
    text = f"{found['same']} of {found['answers']} ({found['by']})"
    if first := found.get("first"):
        text += f", first difference at {first['position']}"
    return text


def notes(result: dict[str, Any]) -> list[str]:
    """What is to be said of how systems ran, and of those that were not measured."""
    found = []
    if (together := result.get("together", 1)) > 1:
        found.append(
            f"Up to {together} vLLM servers started at once; while one was measured the "
            "others were asked nothing. Their memory counts from when all were ready."
        )
    for row in result["systems"]:
        if "remedy" in row:
            found.append(f"{row['system']} {_verb(row['status'])}: {row['remedy']}")
        elif "log" in row:
            found.append(f"{row['system']} failed:\n{row['log']}")
    return found


def _verb(status: str) -> str:
    return status if status.startswith("needs") else f"is {status}"


def markdown(result: dict[str, Any]) -> str:
    """A result file as Markdown."""
    machine = result["machine"]
    head = (
        f"{result['shape_name']}, {result['dtype']}, {result['share']:.0%} of the experts on the "
        f"GPU, {result['new_tokens']} tokens a prompt. {machine['device']}, "
        f"{machine['processor']}, torch {machine['torch']}, vLLM {machine['vllm']}, commit "
        f"{result['commit']}."
    )
    return "\n".join([head, "", *markdown_table(cells(result)), "", *notes(result)])


def show(result: dict[str, Any]) -> None:
    """Print the table and the notes."""
    from report import terminal_table
    from rich.console import Console

    console = Console(width=160)
    console.print(terminal_table(cells(result)))
    for line in notes(result):
        console.print(line, markup=False, highlight=False)
