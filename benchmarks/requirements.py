"""What is promised of speed, and whether the rows of a run keep it.

A row is set beside ``t_res``, the time of the same case by vLLM with all experts on the GPU, and
beside the time that the bytes it moved take at the rate of the link: pinned copies of 9 MiB in the
same run. Where nothing can overlap the bound is the sum, elsewhere the larger of the two.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

BOUNDS = {
    "t / t_res": "at most",
    "(t_res + bytes / BW) / t": "at least",
    "max(t_res, bytes / BW) / t": "at least",
    "us": "at most",
}
"""What is judged, and on which side of the limit it must lie."""


@dataclass(frozen=True)
class Requirement:
    """One row of the table: some cases and the limit of their value."""

    text: str
    case: str
    sizes: tuple[int, ...]
    value: str
    limit: float
    shares: tuple[float, ...] = (1.0,)
    confined: bool = False

    def covers(self, row: Row) -> bool:
        """Whether a row is one of its cases."""
        return (
            row["server"] in ("plugin", "resolve")
            and row["case"] == self.case
            and row["share"] in self.shares
            and size_of(row) in self.sizes
            and bool(row.get("confined")) == self.confined
        )

    @property
    def target(self) -> str:
        """The limit in words."""
        if self.value == "us":
            return f"at most {self.limit:g} us a layer"
        return f"{self.value} {BOUNDS[self.value]} {self.limit:.2f}"

    def holds(self, value: float) -> bool:
        """Whether a value keeps the limit."""
        return value <= self.limit if BOUNDS[self.value] == "at most" else value >= self.limit

    @property
    def cases(self) -> int:
        """How many rows it takes to tell."""
        return len(self.sizes) * len(self.shares)


def requirements(chunk: int) -> list[Requirement]:
    """All of them; ``chunk`` is the number of tokens that a server takes at once."""
    to_resident, added, larger, us = BOUNDS
    some = (0.25, 0.5)
    return [
        Requirement(
            "100 % in slots, decode batch 1 / 8 / 32", "decode", (1, 8, 32), to_resident, 1.05
        ),
        Requirement(
            "50 % in slots, routing confined to residents, decode batch 1 / 8",
            "decode", (1, 8), to_resident, 1.12, (0.5,), confined=True,
        ),
        Requirement(
            f"100 % in slots, {chunk}-token prefill", "prefill", (chunk,), to_resident, 1.10
        ),
        Requirement(
            "25 % and 50 % in slots, decode batch 1 and 8", "decode", (1, 8), added, 0.93, some
        ),
        Requirement(
            "25 % and 50 %, decode batch 32 and 128", "decode", (32, 128), larger, 0.88, some
        ),
        Requirement(
            f"25 % and 50 %, {chunk}-token prefill", "prefill", (chunk,), larger, 0.95, some
        ),
        Requirement(
            f"0, 25 and 50 % in slots, {4 * chunk}-token prompt in {chunk}-token chunks",
            "prefill", (4 * chunk,), larger, 0.95, (0.0, *some),
        ),
        Requirement("resolve + gather, all hits, batch 1", "resolve", (1,), us, 8.0),
        Requirement("resolve + gather, all hits, batch 32", "resolve", (32,), us, 16.0),
    ]  # fmt: skip


FASTER = "every case above"
FASTER_TARGET = "faster than stock --cpu-offload-gb with the same share resident"


def size_of(row: Row) -> int | None:
    """Sequences of a decode step, or tokens of a prompt."""
    return row.get("tokens") or row.get("batch")


def set_beside_bounds(rows: Iterable[Row], rate: float) -> list[Row]:
    """Give every row of the plugin its bounds, and the stock server's time if it was measured.

    Args:
        rows: all rows of a run.
        rate: bytes a second of the link.
    """
    rows = list(rows)
    resident = {_case(row): row["seconds"] for row in _of(rows, "resident")}
    offloaded = {(row["share"], *_case(row)): row["seconds"] for row in _of(rows, "cpu-offload")}
    judged = []
    for row in rows:
        t_res = resident.get(_case(row))
        if row.get("server") != "plugin" or "bytes" not in row or t_res is None:
            judged.append(row)
            continue
        bound = row["bytes"] / rate
        judged.append(
            {
                **row,
                "resident_seconds": t_res,
                "copy_bound_seconds": bound,
                "to_resident": row["seconds"] / t_res,
                "of_sum_bound": (t_res + bound) / row["seconds"],
                "of_max_bound": max(t_res, bound) / row["seconds"],
                "cpu_offload_seconds": offloaded.get((row["share"], *_case(row))),
            }
        )
    return judged


def _of(rows: Iterable[Row], server: str) -> Iterator[Row]:
    return (row for row in rows if row.get("server") == server and row.get("case") != "start")


def _case(row: Row) -> tuple[Any, ...]:
    """Equal for rows of two servers that may be compared."""
    return row["shape"], row.get("case"), size_of(row), row.get("confined")


_FIELDS = {
    "t / t_res": "to_resident",
    "(t_res + bytes / BW) / t": "of_sum_bound",
    "max(t_res, bytes / BW) / t": "of_max_bound",
}


def value_of(requirement: Requirement, row: Row) -> float | None:
    """What a row scores, None if a bound of it was not measured."""
    if requirement.value == "us":
        return row["seconds"] * 1e6
    return row.get(_FIELDS[requirement.value])


def verdicts(rows: list[Row], chunk: int) -> list[dict[str, Any]]:
    """The table: each requirement with the values of its cases and whether it is kept.

    ``passed`` is None where a case has not been measured and the measured ones pass.
    """
    rows = [row for row in rows if "seconds" in row]
    table, covered = [], []
    for requirement in requirements(chunk):
        found = [row for row in rows if requirement.covers(row)]
        values = {label(row): value_of(requirement, row) for row in found}
        covered += found
        table.append(
            {
                "case": requirement.text,
                "target": requirement.target,
                "values": values,
                "passed": _all(
                    [None if v is None else requirement.holds(v) for v in values.values()],
                    requirement.cases,
                ),
            }
        )
    return [*table, _faster(covered)]


def _faster(rows: list[Row]) -> dict[str, Any]:
    """Whether every judged row beats the stock server that keeps as many experts resident."""
    compared = [row for row in rows if row["server"] == "plugin" and row["share"] < 1.0]
    speedups = {label(row): _speedup(row) for row in compared}
    outcome = _all([None if s is None else s > 1 for s in speedups.values()], 1)
    return {"case": FASTER, "target": FASTER_TARGET, "values": speedups, "passed": outcome}


def _speedup(row: Row) -> float | None:
    stock = row.get("cpu_offload_seconds")
    return None if stock is None else stock / row["seconds"]


SAME_HITS = "hits of a replayed trace"
SAME_HITS_TARGET = "exactly those of vllm-moe-offload simulate"


def same_hits(rows: Iterable[Row], simulated: dict[float, int]) -> dict[str, Any]:
    """Whether the engine's hits are the simulator's.

    Args:
        rows: rows of replayed traces.
        simulated: hits of the simulator by share in slots.
    """
    found = [row for row in rows if row.get("case") == "trace"]
    outcomes = [row["hits"] == simulated[row["share"]] for row in found]
    values = {
        f"{row['share']:.0%}": f"{row['hits']} of {row['active']}, simulated "
        f"{simulated[row['share']]}" for row in found
    }  # fmt: skip
    passed = _all(list(outcomes), len(found))
    if passed and {row["share"] for row in found} != simulated.keys():
        passed = None
    return {"case": SAME_HITS, "target": SAME_HITS_TARGET, "values": values, "passed": passed}


def _all(outcomes: list[bool | None], needed: int) -> bool | None:
    if False in outcomes:
        return False
    return None if None in outcomes or len(outcomes) < needed else True


def label(row: Row) -> str:
    """Share and case of a row in a few words."""
    parts = [f"{row['share']:.0%}"] if row["server"] != "resolve" else []
    parts.append(f"{row['case']} {size_of(row)}")
    if row.get("confined"):
        parts.append("confined")
    return " ".join(parts)
