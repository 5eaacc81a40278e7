import importlib
import subprocess
import sys
import textwrap

import pytest

from vllm_moe_offload.patches import when_imported


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module whose name is unique to the test and returns the name."""
    monkeypatch.syspath_prepend(tmp_path)
    names = []

    def write(source: str, name: str = "awaited") -> str:
        name = f"{name}_{tmp_path.name}".replace("-", "_")
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        importlib.invalidate_caches()
        names.append(name)
        return name

    yield write
    for name in names:
        sys.modules.pop(name, None)
        when_imported._pending.pop(name, None)


def test_already_imported(module):
    name = module("value = 1")
    imported = importlib.import_module(name)
    calls = []
    when_imported.call(name, calls.append)
    assert calls == [imported]


def test_imported_later(module):
    name = module("value = 1")
    seen = []
    when_imported.call(name, lambda m: seen.append((m.__name__, m.value)))
    assert seen == []
    assert name not in sys.modules
    importlib.import_module(name)
    assert seen == [(name, 1)]


def test_called_once(module):
    name = module("value = 1")
    calls = []
    when_imported.call(name, calls.append)
    imported = importlib.import_module(name)
    importlib.reload(imported)
    assert calls == [imported]


def test_several_callbacks_in_order(module):
    name = module("value = 1")
    order = []
    for number in range(3):
        when_imported.call(name, lambda _, n=number: order.append(n))
    importlib.import_module(name)
    assert order == [0, 1, 2]


def test_module_looks_as_if_imported_without_us(module):
    plain = importlib.import_module(module("value = 1", "plain"))
    name = module("value = 1")
    when_imported.call(name, lambda _: None)
    awaited = importlib.import_module(name)
    assert type(awaited.__loader__) is type(plain.__loader__)
    assert type(awaited.__spec__) is type(plain.__spec__)
    assert awaited.__spec__.loader is awaited.__loader__
    assert awaited.__file__.endswith(f"{name}.py")


PARTIAL = """
from vllm_moe_offload.patches import when_imported

calls = []
when_imported.call(__name__, lambda module: calls.append(module.value))
early = list(calls)
value = 1
"""


def test_partially_imported(module):
    imported = importlib.import_module(module(PARTIAL))
    assert imported.early == [], "called back before the module was complete"
    assert imported.calls == [1]
    assert type(imported.__spec__).__name__ == "ModuleSpec"


def test_partially_imported_and_failing(module):
    name = module(PARTIAL + "raise RuntimeError('not yet')\n")
    with pytest.raises(RuntimeError, match="not yet"):
        importlib.import_module(name)
    calls = when_imported._pending[name][0].__globals__["calls"]
    assert calls == []
    module("value = 2")
    importlib.import_module(name)
    assert calls == [2]


def test_failing_import_keeps_the_callback(module):
    name = module("import no_such_module_anywhere")
    calls = []
    when_imported.call(name, calls.append)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(name)
    assert calls == []
    module("value = 2")
    assert importlib.import_module(name).value == 2
    assert len(calls) == 1


def test_module_that_does_not_exist():
    when_imported.call("no_such_module_anywhere", lambda _: pytest.fail("called back"))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("no_such_module_anywhere")
    when_imported._pending.pop("no_such_module_anywhere")


def test_other_modules_are_left_alone(module):
    when_imported.call("no_such_module_anywhere", lambda _: None)
    name = module("value = 1")
    assert when_imported._FINDER.find_spec(name, None) is None
    assert importlib.import_module(name).value == 1
    when_imported._pending.pop("no_such_module_anywhere")


@pytest.mark.parametrize(
    "statement",
    [
        # vLLM loads platform plugins in the middle of these imports.
        "from vllm import EngineArgs",
        "from vllm.model_executor.layers.fused_moe import fused_experts",
    ],
)
def test_every_order_of_importing_vllm_is_patched(statement):
    code = f"""
        {statement}
        import importlib
        from vllm_moe_offload import patches
        for target in patches.SEAMS.values():
            importlib.import_module(target)
        from vllm.engine.arg_utils import EngineArgs
        assert EngineArgs(".", plugin="moe-offload").additional_config["moe_offload"] == {{}}
        patches.require_all()
        from vllm_moe_offload.patches.when_imported import _pending
        assert not _pending, _pending
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
