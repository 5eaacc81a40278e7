"""Other systems beside the plugin: what they are asked, how they are timed, what is concluded."""

import asyncio
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from xml.etree import ElementTree

import pytest
from peers import checkpoint, convert_to_gguf, table
from peers.agreement import agreement
from peers.client import LlamaCpp, OpenAI, PeerError, Prompt, Reply, Round, ask
from peers.measure import Questions, measure, punctual, shown
from peers.memory import PeakMemory, family, proportional_bytes, wait_for_release
from peers.plot import draw
from peers.prompts import prompts
from peers.run import main, parse, questions_for, setup_of, starts
from peers.systems import all_peers
from peers.systems.prefetch import groups
from peers.transformers_server import Model
from safetensors import safe_open
from shapes import SHAPES

from vllm_moe_offload.checkpoints import make_checkpoint, save_tokenizer
from vllm_moe_offload.errors import OffloadError

PROMPT = Prompt("one two", [5, 6, 7])


def reply(ids=(1, 2, 3), *, sent=0.0, first=1.0, last=2.0, text="abc"):
    return Reply(text, list(ids) if ids else None, 3, 1, sent, first, last)


def setup(tmp_path, *more, has_gpu=True):
    return setup_of(parse(["--out", "x", *more]), tmp_path, has_gpu=has_gpu)


# Timing.


def test_rate_leaves_out_the_first_tokens_and_their_wait():
    together = Round([reply(first=1.0, last=2.0), reply(first=1.5, last=3.0)], 0.0)
    assert together.decode_tokens_per_s == (2 + 2) / (3.0 - 1.0)
    assert together.first_token_s == 1.25
    assert Round([reply(first=1.0, last=1.0)], 0.0).decode_tokens_per_s is None


def test_rounds_of_a_late_client_do_not_count():
    late, timely = Round([reply()], 0.9), Round([reply()], 0.01)
    answers = iter([late, timely, late, timely, timely])
    assert punctual(lambda: next(answers), 2) == [timely, timely]
    assert next(answers) is timely
    assert punctual(lambda: late, 2) == []


class Slow(BaseHTTPRequestHandler):
    """A server that answers a token at a time, and may be told to refuse."""

    events = ()
    pause_s = 0.05
    status = 200

    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        type(self).asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(self.status)
        self.end_headers()
        for event in self.events:
            time.sleep(self.pause_s)
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            self.wfile.flush()
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *words):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(events, **more):
        handler = type("Handler", (Slow,), {"events": events, **more})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}", handler

    yield start
    for server in servers:
        server.shutdown()


def openai_events(ids):
    """vLLM's: a role-like event without a token, one event a token, and the usage."""
    choices = [{"text": "", "token_ids": []}] + [{"text": f" {n}", "token_ids": [n]} for n in ids]
    return [{"choices": [choice]} for choice in choices] + [
        {"choices": [], "usage": {"completion_tokens": len(ids)}}
    ]


def test_client_times_tokens_and_not_empty_events(serve):
    url, handler = serve(openai_events([8, 9, 10]))
    found = ask(url, OpenAI("peer", returns_ids=True), [PROMPT, PROMPT], 3)
    assert handler.asked["prompt"] == PROMPT.token_ids
    assert handler.asked["return_token_ids"]
    for one in found.replies:
        assert (one.text, one.token_ids, one.num_tokens) == (" 8 9 10", [8, 9, 10], 3)
        assert one.first_token_s >= 2 * Slow.pause_s
        # A client that was late for the first one has waited less for the last one.
        assert one.last_s - one.first_s >= 2 * Slow.pause_s - found.lag_s - 0.01


def test_client_counts_by_usage_where_ids_are_not_told(serve):
    events = [{"choices": [{"text": "a"}]}, {"choices": [{"text": "bc"}]},
              {"choices": [], "usage": {"completion_tokens": 5}}]  # fmt: skip
    url, handler = serve(events, pause_s=0)
    (one,) = ask(url, OpenAI("peer", takes_ids=False), [PROMPT], 5).replies
    assert handler.asked["prompt"] == PROMPT.text
    assert (one.text, one.token_ids, one.num_tokens) == ("abc", None, 5)


def test_client_speaks_llama_cpps_own_language(serve):
    events = [{"content": "x", "tokens": [4]}, {"content": "", "tokens": [5]},
              {"content": "", "stop": True, "tokens_predicted": 2}]  # fmt: skip
    url, handler = serve(events, pause_s=0)
    (one,) = ask(url, LlamaCpp(), [PROMPT], 2).replies
    assert handler.asked["n_predict"] == 2
    assert (one.token_ids, one.num_tokens) == ([4, 5], 2)


@pytest.mark.parametrize(
    ("events", "more", "problem"),
    [
        ([], {"status": 503}, "answered 503"),
        ([{"error": {"message": "out of memory"}}], {}, "out of memory"),
        ([], {}, "without a token"),
    ],
)
def test_client_tells_what_went_wrong(serve, events, more, problem):
    url, _ = serve(events, **more)
    with pytest.raises(PeerError, match=problem):
        ask(url, OpenAI("peer"), [PROMPT], 2)


def test_client_tells_that_nobody_is_there():
    with pytest.raises(PeerError, match="did not answer"):
        ask("http://127.0.0.1:9", OpenAI("peer"), [PROMPT], 2)


# Texts.


def test_agreement_finds_the_earliest_difference():
    ours = {1: [reply()], 2: [reply(), reply([1, 2, 3])]}
    theirs = {1: [reply([1, 2, 9])], 2: [reply(), reply([1, 7, 3])]}
    assert agreement(ours, ours) == {"by": "token ids", "same": 3, "answers": 3}
    assert agreement(ours, theirs) == {
        "by": "token ids", "same": 1, "answers": 3,
        "first": {"position": 1, "batch": 2, "prompt": 1},
    }  # fmt: skip


def test_agreement_compares_texts_where_one_has_no_ids():
    found = agreement({1: [reply(text="abc")]}, {1: [reply(None, text="ab")]})
    assert found == {
        "by": "text", "same": 0, "answers": 1, "first": {"position": 2, "batch": 1, "prompt": 0}
    }  # fmt: skip


@pytest.mark.parametrize("tokens", [4, 7, 200])
def test_prompts_have_their_length_and_differ(tokens):
    made = prompts(lambda text: list(text.encode())[::2], 6, tokens * 4, seed=1)
    assert [len(prompt.token_ids) for prompt in made] == [tokens * 4] * 6
    assert all(list(prompt.text.encode())[::2] == prompt.token_ids for prompt in made)
    assert len({prompt.text for prompt in made}) == 6
    assert made == prompts(lambda text: list(text.encode())[::2], 6, tokens * 4, seed=1)


def test_prompts_that_no_word_fits_are_shorter():
    made = prompts(lambda text: [5] * 4 * len(text.split()), 3, 10, seed=1)
    assert [len(prompt.token_ids) for prompt in made] == [8] * 3


def test_warm_up_is_as_long_as_what_is_timed_and_none_of_it(tmp_path):
    asked = setup(tmp_path, "--long-prompt", "333", "--batches", "4")
    asked.checkpoint.mkdir()
    save_tokenizer(asked.checkpoint, asked.shape.vocabulary)
    found = questions_for(asked)
    long = [*found.long, found.long_warm_up]
    assert {len(prompt.token_ids) for prompt in long} == {333}
    assert len({prompt.text for prompt in long}) == len(long)
    assert {len(prompt.token_ids) for prompt in [*found.short, *found.warm_up]} == {32}


# The checkpoint.

FAMILIES = {
    "qwen3_moe": ("tiny", {"num_layers": 4}),
    "deepseek_v2": ("tiny-latent", {"num_layers": 3}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_are_those_of_a_published_checkpoint(tmp_path, family):
    _, sizes = FAMILIES[family]
    folder = make_checkpoint(tmp_path, family, num_experts=8, top_k=2, **sizes)
    config = json.loads((folder / "config.json").read_text())
    assert dict(checkpoint.tensors(config)) == sizes_in(folder)


def sizes_in(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as content:
            found |= {k: tuple(content.get_slice(k).get_shape()) for k in content.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_checkpoint_is_complete_and_loads(tmp_path, family, dtype):
    import torch
    from transformers import AutoModelForCausalLM

    shape = SHAPES[FAMILIES[family][0]]
    folder = checkpoint.make(shape, dtype, tmp_path, disk_bytes=10**9)
    config = json.loads((folder / "config.json").read_text())
    assert sizes_in(folder) == dict(checkpoint.tensors(config))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == sizes_in(folder).keys()
    on_disk = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert index["metadata"]["total_size"] == pytest.approx(on_disk, rel=0.05)
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert model.dtype == getattr(torch, dtype)
    gates = [value for name, value in model.state_dict().items() if name.endswith("gate.weight")]
    assert gates
    assert not torch.equal(gates[0], gates[1])


def test_rows_of_a_tensor_longer_than_what_is_drawn_differ(tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(checkpoint, "_DRAWN", 1025)
    folder = checkpoint.make(SHAPES["tiny"], "float32", tmp_path, disk_bytes=10**9)
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as content:
            found |= {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    head = found["lm_head.weight"]
    assert len(torch.unique(head, dim=0)) == len(head)
    assert not torch.equal(head, found["model.embed_tokens.weight"])


def test_every_id_has_a_text_of_its_own(tmp_path):
    from transformers import AutoTokenizer

    shape = SHAPES["deepseek-v2-lite"]
    checkpoint.save_tokenizer(tmp_path, shape.vocabulary)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == shape.vocabulary
    assert tokenizer.decode([512, shape.vocabulary - 1]) == f" w512 w{shape.vocabulary - 1}"
    text = "A mixture of experts"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_checkpoint_too_large_for_the_disk_is_refused_at_once(tmp_path):
    shape = SHAPES["qwen3-30b-a3b"]
    with pytest.raises(OffloadError, match=r"--disk-gb = 100.*and its copy would take 122 GB"):
        checkpoint.make(shape, "bfloat16", tmp_path, disk_bytes=10**11, copies=2)
    assert not list(tmp_path.glob("*.safetensors"))


def test_converter_takes_a_tokenizer_of_no_known_hash(monkeypatch):
    class TextModel:
        def get_vocab_base_pre(self, tokenizer):
            raise NotImplementedError

    script = type(sys)("convert_hf_to_gguf")
    script.TextModel = TextModel
    monkeypatch.setitem(sys.modules, "convert_hf_to_gguf", script)
    convert_to_gguf.accept_any_tokenizer()
    assert TextModel().get_vocab_base_pre(None) == "gpt-2"
    del script.TextModel
    with pytest.raises(SystemExit, match="take another version"):
        convert_to_gguf.accept_any_tokenizer()


# The systems.


@pytest.mark.parametrize("peer", all_peers(), ids=lambda peer: peer.name)
def test_command_lines_hold_the_checkpoint_and_the_sizes(peer, tmp_path, monkeypatch):
    monkeypatch.setenv("FREETOKEN", sys.executable)
    monkeypatch.setenv("KTRANSFORMERS", sys.executable)
    asked = setup(tmp_path, "--batches", "1", "77")
    asked.checkpoint.mkdir()
    command = peer.command(asked)
    assert any(str(asked.checkpoint) in word for word in command)
    assert peer.name == "Accelerate" or "77" in command
    assert not {"--host", "--port"} & set(command)


def test_stock_vllm_understands_its_command_lines(tmp_path):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    asked = setup(tmp_path, "--share", "0.25")
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    parser.add_argument("model_tag")
    stock, cpu_offload, prefetch = (
        parser.parse_args(peer.command(asked)[2:])
        for peer in all_peers()[:4]
        if peer.name != "this plugin"
    )
    assert stock.cpu_offload_gb == stock.offload_group_size == 0
    pool_gib = asked.shape.pool_bytes / 2**30
    assert cpu_offload.cpu_offload_gb == pytest.approx(0.75 * pool_gib)
    assert set(cpu_offload.cpu_offload_params) == {"experts"}
    assert (prefetch.offload_group_size, prefetch.offload_num_in_group) == (4, 3)
    assert set(prefetch.offload_params) == {"experts"}


def test_options_for_all_vllm_servers(tmp_path):
    asked = setup(tmp_path, "--vllm-options", "--max-cudagraph-capture-size 32")
    for peer in all_peers()[:4]:
        assert peer.command(asked)[-2:] == ["--max-cudagraph-capture-size", "32"]


@pytest.mark.parametrize(
    ("share", "layers", "expected"),
    [(0.5, 16, (1, 2)), (0.25, 16, (3, 4)), (0, 16, (1, 1)), (1, 16, (1, 16)), (0.9, 4, (1, 4))],
)
def test_prefetch_offloads_the_share_nearest_to_the_asked(share, layers, expected):
    assert groups(share, layers) == expected


def test_kv_cache_holds_what_is_asked(tmp_path):
    for shape in ("qwen3-30b-a3b", "deepseek-v2-lite"):
        asked = setup(tmp_path, "--shape", shape, "--batches", "1", "32")
        assert asked.kv_tokens >= 32 * (asked.short_prompt + asked.new_tokens)
        assert asked.kv_tokens >= asked.context > asked.long_prompt
        assert asked.kv_bytes < 2 << 30


def test_absent_systems_say_what_would_help(tmp_path, monkeypatch):
    for name in ("FREETOKEN", "KTRANSFORMERS", "LLAMA_CPP"):
        monkeypatch.setenv(name, "nowhere")
    absent = {peer.name: peer.absent(setup(tmp_path, has_gpu=False)) for peer in all_peers()}
    assert absent["vLLM resident"] is absent["this plugin"] is None
    assert absent["vLLM prefetch"].status == "needs a GPU"
    for name in ("FreeToken", "KTransformers", "llama.cpp"):
        assert absent[name].status == "not installed"
        assert name.upper().replace(".", "_").removesuffix("_") in absent[name].remedy


def questions():
    """Long ones have a length that no other has."""
    long, warm_up = Prompt("long", [5] * 9), Prompt("warm-up", [6] * 9)
    return Questions(long=[long], short=[PROMPT] * 2, warm_up=[PROMPT] * 2, long_warm_up=warm_up)


class FakePeer:
    """A system out of one line of Python."""

    name = "fake"
    dialect = OpenAI("peer", returns_ids=True)
    idles_quietly = True

    def __init__(self, code):
        self.code = code

    def absent(self, setup):
        return None

    def prepare(self, setup):
        pass

    def command(self, setup):
        return [sys.executable, "-c", self.code]

    def environment(self, setup):
        return {}


SERVER = """
import sys, time, json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
start = time.monotonic()
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        loading = time.monotonic() < start + 1
        self.send_response(503 if loading else 200); self.end_headers()
        for n in range(0 if loading else asked["max_tokens"]):
            time.sleep(0.02)
            event = {"choices": [{"text": "x", "token_ids": [n]}]}
            self.wfile.write(f"data: {json.dumps(event)}\\n\\n".encode()); self.wfile.flush()
port = int(sys.argv[sys.argv.index("--port") + 1])
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def run_fake(tmp_path, code):
    asked = setup(tmp_path, "--batches", "1", "2", "--new-tokens", "8", has_gpu=False)
    (found,) = measure([FakePeer(code)], asked, questions(), rounds=1, start_limit_s=20)
    return found


def test_a_system_is_measured_from_its_start_to_its_end(tmp_path):
    row, replies = run_fake(tmp_path, SERVER)
    assert row["status"] == "measured", row
    assert row["ready_s"] >= 0.5  # it is healthy before it answers
    assert row["host_bytes"] > 1 << 20
    assert set(replies) == {1, 2}
    rate = row["decode_tokens_per_s"]["1"]
    assert rate is None or 0 < rate <= 1 / 0.02
    assert row["first_token_s"] is None or row["first_token_s"] >= 0.02


COMPILING_S = 0.5

COMPILING = SERVER.replace(
    "        loading =",
    f"""
        length = len(asked["prompt"])
        print("asked", asked["prompt"], flush=True)
        time.sleep(0 if length in seen else {COMPILING_S})
        seen.add(length)
        loading =""",
).replace("start = ", "seen = set(); start = ")


def test_kernels_for_long_prompts_are_compiled_before_any_is_timed(tmp_path):
    row, _ = run_fake(tmp_path, COMPILING)
    assert row["status"] == "measured", row
    assert row["first_token_s"] is None or row["first_token_s"] < COMPILING_S
    lines = (tmp_path / "fake.log").read_text().splitlines()
    long = [line for line in lines if line in (f"asked {[5] * 9}", f"asked {[6] * 9}")]
    assert long[:2] == [f"asked {[6] * 9}", f"asked {[5] * 9}"]
    assert f"asked {[6] * 9}" not in long[1:], "what warms up is not timed"


TINY = ["--shape", "tiny", "--batches", "1", "2", "--new-tokens", "8", "--rounds", "1",
        "--long-prompt", "16", "--start-limit-s", "20"]  # fmt: skip


def run_all(tmp_path, monkeypatch, peers, *more):
    """The whole command with other systems; its status and what it wrote."""
    out = tmp_path / "r.json"
    monkeypatch.setattr("peers.run.all_peers", lambda: peers)
    monkeypatch.setattr("sys.argv", ["run.py", *TINY, "--commit", "c", "--out", str(out), *more])
    number = signal.getsignal(signal.SIGTERM)
    try:
        return main(), json.loads(out.read_text())
    finally:
        signal.signal(signal.SIGTERM, number)


def named(name, code):
    peer = FakePeer(code)
    peer.name = name
    return peer


def test_all_systems_are_in_the_file_whatever_becomes_of_one(tmp_path, monkeypatch, capsys):
    class Careless(FakePeer):
        def prepare(self, setup):
            raise KeyError("no such file")

    careless = Careless(SERVER)
    careless.name = "careless"
    peers = [named("first", SERVER), named("broken", "raise SystemExit('hurt')"), careless]
    status, result = run_all(tmp_path, monkeypatch, peers)
    assert status == 1
    found = {row["system"]: row for row in result["systems"]}
    assert [row["status"] for row in found.values()] == ["measured", "failed", "failed"]
    assert "hurt" in found["broken"]["log"]
    assert "no such file" in found["careless"]["log"]
    assert "hurt" in capsys.readouterr().out


def test_no_system_begins_when_the_time_is_up(tmp_path, monkeypatch):
    peers = [named("first", SERVER), named("second", SERVER)]
    _, result = run_all(tmp_path, monkeypatch, peers, "--limit-s", "0")
    assert [row["status"] for row in result["systems"]] == ["out of time"] * 2
    assert "second is out of time: Raise --limit-s." in table.notes(result)


def test_what_was_measured_is_kept_when_the_run_is_ended(tmp_path, monkeypatch, capsys):
    waiting = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    peers = [named("first", SERVER), named("second", waiting), named("third", SERVER)]
    status, result = run_all(tmp_path, monkeypatch, peers)
    assert status == 1
    assert [row["system"] for row in result["systems"]] == ["first"]
    shown = capsys.readouterr()
    assert "Interrupted" in shown.err
    assert "first" in shown.out


MEETING = """
import pathlib, sys, time
here = pathlib.Path({folder!r})
(here / "{name}").touch()
while not (here / "{other}").exists():
    time.sleep(0.01)
"""


def meeting(folder, name, other):
    """A system that does not start before another one does."""
    return named(name, MEETING.format(folder=str(folder), name=name, other=other) + SERVER)


def test_systems_that_start_together_are_measured_one_after_the_other(
    tmp_path, monkeypatch, capsys
):
    peers = [
        meeting(tmp_path, "first", "second"),
        named("broken", "raise SystemExit('hurt')"),
        meeting(tmp_path, "second", "first"),
    ]
    status, result = run_all(tmp_path, monkeypatch, peers, "--together", "3")
    assert status == 1
    first, broken, second = result["systems"]
    assert [first["system"], broken["system"], second["system"]] == ["first", "broken", "second"]
    assert [first["status"], second["status"]] == ["measured"] * 2, result
    assert "hurt" in broken["log"]
    assert first["is_reference"]
    assert second["agreement"]["same"] == second["agreement"]["answers"]
    for row in (first, second):
        # Each is a process of its own, and holds nothing of the other's.
        assert 1 << 20 < row["host_bytes"] < 100 << 20
    assert "Up to 3 vLLM servers started at once" in table.notes(result)[0]
    assert not family(os.getpid())[1:]


def test_only_systems_that_idle_quietly_start_together():
    names = [[peer.name for peer in group] for group in starts(all_peers(), 3)]
    assert names == [
        ["vLLM resident", "this plugin", "vLLM --cpu-offload-gb"], ["vLLM prefetch"],
        ["FreeToken"], ["llama.cpp"], ["KTransformers"], ["Accelerate"],
    ]  # fmt: skip
    assert [len(group) for group in starts(all_peers(), 1)] == [1] * len(all_peers())


def test_no_server_is_left_of_those_that_started_together(tmp_path, monkeypatch, capsys):
    waiting = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    peers = [named("first", "import time; time.sleep(60)"), named("second", waiting)]
    with pytest.raises(FileNotFoundError):  # of the results: there are none
        run_all(tmp_path, monkeypatch, peers, "--together", "2")
    assert "Interrupted" in capsys.readouterr().err
    assert not family(os.getpid())[1:]


def test_a_system_that_fails_leaves_its_log(tmp_path):
    row, replies = run_fake(tmp_path, "raise SystemExit('no such kernel')")
    assert (row["status"], replies) == ("failed", {})
    assert "no such kernel" in row["log"]


def test_command_lines_do_not_tell_where_things_lie():
    assert shown(["/a/b/vllm", "serve", "/tmp/x y/tiny"]) == "vllm serve tiny"


def test_memory_of_a_process_and_its_children(tmp_path):
    size = 64 << 20
    child = f"x = bytearray(b'1') * {size}; print('ready', flush=True); import time; time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            assert process.stdout.readline() == b"ready\n"
            with PeakMemory(process.pid) as memory, memory.quiet():
                processes = family(process.pid)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    wait_for_release(processes)
    assert len(processes) == 2
    assert proportional_bytes(process.pid) == 0
    found = memory.beyond_what_is_left()
    assert size < found["host_bytes"] < 3 * size
    assert found["gpu_bytes"] == 0 or shutil.which("nvidia-smi")


def test_memory_of_the_gpu_is_what_is_free_again_at_the_end(monkeypatch):
    # Another system has 5 of it all the time, and the driver is slow to take back the rest.
    readings = iter([5, 9, 12, 11, *[8, 6, 5, 5], 5])
    monkeypatch.setattr("peers.memory.gpu_bytes", lambda: next(readings))
    monkeypatch.setattr("peers.memory._SETTLE_S", 0.0)
    memory = PeakMemory(os.getpid())
    for _ in range(4):
        memory._look_at_gpu()
    wait_for_release([])
    assert memory.beyond_what_is_left()["gpu_bytes"] == 12 - 5


# transformers behind HTTP.


def test_requests_that_wait_together_are_one_batch(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    folder = make_checkpoint(tmp_path, "qwen3_moe", num_layers=2, num_experts=4, top_k=2)
    model = Model.__new__(Model)
    model._model = AutoModelForCausalLM.from_pretrained(folder).eval()
    asked = [([7, 8, 9], 6), ([11, 12, 13, 14, 15], 4)]

    async def answers():
        model._waiting = asyncio.Queue()
        work = asyncio.create_task(model.serve())
        queues = [model.ask(prompt, count) for prompt, count in asked]
        found = [
            [await queue.get() for _ in range(count)]
            for queue, (_, count) in zip(queues, asked, strict=True)
        ]
        work.cancel()
        return found

    together = asyncio.run(answers())
    for (prompt, count), found in zip(asked, together, strict=True):
        ids = torch.tensor([prompt])
        alone = model._model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count,
            eos_token_id=-1, pad_token_id=0,
        )  # fmt: skip
        assert found == alone[0, len(prompt) :].tolist()


# The command and what it prints.


def result():
    measured = {
        "status": "measured", "command": "x", "ready_s": 1.0, "first_token_s": 0.0123,
        "decode_tokens_per_s": {"1": 50.0, "8": None}, "gpu_bytes": 3 << 30,
        "host_bytes": 5 << 29, "host_taken_bytes": 1 << 30,
    }  # fmt: skip
    differs = {"by": "text", "same": 3, "answers": 9,
               "first": {"position": 4, "batch": 1, "prompt": 0}}  # fmt: skip
    machine = {"device": "CPU", "processor": "p", "torch": "t", "vllm": "v"}
    return {
        "machine": machine, "commit": "c", "shape_name": "tiny", "dtype": "float32", "share": 0.25,
        "batches": [1, 8], "long_prompt": 256, "new_tokens": 64,
        "systems": [
            {"system": "vLLM resident", **measured, "is_reference": True},
            {"system": "other", **measured, "agreement": differs},
            {"system": "absent", "status": "not installed", "remedy": "Install it."},
            {"system": "broken", "status": "failed", "log": "it hurts"},
        ],
    }  # fmt: skip


def test_table_hides_no_system(tmp_path, monkeypatch, capsys):
    (tmp_path / "r.json").write_text(json.dumps(result()))
    monkeypatch.setattr("sys.argv", ["run.py", "--render", str(tmp_path / "r.json")])
    assert main() == 0
    text = capsys.readouterr().out
    assert (
        "| vLLM resident | 12.3 | 50.0 | machine too busy | 3.00 | 2.50 | 1.00 | reference |"
        in (text)
    )
    assert "3 of 9 (text), first difference at 4" in text
    assert "absent is not installed: Install it." in text
    assert "it hurts" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert len(table.notes(result())) == 2


def test_plot_holds_what_was_measured(tmp_path):
    path = draw(result(), tmp_path / "r.json")
    assert ElementTree.parse(path).getroot().tag.endswith("svg")
    nothing = {**result(), "systems": result()["systems"][2:]}
    assert draw(nothing, tmp_path / "n.json") is None


@pytest.mark.parametrize(
    "arguments",
    [[], ["--out", "x", "--share", "1.5"], ["--out", "x", "--only", "nobody"],
     ["--out", "x", "--batches", "0"]],
)  # fmt: skip
def test_a_wrong_command_line_is_refused(arguments):
    with pytest.raises(SystemExit):
        parse(arguments)


def test_the_setup_fits_a_disk_of_64_gib():
    shape = SHAPES[parse(["--out", "x"]).shape]
    needed = 2 * checkpoint_size(shape)
    assert needed < parse(["--out", "x"]).disk_gb * 1e9 < 64 << 30


def checkpoint_size(shape):
    config = shape._config() | {"model_type": "qwen3_moe"}
    return sum(math.prod(sizes) for _, sizes in checkpoint.tensors(config)) * 2
