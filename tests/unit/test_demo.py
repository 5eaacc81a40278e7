import io
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from vllm_moe_offload import cli, demo
from vllm_moe_offload.demo.agreement import apart
from vllm_moe_offload.demo.conversation import REQUESTS, Answer, DemoError, Outcome, Request
from vllm_moe_offload.demo.report import texts_table
from vllm_moe_offload.demo.server import Server, command, environment, free_port

# Answers like vLLM, at once. --plugin with FAKE_SHIFT in the environment gives other tokens.
FAKE_SERVER = """
import json, os, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

plugin = "--plugin" in sys.argv
shift = int(os.environ.get("FAKE_SHIFT", 0)) if plugin else 0
stats = {"experts_in_pool": 192, "slots": 48, "resident": 47, "hits": 0, "misses": 0,
         "active": 0, "streamed": 0, "bytes_moved": 0}
child = subprocess.Popen(["sleep", "300"])
print("(APIServer pid=1) INFO 11-23 18:03:38 [x.py:1] child", child.pid, flush=True)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def reply(self, content, status=200):
        sent = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)
        if status == 500:  # as uvicorn does after an exception, unannounced
            time.sleep(0.2)
            self.close_connection = True

    def do_GET(self):
        self.reply({}, 200 if self.path == "/health" else 404)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/collective_rpc":
            return self.reply({"results": [stats]}, 200 if plugin else 500)
        if "messages" in body and "FAKE_NO_TEMPLATE" in os.environ:
            status, message = os.environ["FAKE_NO_TEMPLATE"].split(maxsplit=1)
            return self.reply({"error": {"message": message}}, int(status))
        stats["hits"] += 10
        stats["bytes_moved"] += 2**20
        ids = [7 + shift] * body["max_tokens"]
        choice = {"token_ids": ids if body["return_token_ids"] else None}
        text = f"text {7 + shift}"
        choice |= {"message": {"content": text}} if "messages" in body else {"text": text}
        logprob = -2.0 - float(os.environ.get("FAKE_ERROR", 0)) * plugin
        if body.get("logprobs") is True:
            choice["logprobs"] = {"content": [{"logprob": logprob}] * len(ids)}
        elif "logprobs" in body:
            choice["logprobs"] = {"token_logprobs": [logprob] * len(ids)}
        self.reply({"choices": [choice]})

    def log_message(self, *args):
        pass


ThreadingHTTPServer.request_queue_size = 64
port = int(sys.argv[sys.argv.index("--port") + 1])
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def script(path: Path, interpreter: str, source: str) -> Path:
    path.write_text(f"#!{interpreter}\n{source}")
    path.chmod(0o755)
    return path


@pytest.fixture
def vllm(tmp_path, monkeypatch) -> Path:
    """A fake ``vllm`` beside the interpreter, and an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(demo, "version", lambda name: "0.32.0+cpu")
    path = script(tmp_path / "vllm", sys.executable, FAKE_SERVER)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    return path


@pytest.fixture(autouse=True)
def _keep_signal_handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def ends(pid: int) -> bool:
    """Whether the process is gone, or about to be: kill does not wait."""
    stat = Path(f"/proc/{pid}/stat")
    for _ in range(100):
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def child_of_server(log: str) -> int:
    return int(Path(".demo", log).read_text().split()[-1])


def outcome(*token_ids: list[int], seconds: float = 1.0, **stats: int) -> Outcome:
    request = Request("prompt", is_chat=False)
    answers = [Answer(request, f"text {ids}", ids) for ids in token_ids]
    return Outcome(answers, seconds, stats)


def rendered(*tables: object) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(*tables)
    return console.file.getvalue()


def test_same_tokens_exit_zero(vllm, capsys):
    assert demo.run("some/model") == 0
    out = capsys.readouterr().out
    assert out.rstrip().endswith("identical: yes")
    assert "--plugin moe-offload --moe-offload-cache-fraction 0.25" in out
    assert "47 of 48" in out
    assert ends(child_of_server("moe-offload.log"))
    assert ends(child_of_server("stock.log"))


def test_the_warm_up_is_not_counted(vllm, capsys):
    demo.run("some/model")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["hits", str(10 * len(REQUESTS)), "-"] in rows
    assert ["bytes", "moved", f"{len(REQUESTS)}.0", "MiB", "-"] in rows


def test_other_tokens_exit_one(vllm, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_SHIFT", "1")
    assert demo.run("some/model") == 1
    out = capsys.readouterr().out
    assert out.rstrip().endswith("identical: no")
    assert "token ids differ from position 0" in out


@pytest.mark.parametrize(
    "why",
    [
        "400 provide a chat template",
        "400 Token id 200008 is out of vocabulary",
        "500 error downloading or loading vocab file",
    ],
)
def test_model_that_cannot_chat_is_asked_for_completions_only(vllm, monkeypatch, capsys, why):
    monkeypatch.setenv("FAKE_NO_TEMPLATE", why)
    assert demo.run("some/model") == 0
    texts = capsys.readouterr().out.partition("request")[2]
    assert "chat " not in texts


def test_server_that_dies_is_reported_with_its_log(vllm, capsys):
    script(vllm, "/bin/sh", 'echo "no such model: $2"; exit 3')
    start = time.monotonic()
    assert demo.run("some/model") == 1
    out = capsys.readouterr().out
    assert "ended with status 3" in out
    assert "no such model: some/model" in out
    assert time.monotonic() - start < 60


def test_server_that_dies_while_answering_is_reported(vllm):
    vllm.write_text(vllm.read_text().replace("stats[", "os._exit(4)  # "))
    with Server(command("m", "auto", True), {}, Path("log")) as server:
        server.wait_until_healthy(lambda seconds, message: None)
        with pytest.raises(DemoError, match="did not answer"):
            server.ask(REQUESTS, with_stats=True)


@pytest.mark.parametrize("model", ["/nowhere/model", "./model", "../model", "~/no such model"])
def test_folder_that_is_not_there_starts_no_server(vllm, capsys, model):
    assert demo.run(model) == 1
    assert f"{model}: there is no such folder" in capsys.readouterr().out
    assert not Path(".demo").exists()


def test_missing_vllm_is_reported(vllm, capsys):
    vllm.unlink()
    assert demo.run("some/model") == 1
    assert "No such file" in capsys.readouterr().out


def test_progress_tells_the_last_message_of_the_log(vllm):
    script(
        vllm,
        "/bin/sh",
        "echo '(Worker pid=1) INFO 11-23 18:03:38 [b.py:9] [x] loading'; echo noise; sleep 99",
    )
    with Server(command("m", "auto", True), {}, Path("log")) as server:

        def stop_when_told(seconds: float, message: str) -> None:
            assert seconds < 60
            if message != "starting":
                raise InterruptedError(message)

        with pytest.raises(InterruptedError, match=r"^\[x\] loading$"):
            server.wait_until_healthy(stop_when_told)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_no_process_is_left_when_the_demo_is_stopped(vllm, number):
    script(vllm, "/bin/sh", "trap '' TERM INT; sleep 300 & echo $!; wait; wait; wait")
    code = (
        # As in a terminal, whatever this process has inherited.
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "signal.signal(signal.SIGHUP, signal.SIG_DFL); "
        "from vllm_moe_offload import demo; from vllm_moe_offload.demo import server; "
        f"sys.executable = {str(vllm)!r}; "
        "server._STOP_TIMEOUT_S = 0.2; demo.version = lambda name: '0'; sys.exit(demo.run('m'))"
    )
    python = Path(sys.prefix, "bin", "python")
    with subprocess.Popen([python, "-c", code], stdout=subprocess.PIPE) as process:
        log = Path(".demo/moe-offload.log")
        while not (log.exists() and log.read_text().strip()):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert b"Interrupted" in out
    assert ends(child_of_server(log.name))


def test_outcomes_of_different_length_are_shown_as_different():
    text = rendered(texts_table(outcome([1, 2]), outcome([1, 2, 3])))
    assert "differ from position the end" in text


def test_texts_keep_brackets_and_lose_control_characters():
    odd = outcome([1])
    odd = replace(odd, answers=[replace(odd.answers[0], text="[b]\x07a\ufffd\n[/red]")])
    assert "[b] a [/red]" in rendered(texts_table(odd, odd))


def test_time_is_shared_by_all_tokens():
    assert outcome([1, 2], [3, 4], seconds=0.1).ms_per_token == pytest.approx(25)


def test_an_answer_without_token_ids_is_an_error():
    reply = {"choices": [{"text": "x", "token_ids": None}]}
    with pytest.raises(DemoError, match="no token ids"):
        Answer.parse(Request("p", is_chat=False), reply)


def test_free_ports_can_be_bound():
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", free_port()))


def test_only_the_stock_server_is_without_plugins(tmp_path):
    assert environment("m", on_cpu=True, plugin=False)["VLLM_PLUGINS"] == ""
    assert "VLLM_PLUGINS" not in environment("m", on_cpu=True, plugin=True)
    assert "HF_HUB_OFFLINE" not in environment("m", on_cpu=True, plugin=True)
    assert environment(str(tmp_path), on_cpu=True, plugin=True)["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(
    ("version", "model", "given", "dtype"),
    [
        ("0.32.0+cpu", "m", None, "float32"),
        ("0.33.0", "m", None, "auto"),
        ("0.33.0", None, None, "float32"),
        ("0.33.0", "m", "bfloat16", "bfloat16"),
    ],
)
def test_data_type(vllm, monkeypatch, capsys, version, model, given, dtype):
    script(vllm, "/bin/sh", "exit 1")
    monkeypatch.setattr(demo, "version", lambda name: version)
    monkeypatch.setattr(
        demo, "make_checkpoint", lambda path, family, **kwargs: path.mkdir() or path
    )
    demo.run(model, given)
    assert f"--dtype {dtype} " in capsys.readouterr().out


def test_command_line(monkeypatch):
    calls = []
    monkeypatch.setattr(demo, "run", lambda *args: calls.append(args) or 5)
    assert cli.main(["demo"]) == 5
    assert cli.main(["demo", "some/model", "--dtype", "float32"]) == 5
    assert cli.main(["demo", "--format", "mxfp4"]) == 5
    assert calls == [(None, None, None), ("some/model", "float32", None), (None, None, "mxfp4")]


@pytest.mark.parametrize("form", demo.FORMATS)
def test_format_that_stock_vllm_does_not_serve_here(vllm, monkeypatch, capsys, form):
    monkeypatch.setattr(demo, "version", lambda name: "0.32.0+cpu")
    monkeypatch.setattr(demo.Path, "read_text", lambda _: "flags : avx512f")
    assert demo.run(None, None, form) == 1
    out = capsys.readouterr().out
    assert form in out
    assert "on a GPU, or on a CPU with AMX" in " ".join(out.split())
    assert "vllm serve" not in out


@pytest.mark.parametrize("form", demo.FORMATS)
def test_small_checkpoint_in_a_format(vllm, monkeypatch, capsys, form):
    monkeypatch.setattr(demo, "version", lambda name: "0.33.0")
    assert demo.run(None, None, form) == 0
    out = capsys.readouterr().out
    assert "--dtype auto" in out
    (folder,) = Path(".demo").glob(f"*-{form}")
    assert str(folder) in out
    config = json.loads((folder / "config.json").read_text())
    methods = {"fp8": "fp8", "w4a16": "compressed-tensors", "mxfp4": "mxfp4"}
    assert config["quantization_config"]["quant_method"] == methods[form]


@pytest.mark.parametrize(
    ("shift", "error", "status", "ending"),
    [
        (0, 0.0, 0, "identical: yes\nthe same but for rounding: yes"),
        (1, 0.1, 0, "identical: no\nthe same but for rounding: yes"),
        (0, 0.2, 1, "identical: yes\nthe same but for rounding: no"),
        (1, -0.2, 1, "identical: no\nthe same but for rounding: no"),
    ],
)
def test_format_is_the_same_but_for_rounding(
    vllm, monkeypatch, capsys, shift, error, status, ending
):
    monkeypatch.setattr(demo, "version", lambda name: "0.33.0")
    monkeypatch.setenv("FAKE_SHIFT", str(shift))
    monkeypatch.setenv("FAKE_ERROR", str(error))
    assert demo.run(None, None, "w4a16") == status
    out = capsys.readouterr().out
    assert out.rstrip().endswith(ending)
    assert f"within {abs(error):.3f} of each other" in " ".join(out.split())


def test_answers_are_compared_up_to_where_tokens_part():
    request = Request("prompt", is_chat=False, with_logprobs=True)

    def answer(tokens, logprobs):
        return Answer(request, "text", tokens, logprobs)

    ours = [answer([1, 2, 3], [-1.0, -2.0, -9.0]), answer([4, 5], [-1.0, -1.0])]
    theirs = [answer([1, 7, 3], [-1.25, -2.5, -3.0]), answer([4, 5], [-1.0, -1.125])]
    assert apart(ours, theirs) == 0.5
    assert apart(ours[1:], theirs[1:]) == 0.125


def test_formats_of_the_command_line_are_those_of_the_demo(capsys):
    with pytest.raises(SystemExit):
        cli.main(["demo", "--format", "no such"])
    message = capsys.readouterr().err
    assert all(form in message for form in demo.FORMATS)


def test_command_line_needs_a_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 2
    assert "demo" in capsys.readouterr().err


def test_vllm_without_its_script(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python3"))
    words = ["-m", "vllm.entrypoints.cli.main", "serve", "m"]
    assert command("m", "auto", True)[:5] == [sys.executable, *words]
    (tmp_path / "vllm").touch()
    assert command("m", "auto", True)[:3] == [str(tmp_path / "vllm"), "serve", "m"]
