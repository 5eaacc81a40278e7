import argparse
import copy
import pickle

import pytest
import vllm.entrypoints.llm
from vllm import LLM
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_moe_offload import patches
from vllm_moe_offload.config import MoeOffloadConfig
from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.patches.engine_args import WORKER_GUARD
from vllm_moe_offload.patches.wrapping import PatchError

GIVEN = {"cache_fraction": 0.5, "staging_mb": 32.0, "layers": "0-1", "stats_interval_s": 5.0}
FLAGS = [
    "--moe-offload-cache-fraction", "0.5", "--moe-offload-staging-mb", "32",
    "--moe-offload-layers", "0-1", "--moe-offload-stats-interval-s", "5",
]  # fmt: skip


def make_parser() -> FlexibleArgumentParser:
    """The parser of `vllm serve`."""
    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
    return parser


@pytest.fixture(scope="module")
def parser() -> FlexibleArgumentParser:
    return make_parser()


@pytest.fixture
def serve(parser):
    """Parses the words after `vllm serve` and returns the namespace as the command does."""

    def parse(*words: object) -> argparse.Namespace:
        namespace = parser.parse_args(["serve", *map(str, words)])
        namespace.model = namespace.model_tag
        return namespace

    return parse


@pytest.fixture
def llm_args(monkeypatch):
    """Returns the engine arguments that LLM(...) makes of its own."""

    class StopError(Exception):
        pass

    def make(**kwargs) -> EngineArgs:
        caught = []

        def stop(*args, **engine_kwargs):
            caught.append(engine_kwargs.get("engine_args") or args[0])
            raise StopError

        monkeypatch.setattr(vllm.entrypoints.llm.LLMEngine, "from_engine_args", stop)
        with pytest.raises(StopError):
            LLM(**kwargs)
        return caught[0]

    return make


def options_of(arguments: EngineArgs) -> dict:
    """What all processes of the engine will see."""
    return arguments.create_engine_config().additional_config["moe_offload"]


def test_all_ways_in_give_the_same(checkpoint, serve, llm_args):
    model = str(checkpoint("qwen3_moe"))
    expected = MoeOffloadConfig.parse(GIVEN).model_dump(mode="json")
    ways = [
        AsyncEngineArgs.from_cli_args(serve(model, "--plugin", "moe-offload", *FLAGS)),
        EngineArgs.from_cli_args(serve(model, *FLAGS)),
        llm_args(model=model, plugin="moe-offload", moe_offload=GIVEN),
        llm_args(model=model, additional_config={"moe_offload": GIVEN}),
        EngineArgs(model, plugin="moe-offload", moe_offload=GIVEN),
        EngineArgs(model, moe_offload=GIVEN),
        AsyncEngineArgs(model=model, additional_config={"moe_offload": GIVEN}),
    ]
    for arguments in ways:
        assert options_of(arguments) == expected


def test_defaults(checkpoint, serve):
    model = str(checkpoint("qwen3_moe"))
    arguments = AsyncEngineArgs.from_cli_args(serve(model, "--plugin", "moe-offload"))
    assert options_of(arguments) == MoeOffloadConfig().model_dump(mode="json")


def test_nothing_changes_without_the_plugin(checkpoint, serve):
    model = str(checkpoint("qwen3_moe"))
    assert serve(model).additional_config == {}
    config = EngineArgs(model, additional_config={"other": 1}).create_engine_config()
    assert config.additional_config == {"other": 1}
    assert config.parallel_config.worker_extension_cls != WORKER_GUARD


@pytest.mark.parametrize(
    "words",
    [
        ["--plugin", "moe-offload", "MODEL"],
        ["MODEL", "--plugin", "moe-offload"],
        ["--plugin=moe-offload", "MODEL"],
        ["--plugin", "moe-offload", "--model", "MODEL"],
        ["--max-model-len", "64", "--plugin", "moe-offload", "MODEL", "--port", "8001"],
    ],
    ids=" ".join,
)
def test_plugin_before_and_after_the_model(serve, words):
    namespace = serve(*words)
    assert namespace.model_tag == "MODEL"
    assert namespace.additional_config == {"moe_offload": {}}


@pytest.mark.parametrize(
    "words",
    [
        ["--moe-offload-gpu-gb", "2", "MODEL"],
        ["MODEL", "--moe-offload-gpu-gb=2"],
        ["MODEL", "--moe_offload_gpu_gb", "2"],
        ["MODEL", "--moe-offload-gpu-gb", "7", "--moe-offload-gpu-gb", "2"],
    ],
    ids=" ".join,
)
def test_an_option_alone_selects_the_plugin(serve, words):
    assert serve(*words).additional_config == {"moe_offload": {"gpu_gb": "2"}}


def test_a_flag_takes_no_value(serve):
    namespace = serve("--moe-offload-allow-dense", "MODEL")
    assert namespace.model_tag == "MODEL"
    assert namespace.additional_config == {"moe_offload": {"allow_dense": True}}


JSON = '{"other": 1, "moe_offload": {"staging_mb": 8}}'


@pytest.mark.parametrize(
    "words",
    [
        ["--additional-config", JSON, *FLAGS[:2]],
        [*FLAGS[:2], "--additional-config", JSON],
        [*FLAGS[:2], "--additional-config", JSON, "--plugin", "moe-offload"],
        [
            *FLAGS[:2],
            "--additional-config.other",
            "1",
            "--additional-config.moe_offload.staging_mb",
            "8",
        ],
    ],
    ids=["before", "after", "between", "dotted"],
)
def test_additional_config_is_merged(serve, words):
    assert serve("MODEL", *words).additional_config == {
        "other": 1,
        "moe_offload": {"staging_mb": 8, "cache_fraction": "0.5"},
    }


def test_the_last_word_counts(serve):
    flag = ["--moe-offload-staging-mb", "2"]
    before = serve("MODEL", *flag, "--additional-config", JSON).additional_config
    after = serve("MODEL", "--additional-config", JSON, *flag).additional_config
    assert before["moe_offload"] == {"staging_mb": 8}
    assert after["moe_offload"] == {"staging_mb": "2"}


@pytest.mark.parametrize("plugin_first", [True, False])
def test_additional_config_of_somebody_else(serve, plugin_first):
    words = [["--plugin", "moe-offload"], ["--additional-config", '{"other": 1}']]
    first, second = words if plugin_first else reversed(words)
    namespace = serve("MODEL", *first, *second)
    assert namespace.additional_config == {"other": 1, "moe_offload": {}}


def test_additional_config_without_the_plugin(serve):
    assert serve("M", "--additional-config", '{"other": 1}').additional_config == {"other": 1}


@pytest.mark.parametrize("plugin_first", [True, False])
def test_additional_config_that_is_no_mapping(serve, plugin_first):
    words = [["--plugin", "moe-offload"], ["--additional-config", '{"moe_offload": 5}']]
    first, second = words if plugin_first else reversed(words)
    with pytest.raises(OffloadError) as error:
        serve("MODEL", *first, *second)
    assert "moe_offload = 5: " in str(error.value)
    assert 'Give {"gpu_gb": 8}' in str(error.value)


def test_options_from_a_file(serve, tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text("plugin: moe-offload\nmoe-offload-gpu-gb: 2\nmoe-offload-allow-dense: true\n")
    options = serve("MODEL", "--config", file).additional_config["moe_offload"]
    assert options == {"gpu_gb": "2", "allow_dense": True}


def test_parses_do_not_see_each_other(serve, parser):
    serve("MODEL", "--plugin", "moe-offload", *FLAGS)
    serve("MODEL", "--additional-config", JSON, "--plugin", "moe-offload")
    assert serve("MODEL").additional_config == {}
    assert make_parser().parse_args(["serve", "MODEL"]).additional_config == {}
    assert EngineArgs(".").additional_config == {}


@pytest.mark.parametrize(
    "words", [["--plugin", "moe-ofload"], ["--moe-offload-gpu-gib", "3"], ["--moe-offload-gpu-gb"]]
)
def test_unknown_words_on_the_command_line(serve, words, capsys):
    with pytest.raises(SystemExit):
        serve("MODEL", *words)
    assert words[-1] in capsys.readouterr().err


def test_help_shows_one_group(parser, capsys, monkeypatch):
    monkeypatch.setattr(FlexibleArgumentParser, "_search_keyword", None)
    with pytest.raises(SystemExit):
        parser.parse_args(["serve", "--help=moe-offload"])
    text = capsys.readouterr().out
    assert text.count("moe-offload:\n") == 1
    group = text.split("moe-offload:\n")[1].split("\n\nWhen passing")[0]
    flags = {f"--moe-offload-{name.replace('_', '-')}" for name in MoeOffloadConfig.model_fields}
    assert {word for word in group.split() if word.startswith("--")} == {*flags, "--plugin"}
    for field in MoeOffloadConfig.model_fields.values():
        assert field.description in " ".join(group.split())


@pytest.mark.parametrize("arguments", [EngineArgs, AsyncEngineArgs])
def test_unknown_option(checkpoint, arguments):
    made = arguments(model=str(checkpoint("qwen3_moe")), moe_offload={"gpu_gib": 2})
    with pytest.raises(OffloadError) as error:
        made.create_engine_config()
    assert "option = gpu_gib: " in str(error.value)
    assert "Did you mean gpu_gb" in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("gpu-gb", "-3"), ("gpu-gb", "nan"), ("cache-fraction", "2"), ("staging-mb", "lots")],
)
def test_bad_value_on_the_command_line(checkpoint, serve, name, value):
    namespace = serve(checkpoint("qwen3_moe"), f"--moe-offload-{name}", value)
    with pytest.raises(OffloadError) as error:
        AsyncEngineArgs.from_cli_args(namespace).create_engine_config()
    assert f"{name.replace('-', '_')} = {value}: " in str(error.value)
    assert "Give a" in str(error.value)


@pytest.mark.parametrize("plugin", ["moe-ofload", "", 3])
def test_unknown_plugin(plugin):
    with pytest.raises(OffloadError) as error:
        EngineArgs("MODEL", plugin=plugin)
    assert f"plugin = {plugin}: there is no such plugin" in str(error.value)
    assert "Give moe-offload" in str(error.value)


@pytest.mark.parametrize("value", [8, "gpu_gb", ["gpu_gb"]], ids=repr)
def test_options_that_are_no_mapping(checkpoint, value):
    model = str(checkpoint("qwen3_moe"))
    ways = [
        lambda: EngineArgs(model, moe_offload=value),
        lambda: EngineArgs(
            model, plugin="moe-offload", additional_config={"moe_offload": value}
        ),
        lambda: EngineArgs(
            model, additional_config={"moe_offload": value}
        ).create_engine_config(),
    ]  # fmt: skip
    for way in ways:
        with pytest.raises(OffloadError) as error:
            way()
        assert f"moe_offload = {value}: " in str(error.value)
        assert 'Give {"gpu_gb": 8}' in str(error.value)


def test_both_ways_at_once():
    other = {"other": 1, "moe_offload": {"gpu_gb": 4}}
    made = EngineArgs(".", additional_config=other, moe_offload={"gpu_gb": 4, "staging_mb": 8})
    assert made.additional_config == {"other": 1, "moe_offload": {"gpu_gb": 4, "staging_mb": 8}}
    with pytest.raises(OffloadError) as error:
        EngineArgs(".", additional_config=other, moe_offload={"gpu_gb": 5})
    assert "gpu_gb = 5: additional_config already says 4" in str(error.value)
    assert "Give the option in one place" in str(error.value)


def test_what_the_user_gave_is_not_changed(checkpoint):
    given = {"moe_offload": {"layers": "0"}, "other": 1}
    options = {"staging_mb": 8}
    before = copy.deepcopy((given, options))
    for family in ("qwen3_moe", "dense"):
        made = EngineArgs(
            str(checkpoint(family)),
            additional_config=given,
            moe_offload={**options, "allow_dense": True},
        )
        made.create_engine_config()
    assert (given, options) == before


def test_configuration_can_be_made_twice(checkpoint):
    made = EngineArgs(str(checkpoint("qwen3_moe")), moe_offload=GIVEN)
    assert options_of(made) == options_of(made)
    again = EngineArgs(made.model, additional_config={"moe_offload": options_of(made)})
    assert options_of(again) == options_of(made)


def test_arguments_and_configuration_travel_between_processes(checkpoint):
    made = AsyncEngineArgs(str(checkpoint("qwen3_moe")), moe_offload=GIVEN)
    assert pickle.loads(pickle.dumps(made)).additional_config == made.additional_config
    config = pickle.loads(pickle.dumps(made.create_engine_config()))
    assert config.additional_config == {"moe_offload": options_of(made)}


def test_workers_are_guarded(checkpoint):
    model = str(checkpoint("qwen3_moe"))
    config = EngineArgs(model, plugin="moe-offload").create_engine_config()
    assert config.parallel_config.worker_extension_cls == WORKER_GUARD
    own = EngineArgs(model, plugin="moe-offload", worker_extension_cls="a.B")
    assert own.create_engine_config().parallel_config.worker_extension_cls == "a.B"


def test_failed_patch_stops_only_those_who_ask(checkpoint, monkeypatch):
    model = str(checkpoint("qwen3_moe"))
    monkeypatch.setattr(patches, "_failures", [PatchError("moe-offload: Worker has no sleep")])
    EngineArgs(model).create_engine_config()
    with pytest.raises(PatchError, match="Worker has no sleep"):
        EngineArgs(model, plugin="moe-offload").create_engine_config()


@pytest.mark.parametrize("spelling", ["--moe-offload-gpu-bg", "--moe_offload_gpu_bg=8"])
def test_misspelt_option_is_refused_with_the_nearest(spelling, monkeypatch, capsys):
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    monkeypatch.setattr("sys.argv", ["vllm", "serve", "model", spelling, "8"])
    with pytest.raises(SystemExit) as stop:
        EngineArgs.add_cli_args(FlexibleArgumentParser())
    assert stop.value.code == 2
    assert "Did you mean --moe-offload-gpu-gb?" in capsys.readouterr().err
