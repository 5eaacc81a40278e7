"""How a server ends: signals while its engines load, and requests that a shutdown cuts off."""

import asyncio
import os
import signal
from types import SimpleNamespace

import pytest

from vllm_moe_offload.config import KEY
from vllm_moe_offload.metrics.page import FOLDER
from vllm_moe_offload.patches import cut_off, engine_startup
from vllm_moe_offload.patches.wrapping import PatchError


class Process:
    killed = False

    def kill(self):
        self.killed = True


@pytest.fixture
def startup(monkeypatch, tmp_path):
    """A wait for an engine that gets ``signal``, and ends as vLLM's when the engine is killed."""
    monkeypatch.setenv(FOLDER, str(tmp_path))
    process = Process()
    run = SimpleNamespace(
        launch=SimpleNamespace(engine_manager=SimpleNamespace(processes=[process])),
        process=process,
        signal=None,
        error=None,
    )

    def wait_for_engine_startup(socket, launch):
        if run.signal is not None:
            os.kill(os.getpid(), run.signal)
        if run.error or launch.engine_manager.processes[0].killed:
            raise RuntimeError(run.error or "Engine core initialization failed")
        return "ready"

    run.module = SimpleNamespace(wait_for_engine_startup=wait_for_engine_startup)
    engine_startup.apply(run.module)
    before = {number: signal.getsignal(number) for number in engine_startup.SIGNALS}
    yield run
    assert {number: signal.getsignal(number) for number in engine_startup.SIGNALS} == before


def test_engine_that_starts(startup):
    assert startup.module.wait_for_engine_startup("socket", startup.launch) == "ready"
    assert startup.module.wait_for_engine_startup("socket", launch=startup.launch) == "ready"
    assert not startup.process.killed


@pytest.mark.parametrize("number", engine_startup.SIGNALS)
def test_signal_while_an_engine_starts(startup, number):
    startup.signal = number
    with pytest.raises(SystemExit) as raised:
        startup.module.wait_for_engine_startup("socket", startup.launch)
    assert startup.process.killed
    assert raised.value.code == 128 + number


def test_engine_that_fails_by_itself(startup):
    startup.error = "no memory"
    with pytest.raises(RuntimeError, match="no memory"):
        startup.module.wait_for_engine_startup("socket", startup.launch)


@pytest.mark.parametrize("lacks", ["offloading", "processes"])
def test_signals_are_left_to_vllm(startup, monkeypatch, lacks):
    if lacks == "offloading":
        monkeypatch.delenv(FOLDER)
    else:
        startup.launch.engine_manager = None
    received = []
    monkeypatch.setattr(engine_startup, "_killing", lambda _: pytest.fail("handlers were changed"))
    if lacks == "offloading":
        startup.signal = signal.SIGTERM
        before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
        try:
            assert startup.module.wait_for_engine_startup("socket", startup.launch) == "ready"
        finally:
            signal.signal(signal.SIGTERM, before)
        assert received == [signal.SIGTERM]
    else:
        with pytest.raises(AttributeError):  # of the stand-in for vLLM's function
            startup.module.wait_for_engine_startup("socket", startup.launch)


def test_startup_that_waits_for_something_else():
    module = SimpleNamespace(wait_for_engine_startup=lambda socket, launch, config: None)
    with pytest.raises(PatchError, match="wait_for_engine_startup"):
        engine_startup.apply(module)


def test_applying_startup_again_does_nothing(startup):
    wrapped = startup.module.wait_for_engine_startup
    engine_startup.apply(startup.module)
    assert startup.module.wait_for_engine_startup is wrapped


class OutputProcessor:
    def __init__(self):
        self.told = []

    def propagate_error(self, error):
        assert asyncio.get_running_loop()
        self.told.append(error)


def make_client(options):
    class AsyncLLM:
        def __init__(self):
            self.output_handler = None
            self.output_processor = OutputProcessor()
            self.vllm_config = SimpleNamespace(additional_config=options)
            self.shut_down = 0

        def shutdown(self, timeout=None):
            self.shut_down += 1

    cut_off.apply(SimpleNamespace(AsyncLLM=AsyncLLM, OutputProcessor=OutputProcessor))
    return AsyncLLM()


@pytest.mark.parametrize("options", [{KEY: {}}, {}])
def test_requests_that_a_shutdown_cuts_off(options):
    client = make_client(options)

    async def serve():
        client.output_handler = asyncio.create_task(asyncio.Event().wait())
        # As a signal's handler does it, beside the loop.
        await asyncio.to_thread(client.shutdown, timeout=0)
        await asyncio.sleep(0)
        client.output_handler.cancel()

    asyncio.run(serve())
    assert client.shut_down == 1
    assert [type(error).__name__ for error in client.output_processor.told] == (
        ["EngineDeadError"] if options else []
    )


def test_shutdown_before_and_after_serving():
    client = make_client({KEY: {}})
    client.shutdown()

    async def serve():
        client.output_handler = asyncio.create_task(asyncio.sleep(0))
        await client.output_handler

    asyncio.run(serve())
    client.shutdown()
    assert client.shut_down == 2
    assert client.output_processor.told == []


def test_requests_that_are_kept_elsewhere():
    with pytest.raises(AttributeError):
        cut_off.apply(SimpleNamespace(AsyncLLM=object, OutputProcessor=object))
