"""The recorder: what is routed while a server runs, written down as traces.

    step log -> ring on the device -> inbox in host memory -> sequences -> files, hot set
    (each step)  (drain thread)                      (write thread)

A step costs the server one small copy on its stream and a few lines of bookkeeping; nothing here
waits for the device or the disk while a step runs. What does not fit the ring is dropped and
counted.
"""

from vllm_moe_offload.recorder.directory import prepare_directory, warm_start_path
from vllm_moe_offload.recorder.files import TraceInfo
from vllm_moe_offload.recorder.hot_set import HotSet
from vllm_moe_offload.recorder.recorder import Recorder
from vllm_moe_offload.recorder.steps import StepRows

__all__ = [
    "HotSet",
    "Recorder",
    "StepRows",
    "TraceInfo",
    "prepare_directory",
    "warm_start_path",
]
