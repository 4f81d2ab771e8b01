"""Every override and file loads as a checked `Config` or is rejected in one line."""

import json
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings, strategies

import dmt
from dmt.config import (
    MEMORY_CONFIGS,
    AssociativeConfig,
    Config,
    DataConfig,
    DenseConfig,
    FeaturalConfig,
    LossConfig,
    StudentConfig,
)
from dmt.config_io import (
    ADVICE_BY_NAME,
    EMBEDDED_TEACHER_DIR,
    check_config,
    describe_settings,
    list_setting_names,
    load_config,
    read_teacher_shape,
    resolve_layer_memories,
    save_config,
    select_layers,
)
from dmt.errors import UserError
from dmt.paths import expand_home

SHAPE = {"n_layer": 4, "n_embd": 128, "n_positions": 256}  # so 512 neurons in a block
GROUPS = {
    item.name: [type(getattr(Config(), item.name))]
    for item in fields(Config)
    if is_dataclass(getattr(Config(), item.name))
}
# A setting of memories is listed once; the associative kind has all those of the featural one.
GROUPS["memory"] = [AssociativeConfig, *MEMORY_CONFIGS.values()]
CLASSES = {  # the class of each setting
    f"{item.name}.{member}" if member else item.name: config_class
    for item in fields(Config)
    for member, config_class in (
        {
            member.name: config_class
            for config_class in reversed(GROUPS[item.name])
            for member in fields(config_class)
        }
        if item.name in GROUPS
        else {"": Config}
    ).items()
}


@pytest.fixture(scope="module")
def teacher_override(tmp_path_factory):
    """Create a teacher that has only a config.json, the part that settings need."""
    folder = tmp_path_factory.mktemp("teacher")
    (folder / "config.json").write_text(json.dumps(SHAPE))
    return f"teacher={folder}"


def load_error(*overrides, file=None) -> str:
    """Return the one-line error of loading `overrides`."""
    with pytest.raises(UserError) as error:
        load_config(file, overrides)
    message = str(error.value)
    assert message.isprintable(), f"not one line: {message!r}"
    assert len(message) < 400, "too long for one line"
    return message


def write_config(folder: Path, content: str | bytes) -> Path:
    file = folder / "differences.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


# --- invalid overrides --------------------------------------------------------------------------

INVALID_OVERRIDES = [
    # types
    ("memory.k=three", "memory.k must be a whole number, auto or empty, got three"),
    ("memory.k=3.5", "memory.k must be a whole number, auto or empty, got 3.5"),
    ("memory.k=nan", "memory.k must be a whole number, auto or empty, got nan"),
    ("memory.k=true", "memory.k must be a whole number, auto or empty, got true"),
    ("memory.k=[3]", "memory.k must be a whole number, auto or empty, got [3]"),
    ("memory.k=???", "memory.k must be a whole number, auto or empty, got ???"),
    ("seed=", "seed must be a whole number, got nothing"),
    ("seed=null", "seed must be a whole number, got nothing"),
    ("seed=1e3", "seed must be a whole number, got 1000.0; write 1000"),
    (
        "seed=99999999999999999999",
        "seed must be a whole number, got 99999999999999999999; it is too large",
    ),
    ("loss.kl=much", "loss.kl must be a number, got much"),
    ("loss.kl=1,5", "loss.kl must be a number, got 1,5"),
    ("loss.kl=true", "loss.kl must be a number, got true"),
    ("loss.kl=nan", "loss.kl must be a number, got nan; it must be finite"),
    ("loss.kl=inf", "loss.kl must be a number, got inf; it must be finite"),
    ("optim.grad_clip=.inf", "optim.grad_clip must be a number, got inf; it must be finite"),
    ("memory.projections=maybe", "memory.projections must be true or false, got maybe"),
    ("memory.projections=3", "memory.projections must be true or false, got 3"),
    ("teacher=", "teacher must be text, got nothing"),
    ("teacher=''", "teacher must be text, got ''"),
    ("teacher=[gpt2]", "teacher must be text, got [gpt2]"),
    ("teacher=1.5", "teacher must be text, got 1.5; put it in quotes"),
    ('teacher="a\\nb"', "teacher must be text, got 'a\\nb'"),
    (
        "teacher=${oc.env:HOME}",
        (
            "teacher must be text, got ${oc.env:HOME}; ${...} is not filled in here, write the "
            "value itself"
        ),
    ),
    (
        "loss.kl=${loss.ce}",
        (
            "loss.kl must be a number, got ${loss.ce}; ${...} is not filled in here, write the "
            "value itself"
        ),
    ),
    ("teacher=${", "cannot read teacher=${: ${...} is not filled in here, write the value itself"),
    # choices
    (
        "memory.activation=sofmax",
        "memory.activation must be one of block, relu, softmax, distance, got sofmax",
    ),
    (
        "memory.activation=3",
        "memory.activation must be one of block, relu, softmax, distance, got 3",
    ),
    (
        "memory.search=approximate",
        "memory.search must be one of exact, int8, ivf, got approximate",
    ),
    ("task=", "task must be one of distill, consolidate, sleep, got nothing"),
    # lists
    (
        "data.corpora=speeches",
        (
            "data.corpora must be a list such as [speeches, biographies], got speeches; write "
            "data.corpora=[speeches]"
        ),
    ),
    ("data.corpora=", "data.corpora must be a list such as [speeches, biographies], got nothing"),
    (
        "data.corpora=[]",
        (
            "data.corpora is empty; name at least one of speeches, biographies, a file, a "
            "folder, hub:<dataset>"
        ),
    ),
    ("data.corpora=[speeches,[a]]", "data.corpora[1] must be text, got [a]"),
    (
        "data.mixture_weights=3",
        "data.mixture_weights must be a list of numbers such as [3, 1], got 3",
    ),
    ("data.mixture_weights=[1,a]", "data.mixture_weights[1] must be a number, got a"),
    (
        "data.mixture_weights=[1,inf]",
        "data.mixture_weights[1] must be a number, got inf; it must be finite",
    ),
    (
        "data.mixture_weights=[1]",
        "data.mixture_weights must be one number >= 0 for each of the 2 data.corpora, got [1.0]",
    ),
    (
        "data.mixture_weights=[1,-1]",
        (
            "data.mixture_weights must be one number >= 0 for each of the 2 data.corpora, got "
            "[1.0, -1.0]"
        ),
    ),
    (
        "data.mixture_weights=[0,0]",
        (
            "data.mixture_weights must be one number >= 0 for each of the 2 data.corpora, got "
            "[0.0, 0.0]"
        ),
    ),
    (
        "student.layer_overrides={k: 3}",
        (
            "student.layer_overrides must be a list of rules such as [{layers: 0-1, memory: {k: "
            "64}}], got {k: 3}"
        ),
    ),
    (
        "student.layer_overrides=[3]",
        "student.layer_overrides[0] must be a rule such as {layers: 0-1, memory: {k: 64}}, got 3",
    ),
    # keys
    (
        "memory.activatoin=relu",
        "memory.activatoin is not a setting; did you mean memory.activation?",
    ),
    ("memry.k=3", "memry.k is not a setting; did you mean memory.k?"),
    ("k=3", "k is not a setting; did you mean memory.k?"),
    ("trainer.logger=wandb", "trainer.logger is not a setting; set trainer.loggers="),
    ("trainer.max_time=1", "trainer.max_time is not a setting; send SIGTERM or SIGUSR1"),
    ("trainer.gradient_clip_val=1", "is not a setting; set optim.grad_clip"),
    ("memory.k.x=3", "memory.k.x is not a setting; did you mean memory.k"),
    ("data.corpora[0]=x", "data.corpora[0] is not a setting; did you mean data.corpora"),
    ("memory..k=3", "memory..k is not a setting; did you mean memory.k?"),
    (".=3", ". is not a setting; --help lists them"),
    ("colour=3", "colour is not a setting; --help lists them"),
    ("a\nb=3", "'a\\nb' is not a setting; --help lists them"),
    ("memory=3", "memory is a group of settings such as memory.kind, got 3; --help lists them"),
    (
        "memory=",
        "memory is a group of settings such as memory.kind, got nothing; --help lists them",
    ),
    ("memory={kk: 3}", "memory.kk is not a setting; did you mean memory.k?"),
    (
        "memory.k",
        (
            "cannot read memory.k: a setting is written key=value, as in memory.k=64; --help "
            "lists them"
        ),
    ),
    ("=3", "cannot read =3: a setting is written key=value, as in memory.k=64; --help lists them"),
    ("", "cannot read '': a setting is written key=value, as in memory.k=64; --help lists them"),
    # YAML inside an override
    (
        "memory.k=[",
        (
            "cannot read memory.k=[: not valid YAML (did not find expected node content); fix or "
            "quote it"
        ),
    ),
    (
        "teacher=a: b: c",
        (
            "cannot read teacher=a: b: c: not valid YAML (mapping values are not allowed in this "
            "context)"
        ),
    ),
    (
        "teacher=!!python/name:os.system x",
        "cannot read teacher=!!python/name:os.system x: not valid YAML",
    ),
    ("teacher=\0", "cannot read teacher='\\x00': not valid YAML"),
    ("data.corpora=" + "[" * 3000, "not valid YAML"),
    ("data.corpora=" + "[" * 3000 + "]" * 3000, "not valid YAML"),
    ("seed=" + "9" * 5000, "cannot read seed=999"),
    # ranges
    ("memory.k=0", "memory.k must be at least 1, got 0"),
    ("stages.k_warmup_factor=0.5", "stages.k_warmup_factor must be at least 1, got 0.5"),
    ("optim.value_lr_scale=-1", "optim.value_lr_scale must be at least 0, got -1.0"),
    ("memory.mean_k=0", "memory.mean_k must be at least 1, got 0"),
    ("memory.k=-3", "memory.k must be at least 1, got -3"),
    ("memory.heads=0", "memory.heads must be at least 1, got 0"),
    ("seed=-1", "seed must be at least 0, got -1"),
    ("seed=4294967296", "seed must be in [0, 4294967295], got 4294967296"),
    ("loss.kl=-0.5", "loss.kl must be at least 0, got -0.5"),
    ("loss.temperature=0", "loss.temperature must be a positive number, got 0.0"),
    ("stages.end_to_end_lr=-1e-3", "stages.end_to_end_lr must be a positive number, got -0.001"),
    ("optim.beta2=1", "optim.beta2 must be in [0, 1), got 1.0"),
    ("optim.beta1=-0.1", "optim.beta1 must be in [0, 1), got -0.1"),
    ("optim.min_lr_ratio=2", "optim.min_lr_ratio must be in [0, 1], got 2.0"),
    ("data.seq_len=1", "data.seq_len must be at least 2, got 1"),
    ("data.batch_size=0", "data.batch_size must be at least 1, got 0"),
    ("trainer.devices=0", "trainer.devices must be at least 1, got 0"),
    (
        "trainer.log_dir=~no-such-person/x",
        "trainer.log_dir=~no-such-person/x begins with a home folder that does not exist",
    ),
    (
        "data.corpora=[~no-such-person]",
        "data.corpora=~no-such-person begins with a home folder that does not exist",
    ),
    (
        "teacher=~no-such-person",
        "teacher=~no-such-person begins with a home folder that does not exist",
    ),
]


@pytest.mark.parametrize(
    ("override", "message"),
    INVALID_OVERRIDES,
    ids=[override[:40].encode("unicode_escape").decode() for override, _ in INVALID_OVERRIDES],
)
def test_an_invalid_override_is_rejected_in_one_line_that_names_valid_values(override, message):
    assert message in load_error(override)


CONTRADICTIONS = [
    (["memory.k=600"], "memory.k must be in [1, memory.num_slots=512], got 600"),
    (
        ["memory.num_slots=32", "memory.k=33", "memory.init=random"],
        "memory.k must be in [1, memory.num_slots=32], got 33",
    ),
    (["memory.heads=3", "memory.k=3"], "memory.num_slots=512 must be a multiple of memory.heads=3"),
    (["memory.heads=2"], "memory.heads=2 divide k, which memory.k=auto does not"),
    (["memory.heads=2", "memory.k=7"], "memory.k=7 must be a multiple of memory.heads=2"),
    (
        ["memory.num_slots=256", "memory.k=300"],
        "memory.k must be in [1, memory.num_slots=256], got 300",
    ),
    (["memory.mean_k=600"], "memory.mean_k must be in [1, memory.num_slots=512], got 600"),
    (
        ["memory.k=8", "memory.mean_k=8"],
        "memory.mean_k is used with memory.k=auto alone, got memory.k=8",
    ),
    (
        ["memory.selection=score"],
        (
            "memory.k=auto compares slots of all layers, which scores do not allow; set memory.k "
            "to a number"
        ),
    ),
    (
        ["stages.calibration_tokens=0"],
        "memory.k=auto is set by calibration, got stages.calibration_tokens=0",
    ),
    (
        ["memory.activation=softmax"],
        (
            "memory.selection=contribution needs a weight per slot, which "
            "memory.activation=softmax does not have"
        ),
    ),
    (
        [
            "memory.activation=distance",
            "memory.selection=score",
            "memory.gradient=straight_through",
        ],
        "memory.gradient=straight_through needs memory.activation=block or relu, got distance",
    ),
    (["data.seq_len=257"], "data.seq_len=257 is longer than the 256 positions of teacher="),
    (
        ["data.batch_size=7", "trainer.devices=2"],
        "data.batch_size=7 must be a multiple of trainer.devices=2",
    ),
    (
        ["task=consolidate", "context.text=a", "trainer.devices=2"],
        "trainer.devices must be 1 with task=consolidate, got 2",
    ),
    (
        ["loss.kl=0", "loss.hidden_mse=0", "loss.block_fvu=0"],
        "every weight in loss is 0, so the end-to-end stage has nothing to learn; set loss.kl=1",
    ),
    (
        ["stages.calibration_tokens=0", "stages.layerwise_steps=0", "stages.end_to_end_steps=0"],
        "every stage is 0, nothing would happen; set for example stages.end_to_end_steps=100",
    ),
]


@pytest.mark.parametrize(
    ("overrides", "message"),
    CONTRADICTIONS,
    ids=[" ".join(overrides) for overrides, _ in CONTRADICTIONS],
)
def test_contradicting_settings_are_rejected(teacher_override, overrides, message):
    assert message in load_error(teacher_override, *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["memory.k=512"],
        ["memory.num_slots=32", "memory.k=32", "memory.init=random"],
        ["memory.heads=4", "memory.k=8"],
        ["memory.heads=2", "memory.projections=true"],
        ["memory.mean_k=8", "student.layer_overrides=[{layers: 1, memory: {k: 4}}]"],
        ["memory.mean_k=8", "student.layer_overrides=[{layers: 0, memory: {kind: dense}}]"],
        [
            "student.layer_overrides=[{layers: 0, memory: {k: 8, selection: score, metric: "
            "euclidean}}]"
        ],
        ["memory.activation=softmax", "memory.selection=score", "memory.k="],
        ["data.seq_len=256"],
        ["data.batch_size=8", "data.micro_batch_size=4"],
        ["data.batch_size=6"],
        ["data.batch_size=2", "data.micro_batch_size=8"],
        ["loss.kl=0", "loss.hidden_cosine=1"],
        ["loss.kl=0", "stages.end_to_end_steps=0"],
        ["optim.min_lr_ratio=1"],
        ["seed=4294967295"],
    ],
    ids=" ".join,
)
def test_limits_are_included(teacher_override, overrides):
    load_config(None, [teacher_override, *overrides])


# --- valid overrides ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("memory.k=64", 64),
        ("memory.k=", None),
        ("memory.k=null", None),
        ("memory.projections=yes", True),
        ("memory.projections=off", False),
        ("memory.activation=relu", "relu"),
        ("loss.kl=2", 2.0),
        ("loss.kl=3e-3", 0.003),
        ("seed=0x10", 16),
        ("teacher=gpt2", "gpt2"),
        ("teacher='1.5'", "1.5"),
        ("teacher=a=b", "a=b"),
        ("trainer.log_dir=2026", "2026"),
        ("trainer.log_dir=2026-10-01", "2026-10-01"),
        (
            "data.corpora=[hub:wikitext:wikitext-2-raw-v1, ./a b.txt]",
            ["hub:wikitext:wikitext-2-raw-v1", "./a b.txt"],
        ),
        ("data.mixture_weights=[3, 1]", [3.0, 1.0]),
    ],
)
def test_a_valid_override_gets_the_type_of_its_field(override, value):
    config = load_config(None, [override])
    setting = config
    for part in override.partition("=")[0].split("."):
        setting = getattr(setting, part)
    assert setting == value
    assert type(setting) is type(value)
    assert load_config() == Config(), "the defaults are unchanged"


def test_overrides_take_precedence_over_files_and_the_last_override_wins(
    tmp_path, teacher_override
):
    file = write_config(tmp_path, "memory: {k: 32, projections: true}\nloss: {kl: 2}\n")
    config = load_config(file, [teacher_override, "memory.k=64", "seed=1", "memory.k=16"])
    assert config.memory == FeaturalConfig(k=16, projections=True)
    assert config.loss == LossConfig(kl=2.0)
    assert config.seed == 1
    assert config.data == DataConfig()


def test_a_group_can_be_set_by_one_override(teacher_override):
    config = load_config(
        None, [teacher_override, "memory.projections=true", "memory={k: 8, heads: 2}"]
    )
    assert config.memory == FeaturalConfig(k=8, heads=2, projections=True)


@pytest.mark.parametrize("content", ["", "# nothing\n", "memory: {}\n"])
def test_an_empty_file_gives_the_defaults(tmp_path, content):
    assert load_config(write_config(tmp_path, content)) == Config()


@pytest.mark.parametrize(
    "file", sorted(Path(__file__).parents[1].glob("configs/*.yaml")), ids=lambda file: file.name
)
def test_every_shipped_config_loads(file):
    load_config(file)


# --- files --------------------------------------------------------------------------------------

INVALID_FILES = [
    (
        "memory:\n\tk: 3\n",
        (
            "line 2: not valid YAML (found character that cannot start any token); indent with "
            "spaces, not tabs"
        ),
    ),
    (
        "memory: {k: 3\n",
        "line 2: not valid YAML (did not find expected ',' or '}'); fix or quote it",
    ),
    ("a: 1\n--- \nb: 2\n", "not valid YAML"),
    ("- memory\n- k\n", "must hold settings such as `memory: {k: 64}`, got [memory, k]"),
    ("64\n", "must hold settings such as `memory: {k: 64}`, got 64"),
    ("hello\n", "hello is not a setting; --help lists them"),
    (b"\x80\x00\xff", "is not UTF-8 text; a config file is YAML such as `memory: {k: 64}`"),
    (b"a: \x00\x01", "not valid YAML"),
    ("seed: 1\nseed: 2\n", "line 2: not valid YAML (found duplicate key seed); fix or quote it"),
    (
        "memory.k: 3\n",
        "memory.k with a dot is for the command line; in a file write memory: {k: 3}",
    ),
    ("memroy: {k: 3}\n", "memroy is not a setting; did you mean memory?"),
    ("memory: {kay: 3, k: 3}\n", "memory.kay is not a setting; did you mean memory.k?"),
    ("k: 3\n", "k is not a setting; did you mean memory.k?"),
    ("3: 4\n", "3 is not a setting; --help lists them"),
    ("memory: 3\n", "memory is a group of settings such as memory.kind, got 3; --help lists them"),
    ("memory: {k: three}\n", "memory.k must be a whole number, auto or empty, got three"),
    ("data: {corpora: speeches}\n", "got speeches; write data.corpora=[speeches]"),
    (
        "data: {corpora: !!binary aGk=}\n",
        "data.corpora must be a list such as [speeches, biographies], got b'hi'",
    ),
    ("teacher: ${oc.env:HOME}\n", "${...} is not filled in here, write the value itself"),
    ("teacher: ${\n", "${...} is not filled in here, write the value itself"),
    ("a: &a [*a]\n", "not valid YAML"),
]


@pytest.mark.parametrize(
    ("content", "message"), INVALID_FILES, ids=[repr(content)[:30] for content, _ in INVALID_FILES]
)
def test_an_invalid_file_is_rejected_in_one_line_that_names_it(tmp_path, content, message):
    file = write_config(tmp_path, content)
    error = load_error(file=file)
    assert message in error
    assert str(file) in error


def test_a_missing_file_is_rejected_with_a_list_of_existing_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        "cannot read config file nix.yaml (No such file or directory); there are: none here"
        in load_error(file="nix.yaml")
    )
    (tmp_path / "configs").mkdir()
    write_config(tmp_path / "configs", "")
    assert "there are: configs/differences.yaml" in load_error(file="nix.yaml")
    assert "cannot read config file configs (Is a directory)" in load_error(file="configs")


# --- kinds of memory ----------------------------------------------------------------------------


def test_a_memory_accepts_only_the_settings_of_its_kind():
    message = load_error("memory.kind=dense", "memory.k=8")
    kinds = ", ".join(name for name, cls in MEMORY_CONFIGS.items() if hasattr(cls, "k"))
    assert message == (
        f"memory.k is not a setting of memory.kind=dense (it is one of {kinds}); "
        "leave it out, or set memory.kind=featural"
    )
    assert "memory.knn_k is not a setting of memory.kind=featural" in load_error("memory.knn_k=4")
    assert load_config(None, ["memory.knn_k=4", "memory.kind=associative"]).memory.knn_k == 4


def test_settings_of_a_file_for_another_kind_are_ignored(tmp_path):
    path = write_config(tmp_path, "memory: {kind: associative, k: 64, knn_k: 4}\n")
    assert load_config(path, ["memory.kind=featural"]).memory == FeaturalConfig(k=64)
    assert load_config(path, ["memory.kind=dense"]).memory == DenseConfig()


def test_a_rule_that_switches_back_to_slots_has_the_settings_of_the_run(teacher_override):
    rules = "[{layers: all, memory: {kind: dense}}, {layers: 1, memory: {kind: featural}}]"
    config = load_config(
        None, [teacher_override, "memory.k=64", f"student.layer_overrides={rules}"]
    )
    memories = resolve_layer_memories(config, 4)
    assert memories == [DenseConfig(), FeaturalConfig(k=64), DenseConfig(), DenseConfig()]


def test_an_invalid_argument_is_named_as_in_the_call():
    with pytest.raises(UserError, match=r"^k must be in \[1, num_slots=32\], got 33$"):
        FeaturalConfig(num_slots=32, k=33)
    with pytest.raises(UserError, match=r"^activation must be one of block, relu, softmax, "):
        FeaturalConfig(activation="sofmax")
    with pytest.raises(ValueError, match=r"^kl must be at least 0, got -1\.0$"):
        LossConfig(kl=-1)


# --- rules per layer ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("all", [0, 1, 2, 3]),
        ("3", [3]),
        ("0-2", [0, 1, 2]),
        ("2-", [2, 3]),
        ("2-2", [2]),
        ("3, 0-1", [0, 1, 3]),
        ("1,1,0-1", [0, 1]),
        ("all,2", [0, 1, 2, 3]),
        ("last", [3]),
        ("0, last", [0, 3]),
        ("1-last", [1, 2, 3]),
    ],
)
def test_layers_are_selected_by_all_number_range_or_list(text, layers):
    assert select_layers(text, 4, "layers") == layers


@pytest.mark.parametrize(
    "text", ["", "x", "-1", "1-x", "1-2-3", "1,", "all-", "None", "1.5", "a\nb"]
)
def test_invalid_layer_selections_are_rejected(text):
    with pytest.raises(
        UserError,
        match=r"^layers must be `all`, `last`, a layer, a range such as 0-2 or 2-, or a list; got ",
    ):
        select_layers(text, 4, "layers")


@pytest.mark.parametrize("text", ["4", "0-4", "3-1", "4-", "0,9", "0--1"])
def test_layers_that_do_not_exist_are_rejected(text):
    with pytest.raises(UserError, match=rf"^layers must name layers in \[0, 3\], got {text}$"):
        select_layers(text, 4, "layers")


def test_rules_apply_in_order_and_later_rules_win(teacher_override):
    rules = (
        "[{layers: all, memory: {k: 64}}, {layers: 1-, memory: {heads: 2}}, "
        "{layers: [0, 3], memory: {kind: dense}}]"
    )
    base = FeaturalConfig(projections=True)
    config = load_config(
        None, [teacher_override, f"student.layer_overrides={rules}", "memory.projections=true"]
    )
    assert resolve_layer_memories(config, 4, 512) == [
        DenseConfig(),
        replace(base, k=64, heads=2),
        replace(base, k=64, heads=2),
        DenseConfig(),
    ]
    assert resolve_layer_memories(Config(), 3) == [FeaturalConfig()] * 3


INVALID_RULES = [
    (
        "[{layers: 0, memory: {kk: 3}}]",
        (
            "student.layer_overrides[0].memory.kk is not a setting; did you mean "
            "student.layer_overrides[0].memory.k?"
        ),
    ),
    (
        "[{layers: 0, memory: {k: three}}]",
        "student.layer_overrides[0].memory.k must be a whole number, auto or empty, got three",
    ),
    (
        "[{layers: 0, memory: {kind: sparse}}]",
        (
            f"student.layer_overrides[0].memory.kind must be one of {', '.join(MEMORY_CONFIGS)}, "
            "or a class such as my_package.my_module:MyMemory, got sparse"
        ),
    ),
    (
        "[{layers: 0, memory: {k: 0}}]",
        "student.layer_overrides[0].memory.k must be at least 1, got 0",
    ),
    (
        "[{layers: 0, memory: {}}, {layers: 1, memory: {num_slots: 32, k: 64, init: random}}]",
        (
            "student.layer_overrides[1].memory.k must be in [1, "
            "student.layer_overrides[1].memory.num_slots=32], got 64"
        ),
    ),
    (
        "[{layers: 0, memory: {mean_k: 8}}]",
        (
            "memory.mean_k must be the same in all layers with memory.k=auto, which share one "
            "budget, got 8 and nothing"
        ),
    ),
    (
        "[{layers: 1, memory: {selection: centered}}]",
        "memory.selection must be the same in all layers with memory.k=auto",
    ),
    (
        "[{layers: 0, memory: {heads: 0}}]",
        "student.layer_overrides[0].memory.heads must be at least 1, got 0",
    ),
    (
        "[{layers: 1, memory: {metric: euclidean}}]",
        "memory.metric must be the same in all layers with memory.k=auto",
    ),
    (
        "[{memory: {k: 3}}]",
        (
            "student.layer_overrides[0] must be a rule such as {layers: 0-1, memory: {k: 64}}, "
            "got {memory: {k: 3}}"
        ),
    ),
    (
        "[{layers: 0}]",
        (
            "student.layer_overrides[0] must be a rule such as {layers: 0-1, memory: {k: 64}}, "
            "got {layers: 0}"
        ),
    ),
    (
        "[{layers: 0, memory: }]",
        "must be a rule such as {layers: 0-1, memory: {k: 64}}, got {layers: 0, memory: nothing}",
    ),
    (
        "[{layers: 0, memory: {k: 3}, k: 3}]",
        "student.layer_overrides[0] must be a rule such as {layers: 0-1, memory: {k: 64}}, got",
    ),
    (
        "[{layers: true, memory: {k: 3}}]",
        "student.layer_overrides[0].layers must be `all`, `last`, a layer, a range",
    ),
]


@pytest.mark.parametrize(
    ("rules", "message"), INVALID_RULES, ids=[rules for rules, _ in INVALID_RULES]
)
@pytest.mark.parametrize("local", [True, False], ids=["local-teacher", "hub-teacher"])
def test_an_invalid_rule_is_rejected_for_local_and_hub_teachers(
    teacher_override, local, rules, message
):
    assert message in load_error(
        teacher_override if local else "teacher=somewhere/else", f"student.layer_overrides={rules}"
    )


def test_rules_are_checked_against_a_local_teacher(teacher_override):
    assert "student.layer_overrides[0].layers must name layers in [0, 3], got 2-4" in load_error(
        teacher_override, "student.layer_overrides=[{layers: 2-4, memory: {k: 3}}]"
    )
    assert (
        "student.layer_overrides[0].memory.k must be in [1, "
        "student.layer_overrides[0].memory.num_slots=512], got 600"
        in load_error(teacher_override, "student.layer_overrides=[{layers: 2, memory: {k: 600}}]")
    )
    load_config(
        None,
        ["teacher=somewhere/else", "student.layer_overrides=[{layers: 2-40, memory: {k: 600}}]"],
    )


def test_a_rule_is_rejected_without_importing_heavy_libraries():
    script = (
        "import sys; from dmt.config_io import load_config; from dmt.errors import UserError\n"
        "try: load_config(None, ['student.layer_overrides=[{layers: 0, memory: {kk: 3}}]'])\n"
        "except UserError: print(*{'torch', 'transformers', 'pytorch_lightning', 'pandas'} & "
        "set(sys.modules), 'refused')"
    )
    environment = {"PYTHONPATH": str(Path(dmt.__file__).parents[1])}
    process = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False
    )
    assert process.stdout.split() == ["refused"], process.stderr


# --- the teacher's shape ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "shape"),
    [
        (json.dumps(SHAPE), {"layers": 4, "slots": 512, "positions": 256}),
        (json.dumps(SHAPE | {"n_inner": 96}), {"layers": 4, "slots": 96, "positions": 256}),
        (json.dumps(SHAPE | {"n_inner": None}), {"layers": 4, "slots": 512, "positions": 256}),
        (json.dumps(SHAPE | {"n_layer": "4"}), None),
        (json.dumps(SHAPE | {"n_layer": 0}), None),
        (json.dumps({"hidden_size": 128}), None),
        (json.dumps(SHAPE | {"n_embd": None}), None),
        ("[1]", None),
        ("{", None),
        (None, None),
    ],
)
def test_the_shape_is_read_from_config_json_or_is_unknown(tmp_path, content, shape):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert read_teacher_shape(str(tmp_path)) == shape


@pytest.mark.skipif(
    not (EMBEDDED_TEACHER_DIR / "config.json").exists(),
    reason="the embedded teacher does not exist",
)
def test_the_embedded_teacher_fits_the_defaults():
    check_config(Config())
    assert read_teacher_shape("embedded") is not None


def test_a_user_without_a_home_folder_needs_none(monkeypatch):
    monkeypatch.delenv("DMT_CACHE", raising=False)

    def fail():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", fail)
    assert read_teacher_shape("nix/model") is None
    with pytest.raises(UserError, match="set DMT_CACHE"):
        read_teacher_shape("smollm2")
    assert expand_home("~nobody-has-this-name/x") == Path("~nobody-has-this-name/x")


# --- to a file and back -------------------------------------------------------------------------


def test_a_saved_config_loads_unchanged(tmp_path, teacher_override):
    overrides = [
        teacher_override,
        "memory.k=64",
        (
            "student.layer_overrides=[{layers: 0-2, memory: {k: 8}}, {layers: '3', memory: "
            "{num_slots: null}}]"
        ),
        (
            "data.corpora=[./1.txt, 'on', '1e3', 'null', '~/x: y # z', 'ümläut', '2026-10-01', "
            "'012', '???']"
        ),
        "loss.kl=3e-05",
        "trainer.progress_bar=no",
        "trainer.log_dir=2026",
    ]
    config = load_config(None, overrides)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    save_config(Config(), tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == Config()


# --- --help -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "config_class"), CLASSES.items(), ids=lambda part: str(part)[:40])
def test_help_prints_every_field_with_default_choices_and_docstring(key, config_class):
    group, _, leaf = key.partition(".")
    annotation = get_type_hints(config_class)[leaf or group]
    entry = re.search(rf"^{re.escape(key)}=(.*)\n    (\S.*)$", describe_settings(), re.MULTILINE)
    assert entry, f"{key} is not in --help"
    default, _, choices = entry[1].partition("   ")
    assert len(entry[2]) > 10, f"{key} has no docstring"
    if key == "memory.kind":
        assert choices == f"[{', '.join(MEMORY_CONFIGS)}]"
    elif get_origin(annotation) is Literal:
        assert choices == f"[{', '.join(get_args(annotation))}]"
    else:
        assert not choices
    is_featural = group != "memory" or leaf in {item.name for item in fields(FeaturalConfig)}
    kind = [] if is_featural else [f"memory.kind={config_class.kind_name}"]
    assert load_config(None, [*kind, f"{key}={default}"]) == load_config(None, kind), (
        "a printed default is a valid override"
    )


def test_help_prints_nothing_twice():
    lines = [line for line in describe_settings().splitlines() if not line.startswith(" ")]
    names = [line.partition("=")[0] for line in lines]
    assert len(names) == len(set(names))
    assert set(names) == set(CLASSES)
    assert {
        "data.corpora=[speeches, biographies]",
        "memory.k=auto",
        "memory.projections=false",
    } <= set(lines), "as in an override"


# --- random input -------------------------------------------------------------------------------

ODDITIES = [
    "null",
    "true",
    "[]",
    "{}",
    "[1, {a: [b]}]",
    "${x}",
    "${a:${b}}",
    "???",
    "!!set {a}",
    "&a",
    "*a",
    "<<: 3",
    "~x",
    "2026-10-01",
]
any_text = strategies.text(max_size=30)
values = strategies.one_of(
    any_text,
    strategies.integers().map(str),
    strategies.floats().map(str),
    strategies.sampled_from(ODDITIES),
    strategies.sampled_from(["", "all", "2-"]).map(
        lambda layers: f"[{{layers: '{layers}', memory: {{k: 3}}}}]"
    ),
    strategies.lists(any_text, max_size=3).map(json.dumps),
    strategies.dictionaries(any_text, any_text, max_size=3).map(json.dumps),
)
override = strategies.tuples(
    strategies.sampled_from([*CLASSES, "memory", "data", "student"]), values
).map("=".join)


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    strategies.lists(strategies.one_of(override, override, any_text), max_size=3),
    strategies.one_of(strategies.none(), any_text),
)
def test_random_input_loads_and_saves_or_is_rejected_in_one_line(tmp_path, overrides, content):
    file = (
        None
        if content is None
        else write_config(tmp_path, content.encode("utf-8", "surrogatepass"))
    )
    try:
        config = load_config(file, overrides)
    except UserError as error:
        message = str(error)
    else:
        message = ""
        save_config(config, tmp_path / "config.yaml")
        assert load_config(tmp_path / "config.yaml") == config
    assert not message or message.isprintable(), f"not one line: {message!r}"


def test_a_config_built_in_code_is_checked_like_a_loaded_one():
    with pytest.raises(UserError, match=r"^k must be at least 1, got -1"):
        check_config(Config(memory=FeaturalConfig(k=-1)))
    with pytest.raises(UserError, match=r"student.layer_overrides\[0\] must be a rule"):
        check_config(Config(student=StudentConfig(layer_overrides=[{"layers": "all"}])))


def test_an_override_reaches_the_rules_that_have_the_setting():
    path = Path(__file__).parents[1] / "configs" / "associative.yaml"
    config = load_config(path, ["memory.capacity=1000"])
    memories = resolve_layer_memories(config, 4)
    assert memories[3].capacity == 1000
    assert memories[0] == load_config(path).memory
    with pytest.raises(UserError, match=r"memory\.capacity is not a setting"):
        load_config(path, ["student.layer_overrides=[]", "memory.capacity=1000"])


@pytest.mark.parametrize(("name", "advice"), ADVICE_BY_NAME.items())
def test_advice_for_settings_of_other_trainers_exists(name, advice):
    settings_named = re.findall(r"\b(?:data|optim|stages|trainer)\.\w+", advice)
    assert set(settings_named) <= set(list_setting_names())
    assert (
        settings_named
        or "--resume" in advice
        or (Path(__file__).parents[1] / advice.split()[-1]).is_file()
    )
