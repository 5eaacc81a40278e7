"""What the demo shows: progress, texts, figures."""

from typing import Self

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_moe_offload.demo.conversation import Answer, Outcome


class Progress:
    """Shows seconds and what the server does, in place or, if not on a terminal, now and then.

    Args:
        console: where to.
    """

    _INTERVAL_S = 5.0

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status = console.status("  starting")
        self._next_s = self._INTERVAL_S

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._status.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._status.stop()

    def __call__(self, seconds: float, message: str) -> None:
        """Show how long it has taken and the server's last message."""
        text = Text(f"  {seconds:3.0f} s  {message}")
        text.truncate(self._console.width - 4, overflow="ellipsis")
        if self._console.is_terminal:
            self._status.update(text)
        elif seconds >= self._next_s:
            self._next_s += self._INTERVAL_S
            self._console.print(text)


def texts_table(offloaded: Outcome, stock: Outcome) -> Table:
    """Every answer once; both texts where the servers differ."""
    table = Table("request", "prompt", "text", box=box.SIMPLE)
    for ours, theirs in zip(offloaded.answers, stock.answers, strict=True):
        same = ours.token_ids == theirs.token_ids
        text = _one_line(ours.text) if same else _difference(ours, theirs)
        kind = "chat" if ours.request.is_chat else "completion"
        table.add_row(kind, Text(_one_line(ours.request.text)), Text(text))
    return table


def _difference(ours: Answer, theirs: Answer) -> str:
    pairs = zip(ours.token_ids, theirs.token_ids, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), "the end")
    return (
        f"token ids differ from position {first} on\n"
        f"moe-offload: {_one_line(ours.text)}\nstock: {_one_line(theirs.text)}"
    )


def _one_line(text: str) -> str:
    # A random model generates control characters and broken UTF-8 too.
    printable = (c if c.isprintable() and c != "\ufffd" else " " for c in text)
    return " ".join("".join(printable).split())


def figures_table(offloaded: Outcome, stock: Outcome) -> Table:
    """What the plugin counted, and the time of both servers."""
    table = Table("", "moe-offload", "stock vLLM", box=box.SIMPLE)
    for column in table.columns[1:]:
        column.justify = "right"
    stats = offloaded.stats
    for title, value in (
        ("experts in pool", f"{stats['experts_in_pool']}"),
        ("experts in slots", f"{stats['resident']} of {stats['slots']}"),
        ("hits", f"{stats['hits']}"),
        ("misses", f"{stats['misses']}"),
        ("bytes moved", f"{stats['bytes_moved'] / 2**20:.1f} MiB"),
    ):
        table.add_row(title, value, "-")
    times = (f"{outcome.ms_per_token:.2f} ms" for outcome in (offloaded, stock))
    table.add_row(f"time a token, {len(stock.answers)} requests at once", *times)
    return table
