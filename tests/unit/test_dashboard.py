"""The Grafana dashboard asks for what the server exposes."""

import json
import re
import shutil
import subprocess
from importlib.resources import files

import promql_parser
import pytest

from vllm_moe_offload.metrics.families import PREFIX, families

DASHBOARD = json.loads((files("vllm_moe_offload.metrics") / "grafana.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}


def exposed() -> set[str]:
    """Names of the samples of every family."""
    suffixes = {"counter": "_total", "info": "_info"}
    return {family.name + suffixes.get(family.type, "") for family in families([])}


def names(query: str) -> set[str]:
    return set(re.findall(rf"{PREFIX}\w+", query))


def test_every_metric_exists():
    asked = set().union(*map(names, [*QUERIES, VARIABLES["model"]["definition"]]))
    assert asked <= exposed()


def test_no_metric_is_left_out():
    assert exposed() == set().union(*map(names, QUERIES))


def test_every_query_keeps_to_the_chosen_models():
    for query in QUERIES:
        metrics = re.findall(rf"(?:{PREFIX}|vllm:)\w+", query)
        assert metrics
        assert query.count('{model_name=~"$model"}') == len(metrics)


def test_legends_use_labels_that_the_query_keeps():
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
                kept = re.search(r"by \(([\w, ]+)\)", target["expr"])
                assert label in kept[1].split(", "), target["expr"]


def test_panels_do_not_overlap():
    cells = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for place in [panel["gridPos"]]
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))


def test_any_data_source_will_do():
    assert VARIABLES["datasource"]["type"] == "datasource"
    sources = [panel["datasource"]["uid"] for panel in DASHBOARD["panels"]]
    assert set(sources) == {"${datasource}"}


def filled_in(query: str) -> str:
    """A query as Grafana sends it."""
    return query.replace("$model", ".*").replace("$__rate_interval", "5m")


@pytest.mark.parametrize("query", QUERIES)
def test_query_is_promql(query):
    assert "$" not in filled_in(query)
    promql_parser.parse(filled_in(query))


def test_what_is_no_promql_would_be_noticed():
    with pytest.raises(ValueError, match="paren"):
        promql_parser.parse(filled_in(QUERIES[0])[:-1])


def test_promtool_takes_every_query(tmp_path):
    if shutil.which("promtool") is None:
        pytest.skip("promtool, which comes with Prometheus, is not installed")
    rules = [{"record": f"query:{n}", "expr": filled_in(q)} for n, q in enumerate(QUERIES)]
    file = tmp_path / "rules.yml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    subprocess.run(["promtool", "check", "rules", file], check=True)
