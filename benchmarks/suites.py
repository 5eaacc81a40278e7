"""What each suite measures: pure lists of jobs for ``timed_server.py``.

A job is one process: a server with its settings and the measurements it is asked for.
"""

from typing import Any

from shapes import SHAPES

GIB = 1 << 30

ENGINE_BATCHES = (1, 8, 32, 128)
GROWTH_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
GROWTH_PROMPTS = (128, 512, 2048, 8192, 32_768)
GROWTH_SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)
TRACE_SHARES = (0.5, 0.25)

Job = dict[str, Any]
Plan = dict[str, Any]


def engine(name: str, options: dict[str, Any]) -> list[Job]:
    """Everything that the table of targets needs, on one shape."""
    shape, tiny = SHAPES[name], name.startswith("tiny")
    chunk = chunk_of(name)
    half = shape.num_experts // 2
    steps, repeats = (4, 1) if tiny else (24, 3)

    def plans(*, few: bool, confined: bool, long: bool = True) -> list[Plan]:
        count = min(steps, 6) if few else steps
        warm_up = 3 if few else 8
        # Large batches move as much in one step as small ones in many.
        found = [decode(batch, count if batch <= 8 else min(count, 10), warm_up)
                 for batch in ENGINE_BATCHES]  # fmt: skip
        found.append(prefill(chunk, 1 if few else repeats, warm_up=0 if few else 1))
        if long:
            found.append(prefill(4 * chunk, 1 if few else 2, warm_up=0 if few else 1))
        if confined:
            found += [decode(batch, count, warm_up, confined=half) for batch in (1, 8)]
        return found

    jobs = [job("resident", "resident", 1.0, name, plans(few=False, confined=True))]
    for share in (1.0, 0.5, 0.25, 0.0):
        asked = plans(few=False, confined=share == 0.5, long=share < 1.0)
        jobs.append(plugin(share, name, asked, options))
    for share in (0.5, 0.25, 0.0):
        jobs.append(cpu_offload(share, name, plans(few=True, confined=share == 0.5)))
    resolve = [{"case": "resolve", "batch": batch} for batch in (1, 32)]
    jobs.append({**job("resolve", "resolve", 1.0, name, resolve), "kind": "resolve"})
    return jobs


def growth(name: str, options: dict[str, Any]) -> list[Job]:
    """How time grows with the batch, the prompt and the share of experts without a slot."""
    tiny = name.startswith("tiny")
    prompts = (32, 128, 512) if tiny else GROWTH_PROMPTS
    batches = (1, 4, 16) if tiny else GROWTH_BATCHES
    plans = [decode(batch, 6, 3) for batch in batches]
    # The shortest first, so that the longest find their code compiled.
    plans += [prefill(tokens, 1 if tokens > 8192 else 2) for tokens in prompts]
    jobs = [job("resident", "resident", 1.0, name, plans)]
    return jobs + [plugin(share, name, plans, options) for share in GROWTH_SHARES]


def shapes(name: str, options: dict[str, Any]) -> list[Job]:
    """The whole model at a quarter, and a model whose experts are 352 MB each."""
    if name.startswith("tiny"):
        whole, large = name, name
    else:
        whole, large = "qwen3-30b-a3b", "mixtral-8x7b-4"
    steps = 4 if name.startswith("tiny") else 12
    plans = [decode(batch, steps) for batch in (1, 8, 32)] + [prefill(chunk_of(whole), 2)]
    jobs = []
    if not name.startswith("tiny"):
        jobs.append(job("resident, 48 layers", "resident", 1.0, whole, plans))
    jobs.append({**plugin(0.25, whole, plans, options), "name": "plugin 0.25, 48 layers"})
    jobs.append({**job("resident", "resident", 1.0, large, plans), "name": "resident, mixtral"})
    for share in (0.5, 0.25):
        jobs.append({**plugin(share, large, plans, options), "name": f"plugin {share}, mixtral"})
    return jobs


def trace(name: str, options: dict[str, Any], path: str = "", tokens: int = 512) -> list[Job]:
    """Routing of a recorded trace, a token a step; the hits must be those of the simulator.

    Args:
        name: a shape with as many layers and choices as the trace.
        options: of the plugin.
        path: the trace.
        tokens: how many of its tokens are replayed.
    """
    plan = {"case": "trace", "trace": path, "tokens": tokens, "repeats": 2}
    jobs = []
    for share in TRACE_SHARES:
        asked = {**plugin(share, name, [decode(1, tokens)], options), "kind": "trace"}
        # A step that was scheduled ahead would route a token that nobody counts.
        asked["settings"] |= {"max_model_len": tokens + 64, "async_scheduling": False}
        jobs.append({**asked, "name": f"trace {share}", "measurements": [plan]})
    return jobs


SUITES = {"engine": engine, "growth": growth, "shapes": shapes}


def profiled(asked: Job, case: str, size: int, path: str) -> Job:
    """The same server, profiled in one case.

    Args:
        asked: a job of a suite.
        case: decode or prefill.
        size: sequences or tokens.
        path: where the text goes.
    """
    plan = decode(size, 8) if case == "decode" else prefill(size, 1)
    special = {name: v for name, v in asked["settings"].items() if name not in _SIZED}
    alone = job(asked["name"], asked["server"], asked["share"], asked["shape"], [plan], **special)
    return {**alone, "kind": "profile", "profile": path}


def decode(batch: int, steps: int, warm_up: int = 8, *, confined: int | None = None) -> Plan:
    """Decode steps of so many sequences; routing is confined to the first experts if asked."""
    plan = {"case": "decode", "batch": batch, "steps": steps, "warm_up": warm_up}
    return plan if confined is None else {**plan, "confined": confined}


def prefill(tokens: int, repeats: int, warm_up: int = 1) -> Plan:
    """One prompt at a time."""
    return {"case": "prefill", "tokens": tokens, "repeats": repeats, "warm_up": warm_up}


def chunk_of(name: str) -> int:
    """Tokens that a server of this shape takes in one step."""
    return 256 if name.startswith("tiny") else 8192


def plugin(share: float, name: str, plans: list[Plan], options: dict[str, Any]) -> Job:
    """A server with this plugin."""
    offload = {"cache_fraction": share, "stats_interval_s": 0, **options}
    settings = {"plugin": "moe-offload", "moe_offload": offload}
    return job(f"plugin {share}", "plugin", share, name, plans, **settings)


def cpu_offload(share: float, name: str, plans: list[Plan]) -> Job:
    """Stock vLLM that keeps the experts of so many layers in host memory, and of no others."""
    host = (1 - share) * SHAPES[name].pool_bytes / GIB
    settings = {"cpu_offload_gb": host, "cpu_offload_params": ["experts"]}
    return job(f"cpu-offload {share}", "cpu-offload", share, name, plans, **settings)


def job(
    label: str, server: str, share: float, name: str, plans: list[Plan], **settings: Any
) -> Job:
    """One process, sized for what it is asked."""
    tiny, chunk = name.startswith("tiny"), chunk_of(name)
    batches = sorted({plan["batch"] for plan in plans if "batch" in plan})
    longest = max([plan["tokens"] for plan in plans if "tokens" in plan], default=chunk)
    base: dict[str, Any] = {
        "kv_cache_memory_bytes": (64 << 20) if tiny else 3 * GIB // 2,
        "max_model_len": longest + 64,
        "max_num_batched_tokens": chunk,
        "max_num_seqs": max(batches, default=1),
        "gpu_memory_utilization": 0.05,  # of no meaning beside the size above, but checked
    }
    if tiny:
        base |= {"dtype": "float32", "enforce_eager": True}
    else:
        base["compilation_config"] = {"cudagraph_capture_sizes": batches or [1]}
    return {
        "name": label,
        "kind": "server",
        "server": server,
        "share": share,
        "shape": name,
        "settings": {**base, **settings},
        "measurements": plans,
    }


def united(jobs: list[Job]) -> list[Job]:
    """Make one process of jobs of one name, with every measurement of any of them once."""
    by_name: dict[str, Job] = {}
    for new in jobs:
        old = by_name.get(new["name"])
        if old is None:
            by_name[new["name"]] = new
            continue
        known = {_key(plan) for plan in old["measurements"]}
        plans = old["measurements"] + [p for p in new["measurements"] if _key(p) not in known]
        special = {k: v for k, v in old["settings"].items() if k not in _SIZED}
        by_name[new["name"]] = {
            **job(old["name"], old["server"], old["share"], old["shape"], plans, **special),
            "kind": old["kind"],
        }
    return list(by_name.values())


_SIZED = (
    "kv_cache_memory_bytes", "max_model_len", "max_num_batched_tokens", "max_num_seqs",
    "gpu_memory_utilization", "dtype", "enforce_eager", "compilation_config",
)  # fmt: skip


def _key(plan: Plan) -> tuple[Any, ...]:
    return plan["case"], plan.get("batch"), plan.get("tokens"), plan.get("confined")
