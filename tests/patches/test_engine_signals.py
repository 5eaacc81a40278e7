"""vLLM's idle engine loop gets a signal that interrupts nothing."""

import queue
import signal
from types import SimpleNamespace

import pytest
from missed_signals import missed
from vllm.v1.engine import EngineCoreRequestType, core

from vllm_moe_offload.config import KEY
from vllm_moe_offload.patches import engine_signals
from vllm_moe_offload.patches.wrapping import PatchError

SLEPT_ON = (EngineCoreRequestType.WAKEUP, "slept on")


@pytest.fixture
def idle():
    """Makes engines of vLLM's without a model, which have nothing to do and handle SIGTERM."""

    def make(additional_config):
        engine = core.EngineCoreProc.__new__(core.EngineCoreProc)
        engine.__dict__.update(
            vllm_config=SimpleNamespace(additional_config=additional_config, shutdown_timeout=0),
            shutdown_state=core.EngineShutdownState.RUNNING,
            input_queue=queue.Queue(),
            aborts_queue=queue.Queue(),
            process_input_queue_block=True,
            engines_running=False,
            batch_queue=None,
            enable_fault_tolerance=False,
            publish_dp_lb_stats=False,
            _idle_state_callbacks=[],
            scheduler=SimpleNamespace(
                has_requests=lambda: False,
                get_num_unfinished_requests=lambda: 0,
                finish_requests=lambda *_: [],
            ),
            step_fn=lambda: ({}, False),
            post_step=lambda _: None,
            _handle_client_request=lambda *request: engine.requests.append(request),
            _send_abort_outputs=lambda _: None,
            requests=[],
        )
        signal.signal(signal.SIGTERM, lambda *_: shut_down(engine))
        return engine

    def shut_down(engine):
        engine.shutdown_state = core.EngineShutdownState.REQUESTED

    before = signal.getsignal(signal.SIGTERM)
    yield make
    signal.signal(signal.SIGTERM, before)


def run_until_signal(engine, patience_s):
    with (
        missed(signal.SIGTERM, lambda: engine.input_queue.put(SLEPT_ON), patience_s),
        pytest.raises(SystemExit),
    ):
        engine.run_busy_loop()


def test_engine_that_offloads_ends(idle):
    engine = idle({KEY: {}})
    run_until_signal(engine, patience_s=10.0)
    assert engine.requests == [(EngineCoreRequestType.WAKEUP, None)]


@pytest.mark.parametrize("options", [{}, None])
def test_engine_that_does_not_is_left_alone(idle, options):
    """It is what the patch is for: vLLM's loop by itself sleeps on."""
    engine = idle(options)
    run_until_signal(engine, patience_s=0.5)
    assert engine.requests == [SLEPT_ON]


@pytest.mark.parametrize("name", ["EngineCoreProc", "DPEngineCoreProc"])
def test_loops_of_all_engines(name):
    assert hasattr(vars(getattr(core, name))["run_busy_loop"], "_moe_offload_wraps")


def test_loop_that_has_moved():
    module = SimpleNamespace(
        EngineCoreRequestType=EngineCoreRequestType, EngineCoreProc=type("EngineCoreProc", (), {})
    )
    with pytest.raises(PatchError, match="run_busy_loop"):
        engine_signals.apply(module)
