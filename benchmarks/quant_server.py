"""``timed_server.py`` for quantised models, with one share in slots after the other.

Called by ``jobs.py``.
"""

import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps it off

import timed_server
from exchange import Exchange, in_turn
from quant_shapes import QUANT_SHAPES
from shapes import SHAPES
from timed_server import Talk


def time_shares(job: dict[str, Any], folder: Path, talk: Talk) -> None:
    """Time the same steps with each of several engines over one server's weights.

    The first one must be the server's own.
    """
    server, strategy = timed_server.started(job, folder, talk)
    exchange = Exchange(server.worker())
    talk.wait_for_turn()
    options = job["settings"]["moe_offload"]

    def run(asked: dict[str, Any]) -> None:
        nonlocal options
        start = time.perf_counter()
        if asked["options"] != options:
            exchange.build(asked["options"])
            options = asked["options"]
        about = {
            "configuration": asked["name"],
            "share": asked["share"],
            "exchange_seconds": time.perf_counter() - start,
            "row_bytes": row_bytes(server.stats()),
        }
        for row in timed_server.measured(server, strategy, {**job, "share": asked["share"]}):
            talk.note({**about, **row})

    in_turn(job["engines"], run, talk)


def row_bytes(stats: dict[str, int] | None) -> float:
    """Bytes that one expert moves."""
    assert stats is not None
    return stats["pool_bytes"] / stats["experts_in_pool"]


if __name__ == "__main__":
    SHAPES.update(QUANT_SHAPES)
    timed_server.KINDS["shares"] = time_shares
    sys.exit(timed_server.main())
