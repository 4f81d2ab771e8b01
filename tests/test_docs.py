"""Every command and Python block of the README and of docs/, run as a newcomer would run it.

A run is made small by settings that are appended. Names of things that a newcomer has and this
machine lacks (a model folder, a text file) are created in the folder where the commands run.
"""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
import warnings
from pathlib import Path

import pytest
from conftest import make_llama, make_teacher

from dmt.cli.main import main

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
GENERATED = ("reference", "experiments")
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [README, *(page for page in DOCS if page.parent.name not in GENERATED)]
PROGRAMS = ("pip", "python", "dmt", "torchrun", "tensorboard", "make")
SMALL = [
    "stages.calibration_tokens=256",
    "stages.lookup_tokens=256",
    "stages.layerwise_steps=1",
    "stages.end_to_end_steps=2",
    "optim.warmup_steps=1",
    "trainer.num_threads=1",
    "trainer.precision=32-true",
    "trainer.progress_bar=false",
    "data.test_tokens=512",
    "data.validation_tokens=256",
    "data.seq_len=64",
    "data.micro_batch_size=2",
]
SMALL_CONTEXT = [
    "data.corpora=[notes.txt]",
    "data.test_tokens=512",
    "context.num_samples=4",
    "context.qa_per_sentence=1",
]
ADA = "Ada Winterbourne was born in the town of Ravenhill."


def read_commands(page):
    """Commands of a page: indented lines that begin with one of `PROGRAMS`, comments removed."""
    pattern = rf"^    ((?:{'|'.join(PROGRAMS)}) .*)$"
    return [match.split("  #")[0].strip() for match in re.findall(pattern, page.read_text(), re.M)]


def read_python_blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


COMMANDS = [(page, command) for page in PAGES for command in read_commands(page)]
RUNNABLE = [(p, c) for p, c in dict.fromkeys(COMMANDS) if c.split()[0] in ("dmt", "python")]
CLIENTS_PAGE = "clients.md"
PAGES_WITH_PYTHON = [page for page in PAGES if read_python_blocks(page)]


def name_of(item):
    return item.stem if isinstance(item, Path) else str(item)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A folder with the checkout's files and with what the docs call the newcomer's own."""
    folder = tmp_path_factory.mktemp("newcomer")
    for name in ("distill.py", "configs", "examples", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    sentence = f'{{"sentence": "{ADA.replace("Ada", "Eda")}"}}\n'
    (folder / "facts.jsonl").write_text(sentence, encoding="utf-8")
    for suffix in ("txt", "jsonl"):
        source = ROOT / "configs" / "consolidation" / f"person.{suffix}"
        shutil.copy(source, folder / f"page.{suffix}")
    lines = (
        f"{i} the quick brown fox {i % 7} jumps over the lazy dog {i % 11} and runs away"
        for i in range(600)
    )
    text = "\n\n".join(lines)
    (folder / "notes.txt").write_text(text, encoding="utf-8")
    (folder / "my.yaml").write_text("memory: {kind: featural}\n", encoding="utf-8")
    (folder / "papers").mkdir()
    (folder / "papers" / "one.txt").write_text(text.replace("fox", "cat"), encoding="utf-8")
    gpt2 = make_teacher(len(tokenizer), n_layer=4, n_positions=64, n_inner=1536)
    llama = make_llama(
        len(tokenizer), num_hidden_layers=4, intermediate_size=1536, max_position_embeddings=64
    )
    for name, model in {"my-gpt2": gpt2, "my-llama": llama}.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def make_small(command, folder):
    """Arguments of `dmt` for a command of the docs, small enough for a test."""
    args = shlex.split(command.replace("/models/", f"{folder}/"))
    args = args[2:] if args[0] == "python" else args[1:]
    if command.startswith("python distill.py"):
        args.insert(0, "distill")
    name = args[0]
    args = ["embedded" if arg == "smollm2" and name == "consolidate" else arg for arg in args]
    if name == "consolidate":  # on the run of the embedded teacher, which has room for a context
        small = ["--steps", "2"] if {"weights", "prompt"} & set(args) else []
        return [*args, "--model", "lightning_logs/version_0", *small, *SMALL_CONTEXT]
    if name == "sleep":
        return [*args, "--model", "lightning_logs/version_0", "--steps", "2"]
    if "--rows" in args:
        return [*args, "--model", "lightning_logs/rows"]
    if name != "distill" or "--resume" in args:
        return args
    args = [arg for arg in args if not arg.startswith("trainer.run_name=")]  # may exist already
    if any("consolidation/" in arg for arg in args):
        return [*args, *SMALL_CONTEXT, "trainer.progress_bar=false"]
    if args == ["distill", "unplug"]:  # the embedded teacher, whose people are declared
        return [*args, "data.corpora=[biographies]", "data.mixture_weights=[]", *SMALL]
    teacher = "my-llama" if "smollm2" in args else "my-gpt2"
    settings = {arg.partition("=")[0] for arg in args}
    own = {"teacher": folder / teacher, "data.corpora": "[notes.txt]"}
    if args == ["distill"]:  # the embedded teacher, on less text
        own = {"data.corpora": "[biographies]"}
    small = [*(f"{name}={value}" for name, value in own.items()), *SMALL]
    return [*args, *(item for item in small if item.partition("=")[0] not in settings)]


@pytest.fixture(scope="module")
def newcomer(folder):
    """The folder after the first commands of the docs, with the runs that later ones name."""
    old = Path.cwd()
    os.chdir(folder)
    try:
        for extra in ([], ["seed=1"], ["data.corpora=[notes.txt]"], [], ["trainer.run_name=wide"]):
            assert main([*make_small("dmt distill", folder), *extra]) == 0
        rows = ["trainer.run_name=rows", "stages.end_to_end_steps=5", "memory.write_start=0.3"]
        assert main([*make_small("dmt distill associative", folder), *rows]) == 0
        for k in (32, 64):
            for seed in (0, 1):
                extra = [f"memory.mean_k={k}", f"seed={seed}", f"trainer.run_name=k{k}-seed{seed}"]
                assert main([*make_small("dmt distill", folder), *extra]) == 0
        unplug = make_small("dmt distill unplug", folder)
        assert main([*unplug, "trainer.run_name=unplug"]) == 0
        model = ["--model", "lightning_logs/version_0"]
        assert main(["memory", "write", ADA, "--tag", "family", *model]) == 0
        assert main(["generate", "Ada Winterbourne was born in the town of", *model]) == 0
        assert main(["use", "version_0"]) == 0
    finally:
        os.chdir(old)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("page", "command"), RUNNABLE, ids=name_of)
def test_commands_run(page, command, newcomer, monkeypatch, capsys):
    monkeypatch.chdir(newcomer)
    if command.startswith(("python -m benchmarks", "python benchmarks", "python scripts")):
        pytest.skip("checked by test_benchmark_arguments and tests/test_scripts.py")
    if "--print-completion" in command:
        with pytest.raises(SystemExit) as end:
            main(["--print-completion", "bash"])
        assert not end.value.code
        return
    if command.startswith("dmt sleep"):  # an earlier command may have deleted what it moves
        assert main(["memory", "write", ADA, "--tag", "family"]) == 0
        assert main(["generate", "Ada Winterbourne was born in the town of"]) == 0
        capsys.readouterr()
    code = main(make_small(command, newcomer))
    output = capsys.readouterr()
    assert code == 0, output.err
    assert output.out.strip()


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES_WITH_PYTHON, ids=name_of)
def test_python_blocks_run(page, newcomer, monkeypatch):
    if page.name == CLIENTS_PAGE:
        pytest.importorskip("trl")
        pytest.importorskip("lm_eval")
        warnings.simplefilter("ignore")  # the clients warn about themselves
    monkeypatch.chdir(newcomer)
    namespace = {"__name__": "__main__"}  # later blocks use what earlier ones define
    for block in read_python_blocks(page):
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=name_of)
def test_examples_run(path, newcomer, monkeypatch, capsys):
    monkeypatch.chdir(newcomer)
    monkeypatch.setattr(sys, "argv", [path.name])
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_ci_runs_the_two_commands_of_the_readme():
    commands = [c for c in read_commands(README) if "requirements" in c]
    assert commands == [
        "pip install -r requirements.txt && python distill.py",
        "pip install -r requirements-dev.txt && python -m pytest",
    ]
    assert "pip install -r requirements" in (ROOT / ".ci" / "run").read_text()


def list_benchmarks():
    text = "\n".join(page.read_text() for page in DOCS)
    pattern = r"python (?:-m )?(benchmarks[./][\w/.]+(?: --[\w-]+)*|benchmarks\b)"
    return sorted({match.rstrip(".") for match in re.findall(pattern, text)})


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("command", list_benchmarks())
def test_benchmark_arguments(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for path in (ROOT, ROOT / "benchmarks"):
        monkeypatch.syspath_prepend(str(path))
    name, *args = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    run = runpy.run_path if name.endswith(".py") else runpy.run_module
    with pytest.raises(SystemExit) as end:
        run(name, run_name="__main__")
    assert not end.value.code
    shown = capsys.readouterr().out
    assert all(arg in shown for arg in args)


def test_every_test_that_the_log_of_outside_sources_names_exists():
    page = (ROOT / "docs" / "contributing" / "tried-from-outside.md").read_text(encoding="utf-8")
    names = re.findall(r"`((?:tests|benchmarks)/[\w/.]+)(?:::(\w+))?`", page)
    assert len(names) > 80
    missing = [
        (path, name)
        for path, name in names
        if not (ROOT / path).exists()
        or (name and f"def {name}(" not in (ROOT / path).read_text(encoding="utf-8"))
    ]
    assert not missing


@pytest.mark.slow
def test_tensorboard_shows_the_runs_on_loopback_only(newcomer):
    command = next(c for _, c in COMMANDS if c.startswith("tensorboard"))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    server = subprocess.Popen(
        [*command.split(), "--port", "0"],
        cwd=newcomer,
        env=os.environ | {"PATH": path},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        lines = (re.search(r"http://\S+", line) for line in server.stderr)
        address = next(match[0] for match in lines if match)
        assert re.match(r"http://(localhost|127\.0\.0\.1):\d+/", address)
        for _ in range(60):
            runs = urllib.request.urlopen(f"{address}data/runs", timeout=30).read().decode()
            if "version_0" in runs:
                break
            time.sleep(0.5)
        assert "version_0" in runs
    finally:
        server.kill()
        server.wait()
        server.stderr.close()


def test_pages_are_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in DOCS:
        assert str(page.relative_to(ROOT / "docs")) in navigation


def test_local_links_exist():
    for page in [README, *DOCS]:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_reference_pages_match_the_code():
    script = str(ROOT / "scripts" / "generate_reference.py")
    done = subprocess.run(
        [sys.executable, script, "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
