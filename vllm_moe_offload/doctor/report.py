"""Findings for people, and the same for programs."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_moe_offload.doctor.checks import Finding, is_healthy
from vllm_moe_offload.doctor.facts import Facts

_STYLES = {"ok": "green", "slow": "yellow", "broken": "bold red"}

RATES = ("copy_to_gpu", "copy_to_host", "gather_to_gpu", "gather_to_host")


def as_dict(facts: Facts, findings: list[Finding]) -> dict[str, Any]:
    """All findings, and the measured rates in bytes a second, which ``plan --doctor`` reads."""
    return {
        "healthy": is_healthy(findings),
        "findings": [vars(finding) for finding in findings],
        "host_memory_bytes_per_s": facts.host.bytes_per_s,
        "gpus": [
            {"name": gpu.name, "address": gpu.address, "memory_bytes": gpu.memory_bytes}
            | {f"{name}_bytes_per_s": getattr(rates, name) for name in RATES}
            for gpu in facts.gpus
            if (rates := facts.rates.get(gpu.address)) is not None and rates.problem is None
        ],
    }


def show(findings: list[Finding], console: Console) -> None:
    """Print a line for each finding, with its remedy below where there is one."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("")
    table.add_column("")
    table.add_column("found", overflow="fold")
    for finding in findings:
        value = Text(finding.value)
        if finding.remedy:
            value.append(f"\n{finding.remedy}.", style="italic")
        verdict = Text(finding.verdict, style=_STYLES[finding.verdict])
        table.add_row(finding.subject, verdict, value)
    console.print(table)
    console.print(_summary(findings))


def _summary(findings: list[Finding]) -> Text:
    broken = sum(finding.verdict == "broken" for finding in findings)
    slow = sum(finding.verdict == "slow" for finding in findings)
    if broken:
        return Text(f"\n{broken} broken, {slow} slow", style=_STYLES["broken"])
    if slow:
        return Text(f"\nNothing is broken, {slow} slow", style=_STYLES["slow"])
    return Text("\nAll is well", style=_STYLES["ok"])
