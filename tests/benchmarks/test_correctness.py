"""What ``correctness.py`` says of runs that differ."""

import copy

import answers
import correctness
import pytest
from answers import difference
from correctness import Case, cases, judge

CASE = Case("qwen3_moe", "graphs", "bfloat16", "V2")


def run(**facts):
    answers = {
        "batch 1": [[[5, -0.5], [6, -0.25]]],
        "batch 7": [[[n, -1.0], [n, -2.0], [n, -3.0]] for n in range(7)],
    }
    schedule = {"batch 1": [[3], [1]], "batch 7": [[17, 8, 5], [1, 1, 1]]}
    return {"answers": answers, "schedule": schedule, "facts": facts}


def changed(phase, request, step, answer):
    other = run()
    other["answers"][phase][request][step] = answer
    return other


def all_runs():
    names = [f"share {share}" for share in correctness.SHARES]
    others = ["first start", "share again", "stock", "stock again"]
    return {name: run() for name in [*names, *others]}


def all_controls():
    return {name: run() for name in ("stock", "stock again", "share")}


def test_equal_runs_do_not_differ():
    assert difference(run(), run()) is None


def test_the_earliest_difference_is_named():
    other = changed("batch 7", 5, 2, [5, -3.5])
    other["answers"]["batch 7"][6][1] = [99, -2.0]
    other["schedule"]["batch 7"][1] = [1, 1]
    assert difference(run(), other) == {
        "phase": "batch 7",
        "step": 1,
        "request": 6,
        "tokens": [6, 99],
        "logprob_difference": 0.0,
        "requests_that_differ": 2,
        "same_schedule": False,
    }


def test_the_last_bit_of_a_logprob_counts():
    found = difference(run(), changed("batch 1", 0, 1, [6, -0.25000000000000006]))
    assert found is not None
    assert found["tokens"] == [6, 6]


def test_a_case_passes():
    row = judge(CASE, all_runs(), all_controls())
    assert row["passed"]
    assert set(row["controls"].values()) == {None}
    assert row["max_logprob_difference_to_stock"] == 0


@pytest.mark.parametrize("share", correctness.SHARES[1:])
def test_one_share_that_differs_fails_the_case(share):
    runs = all_runs() | {f"share {share}": changed("batch 7", 0, 0, [0, -1.5])}
    row = judge(CASE, runs, all_controls())
    assert not row["passed"]
    assert list(row["differences"]) == [f"share {share}"]


def test_a_compiler_that_rounds_otherwise_is_told_from_the_plugin():
    controls = all_controls() | {"stock": changed("batch 1", 0, 0, [5, -0.75])}
    row = judge(CASE, all_runs(), controls)
    assert row["passed"]
    differing = {name for name, found in row["controls"].items() if found}
    assert differing == {"vLLM, compiled apart", "vLLM, no compile cache, twice"}


def test_the_start_that_compiled_is_told_from_the_others():
    runs = all_runs() | {"first start": changed("batch 1", 0, 0, [5, -0.75])}
    row = judge(CASE, runs, all_controls())
    assert row["passed"]
    assert [name for name, found in row["controls"].items() if found] == [
        "plugin, start that compiled"
    ]


def test_a_failure_tells_its_start_and_its_first_error():
    log = "start: stock\nCUDA error: one\n" + "x\n" * 2000 + "the end"
    text = correctness.what_failed(log)
    assert text.startswith("start: stock\nCUDA error: one\n")
    assert text.endswith("the end")


def test_float32_must_give_the_tokens_of_vllm():
    runs = all_runs() | {"stock": changed("batch 1", 0, 1, [7, -0.25])}
    assert judge(CASE, runs, None)["passed"]
    assert not judge(CASE._replace(dtype="float32"), runs, None)["passed"]


def test_the_pool_must_be_pinned():
    runs = copy.deepcopy(all_runs())
    runs["share 0.5"]["facts"]["pool_pinned"] = False
    assert not judge(CASE, runs, None)["passed"]


def test_cases_are_filtered(monkeypatch):
    monkeypatch.setattr(correctness, "HAS_GPU", True)
    assert len(cases()) > len(cases(families=["qwen3_moe"])) > 3
    (only,) = cases(["qwen3_moe"], ["full"], ["bfloat16"])
    assert only == Case("qwen3_moe", "full", "bfloat16", "V2")


def test_batches_and_the_prompt_are_as_promised():
    sizes = [len(prompts) for prompts in answers.phases().values()]
    assert sizes == [1, 7, 32, 1]
    (long,) = list(answers.phases().values())[-1]
    assert len(long) == 2 * answers.CHUNK
