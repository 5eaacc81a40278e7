"""Every command of the documentation runs, with a tiny model in place of the one that it names.

Those that cannot run here are listed with the reason, and are understood by what they call.
"""

import argparse
import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from cpu_settings import env
from documented import PAGES, ROOT, Command, blocks, commands, inline_code
from serving import CLIENT
from traces import random_trace

from vllm_moe_offload import cli
from vllm_moe_offload.checkpoints import make_checkpoint
from vllm_moe_offload.demo.server import free_port
from vllm_moe_offload.trace import Trace

COMMANDS = [command for page in PAGES for command in commands(page)]

SERVED = next(c for c in COMMANDS if c.page == "README.md" and c.text.startswith("vllm serve"))
"""The server that is started, and that clients ask."""

NOT_RUN = {
    r"make (install|lint|test)$": "these are what runs the tests, or comes before them",
    r"pip (install|download) ": "it downloads several GB",
    r"\S*python -m pytest ": "it runs other tests",
    r"python benchmarks/": "it measures for minutes, on a GPU",
    r"vllm-moe-offload plan .* --doctor ": "it wants rates that are measured on a GPU",
    r"vllm serve ": "one server is enough; of the others all is checked before weights load",
}

EXPECTED = {
    "make demo": r"identical: yes",
    "vllm bench throughput": r"\d% of \d+ active experts were in slots, [1-9]\d* missed",
    "vllm bench serve": r"Failed requests: +0",
    "vllm-moe-offload plan": r"Fits\. ",
    "vllm-moe-offload watch": r"hit ratio",
    "vllm-moe-offload simulate": r"lru",
    "vllm-moe-offload trace show": r"(?i)tokens",
    "python examples/offline_batch.py": r"active experts were in one of",
    "python examples/chat.py": r"This is .*\n",
    "python examples/record_and_replay.py": r"adaptive +\d",
}
"""What some of them print, whichever arguments they have."""

MODELS = ("Qwen/Qwen3-30B-A3B", "MODEL")
RECORDED = {
    "deepseek-v2-lite.intent": "DeepSeek-V2-Lite",
    "deepseek-v2-lite.summary": "DeepSeek-V2-Lite",
    "qwen3-30b-a3b.chat": "Qwen3-30B-A3B",
}


def reason_not_to_run(command: Command) -> str | None:
    if command is SERVED:
        return None
    return next((why for start, why in NOT_RUN.items() if re.match(start, command.text)), None)


RUN = [command for command in COMMANDS if reason_not_to_run(command) is None]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs") / "tiny"
    return make_checkpoint(
        folder, "qwen3_moe", config_overrides={"max_position_embeddings": 40_960}
    )


@pytest.fixture(scope="module")
def place(model, tmp_path_factory):
    """A folder that looks like a clone to commands, with what other commands would have made."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("Makefile", "examples", "docs", "benchmarks", "tests", "patches"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "traces").mkdir()
    for seed, (name, of) in enumerate({**RECORDED, "traces/one": "Qwen3-30B-A3B"}.items()):
        made = random_trace(seed, tokens=60, layers=4)
        trace = Trace(made.expert_ids, made.sequence_starts, made.num_experts, of, made.source)
        trace.save(folder / f"{name}.npz")
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = {**os.environ, **env("qwen3_moe"), "PATH": programs}
    variables |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_USE_AOT_COMPILE": "0"}
    variables.pop("TRITON_INTERPRET", None)
    return SimpleNamespace(folder=folder, model=model, env=variables)


def filled_in(text: str, place: SimpleNamespace) -> str:
    for name in MODELS:
        text = re.sub(rf"(?<![\w/-]){re.escape(name)}(?![\w/-])", str(place.model), text)
    return text


@pytest.fixture(scope="module")
def port(place):
    """Port of the README's server."""
    number, log = free_port(), place.folder / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {filled_in(SERVED.text, place)} --port {number}"],
            cwd=place.folder, env=place.env, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        wait_until_healthy(process, number, log)
        yield number
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, log.read_text()[-4000:]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until_healthy(process: subprocess.Popen, port: int, log: Path) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            if CLIENT.get(f"http://127.0.0.1:{port}/health").is_success:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    pytest.fail(log.read_text()[-4000:])


def run(text: str | list[str], place: SimpleNamespace, asked: str = "") -> str:
    """What a command prints; it has to succeed."""
    result = subprocess.run(
        ["bash", "-c", text] if isinstance(text, str) else text,
        cwd=place.folder, env=place.env, timeout=300, check=False, text=True,
        input=asked, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:]
    return result.stdout


def is_client(command: Command) -> bool:
    return "localhost:8000" in command.text or command.text.startswith("vllm bench serve")


def as_run(command: Command, port: int | None, place: SimpleNamespace) -> str:
    """A command with what is different here: the model, the port, and an end."""
    text = filled_in(command.text, place).replace("localhost:8000", f"localhost:{port}")
    if command.text.startswith("vllm bench serve"):
        text += f" --port {port}"
    if command.text.startswith("vllm-moe-offload watch"):
        text += " --once"  # it goes on for ever
    if command.words[0] == "make":
        # What is installed is what the tests run with.
        text += f" BIN='{Path(sys.executable).parent}' --assume-old .venv/.installed"
    return text


@pytest.fixture(scope="module")
def printed(place, request):
    """What each of the commands that are tested prints, two at a time as they mostly wait."""
    chosen = {item.callspec.params["command"] for item in request.session.items
              if getattr(item, "originalname", "") == "test_command_runs"}  # fmt: skip
    # The longest begin first.
    waiting = sorted(chosen, key=lambda c: (is_client(c), c.words[0] != "make", str(c)))
    with ThreadPoolExecutor(2) as pool:
        futures = {}
        for command in waiting:
            port = request.getfixturevalue("port") if is_client(command) else None
            asked = "How are you?\nAnd now?\n" if "chat.py" in command.text else ""
            futures[command] = pool.submit(run, as_run(command, port, place), place, asked)
        yield {command: future.result for command, future in futures.items()}


@pytest.mark.parametrize("command", [c for c in RUN if c is not SERVED], ids=str)
def test_command_runs(command, printed):
    text = printed[command]()
    for start, expected in EXPECTED.items():
        if command.text.startswith(start):
            assert re.search(expected, text), text[-4000:]


def test_the_server_of_the_readme(port):
    answer = CLIENT.get(f"http://127.0.0.1:{port}/metrics").text
    assert "vllm_moe_offload_slots" in answer


def test_python_of_the_readme(place):
    ((_, code),) = blocks(ROOT / "README.md", "python")
    for name in MODELS:
        code = code.replace(name, str(place.model))
    (place.folder / "readme.py").write_text(code)
    text = run([sys.executable, "readme.py"], place)
    assert "'experts_in_pool': 32" in text


# What does not run is understood.


@pytest.mark.parametrize("command", [c for c in COMMANDS if reason_not_to_run(c)], ids=str)
def test_command_is_understood(command, place):
    understand(shlex.split(filled_in(shlex.join(command.words), place)), place)


def test_every_reason_is_needed():
    for start in NOT_RUN:
        assert any(re.match(start, c.text) for c in COMMANDS if c is not SERVED), start


INLINE = sorted(
    {
        code.replace("...", "").replace("[MODEL]", "MODEL")
        for page in PAGES
        for code in inline_code(page)
        if re.match(r"(vllm-moe-offload \S+ \S|python benchmarks/\S+ -|vllm serve MODEL |make \w)",
                    code)
    }
)  # fmt: skip


@pytest.mark.parametrize("text", INLINE)
def test_command_in_a_sentence_is_understood(text, place):
    understand(shlex.split(filled_in(text, place)), place)


def understand(words: list[str], place: SimpleNamespace) -> None:
    """Hand a command line to the parser of what it calls.

    Raises:
        SystemExit: the parser does not take it.
    """
    if words[0] == "make":
        subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    elif words[0] == "pip":
        understand_pip(words)
    elif words[:2] == ["vllm", "serve"]:
        understand_serve(words[2:], place)
    elif words[0] == "vllm-moe-offload":
        cli.make_parser().parse_args(words[1:])
    elif words[1].startswith("benchmarks/"):
        script(ROOT / words[1]).parse(words[2:])
    else:
        assert words[1:4] == ["-m", "pytest", "-q"], words
        assert all((ROOT / path).exists() for path in words[4:])


def understand_pip(words: list[str]) -> None:
    from packaging.requirements import Requirement

    if words[1] == "download":
        assert Requirement(words[-1]).name == "vllm"
        return
    (extra,) = re.findall(r"^\.\[(\w+)\]$", words[2])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extra in project["optional-dependencies"]


def understand_serve(words: list[str], place: SimpleNamespace) -> None:
    """Go as far as a server does before it starts an engine."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.cli.serve import cmd_init
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    (serve,) = cmd_init()
    serve.subparser_init(parser.add_subparsers())
    arguments = parser.parse_args(["serve", *words])
    arguments.model = arguments.model_tag
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place.folder)
        config = AsyncEngineArgs.from_cli_args(arguments).create_engine_config()
    assert config.additional_config["moe_offload"]


def script(file: Path) -> argparse.Namespace:
    name = f"documented_{file.parent.name}_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
