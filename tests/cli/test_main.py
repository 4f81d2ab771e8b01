"""`dmt` itself: parsing, help, exit codes, and mistakes in the arguments of `dmt distill`."""

import argparse
import contextlib
import errno
import gc
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from cli_asserts import NOTES
from conftest import SENTENCES, make_teacher
from factories import MEMORY_COMMANDS

import dmt
from dmt import signals
from dmt.cli import main
from dmt.cli.main import distill_main
from dmt.config import Config
from dmt.config_files import find_config, list_configs
from dmt.config_io import list_setting_names, load_config, save_config
from dmt.editing.edit import FALSE_POSITIVE_RATE
from dmt.errors import UserError
from dmt.files import RECORD_VERSION
from dmt.tasks import TaskResult
from dmt.training.run_dir import check_writable

ROOT = Path(__file__).parents[2]
MESSAGES = ["debug", "info", "warning"]
HEAVY = {
    "torch",
    "transformers",
    "pytorch_lightning",
    "pandas",
    "faiss",
    "tokenizers",
    "tensorboard",
}


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """An empty working directory, so that a test sees every file that is left behind."""
    folder = tmp_path / "workdir"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def no_run(monkeypatch):
    """Fail as soon as a run starts: an undetected mistake must not cost minutes of training."""
    monkeypatch.setattr("dmt.tasks.run_task", lambda *_: pytest.fail("a run started"))


@pytest.fixture
def fake_run(workdir, monkeypatch):
    """`fake_run(run_task)`: replace the training of a run, and its table of results."""

    def replace_run(run_task):
        monkeypatch.setattr("dmt.tasks.run_task", run_task)
        monkeypatch.setattr("dmt.cli.distill.print_summary", lambda *_: None)

    return replace_run


@pytest.fixture
def started(workdir, fake_run):
    """The configs of the runs that were started."""
    configs = []
    fake_run(lambda config, _: configs.append(config) or TaskResult(workdir))
    return configs


@pytest.fixture
def tiny_run(teacher_folder, text_file):
    """Arguments of a run that takes a moment."""
    return [
        f"teacher={teacher_folder}",
        f"data.corpora=[{text_file}]",
        "data.seq_len=16",
        "memory.k=8",
        "trainer.num_threads=1",
        "trainer.accelerator=cpu",
        "trainer.progress_bar=false",
        "stages.layerwise_steps=0",
        "stages.end_to_end_steps=1",
    ]


def run_script(*args: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "distill.py"), *args]
    return subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def get_error(capsys, args: list[str]) -> str:
    """Return the error message of `dmt distill` without its prefix."""
    capsys.readouterr()  # discard the output of fixtures
    assert distill_main(args) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    *notes, last = printed.err.splitlines()
    assert [line for line in notes if not line.startswith(NOTES)] == []
    assert last.startswith("error: ")
    return last.removeprefix("error: ")


# As a process of its own


@pytest.mark.parametrize("command", ["--help", "distill --help", "memory write --help"])
def test_help_fits_a_screen_and_shows_an_example(capsys, command):
    with pytest.raises(SystemExit) as exit_info:
        main.main(command.split())
    assert exit_info.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 100
    assert any(line.startswith("  dmt ") for line in lines)


def test_the_default_rate_of_facts_is_that_of_the_library():
    """Spelled out in the parser, which imports no torch."""
    args = main.build_parser().parse_args(["memory", "write", "Ada lives in Paris."])
    assert args.false_positive_rate == FALSE_POSITIVE_RATE


def list_commands(parser=None, prefix=()):
    """Yield the name and the parser of each command that does something."""
    parser = parser or main.build_parser()
    subparsers = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    for action in subparsers:
        for name, subparser in action.choices.items():
            yield from list_commands(subparser, (*prefix, name))
    if not subparsers:
        yield " ".join(prefix), parser


def test_every_command_has_help_that_fits_a_screen_and_a_working_example(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    commands = dict(list_commands())
    assert {"distill", "generate", "consolidate", "sleep", "compare", "config"} < set(commands)
    assert {f"memory {name}" for name in MEMORY_COMMANDS} < set(commands)
    for name, parser in commands.items():
        lines = parser.format_help().splitlines()
        assert len(lines) <= 50, name
        assert max(map(len, lines)) <= 110, name
        examples = [line.strip() for line in lines if line.startswith(f"  dmt {name}")]
        assert examples, f"{name} --help shows no example"
        for example in examples:
            args = shlex.split(example.partition("  #")[0].partition(" > ")[0])[1:]
            parsed, extra = main.build_parser().parse_known_args(args)
            assert parsed.parser.prog == f"dmt {name}"
            assert not [arg for arg in extra if arg.startswith("-")], example


def test_every_option_has_help():
    for name, parser in list_commands():
        for action in parser._actions:
            assert action.help, f"{name}: {action.dest}"


def test_version_is_printed(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main.main(["--version"])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out == f"dmt {dmt.__version__}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_scripts_name_commands_and_options(capsys, shell):
    with pytest.raises(SystemExit) as exit_info:
        main.main(["--print-completion", shell])
    assert exit_info.value.code == 0
    script = capsys.readouterr().out
    assert "consolidate" in script
    assert "--false-positive-rate" in script


def test_config_list_shows_every_setting(capsys):
    assert main.main(["config", "--list"]) == 0
    listed = re.findall(r"^([a-z_0-9.]+)=", capsys.readouterr().out, re.MULTILINE)
    groups = {name.partition(".")[0] for name in list_setting_names() if "." in name}
    assert listed == [name for name in list_setting_names() if name not in groups]


def test_config_explains_a_setting_or_a_group(capsys):
    assert main.main(["config", "--explain", "memory.mean_k", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["memory.mean_k"]
    assert main.main(["config", "--explain", "optim", "--json"]) == 0
    settings = json.loads(capsys.readouterr().out)
    assert "optim.grad_clip" in settings
    assert all(name.startswith("optim.") for name in settings)
    assert main.main(["config", "--explain", "memory.meank"]) == 2
    assert "did you mean memory.mean_k?" in capsys.readouterr().err


def test_config_shows_a_config_that_can_be_used_as_a_file(workdir, capsys):
    assert main.main(["config", "--show", "seed"]) == 0
    (workdir / "my.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    seed_config = load_config(find_config("seed"))
    assert load_config("my.yaml") == seed_config
    assert main.main(["config", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == set(list_configs())


def test_a_config_can_be_named_from_any_folder(workdir, started):
    assert distill_main(["seed", "memory.k=4"]) == 0
    assert started[0].memory.init == "random"
    assert started[0].memory.k == 4
    assert distill_main(["consolidation/people"]) == 0
    assert Path(started[1].context.file).is_file()
    assert Path(started[1].context.questions).is_file()


def test_a_file_is_preferred_to_a_config_of_that_name(workdir, started):
    (workdir / "seed").write_text("seed: 7\n")
    assert distill_main(["seed"]) == 0
    assert started[0].seed == 7


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("sed", "did you mean seed?"),
        ("people", "did you mean consolidation/people?"),
        ("catalog/peer", "did you mean catalogue/peer?"),
        ("fly", "dmt config lists those that come with dmt"),
    ],
)
def test_an_unknown_config_name_gets_a_hint(workdir, no_run, capsys, name, hint):
    message = get_error(capsys, [name])
    assert message.startswith(f"cannot read config file {name} (No such file or directory)")
    assert hint in message


def test_distill_prints_json(workdir, capsys, fake_run):
    def run_task(config, resume_dir):
        print("a table for people")
        (workdir / "run.json").write_text(
            json.dumps({"format": RECORD_VERSION, "fidelity": {"text": {"kl": 0.5}}})
        )
        return TaskResult(workdir)

    fake_run(run_task)
    assert distill_main(["--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {
        "run_dir": str(workdir),
        "fidelity": {"text": {"kl": 0.5}},
    }
    assert "a table for people" in printed.err


@pytest.mark.parametrize(
    ("option", "messages"),
    [([], ["info", "warning"]), (["--quiet"], ["warning"]), (["--verbose"], MESSAGES)],
)
def test_quiet_and_verbose_choose_what_is_logged(workdir, capsys, fake_run, option, messages):
    def run_task(config, resume_dir):
        logger = logging.getLogger("dmt.training")
        for level in MESSAGES:
            getattr(logger, level)(level)
        return TaskResult(workdir)

    fake_run(run_task)
    assert distill_main(option) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line in MESSAGES] == messages
    assert not logging.getLogger("dmt").handlers


def test_a_full_disk_is_a_failure_and_not_a_mistake(workdir, capsys, monkeypatch):
    def run_task(config, resume_dir):
        raise OSError(errno.ENOSPC, "No space left on device", "logs/run.json")

    monkeypatch.setattr("dmt.tasks.run_task", run_task)
    assert distill_main([]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_a_typo_is_one_line_and_leaves_nothing(workdir):
    start = time.perf_counter()
    process = run_script("memory.skip_conection=false", cwd=workdir)
    seconds = time.perf_counter() - start
    assert process.returncode == 2
    assert process.stdout == ""
    assert process.stderr == (
        "error: memory.skip_conection is not a setting; did you mean memory.skip_connection?\n"
    )
    assert list(workdir.iterdir()) == []
    assert seconds < 5  # 0.3 on an idle machine


def test_a_missing_corpus_is_one_line_and_leaves_nothing(workdir, teacher_folder):
    process = run_script(
        f"teacher={teacher_folder}", "data.seq_len=16", "data.corpora=[nix.txt]", cwd=workdir
    )
    assert process.returncode == 2
    assert process.stdout == ""
    *notes, error = process.stderr.splitlines()
    assert notes == ["loading torch and transformers ...", "tokenizing nix.txt"]
    assert error.startswith(
        "error: data.corpora: no file or folder nix.txt; accepted are speeches, biographies,"
    )
    assert list(workdir.iterdir()) == []


def test_the_garbage_collector_rests_while_libraries_load(workdir):
    script = f"""
import gc, sys
sys.path.insert(0, {str(ROOT / "src")!r})
from dmt.cli.main import distill_main as main
rounds = []
def record(phase, info):
    if "torch" in sys.modules and "dmt.distillation.run" not in sys.modules:
        rounds.append(info)
gc.callbacks.append(record)
assert main(["data.corpora=[nix.txt]"]) == 2
assert "dmt.tasks" in sys.modules
assert not rounds, rounds
assert gc.isenabled()
assert gc.get_freeze_count() > 100_000
"""
    process = subprocess.run(
        [sys.executable, "-c", script], cwd=workdir, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr


def test_fast_imports_restores_the_garbage_collector(monkeypatch):
    monkeypatch.setattr(signals, "exit_on_signal", lambda: None)
    monkeypatch.setattr(signals, "raise_on_signal", lambda: None)
    frozen = gc.get_freeze_count()

    def import_missing_module():
        with signals.fast_imports():
            assert not gc.isenabled()
            raise ImportError

    with pytest.raises(ImportError):
        import_missing_module()
    assert gc.isenabled()
    gc.disable()
    with signals.fast_imports():
        pass
    assert not gc.isenabled()
    gc.enable()
    assert gc.get_freeze_count() == frozen, (
        "torch was imported before, so these objects are not frozen"
    )


def test_other_commands_use_fast_imports(monkeypatch, capsys):
    entered = []
    monkeypatch.setattr(
        signals, "fast_imports", lambda: entered.append(1) or contextlib.nullcontext()
    )
    assert main.main(["memory", "stats", "--model", "nix"]) == 2
    assert entered
    assert "model nix" in capsys.readouterr().err


def test_help_and_mistakes_need_no_heavy_imports(workdir):
    """Importing torch and transformers takes seconds; without them an answer takes a fraction."""
    script = f"""
import sys
import time
sys.path.insert(0, {str(ROOT / "src")!r})
sys.modules["dmt.tasks"] = None  # no run may begin
from dmt.cli.main import distill_main as main
try:
    main(["--help"])
except SystemExit as help_exit:
    assert help_exit.code == 0
for args in (
    ["memory.kk=3"],
    ["memory.k=x"],
    ["memory.k=600", "memory.num_slots=512"],
    ["nix.yaml"],
    ["--nix"],
    ["--resume", "nix"],
    ["student.layer_overrides=[{{layers: 0, memory: {{kk: 3}}}}]"],
    ["trainer.log_dir=/dev/null/x"],
    ["data.corpora=[]"],
):
    assert main(args) == 2, args
    imported = {HEAVY!r} & set(sys.modules)
    assert not imported, (args, imported)
"""
    process = subprocess.run(
        [sys.executable, "-c", script], cwd=workdir, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    assert len(process.stderr.splitlines()) == 9
    assert list(workdir.iterdir()) == []


# Options and files


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["a.yaml", "b.yaml"], "one config file at most, got a.yaml, b.yaml"),
        (["--config", "b.yaml", "a.yaml"], "one config file at most, got a.yaml, b.yaml"),
        (["memory.k", "64"], "one config file at most, got memory.k, 64"),
        (
            ["nix.yaml"],
            "cannot read config file nix.yaml (No such file or directory)",
        ),
        (
            ["--config", "nix.yaml"],
            "cannot read config file nix.yaml (No such file or directory)",
        ),
        (["--config="], "cannot read config file . (Is a directory)"),
        (
            ["--config"],
            "argument --config: expected one argument; see dmt distill --help",
        ),
        (
            ["--seed=3"],
            "unrecognized arguments: --seed=3; a setting is written key=value, without dashes; see",
        ),
        (["--conf", "a.yaml"], "unrecognized arguments: --conf"),
        (["-k", "memory.k=3"], "unrecognized arguments: -k"),
        (
            ["--resume", "nix", "memory.k=3"],
            "--resume uses the run's own settings; leave out memory.k=3",
        ),
        (
            ["--resume", "nix", "a.yaml"],
            "--resume uses the run's own settings; leave out a.yaml",
        ),
        (
            ["--resume", "nix"],
            "--resume nix: no run is there (no config.yaml); there are: none beside it",
        ),
        (["--resume="], "--resume .: no run is there (no config.yaml)"),
        (["teacher='a\n\nb'"], "teacher must be text, got 'a\\nb'"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_wrong_options_and_files(workdir, no_run, capsys, args, message):
    assert message in get_error(capsys, args)
    assert list(workdir.iterdir()) == []


def test_resume_names_the_existing_runs(workdir, no_run, capsys):
    for number in (0, 1):
        (workdir / "logs" / f"version_{number}").mkdir(parents=True)
        save_config(Config(), workdir / "logs" / f"version_{number}" / "config.yaml")
    message = get_error(capsys, ["--resume", "logs/version_7"])
    assert message == (
        "--resume logs/version_7: no run is there (no config.yaml); "
        "there are: logs/version_0, logs/version_1"
    )


@pytest.mark.parametrize(
    "args",
    [
        ["{file}"],
        ["--config", "{file}"],
        ["memory.k=32", "{file}"],
        ["--config={file}", "memory.k=32"],
    ],
)
def test_a_config_can_be_named_in_any_position(workdir, started, args):
    (workdir / "some.yaml").write_text("memory: {k: 64}\nseed: 5\n")
    assert distill_main([arg.format(file="some.yaml") for arg in args]) == 0
    assert started[0].seed == 5
    assert started[0].memory.k == (32 if "memory.k=32" in args else 64), (
        "arguments override the file"
    )


def test_no_arguments_start_a_run_with_the_defaults(workdir, started):
    assert distill_main([]) == 0
    assert started == [Config()]


def test_an_error_of_several_lines_is_printed_on_one(capsys, monkeypatch):
    def fail(*_):
        raise UserError("first\n  second\n")

    monkeypatch.setattr("dmt.config_io.load_config", fail)
    assert get_error(capsys, []) == "first second"


@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)],
)
def test_a_signal_outside_training_sets_the_exit_code(workdir, capsys, monkeypatch, signum, code):
    monkeypatch.setattr(
        "dmt.tasks.run_task",
        lambda config, folder: os.kill(os.getpid(), signum),
    )
    handler = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background jobs ignore it
    try:
        assert distill_main([]) == code
    finally:
        signal.signal(signal.SIGINT, handler)
    assert capsys.readouterr().err.splitlines()[-1].startswith("stopped; ")


def test_main_restores_the_signal_handlers(workdir, fake_run):
    before = {signum: signal.getsignal(signum) for signum in signals.SIGNALS}
    during = {}

    def run_task(*_):
        during.update({signum: signal.getsignal(signum) for signum in signals.SIGNALS})
        return TaskResult(workdir)

    fake_run(run_task)
    assert distill_main([]) == 0
    assert during[signal.SIGTERM] != before[signal.SIGTERM]
    assert {signum: signal.getsignal(signum) for signum in signals.SIGNALS} == before


def test_an_ignored_signal_stays_ignored(workdir, fake_run):
    """As nohup ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        fake_run(lambda *_: os.kill(os.getpid(), signal.SIGHUP) or TaskResult(workdir))
        assert distill_main([]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_is_gone_does_not_change_the_exit_code(capsys, monkeypatch):
    interruption = signals.SignalInterrupt(signal.SIGHUP, "stopped after step 3")
    assert signals.report_signal(interruption, "stopped") == 129
    assert signals.report_signal(KeyboardInterrupt(), "stopped") == 130
    assert capsys.readouterr().err == "stopped after step 3\nstopped\n"

    class GoneTerminal:
        def write(self, _):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(sys, "stderr", GoneTerminal())
    assert signals.report_signal(interruption, "stopped") == 129


def test_runs_stop_at_the_end_of_a_step_inside_the_block_alone():
    assert not signals.stops_at_step_end()
    with signals.stop_at_step_end():
        with signals.stop_at_step_end():
            pass
        assert signals.stops_at_step_end()
    assert not signals.stops_at_step_end()


def test_main_works_in_any_thread(workdir, fake_run):
    exit_codes = []
    fake_run(lambda *_: TaskResult(workdir))
    thread = threading.Thread(target=lambda: exit_codes.append(distill_main([])))
    thread.start()
    thread.join()
    assert exit_codes == [0]


# Where the run writes


@pytest.mark.parametrize("below", ["", "/deep/er"])
def test_a_log_folder_that_is_a_file(workdir, no_run, capsys, below):
    (workdir / "taken").write_text("old")
    setting = "trainer.log_dir"
    message = get_error(capsys, [f"{setting}=taken{below}"])
    assert message == (
        f"{setting}=taken{below} cannot be written (Not a directory); "
        f"name another folder, as in {setting}=/tmp/dmt"
    )
    assert (workdir / "taken").read_text() == "old"


def test_check_writable_rejects_a_folder_without_permission_and_creates_none(workdir, monkeypatch):
    check_writable("new/er")
    check_writable(str(workdir))
    assert list(workdir.iterdir()) == []

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("dmt.training.run_dir.TemporaryFile", refuse)  # root may write anywhere
    with pytest.raises(
        UserError,
        match=r"^trainer\.log_dir=new cannot be written \(Permission denied\); name another folder",
    ):
        check_writable("new")


# The teacher


@pytest.mark.parametrize("source", ["./nix", "/nix/nowhere", "a/b/c"])
def test_a_missing_teacher(workdir, capsys, tiny_run, source):
    message = get_error(capsys, [*tiny_run, f"teacher={source}"])
    accepted = "accepted are embedded, reader, a local directory, or a hub name such as gpt2"
    assert message == f"teacher={source}: no such directory; {accepted}"
    assert list(workdir.iterdir()) == []


def test_a_teacher_on_an_unreachable_hub(workdir, capsys, tiny_run):
    message = get_error(capsys, [*tiny_run, "teacher=nobody/nothing"])
    assert message.startswith(
        "teacher=nobody/nothing is neither a local directory nor in the cache, "
        "and the hub does not answer;"
    )
    assert message.endswith("name that folder, or use embedded")
    assert list(workdir.iterdir()) == []


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_teacher_with_a_missing_file(workdir, capsys, tiny_run, teacher_folder, missing):
    (teacher_folder / missing).unlink()
    message = get_error(capsys, tiny_run)
    assert message.startswith(f"teacher={teacher_folder}")
    assert "it needs config.json, model.safetensors and tokenizer.json" in message
    assert list(workdir.iterdir()) == []


@pytest.mark.parametrize("broken", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_teacher_with_a_broken_file(workdir, capsys, tiny_run, teacher_folder, broken):
    (teacher_folder / broken).write_text("{")
    assert get_error(capsys, tiny_run).startswith(f"teacher={teacher_folder} cannot be loaded (")
    assert list(workdir.iterdir()) == []


@pytest.mark.parametrize("changes", [{"n_layer": 5}, {"n_layer": 2}, {"n_embd": 32}], ids=str)
def test_a_teacher_whose_weights_do_not_match_its_config(
    workdir, capsys, tiny_run, teacher_folder, changes
):
    file = teacher_folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert get_error(capsys, tiny_run).startswith(f"teacher={teacher_folder}")
    assert list(workdir.iterdir()) == []


@pytest.mark.parametrize("source", ["a b", "nix/", "a--b"])
def test_a_teacher_with_an_invalid_hub_name(workdir, capsys, tiny_run, source):
    assert get_error(capsys, [*tiny_run, f"teacher={source}"]).startswith(f"teacher={source}")
    assert list(workdir.iterdir()) == []


@pytest.mark.parametrize("name", ["gpuu", "tpu"])
def test_a_missing_accelerator(workdir, capsys, tiny_run, name):
    assert "trainer.accelerator" in get_error(capsys, [*tiny_run, f"trainer.accelerator={name}"])
    assert list(workdir.iterdir()) == []


def test_a_tokenizer_with_another_vocabulary(workdir, capsys, tiny_run, teacher_folder):
    make_teacher(270).save_pretrained(teacher_folder)
    message = get_error(capsys, tiny_run)
    assert message.startswith("data.corpora: text has the token ")
    assert "which the tokenizer has and the model with its 270 embeddings does not" in message
    assert list(workdir.iterdir()) == []


def test_a_teacher_of_an_unsupported_family(workdir, capsys, tiny_run, teacher_folder):
    from transformers import OPTConfig, OPTForCausalLM

    shape = {
        "hidden_size": 16,
        "ffn_dim": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 16,
    }
    OPTForCausalLM(OPTConfig(vocab_size=300, max_position_embeddings=32, **shape)).save_pretrained(
        teacher_folder
    )
    assert "a model of type 'opt' is not supported; supported are gpt2" in get_error(
        capsys, tiny_run
    )
    assert list(workdir.iterdir()) == []


def test_settings_that_the_teacher_contradicts(workdir, capsys, tiny_run):
    assert "memory.k must be in [1, memory.num_slots=64], got 65" in get_error(
        capsys, [*tiny_run, "memory.k=65"]
    )
    assert "data.seq_len=33 is longer than the 32 positions" in get_error(
        capsys, [*tiny_run, "data.seq_len=33"]
    )
    dense_run = [arg for arg in tiny_run if not arg.startswith("memory.")]
    message = get_error(capsys, [*dense_run, "memory.kind=dense"])
    assert (
        message
        == "every layer is dense, so there is nothing to distill; give a layer memory.kind=featural"
    )
    assert list(workdir.iterdir()) == []


# The text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "data.corpora: {file} has no text (files read: 1"),
        ("blank.txt", " \n\n \n", "data.corpora: {file} has no text (files read: 1"),
        ("empty.jsonl", "", "data.corpora: {file} has no text (files read: 1"),
        (
            "short.txt",
            "\n\n".join(["a few", "words"] * 3),
            "text need data.seq_len=16 each",
        ),
        (
            "bad.jsonl",
            json.dumps({"text": "x"}) + "\n{\n",
            "data.corpora: {file} line 2 is not a JSON object (",
        ),
        (
            "other.jsonl",
            '{"body": "x"}\n',
            "data.corpora: {file} line 1 has no text in a field text, content, messages, ",
        ),
        ("latin.txt", b"caf\xe9 " * 100, "data.corpora: {file} is not UTF-8 text; convert it"),
        ("page.pdf", "x", "data.corpora: {file} is none of .txt, .md, .jsonl"),
    ],
    ids=lambda part: part if isinstance(part, str) and len(part) < 12 else "",
)
def test_unusable_text(workdir, tmp_path, capsys, tiny_run, name, content, message):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    error = get_error(capsys, [*tiny_run, f"data.corpora=[{file}]"])
    assert message.format(file=file) in error
    assert list(workdir.iterdir()) == []


def test_a_corpus_shorter_than_a_window(workdir, tmp_path, capsys, tiny_run):
    file = tmp_path / "short.txt"
    file.write_text(SENTENCES[0])
    message = get_error(capsys, [*tiny_run, f"data.corpora=[{file}]", "data.seq_len=32"])
    assert re.search(
        r"short\.txt has \d+ tokens, and its training, validation and test text need "
        r"data\.seq_len=32 each, about 96 together; give it more text or set data\.seq_len=\d+",
        message,
    )
    assert list(workdir.iterdir()) == []


def test_an_empty_folder_of_text(workdir, tmp_path, capsys, tiny_run):
    (tmp_path / "nothing").mkdir()
    assert "has no text (files read: 0)" in get_error(
        capsys, [*tiny_run, f"data.corpora=[{tmp_path / 'nothing'}]"]
    )
    assert list(workdir.iterdir()) == []
