"""The command line: one line and exit code 2 for whatever a person can mend, at once, with nothing left half-written."""

import contextlib
import gc
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SENTENCES, make_teacher

import dmt.cli.main
from dmt import signals
from dmt.cli import main
from dmt.cli.main import distill_main
from dmt.config import Config
from dmt.config_io import list_setting_names, save_config
from dmt.distillation.pretrain import train_tokenizer
from dmt.errors import UserError
from dmt.training.run_dir import check_writable

ROOT = Path(__file__).parents[2]
HEAVY = {
    "torch",
    "transformers",
    "pytorch_lightning",
    "pandas",
    "faiss",
    "tokenizers",
    "tensorboard",
}


@pytest.fixture(autouse=True)
def _signals_put_back():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working directory, so that what a refused run leaves behind is seen."""
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def unstarted(monkeypatch):
    """No run may begin: a mistake that is no longer refused shall not cost minutes of training."""
    monkeypatch.setattr(
        "dmt.training.tasks.run_task_as_command", lambda *_: pytest.fail("a run began")
    )


@pytest.fixture
def words(teacher_folder, text_file):
    """A run that would start at once and end at once."""
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


def distill(*given: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "distill.py"), *given]
    return subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def refusal(capsys, given: list[str]) -> str:
    """The line that `main` ends with, its prefix left out."""
    capsys.readouterr()  # what the fixtures said
    assert distill_main(given) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    *before, last = shown.err.splitlines()
    assert [line for line in before if line != "loading torch and transformers ..."] == []
    assert last.startswith("error: ")
    return last.removeprefix("error: ")


# --- as a person starts it --------------------------------------------------------------------------------------------


def test_help_lists_every_setting(place):
    done = distill("--help", cwd=place)
    assert (done.returncode, done.stderr) == (0, "")
    listed = re.findall(r"^([a-z_0-9.]+)=", done.stdout, re.MULTILINE)
    groups = {name.partition(".")[0] for name in list_setting_names() if "." in name}
    assert listed == [name for name in list_setting_names() if name not in groups]
    assert "--resume RUN_FOLDER" in done.stdout
    assert list(place.iterdir()) == []


def test_a_typo_is_one_line_and_leaves_nothing(place):
    done = distill("memory.wieghting=relu", cwd=place)
    assert done.returncode == 2
    assert done.stdout == ""
    assert (
        done.stderr == "error: memory.wieghting is not a setting; did you mean memory.activation?\n"
    )
    assert list(place.iterdir()) == []


def test_a_missing_corpus_is_one_line_and_leaves_nothing(place, teacher_folder):
    done = distill(
        f"teacher={teacher_folder}", "data.seq_len=16", "data.corpora=[nix.txt]", cwd=place
    )
    assert done.returncode == 2
    assert done.stdout == ""
    started, error = done.stderr.splitlines()
    assert started == "loading torch and transformers ..."
    assert error.startswith(
        "error: data.corpora: no file or folder nix.txt; accepted are speeches, biographies,"
    )
    assert list(place.iterdir()) == []


def test_no_garbage_is_looked_for_while_libraries_load(place):
    script = f"""
import gc, sys
sys.path.insert(0, {str(ROOT / "src")!r})
from dmt.cli.main import distill_main as main
rounds = []
def looked(phase, about):
    if "torch" in sys.modules and "dmt.distillation.run" not in sys.modules:
        rounds.append(about)
gc.callbacks.append(looked)
assert main(["data.corpora=[nix.txt]"]) == 2
assert "dmt.training.tasks" in sys.modules
assert not rounds, rounds
assert gc.isenabled()
assert gc.get_freeze_count() > 100_000
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=place, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_collector_is_as_it_was_once_libraries_are_there(monkeypatch):
    monkeypatch.setattr(signals, "exit_on_signal", lambda: None)
    monkeypatch.setattr(signals, "raise_on_signal", lambda: None)
    frozen = gc.get_freeze_count()

    def import_what_is_not_there():
        with signals.fast_imports():
            assert not gc.isenabled()
            raise ImportError

    with pytest.raises(ImportError):
        import_what_is_not_there()
    assert gc.isenabled()
    gc.disable()
    with signals.fast_imports():
        pass
    assert not gc.isenabled()
    gc.enable()
    assert gc.get_freeze_count() == frozen, (
        "torch was there before, so what is here is not for us to keep"
    )


def test_the_other_command_loads_them_so_too(monkeypatch, capsys):
    entered = []
    monkeypatch.setattr(
        signals, "fast_imports", lambda: entered.append(1) or contextlib.nullcontext()
    )
    assert main.main(["memory", "stats", "--student", "nix"]) == 2
    assert entered
    assert "--student nix" in capsys.readouterr().err


def test_help_and_mistakes_are_answered_before_anything_heavy_is_imported(place):
    """What takes the seconds is the import of torch and transformers; without it an answer is there at once."""
    script = f"""
import sys
sys.path.insert(0, {str(ROOT / "src")!r})
sys.modules["dmt.training.tasks"] = None  # no run may begin
from dmt.cli.main import distill_main as main
try:
    main(["--help"])
except SystemExit as end:
    assert end.code == 0
for words in (["memory.kk=3"], ["memory.k=x"], ["memory.k=600", "memory.num_slots=512"], ["nix.yaml"], ["--nix"], ["--resume", "nix"],
              ["student.layer_overrides=[{{layers: 0, memory: {{kk: 3}}}}]"], ["trainer.log_dir=/dev/null/x"], ["data.corpora=[]"]):
    assert main(words) == 2, words
    imported = {HEAVY!r} & set(sys.modules)
    assert not imported, (words, imported)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=place, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == 9
    assert list(place.iterdir()) == []


# --- options and files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a.yaml", "b.yaml"], "one config file at most, got a.yaml, b.yaml"),
        (["--config", "b.yaml", "a.yaml"], "one config file at most, got a.yaml, b.yaml"),
        (["memory.k", "64"], "one config file at most, got memory.k, 64"),
        (
            ["nix.yaml"],
            "cannot read config file nix.yaml (No such file or directory); there are: none here",
        ),
        (
            ["--config", "nix.yaml"],
            "cannot read config file nix.yaml (No such file or directory); there are: none here",
        ),
        (["--config="], "cannot read config file . (Is a directory)"),
        (
            ["--config"],
            "argument --config: expected one argument; python distill.py --help lists what there is",
        ),
        (
            ["--seed=3"],
            "unrecognized arguments: --seed=3; a setting is written key=value, without dashes; python",
        ),
        (["--conf", "a.yaml"], "unrecognized arguments: --conf"),
        (["-k", "memory.k=3"], "unrecognized arguments: -k"),
        (
            ["--resume", "nix", "memory.k=3"],
            "--resume goes on with the run's own settings; leave out memory.k=3",
        ),
        (
            ["--resume", "nix", "a.yaml"],
            "--resume goes on with the run's own settings; leave out a.yaml",
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
def test_wrong_options_and_files(place, unstarted, capsys, given, message):
    assert message in refusal(capsys, given)
    assert list(place.iterdir()) == []


def test_resume_names_the_runs_that_are_there(place, unstarted, capsys):
    for number in (0, 1):
        (place / "logs" / f"version_{number}").mkdir(parents=True)
        save_config(Config(), place / "logs" / f"version_{number}" / "config.yaml")
    message = refusal(capsys, ["--resume", "logs/version_7"])
    assert (
        message
        == "--resume logs/version_7: no run is there (no config.yaml); there are: logs/version_0, logs/version_1"
    )


@pytest.mark.parametrize(
    "given",
    [
        ["{file}"],
        ["--config", "{file}"],
        ["memory.k=32", "{file}"],
        ["--config={file}", "memory.k=32"],
    ],
)
def test_both_ways_to_name_a_config_and_any_order_of_words(place, monkeypatch, given):
    (place / "some.yaml").write_text("memory: {k: 64}\nseed: 5\n")
    started = []
    monkeypatch.setattr(
        "dmt.training.tasks.run_task_as_command", lambda config, folder: started.append(config) or 0
    )
    assert distill_main([word.format(file="some.yaml") for word in given]) == 0
    assert started[0].seed == 5
    assert started[0].memory.k == (32 if "memory.k=32" in given else 64), (
        "words change what the file says"
    )


def test_no_words_start_a_run_with_the_defaults(place, monkeypatch):
    started = []
    monkeypatch.setattr(
        "dmt.training.tasks.run_task_as_command", lambda config, folder: started.append(config) or 0
    )
    assert distill_main([]) == 0
    assert started == [Config()]


def test_an_error_of_several_lines_is_shown_on_one(capsys, monkeypatch):
    def fail(*_):
        raise UserError("first\n  second\n")

    monkeypatch.setattr(dmt.cli.main.config_io, "load_config", fail)
    assert refusal(capsys, []) == "first second"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_outside_training_ends_in_its_exit_code(place, capsys, monkeypatch, number, code):
    monkeypatch.setattr(
        "dmt.training.tasks.run_task_as_command",
        lambda config, folder: os.kill(os.getpid(), number),
    )
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background jobs ignore it
    try:
        assert distill_main([]) == code
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err.splitlines()[-1].startswith("stopped; ")


# --- where the run would write ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "/deep/er"])
@pytest.mark.parametrize("task", ["distill", "pretrain"])
def test_a_log_folder_that_is_a_file(place, unstarted, capsys, task, below):
    (place / "taken").write_text("mine")
    setting = "pretrain.output" if task == "pretrain" else "trainer.log_dir"
    message = refusal(capsys, [f"task={task}", f"{setting}=taken{below}"])
    assert (
        message
        == f"{setting}=taken{below} cannot be written (Not a directory); name another folder, as in {setting}=/tmp/dmt"
    )
    assert (place / "taken").read_text() == "mine"


def test_a_folder_without_permission_is_refused_and_a_new_one_is_not_made_yet(place, monkeypatch):
    check_writable("new/er")
    check_writable(str(place))
    assert list(place.iterdir()) == []

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("dmt.training.run_dir.TemporaryFile", refuse)  # root may write anywhere
    with pytest.raises(
        UserError,
        match=r"^trainer\.log_dir=new cannot be written \(Permission denied\); name another folder",
    ):
        check_writable("new")


# --- the teacher ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["./nix", "/nix/nowhere", "a/b/c"])
def test_a_teacher_that_is_not_there(place, capsys, words, source):
    message = refusal(capsys, [*words, f"teacher={source}"])
    accepted = "accepted are embedded, reader, a local directory, or a hub name such as gpt2"
    assert message == f"teacher={source}: no such directory; {accepted}"
    assert list(place.iterdir()) == []


def test_a_teacher_on_a_hub_that_does_not_answer(place, capsys, words):
    message = refusal(capsys, [*words, "teacher=nobody/nothing"])
    assert message.startswith(
        "teacher=nobody/nothing is neither a local directory nor in the cache, and the hub does not answer;"
    )
    assert message.endswith("set teacher=<that folder>, or use teacher=embedded")
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_teacher_of_which_a_file_is_missing(place, capsys, words, teacher_folder, missing):
    (teacher_folder / missing).unlink()
    message = refusal(capsys, words)
    assert message.startswith(f"teacher={teacher_folder}")
    assert "it needs config.json, model.safetensors and tokenizer.json" in message
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("broken", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_teacher_of_which_a_file_is_broken(place, capsys, words, teacher_folder, broken):
    (teacher_folder / broken).write_text("{")
    assert refusal(capsys, words).startswith(f"teacher={teacher_folder} cannot be loaded (")
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("changes", [{"n_layer": 5}, {"n_layer": 2}, {"n_embd": 32}], ids=str)
def test_a_teacher_whose_weights_are_not_those_of_its_config(
    place, capsys, words, teacher_folder, changes
):
    file = teacher_folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert refusal(capsys, words).startswith(f"teacher={teacher_folder}")
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("source", ["a b", "nix/", "a--b"])
def test_a_teacher_that_cannot_be_a_name_on_a_hub(place, capsys, words, source):
    assert refusal(capsys, [*words, f"teacher={source}"]).startswith(f"teacher={source}")
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("name", ["gpuu", "tpu"])
def test_an_accelerator_that_is_not_there(place, capsys, words, name):
    assert "trainer.accelerator" in refusal(capsys, [*words, f"trainer.accelerator={name}"])
    assert list(place.iterdir()) == []


def test_a_tokenizer_of_another_vocabulary(place, capsys, words, teacher_folder):
    make_teacher(600).save_pretrained(teacher_folder)
    message = refusal(capsys, words)
    assert message.startswith(
        f"teacher={teacher_folder}: its tokenizer has 300 tokens, its model 600; they belong to different models"
    )
    train_tokenizer([str(i) * 3 for i in range(10, 400)], 500, 32).save_pretrained(teacher_folder)
    make_teacher(300).save_pretrained(teacher_folder)
    assert ", its model 300; they belong to different models" in refusal(capsys, words)
    assert list(place.iterdir()) == []


def test_a_teacher_of_another_family(place, capsys, words, teacher_folder):
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
    assert "a model of type 'opt' is not supported; supported are gpt2" in refusal(capsys, words)
    assert list(place.iterdir()) == []


def test_settings_that_the_teacher_contradicts(place, capsys, words):
    assert "memory.k must be in [1, memory.num_slots=64], got 65" in refusal(
        capsys, [*words, "memory.k=65"]
    )
    assert "data.seq_len=33 is longer than the 32 positions" in refusal(
        capsys, [*words, "data.seq_len=33"]
    )
    message = refusal(capsys, [*words, "memory.kind=dense"])
    assert (
        message
        == "every layer is left dense, so there is nothing to distil; give a layer memory.kind=featural"
    )
    assert list(place.iterdir()) == []


# --- the text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "data.corpora: {file} has no train text; give it more text"),
        ("blank.txt", " \n\n \n", "data.corpora: {file} has no train text; give it more text"),
        ("empty.jsonl", "", "data.corpora: {file} has no train text; give it more text"),
        ("short.txt", "\n\n".join(["a few", "words"] * 9), "part of short has"),
        (
            "bad.jsonl",
            json.dumps({"text": "x"}) + "\n{\n",
            'data.corpora: {file} line 2 is not an object with a "text" field',
        ),
        (
            "other.jsonl",
            '{"body": "x"}\n',
            'data.corpora: {file} line 1 is not an object with a "text" field',
        ),
        ("latin.txt", b"caf\xe9 " * 100, "data.corpora: {file} is not UTF-8 text; convert it"),
        ("page.pdf", "x", "data.corpora: {file} is neither .txt nor .jsonl"),
    ],
    ids=lambda part: part if isinstance(part, str) and len(part) < 12 else "",
)
def test_text_that_cannot_be_used(place, tmp_path, capsys, words, name, content, message):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused = refusal(capsys, [*words, f"data.corpora=[{file}]"])
    assert message.format(file=file) in refused
    assert list(place.iterdir()) == []


def test_missing_text_for_a_new_teacher(place, capsys, words):
    message = refusal(
        capsys, [*words, "task=pretrain", "data.corpora=[nix.txt]", "pretrain.output=new"]
    )
    assert message.startswith(
        "data.corpora: no file or folder nix.txt; accepted are speeches, biographies,"
    )
    assert list(place.iterdir()) == []


def test_a_corpus_shorter_than_a_window(place, tmp_path, capsys, words):
    file = tmp_path / "short.txt"
    file.write_text("\n\n".join(SENTENCES))
    message = refusal(capsys, [*words, f"data.corpora=[{file}]", "data.seq_len=32"])
    assert re.search(
        r"part of short has \d+ tokens, fewer than data\.block=32; give it more text or set a smaller data\.block",
        message,
    )
    assert list(place.iterdir()) == []


def test_an_empty_folder_of_text(place, tmp_path, capsys, words):
    (tmp_path / "nothing").mkdir()
    assert "has no train text" in refusal(
        capsys, [*words, f"data.corpora=[{tmp_path / 'nothing'}]"]
    )
    assert list(place.iterdir()) == []
