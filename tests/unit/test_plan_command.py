"""The command as users see it: tables, JSON, errors, and options that exist."""

import ast
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from vllm_moe_offload import cli
from vllm_moe_offload.checkpoints import make_checkpoint
from vllm_moe_offload.config import MoeOffloadConfig
from vllm_moe_offload.plan import command
from vllm_moe_offload.plan.planner import GPU_UTILISATION
from vllm_moe_offload.sizes import GIB, format_size

KEYS = {
    "dense_bytes", "expert_bytes", "bytes_per_expert", "moe_layers", "experts_per_layer", "top_k",
    "kv_bytes_per_token", "slots_per_layer", "fits", "bounds",
}  # fmt: skip


@pytest.fixture(scope="module")
def moe(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("moe"), "qwen3_moe", num_experts=16)


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("dense"), "dense")


def plan(capsys, *arguments: object) -> str:
    assert cli.main(["plan", *map(str, arguments)]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    return output.out


def plan_json(capsys, *arguments: object) -> dict:
    return json.loads(plan(capsys, *arguments, "--json"))


def test_json_has_the_promised_keys(capsys, moe):
    answer = plan_json(capsys, moe)
    assert answer.keys() >= KEYS
    assert answer["fits"] is True
    assert (answer["moe_layers"], answer["experts_per_layer"], answer["top_k"]) == (4, 16, 2)
    assert answer["bytes_per_expert"] == 3 * 64 * 128 * 4
    assert answer["kv_bytes_per_token"] == 4 * 2 * 2 * 32 * 2
    assert answer["slots_per_layer"] == 16
    assert answer["bounds"]["decode_tokens_per_s"].keys() == {"0", "0.5", "0.75", "0.9"}
    assert answer["changes"] == []


def test_memory_adds_up(capsys, moe):
    for part in ("gpu", "host"):
        memory = plan_json(capsys, moe)[part]
        needed, _ = memory.pop("needed_bytes"), memory.pop("usable_bytes")
        assert sum(memory.values()) == needed


@pytest.mark.parametrize(
    ("arguments", "rate"),
    [((), 25e9), (("--pcie", "gen5"), 52e9), (("--pcie-gb-s", "13.5"), 13.5e9)],
)
def test_rate_of_pcie(capsys, moe, arguments, rate):
    assert plan_json(capsys, moe, *arguments)["bounds"]["pcie_bytes_per_s"] == rate


def test_rate_that_the_doctor_measured(capsys, moe, tmp_path):
    file = tmp_path / "doctor.json"
    gpus = [{"copy_to_gpu_bytes_per_s": rate} for rate in (2.6e10, 2.4e10)]
    file.write_text(json.dumps({"gpus": gpus}))
    assert plan_json(capsys, moe, "--doctor", file)["bounds"]["pcie_bytes_per_s"] == 2.4e10


@pytest.mark.parametrize("text", ['{"gpus": []}', "[]", "{}", "no JSON", None])
def test_no_rate_from_the_doctor(capsys, moe, tmp_path, text):
    file = tmp_path / "doctor.json"
    if text is not None:
        file.write_text(text)
    assert cli.main(["plan", str(moe), "--doctor", str(file)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert str(file) in output.err


def test_default_length_is_what_the_model_allows(capsys, moe):
    assert plan_json(capsys, moe)["max_model_len"] == 4096


def test_dense_model(capsys, dense):
    answer = plan_json(capsys, dense)
    assert answer.keys() >= KEYS
    assert answer["fits"] is True
    zero = [key for key in KEYS if answer[key] == 0 and answer[key] is not False]
    assert sorted(zero) == sorted(KEYS - {"dense_bytes", "kv_bytes_per_token", "fits", "bounds"})
    assert answer["bounds"] == {}
    text = plan(capsys, dense)
    assert "it has no routed experts" in text
    assert "plugin moe-offload" not in text


def test_tables(capsys, moe):
    text = plan(capsys, moe)
    assert "4 MoE layers of 16 experts, 2 a token" in text
    assert "16 of 16 experts a layer" in text
    assert "Fits. Serve it with\nvllm serve " in text
    assert max(len(line) for line in text.splitlines() if "vllm serve" not in line) < 110


def test_rows_that_are_smaller_than_what_is_stored(capsys, moe):
    assert "vLLM serves F32 in 16 bits" in plan(capsys, moe)
    assert "16 bits" not in plan(capsys, moe, "--dtype", "float32")


def test_what_the_default_size_of_the_slots_does(capsys, moe):
    answer = plan_json(capsys, moe)
    assert answer["automatic"]["slots_per_layer"] == 4
    assert answer["automatic"]["slot_bytes"] == 4 * 4 * answer["row_bytes"]
    with_auto = "Where it cannot be shared, 4 of 16 experts a layer have a slot, "
    size = format_size(answer["automatic"]["slot_bytes"])
    assert f"{with_auto}{size} in all, which fits." in plan(capsys, moe)
    small = plan(capsys, moe, "--gpu-gb", "1.6", "--concurrency", "40")
    assert f"{with_auto}{size} in all, for which " in small
    assert " are lacking." in small


def small_gpu(capsys, checkpoint: Path) -> tuple[str, str]:
    """A GPU on which some of 16 experts have slots: staging takes those of 4, and 6 lack."""
    gpu = plan_json(capsys, checkpoint)["gpu"]
    usable = gpu["needed_bytes"] - gpu["slot_bytes"] * 6 // 16
    return "--gpu-gb", str(usable / GPU_UTILISATION / GIB + 1e-9)


def test_both_ways_to_serve(capsys, moe):
    small = small_gpu(capsys, moe)
    answer = plan_json(capsys, moe, *small)
    assert answer["slots_per_layer"] == 6
    assert "--moe-offload-gpu-gb" in answer["serve"]
    assert "--plugin moe-offload --max-model-len" in answer["serve_borrowing"]
    text = plan(capsys, moe, *small)
    assert f"{answer['serve']}\nor let slots borrow whatever the KV cache leaves" in text
    assert text.endswith(f":\n{answer['serve_borrowing']}\n")


def test_one_way_to_serve_where_all_experts_have_a_slot(capsys, moe):
    assert plan_json(capsys, moe)["serve_borrowing"] is None
    assert plan(capsys, moe).count("vllm serve ") == 1


def test_kv_cache_that_is_not_shared(capsys, tmp_path):
    windows = make_checkpoint(tmp_path, "gpt_oss", num_experts=16)
    capsys.readouterr()
    small = small_gpu(capsys, windows)
    answer = plan_json(capsys, windows, *small)
    assert answer["slots_per_layer"] == 6
    assert answer["serve_borrowing"] is None
    text = plan(capsys, windows, *small)
    assert "borrow" not in text
    assert "The KV cache is not shared with experts, as not all layers have full attention." in text


def test_reader_that_has_seen_enough(moe):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-P", "-m", "vllm_moe_offload.cli", "plan", str(moe), "--json"]
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (result.returncode, result.stderr) == (1, "")


def test_more_choices_than_experts(capsys, tmp_path):
    folder = make_checkpoint(tmp_path, "qwen3_moe", num_experts=8)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_experts_per_tok": 9}))
    assert cli.main(["plan", str(folder)]) == 2
    assert "9 experts a token: a layer has only 8" in capsys.readouterr().err


def test_predictors_are_those_of_the_option():
    names = get_args(MoeOffloadConfig.model_fields["predictor"].annotation)
    assert names == command._PREDICTORS, "named twice, as plan does without the options' imports"


def test_tables_of_a_predictor(capsys, moe):
    assert "tables of" not in plan(capsys, moe)
    assert "GPU: tables of markov" in plan(capsys, moe, "--predictor", "markov")
    answer = plan_json(capsys, moe, "--predictor", "markov")
    assert answer["gpu"]["predictor_bytes"] > 0
    assert "--moe-offload-predictor markov " in answer["serve"]


def test_not_fitting_is_an_answer(capsys, moe):
    arguments = (moe, "--gpu-gb", "1.6", "--host-gb", "2", "--concurrency", "40")
    answer = plan_json(capsys, *arguments)
    assert (answer["fits"], answer["serve"]) == (False, None)
    assert answer["changes"]
    assert all(change["serve"].startswith("vllm serve ") for change in answer["changes"])
    text = plan(capsys, *arguments)
    assert "Does not fit: it lacks" in text
    assert answer["changes"][0]["change"] in text


def test_command_line_has_real_options(capsys, moe):
    """Those of the plugin by its options class, those of vLLM by its source, unimported."""
    arguments = (moe, "--concurrency", "1", "--dtype", "half")
    large = plan_json(capsys, *arguments)
    others = large["gpu"]["needed_bytes"] - large["gpu"]["slot_bytes"]
    gpu_gb = (others + 50 * large["row_bytes"]) / GPU_UTILISATION / GIB
    answer = plan_json(capsys, *arguments, "--gpu-gb", gpu_gb)
    assert answer["slots_per_layer"] == 8  # of the 50 rows, staging takes 16
    words = shlex.split(answer["serve"])
    assert words[:5] == ["vllm", "serve", str(moe), "--plugin", "moe-offload"]
    options = {word.removeprefix("--").replace("-", "_") for word in words[5::2]}
    assert all(word.startswith("--") for word in words[5::2])
    own = {name for name in options if name.startswith("moe_offload_")}
    assert {name.removeprefix("moe_offload_") for name in own} <= set(MoeOffloadConfig.model_fields)
    assert own == {"moe_offload_gpu_gb"}
    assert options - own == {"max_model_len", "max_num_seqs", "dtype"}
    assert options - own <= vllm_options()


def vllm_options() -> set[str]:
    vllm = importlib.util.find_spec("vllm")
    if vllm is None:
        pytest.skip("vLLM is not installed")
    tree = ast.parse((Path(vllm.origin).parent / "engine" / "arg_utils.py").read_text())
    arguments = next(n for n in ast.walk(tree) if getattr(n, "name", None) == "EngineArgs")
    return {node.target.id for node in arguments.body if isinstance(node, ast.AnnAssign)}


def test_error_has_its_remedy(capsys, tmp_path):
    assert cli.main(["plan", str(tmp_path)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert "it has no config.json" in output.err
    assert len(output.err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("--gpu-gb", "0"),
        ("--gpu-gb", "inf"),
        ("--host-gb", "much"),
        ("--concurrency", "0"),
        ("--max-model-len", "1.5"),
        ("--dtype", "int3"),
        ("--predictor", "oracle"),
        ("--pcie", "gen5", "--pcie-gb-s", "50"),
        ("--doctor", "file", "--pcie", "gen5"),
    ],
)
def test_bad_arguments(capsys, moe, arguments):
    with pytest.raises(SystemExit) as status:
        cli.main(["plan", str(moe), *arguments])
    assert status.value.code == 2
    error = capsys.readouterr().err
    assert arguments[0] in error
    assert " _" not in error, "names of functions mean nothing to a user"


def test_longer_than_the_model_allows(capsys, moe, tmp_path):
    assert plan_json(capsys, moe, "--max-model-len", "4096")["fits"]
    assert cli.main(["plan", str(moe), "--max-model-len", "4097"]) == 2
    error = capsys.readouterr().err
    assert "--max-model-len = 4097: the model has 4096 positions" in error

    stretched = shutil.copytree(moe, tmp_path / "stretched")
    config = json.loads((moe / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    (stretched / "config.json").write_text(json.dumps(config))
    assert plan_json(capsys, stretched, "--max-model-len", "9000")["fits"]
