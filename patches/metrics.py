"""The plugin's metrics on vLLM's own ``/metrics``.

Target: ``attach_router`` in vllm.entrypoints.serve.instrumentator.metrics.
Versions: 0.32, 0.33.
Why: what a worker counts reaches the API servers with no message of vLLM: the statistics of its
    scheduler have fixed fields, go to one API server a step, and are those of one worker.
How: a collector reads the pages that the workers write. It joins the registry that an API server
    exposes. Several API servers expose only what prometheus_client itself shares between
    processes, in a registry made anew for every request, so there a route in front of theirs
    answers with both.
Can go: when workers can send statistics of a plugin to all API servers.
"""

import os
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any
from weakref import WeakSet

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from vllm_moe_offload.metrics import page
from vllm_moe_offload.metrics.families import OffloadCollector
from vllm_moe_offload.patches.wrapping import wrap

_SHARED = "PROMETHEUS_MULTIPROC_DIR"
"""Environment variable that makes prometheus_client share metrics between processes."""

_collecting: WeakSet[Any] = WeakSet()


def apply(module: ModuleType) -> None:
    """Let every API server expose the pages."""
    registry_of_server = module.get_prometheus_registry
    wrap(module, "attach_router", partial(_attach_router, registry_of_server))


def _attach_router(
    registry_of_server: Callable[[], Any], original: Callable[..., Any], app: Any
) -> None:
    from starlette.responses import Response
    from starlette.routing import Route

    original(app)
    registry = registry_of_server()
    if registry not in _collecting:
        _collecting.add(registry)
        registry.register(OffloadCollector())
    if _SHARED in os.environ and page.FOLDER in os.environ:

        def metrics(_request: Any) -> Response:
            return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

        app.routes.insert(0, Route("/metrics", metrics))
