"""Write docs/options.md from the class that holds the plugin's options: ``make docs``."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm_moe_offload.config import MoeOffloadConfig

PAGE = Path(__file__).with_name("options.md")

_HEAD = """\
# Options

`make docs` writes this page from `vllm_moe_offload/config.py`; descriptions are changed there.

An option has the same name in three places: on the command line with dashes and `--moe-offload-`
in front, of `vllm serve` as of everything else that takes vLLM's arguments,

```console
$ vllm serve MODEL --plugin moe-offload --moe-offload-cache-fraction 0.25
```

in Python as `LLM(MODEL, plugin="moe-offload", moe_offload={"cache_fraction": 0.25})`, and wherever
vLLM takes `additional_config`, as `{"moe_offload": {"cache_fraction": 0.25}}`. Any option turns the
plugin on, and `--plugin moe-offload` alone does so with all defaults. On the command line the last
of two values for one option counts, as for vLLM's own; in Python two are refused. Refused as well
is a name that does not exist, a value out of range, or options that contradict each other: before
weights are loaded, with what to give instead ([troubleshooting](troubleshooting.md)).

"""

_TAIL = """
`vllm serve --help=moe-offload` prints the same. vLLM's command line wants the model first as soon
as `--served-model-name` is given: `vllm serve MODEL --plugin moe-offload --served-model-name NAME`.

## Environment

| variable | what it does |
|---|---|
| `MOE_OFFLOAD_ANY_VLLM=1` | takes a vLLM outside [the tested versions](vllm-versions.md) |
| `VLLM_PLUGINS` | vLLM's own list of plugins to load; if it is set, `moe-offload` must be in it |
"""


def page() -> str:
    """Return the page as it should be."""
    properties = MoeOffloadConfig.model_json_schema()["properties"]
    rows = [
        f"| `{name}` | {_default(field.default)} | {', or '.join(_values(properties[name]))} "
        f"| {field.description.replace('|', '/')} |"
        for name, field in MoeOffloadConfig.model_fields.items()
    ]
    table = ["| option | default | values | what it does |", "|---|---|---|---|", *rows]
    return _HEAD + "\n".join(table) + "\n" + _TAIL


def _default(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _values(schema: Mapping[str, Any]) -> Iterator[str]:
    """Say what a field takes, one alternative after the other."""
    for alternative in schema.get("anyOf", [schema]):
        if "enum" in alternative:
            yield ", ".join(f"`{value}`" for value in alternative["enum"])
        elif "const" in alternative:
            yield f"`{alternative['const']}`"
        elif alternative["type"] in ("number", "integer"):
            yield f"a number{_limits(alternative)}"
        elif alternative["type"] == "boolean":
            yield "the flag alone"
        elif alternative["type"] != "null":
            yield "text"


def _limits(schema: Mapping[str, Any]) -> str:
    words = {"exclusiveMinimum": "above", "minimum": "from", "exclusiveMaximum": "below",
             "maximum": "up to"}  # fmt: skip
    return "".join(
        f" {word} {float(schema[key]):,.10g}" for key, word in words.items() if key in schema
    )


if __name__ == "__main__":
    PAGE.write_text(page())
