"""Measure what host memory and the way to a GPU deliver, with the means that the engine has."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from vllm_moe_offload.doctor.facts import Rates
from vllm_moe_offload.sizes import MIB

if TYPE_CHECKING:
    from torch import Tensor


ROW_BYTES = 8 * MIB
"""As large as an expert of a common model."""

_ROWS = 64
_REPEATS = 5
_HOST_BYTES = 512 * MIB
_HOST_THREADS = 16


def measure_host(available_bytes: int) -> float:
    """Copy in memory on many processors; return the bytes read and written a second.

    Args:
        available_bytes: host memory that may be used; a small part of it is.
    """
    threads = min(_HOST_THREADS, len(os.sched_getaffinity(0)))
    size = max(MIB, min(_HOST_BYTES, available_bytes // 16) // threads)
    pairs = [(np.ones(size, np.uint8), np.ones(size, np.uint8)) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:

        def copy_all() -> None:
            list(pool.map(lambda pair: np.copyto(*pair), pairs))

        copy_all()
        seconds = min(_timed(copy_all) for _ in range(_REPEATS))
    return 2 * size * threads / seconds


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure_gpus(available_bytes: int, *, budget_s: float) -> dict[str, Rates]:
    """Measure every GPU that PyTorch sees, by its address, until the time is used up.

    Args:
        available_bytes: host memory that may be used; a small part of it is.
        budget_s: begin with no further GPU after so many seconds.
    """
    import torch

    from vllm_moe_offload.pcie import device_address

    start = time.monotonic()
    rates: dict[str, Rates] = {}
    for number in range(torch.cuda.device_count()):
        address = device_address(torch.device("cuda", number))
        if address is None or time.monotonic() - start > budget_s:
            continue
        rates[address] = _measure_gpu(number, available_bytes)
    return rates


def _measure_gpu(number: int, available_bytes: int) -> Rates:
    import torch

    from vllm_moe_offload.errors import OffloadError
    from vllm_moe_offload.layout import ExpertLayout
    from vllm_moe_offload.pcie import device_link
    from vllm_moe_offload.pool import HostPool

    device = torch.device("cuda", number)
    pool = HostPool()
    try:
        with torch.cuda.device(device):
            free, _ = torch.cuda.mem_get_info()
            rows = max(2, min(_ROWS, min(free, available_bytes) // 4 // ROW_BYTES))
            layout = ExpertLayout.pack([("row", (ROW_BYTES,), torch.uint8)])
            host = pool.add("the measurement", layout, rows)
            host.rows_EB.zero_()
            if pool.register(device):
                raise RuntimeError(f"CUDA refused to pin {host.num_bytes} bytes")
            on_gpu = torch.zeros_like(host.rows_EB, device=device)
            mapped = pool.device_rows(host, device)
            rate = {
                name: host.num_bytes / _seconds(work)
                for name, work in _ways(host.rows_EB, mapped, on_gpu).items()
            }
            for _ in range(_REPEATS):
                on_gpu.copy_(host.rows_EB, non_blocking=True)
            link = device_link(device)  # now, while the copies keep it awake
            torch.cuda.synchronize()
        return Rates(
            link=link,
            copy_to_gpu=rate["copy_to_gpu"],
            copy_to_host=rate["copy_to_host"],
            gather_to_gpu=rate["gather_to_gpu"],
            gather_to_host=rate["gather_to_host"],
            pinned_bytes=host.num_bytes,
        )
    except (OffloadError, RuntimeError) as error:
        return Rates(problem=" ".join(str(error).split()))
    finally:
        pool.close()


def _ways(host: "Tensor", mapped: "Tensor", on_gpu: "Tensor") -> dict[str, Callable[[], object]]:
    import torch

    from vllm_moe_offload.kernels.gather import gather

    every = torch.arange(host.shape[0], dtype=torch.int32, device=on_gpu.device)
    length = torch.tensor([host.shape[0]], dtype=torch.int32, device=on_gpu.device)
    return {
        "copy_to_gpu": lambda: on_gpu.copy_(host, non_blocking=True),
        "copy_to_host": lambda: host.copy_(on_gpu, non_blocking=True),
        "gather_to_gpu": lambda: gather(mapped, on_gpu, every, every, length),
        "gather_to_host": lambda: gather(on_gpu, mapped, every, every, length),
    }


def _seconds(work: Callable[[], object]) -> float:
    """Shortest of a few runs on the GPU, in seconds."""
    import torch

    work()
    times = []
    for _ in range(_REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return min(times)
