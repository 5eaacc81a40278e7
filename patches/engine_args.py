"""Options: ``--plugin moe-offload``, ``--moe-offload-*``, ``LLM(plugin=..., moe_offload={...})``.

Target: ``EngineArgs`` and ``AsyncEngineArgs`` in vllm.engine.arg_utils.
Versions: 0.32, 0.33.
Why: vLLM has no place for a plugin's own options.
How: every way ends in ``additional_config["moe_offload"]``, which vLLM carries to all processes;
    the finished configuration is checked before any worker starts.
Can go: when plugins can register options of their own.
"""

import argparse
import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from vllm_moe_offload.config import KEY, MoeOffloadConfig
from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.metrics import page
from vllm_moe_offload.patches.quantization import naming_what_works
from vllm_moe_offload.patches.wrapping import PatchError, wrap

PLUGIN = "moe-offload"

WORKER_GUARD = "vllm_moe_offload.patches.worker_guard.WorkerGuard"


def apply(module: ModuleType) -> None:
    """Teach both argument classes the plugin's options."""
    for owner in (module.EngineArgs, module.AsyncEngineArgs):
        wrap(owner, "__init__", _init)
    wrap(module.EngineArgs, "add_cli_args", _add_cli_args)
    wrap(module.EngineArgs, "create_engine_config", _create_engine_config)


def _init(
    original: Callable[..., None],
    self: Any,
    *args: Any,
    plugin: str | None = None,
    moe_offload: dict[str, Any] | None = None,
    **kwargs: Any,
) -> None:
    if plugin is not None or moe_offload is not None:
        _check_plugin(plugin)
        extra = dict(kwargs.get("additional_config") or {})
        kwargs["additional_config"] = _with_options(extra, moe_offload or {})
    original(self, *args, **kwargs)


def _check_plugin(plugin: str | None) -> None:
    if plugin not in (None, PLUGIN):
        raise OffloadError("plugin", plugin, "there is no such plugin", f"Give {PLUGIN}")


def _with_options(extra: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    _check_mapping(options)
    before = extra.get(KEY) or {}
    _check_mapping(before)
    for name, value in options.items():
        if name in before and before[name] != value:
            raise OffloadError(
                name,
                value,
                f"additional_config already says {before[name]}",
                "Give the option in one place",
            )
    return {**extra, KEY: {**before, **options}}


def _check_mapping(options: Any) -> None:
    if not isinstance(options, dict):
        raise OffloadError(
            KEY, options, "it is not a mapping of options", 'Give {"gpu_gb": 8}, or {}'
        )


def _add_cli_args(original: Callable[..., Any], parser: Any) -> Any:
    parser = original(parser)
    _merge_additional_config(parser)
    _refuse_unknown(parser, sys.argv[1:])
    group = parser.add_argument_group(
        title="moe-offload",
        description="Expert offloading: serve MoE models whose experts exceed GPU memory.",
    )
    group.add_argument(
        "--plugin",
        action=_SelectPlugin,
        choices=[PLUGIN],
        default=argparse.SUPPRESS,
        help="Serve the model through a plugin.",
    )
    for name, field in MoeOffloadConfig.model_fields.items():
        is_flag = field.annotation is bool
        group.add_argument(
            _flag(name),
            action=_SetOption,
            option=name,
            nargs=0 if is_flag else None,
            const=True if is_flag else None,
            default=argparse.SUPPRESS,
            metavar=None if is_flag else name.rsplit("_", 1)[-1].upper(),
            help=f"{field.description} Default: {field.default}.",
        )
    return parser


def _flag(option: str) -> str:
    return f"--moe-offload-{option.replace('_', '-')}"


def _refuse_unknown(parser: Any, arguments: Sequence[str]) -> None:
    """Refuse a misspelt option with the nearest one; argparse would only call it unrecognised."""
    known = [_flag(name) for name in MoeOffloadConfig.model_fields]
    for argument in arguments:
        option = argument.split("=")[0].replace("_", "-")
        if not option.startswith("--moe-offload-") or any(k.startswith(option) for k in known):
            continue
        near = difflib.get_close_matches(option, known, n=1, cutoff=0.4)
        hint = f"Did you mean {near[0]}?" if near else f"The options are {', '.join(known)}."
        parser.error(f"moe-offload: there is no option {option}. {hint}")


def _update(namespace: argparse.Namespace, options: dict[str, Any]) -> None:
    # The parser's default is one object for all who parse: never change it in place.
    extra = dict(getattr(namespace, "additional_config", None) or {})
    before = extra.get(KEY) or {}
    _check_mapping(before)
    extra[KEY] = {**before, **options}
    namespace.additional_config = extra


class _SelectPlugin(argparse.Action):
    """``--plugin moe-offload``."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        _update(namespace, {})


class _SetOption(argparse.Action):
    """``--moe-offload-NAME VALUE``; turns the plugin on as well."""

    def __init__(self, *, option: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.option = option

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        _update(namespace, {self.option: self.const if self.nargs == 0 else values})


def _merge_additional_config(parser: Any) -> None:
    """Let ``--additional-config`` add to the plugin's options instead of replacing them."""
    action = parser._option_string_actions.get("--additional-config")
    if action is None:
        raise PatchError("moe-offload: vLLM's parser has no --additional-config any more.")
    original = type(action)

    class Merge(original):  # type: ignore[misc, valid-type]
        def __call__(self, parser: Any, namespace: Any, *rest: Any) -> None:
            before = (getattr(namespace, "additional_config", None) or {}).get(KEY)
            super().__call__(parser, namespace, *rest)
            if before is not None:
                given = (namespace.additional_config or {}).get(KEY) or {}
                _check_mapping(given)
                _update(namespace, {**before, **given})

    action.__class__ = Merge


def _create_engine_config(
    original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any
) -> Any:
    extra = self.additional_config
    options = extra.get(KEY) if isinstance(extra, dict) else None
    if options is None:
        return original(self, *args, **kwargs)
    config = MoeOffloadConfig.parse(options)
    admission = importlib.import_module("vllm_moe_offload.patches.admission")
    admission.check_environment()
    with naming_what_works():
        vllm_config = original(self, *args, **kwargs)
    if not admission.check_model(vllm_config, config):
        del vllm_config.additional_config[KEY]
        return vllm_config
    admission.check_features(vllm_config)
    admission.check_recording(vllm_config, config)
    admission.check_checkpoint(vllm_config)
    vllm_config.additional_config[KEY] = config.model_dump(mode="json")
    if not vllm_config.parallel_config.worker_extension_cls:
        vllm_config.parallel_config.worker_extension_cls = WORKER_GUARD
    page.open_folder()
    return vllm_config
