"""Signals that arrive on another thread, which leave a flag and interrupt nothing."""

import asyncio
import os
import queue
import signal
import threading
import time

import pytest
from missed_signals import missed

from vllm_moe_offload.signal_watch import waking_on_signals

WATCH = "moe-offload-signals"


@pytest.fixture
def handled():
    """Times at which the handler of SIGTERM has run."""
    times = []
    before = signal.signal(signal.SIGTERM, lambda *_: times.append(time.monotonic()))
    yield times
    signal.signal(signal.SIGTERM, before)


def watches():
    return [thread for thread in threading.enumerate() if thread.name == WATCH]


@pytest.fixture(autouse=True)
def nothing_left():
    """Each test leaves threads, files and Python's signals as they were."""
    files = len(os.listdir("/proc/self/fd"))
    yield
    for watch in watches():
        watch.join(30)
    assert not watches()
    assert len(os.listdir("/proc/self/fd")) == files
    assert signal.set_wakeup_fd(-1) == -1


def test_main_thread_that_waits_for_a_lock(handled):
    waited_for = queue.Queue()
    with (
        waking_on_signals(lambda: waited_for.put("woken")),
        missed(signal.SIGTERM, otherwise=lambda: waited_for.put("slept on")),
    ):
        assert waited_for.get() == "woken"
    assert len(handled) == 1


def test_it_sleeps_on_without_a_watch(handled):
    """What the watch is for: were it otherwise, the test above could not fail."""
    waited_for = queue.Queue()
    with missed(signal.SIGTERM, lambda: waited_for.put("slept on"), patience_s=0.5):
        assert waited_for.get() == "slept on"
    assert len(handled) == 1


def test_every_signal_wakes(handled):
    woken = queue.Queue()
    with waking_on_signals(lambda: woken.put(None)):
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
            woken.get(timeout=30)
    assert len(handled) == 3


def test_error_inside_passes():
    with pytest.raises(ZeroDivisionError), waking_on_signals(lambda: None):
        _ = 1 / (len(watches()) - 1)


def test_other_threads_have_no_handlers():
    def run():
        with waking_on_signals(lambda: None):
            found.append(watches())

    found = []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [[]]


def test_event_loop_that_listens_goes_on_listening():
    async def serve():
        told = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR2, told.set)
        with waking_on_signals(lambda: None):
            assert not watches()
            os.kill(os.getpid(), signal.SIGUSR2)
            await asyncio.wait_for(told.wait(), 30)

    asyncio.run(serve())
