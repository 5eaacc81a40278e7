"""Processes that are killed, and what tells others about it."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from vllm_moe_offload.lifeline import Claim, end_with_parent, is_orphaned

PARENT = """
import multiprocessing, os, signal, sys, time
from pathlib import Path
from vllm_moe_offload.lifeline import end_with_parent

def child(folder, handles):
    if handles != "default":
        def handler(*_):
            (folder / "asked").touch()
            if handles == "ends":
                sys.exit()
        signal.signal(signal.SIGTERM, handler)
    end_with_parent(grace_s=5.0)
    (folder / "draft").write_text(str(os.getpid()))
    (folder / "draft").rename(folder / "pid")
    while True:
        time.sleep(0.05)

if __name__ == "__main__":
    method, handles, folder = sys.argv[1:]
    context = multiprocessing.get_context(method)
    context.Process(target=child, args=(Path(folder), handles)).start()
    time.sleep(600)
"""


def wait_until(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Whether it is there and no zombie."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


@pytest.mark.parametrize("handles", ["ends", "default", "ignores"])
@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_child_of_a_killed_process_ends(tmp_path, method, handles):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen([sys.executable, "-P", script, method, handles, tmp_path])
    try:
        wait_until((tmp_path / "pid").exists)
        child = int((tmp_path / "pid").read_text())
        assert is_running(child)
        start = time.monotonic()
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not is_running(child))
    # Only one that does as it is asked is spared the wait.
    assert (time.monotonic() - start < 5.0) == (handles == "ends")
    assert (tmp_path / "asked").exists() == (handles != "default")


def test_process_that_nobody_started_is_left_alone(monkeypatch):
    monkeypatch.setattr("threading.Thread", lambda **_: pytest.fail("somebody is watched"))
    end_with_parent()


CLAIM = """
import sys, time
from pathlib import Path
from vllm_moe_offload.lifeline import Claim
claim = Claim(Path(sys.argv[1]))
print("claimed", flush=True)
time.sleep(600)
"""


def test_claim_lasts_as_long_as_its_process(tmp_path):
    path = tmp_path / "claim"
    assert not is_orphaned(path), "nobody has claimed anything"
    with subprocess.Popen(
        [sys.executable, "-P", "-c", CLAIM, path], stdout=subprocess.PIPE, text=True
    ) as owner:
        try:
            assert owner.stdout.readline() == "claimed\n"
            assert not is_orphaned(path)
            assert not is_orphaned(path), "looking must not take it"
        finally:
            os.kill(owner.pid, signal.SIGKILL)
    assert is_orphaned(path)
    again = Claim(path)
    assert not is_orphaned(path)
    again.release()
    assert not path.exists()


def test_claims_without_locks_stay_in_force(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    Claim(tmp_path / "claim")
    assert not is_orphaned(tmp_path / "claim")
