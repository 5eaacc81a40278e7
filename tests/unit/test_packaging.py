import ast
import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import vllm_moe_offload

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "vllm_moe_offload"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def packages() -> dict[str, Path]:
    """Every folder below the package that is a package itself, by its name."""
    found = {}
    for folder, _, files in os.walk(PACKAGE, followlinks=True):
        if "__init__.py" in files:
            name = ".".join((PACKAGE.name, *Path(folder).relative_to(PACKAGE).parts))
            found[name] = Path(folder).resolve()
    return found


def test_every_package_is_listed():
    assert set(SETUPTOOLS["packages"]) == set(packages())


def test_every_package_is_where_the_project_says():
    folders = {name: (ROOT / folder).resolve()
               for name, folder in SETUPTOOLS["package-dir"].items()}  # fmt: skip
    assert folders == packages()


@pytest.mark.parametrize("name", ["kernels", "patches"])
def test_symlinks(name):
    assert (PACKAGE / name).readlink() == Path("..") / name
    assert (ROOT / name / "__init__.py").is_file()


def test_version():
    assert vllm_moe_offload.__version__ == PROJECT["project"]["version"]


def test_typed():
    assert (PACKAGE / "py.typed").is_file()
    assert SETUPTOOLS["package-data"]["vllm_moe_offload"] == ["py.typed"]


def test_data_files_exist():
    for name, patterns in SETUPTOOLS["package-data"].items():
        assert all(any(packages()[name].glob(pattern)) for pattern in patterns)


def test_entry_points_exist():
    groups = PROJECT["project"]["entry-points"]
    assert groups["vllm.general_plugins"].keys() == {"moe-offload"}
    targets = [target for group in groups.values() for target in group.values()]
    for target in (*targets, *PROJECT["project"]["scripts"].values()):
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize(
    "statement",
    [
        "import vllm_moe_offload.plugin",
        "from vllm_moe_offload import plugin; plugin.register(); plugin.register()",
        "from vllm_moe_offload import plugin; assert plugin.claim_no_platform() is None",
    ],
)
def test_plugin_costs_nothing(statement):
    code = (
        f"{statement}\nimport sys\nprint(sorted({{'torch', 'vllm', 'triton'}} & set(sys.modules)))"
    )
    result = run(sys.executable, "-c", code)
    assert result.stdout == "[]\n", result.stderr


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {file.name}"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_kernels_know_nobody():
    own = f"{PACKAGE.name}.kernels."
    for file in (ROOT / "kernels").rglob("*.py"):
        for name in imports(file):
            assert name.split(".")[0] != "vllm", f"{file.name} imports {name}"
            assert not name.startswith(PACKAGE.name) or name.startswith(own), (
                f"{file.name} imports {name}"
            )


def test_kernels_export_nothing_at_the_top():
    tree = ast.parse((ROOT / "kernels/__init__.py").read_text())
    assert [type(node) for node in tree.body] == [ast.Expr]


def test_imports_point_downwards():
    result = run(Path(sys.executable).with_name("lint-imports"))
    assert result.returncode == 0, result.stdout + result.stderr


def test_no_folder_of_tests_is_a_package():
    assert list((ROOT / "tests").rglob("__init__.py")) == []
