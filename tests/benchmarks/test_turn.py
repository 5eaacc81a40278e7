"""Who is timed while others wait."""

import select
import subprocess
import sys

from turn import TURN_FILE, my_turn

HOLD = """
import sys
from turn import my_turn
with my_turn():
    print("mine", flush=True)
    sys.stdin.readline()
"""


def holder(monkeypatch):
    """A process that has its turn until it is told to end."""
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    return subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_one_has_its_turn_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setenv(TURN_FILE, str(tmp_path / "turn"))
    first = holder(monkeypatch)
    assert first.stdout.readline() == "mine\n"
    second = holder(monkeypatch)
    assert select.select([second.stdout], [], [], 2) == ([], [], [])
    first.communicate("\n")
    assert second.stdout.readline() == "mine\n"
    second.kill()
    second.communicate()
    with my_turn():  # a turn ends with who had it
        pass


def test_nobody_waits_where_no_file_is_named(monkeypatch):
    monkeypatch.delenv(TURN_FILE, raising=False)
    with my_turn(), my_turn():
        pass
