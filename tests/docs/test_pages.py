"""The pages agree with the code: links, options, metrics, messages and figures."""

import ast
import importlib.util
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from documented import PAGES, ROOT, anchors, inline_code, links, prose

from vllm_moe_offload.metrics.families import families
from vllm_moe_offload.quantised_checkpoints import FORMATS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in links(page):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_the_index_has_every_page():
    index = ROOT / "docs/README.md"
    listed = {(index.parent / link.partition("#")[0]).resolve() for link in links(index)}
    results = {page for page in PAGES if page != index}
    assert results <= listed


def test_page_of_options_is_what_the_generator_writes():
    file = ROOT / "docs/generate_options.py"
    spec = importlib.util.spec_from_file_location("generate_options", file)
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    assert generator.PAGE.read_text() == generator.page(), "run make docs"


def test_every_metric_is_explained():
    suffixes = {"counter": "_total", "info": "_info"}
    exposed = {family.name + suffixes.get(family.type, "") for family in families([])}
    named = set(inline_code(ROOT / "docs/metrics.md"))
    assert {name.removeprefix("vllm_moe_offload_") for name in exposed} <= named


# Messages.

SHORTEST = 8
"""Letters of a piece of a message below which it could stand anywhere."""


@cache
def texts_of_the_code() -> tuple[str, ...]:
    """All strings of the source, with ``...`` for what is filled in."""
    files = [file for folder in ("vllm_moe_offload", "kernels", "patches")
             for file in ROOT.glob(f"{folder}/**/*.py")]  # fmt: skip
    return tuple(text for file in files for text in strings(ast.parse(file.read_text())))


def strings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.sub(r"%\w", "...", node.value)
        if isinstance(node, ast.JoinedStr):
            parts = (p.value if isinstance(p, ast.Constant) else "..." for p in node.values)
            yield "".join(parts)


def messages() -> list[str]:
    """What the first column of the tables of messages quotes, but for what others say."""
    found, is_message = [], False
    for line in prose(ROOT / "docs/troubleshooting.md").splitlines():
        if not line.startswith("|"):
            is_message = False
            continue
        first = line.split("|")[1]
        is_message = is_message or first.strip() == "message"
        if "(from vLLM)" not in first:
            found += re.findall(r"`([^`]+)`", first) if is_message else []
    return found


def test_messages_are_looked_for():
    assert len(messages()) > 35


@pytest.mark.parametrize("message", messages())
def test_message_is_one_of_the_code(message):
    pieces = [piece.strip(" ():;,.") for piece in message.split("...")]
    known = [piece for piece in pieces if len(piece) >= SHORTEST]
    assert known, "too short to be looked for"
    for piece in known:
        assert any(piece in text for text in texts_of_the_code()), piece


def test_a_message_that_is_not_there_would_be_noticed():
    assert not any("the moon is in the way" in text for text in texts_of_the_code())


# Figures.

RESULTS = ROOT / "benchmarks/results"

CONFIGURATIONS = {
    "vLLM, all experts on the GPU": ("resident", ""),
    "this plugin, half of them in slots": ("plugin 0.5", ""),
    "vLLM `--cpu-offload-gb`, half of them on the GPU": ("cpu-offload 0.5", ""),
    "this plugin, a quarter": ("plugin 0.25", ""),
    "vLLM `--cpu-offload-gb`, a quarter": ("cpu-offload 0.25", ""),
    "this plugin, half, routing confined to a half": ("plugin 0.5", ", confined"),
    "vLLM `--cpu-offload-gb`, half, the same routing": ("cpu-offload 0.5", ", confined"),
}
REPLAYED = {
    "this plugin, half of the experts in slots": "adaptive 0.5",
    "vLLM `--cpu-offload-gb`, half of them on the GPU": "cpu-offload 0.5",
    "this plugin, a quarter": "adaptive 0.25",
    "vLLM `--cpu-offload-gb`, a quarter": "cpu-offload 0.25",
}
BATCHES = (1, 8, 32)


def rows_of(file: str) -> list[dict]:
    return json.loads((RESULTS / file).read_text())["rows"]


def seconds(rows: list[dict], configuration: str, case: str) -> float:
    (row,) = [r for r in rows if (r["configuration"], name_of(r)) == (configuration, case)]
    return row["seconds"]


def name_of(row: dict) -> str:
    size = row.get("batch", row.get("tokens", ""))
    return f"{row['case']} {size}{', confined' if row.get('confined') else ''}"


def tables_of_the_readme(heading: str) -> Iterator[list[list[str]]]:
    """Cells of the tables of a section, without their first two lines."""
    _, _, section = (ROOT / "README.md").read_text().partition(f"\n## {heading}\n")
    for table in re.findall(r"(?:^\|.*\n)+", section.partition("\n## ")[0], re.MULTILINE):
        lines = table.splitlines()[2:]
        yield [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def assert_shown(cell: str, exact: list[float], digits: str) -> None:
    shown = [float(figure.replace(",", "")) for figure in cell.split("/")]
    assert [f"{figure:{digits}}" for figure in shown] == [f"{value:{digits}}" for value in exact]


def test_replayed_results_are_those_of_the_files():
    table, _ = tables_of_the_readme("Results")
    assert [line[0] for line in table] == list(REPLAYED)
    for name, *cells in table:
        for cell, file in zip(cells, ("qwen3", "deepseek"), strict=True):
            rows = rows_of(f"prediction-{file}.json")
            steps = [seconds(rows, REPLAYED[name], f"decode {batch}") for batch in BATCHES]
            rates = [batch / step for batch, step in zip(BATCHES, steps, strict=True)]
            assert_shown(cell, rates, ".0f")


def test_results_are_those_of_the_file():
    rows, (_, table) = rows_of("engine.json"), tables_of_the_readme("Results")
    assert [name for name, *_ in table] == list(CONFIGURATIONS)
    for name, decode, prefill in table:
        configuration, kind = CONFIGURATIONS[name]
        batches = BATCHES[:2] if kind else BATCHES
        steps = [seconds(rows, configuration, f"decode {batch}{kind}") for batch in batches]
        rates = [batch / step for batch, step in zip(batches, steps, strict=True)]
        assert_shown(decode.removesuffix("/ -"), rates, ".3g")
        assert bool(prefill) == (kind == "")
        if prefill:
            waits = [seconds(rows, configuration, f"prefill {n}") for n in (8192, 32768)]
            assert_shown(prefill, waits, ".3g")


def test_what_the_readme_claims_in_its_first_lines():
    claim = " ".join((ROOT / "README.md").read_text().partition("\n## ")[0].split())
    replayed = [
        seconds(rows, f"cpu-offload {share}", case) / seconds(rows, f"adaptive {share}", case)
        for name in ("prediction-qwen3.json", "prediction-deepseek.json")
        for rows in [rows_of(name)]
        for share in (0.25, 0.5)
        for case in (f"decode {batch}" for batch in BATCHES)
    ]
    assert f"{min(replayed):.1f} to {max(replayed):.0f} times as fast with recorded" in claim
    rows = rows_of("engine.json")
    ratio = {
        (case, share): seconds(rows, f"cpu-offload {share}", case)
        / seconds(rows, f"plugin {share}", case)
        for share in (0.25, 0.5)
        for case in ("prefill 8192", "prefill 32768", *(f"decode {n}" for n in BATCHES))
    }
    prompts = [value for (case, _), value in ratio.items() if case.startswith("prefill")]
    assert {f"long prompts are {value:.0f} times as fast" in claim for value in prompts} == {True}
    assert min(value for (case, _), value in ratio.items() if case.startswith("decode")) >= 1 - 0.04
    assert "as fast within 4 %" in claim


FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "gpt_oss", "granite_moe")


def test_models_that_were_run_on_a_gpu():
    (table,) = tables_of_the_readme("Tested models")
    names = [re.sub(r"\W", "", name.split("(")[0].split(",")[0]).lower() for name, *_ in table]
    assert names == [family.replace("_", "") for family in FAMILIES]
    rows = [row for row in rows_of("correctness-eager.json") if row["mode"] == "eager"]
    for family in FAMILIES:
        runs = {row["dtype"]: row for row in rows if row["family"] == family}
        assert all(run["passed"] and run["bit_identical"] for run in runs.values())
        assert runs.keys() == {"float32", "bfloat16"}
        assert runs["float32"]["tokens_equal_stock"]


def test_graphs_that_were_run_on_a_gpu():
    for family in ("qwen3_moe", "deepseek_v2"):
        (run,) = [row for row in rows_of("correctness-graphs.json")
                  if (row["family"], row["mode"]) == (family, "graphs")]  # fmt: skip
        assert run["passed"]
        assert run["bit_identical"]


def test_formats_that_were_run_on_a_gpu():
    (table,) = tables_of_the_readme("Quantised experts")
    rows = {row["format"]: row for row in rows_of("correctness-quantised.json")}
    assert rows.keys() == set(FORMATS)
    assert all(r["bit_identical"] and r["float32_tokens_equal_stock"] for r in rows.values())
    assert all(row["passed"] for row in rows.values())
    for *_, on_gpu in table:
        assert on_gpu.startswith("tokens, bits, stock")


def test_quantised_servers_that_were_timed_on_a_gpu():
    targets = json.loads((RESULTS / "quant.json").read_text())["targets"]
    assert {target["passed"] for target in targets} == {True}
    assert "**Every target is met**" in (RESULTS.parent / "README.md").read_text()


def test_pages_name_no_file_of_a_machine():
    for page in PAGES:
        assert not re.search(r"(?<!\w)/(home|root|tmp|work)/", Path(page).read_text()), page
