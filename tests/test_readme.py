"""The README's commands, each as it is written, in the README's order and in one folder, as a newcomer would type them.

A run is made small by words that go last; names of what a newcomer has and this machine lacks are put in their place. What
remains as written is the command, its config, its settings, and that one command finds what another has left.
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
from pathlib import Path

import pytest
from conftest import make_llama, make_teacher

from dmt.cli import main
from dmt.cli.main import distill_main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = [
    line.strip()
    for line in README.splitlines()
    if re.match(r"    (pip|python|dmt|torchrun|tensorboard|make) ", line)
]
BENCHMARKS = sorted(set(re.findall(r"`python (?:-m )?(benchmarks[./][^`]+|benchmarks)`", README)))
SMALL = [
    "stages.calibration_tokens=256",
    "stages.layerwise_steps=1",
    "stages.end_to_end_steps=2",
    "optim.warmup_steps=1",
    "trainer.num_threads=1",
    "data.test_tokens=512",
    "data.validation_tokens=256",
    "trainer.progress_bar=false",
    "data.seq_len=64",
    "trainer.precision=32-true",
    "data.micro_batch_size=2",
]
ADA = "Ada Winterbourne was born in the town of Ravenhill."


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """A folder with the checkout's files, and with what the README speaks of as a newcomer's own."""
    folder = tmp_path_factory.mktemp("newcomer")
    (folder / "distill.py").symlink_to(ROOT / "distill.py")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "facts.jsonl").write_text(
        f'{{"sentence": "{ADA.replace("Ada", "Eda")}"}}\n', encoding="utf-8"
    )
    for ending in ("txt", "jsonl"):
        shutil.copy(
            ROOT / "configs" / "consolidation" / f"person.{ending}", folder / f"page.{ending}"
        )
    text = "\n\n".join(
        f"{i} the quick brown fox {i % 7} jumps over the lazy dog {i % 11} and runs away"
        for i in range(600)
    )
    (folder / "notes.txt").write_text(text, encoding="utf-8")
    (folder / "papers").mkdir()
    (folder / "papers" / "one.txt").write_text(text.replace("fox", "cat"), encoding="utf-8")
    shape = {"n_layer": 4, "n_positions": 64, "n_inner": 1536}
    for name, model in {
        "my-gpt2": make_teacher(len(tokenizer), **shape),
        "my-llama": make_llama(
            len(tokenizer), num_hidden_layers=4, intermediate_size=1536, max_position_embeddings=64
        ),
    }.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def told(line, place):
    """The words of a README's line on this machine: what it needs stands in its place, and it is made small."""
    words = shlex.split(line.replace("/models/", f"{place}/"), comments=True)
    if words[0] == "dmt":
        small = (
            ["--steps", "2"] if words[1] == "sleep" or {"weights", "tokens"} & set(words) else []
        )
        small += [
            "data.test_tokens=512",
            "data.corpora=[notes.txt]",
            "context.num_samples=4",
            "context.qa_per_sentence=1",
        ] * (words[1] == "consolidate")
        if "--write-memory" in words:
            made = next(
                file
                for file in (place / "lightning_logs").glob("*/config.yaml")
                if "kind: associative" in file.read_text()
            )
            small += ["-m", str(made.parent)]
        return ["embedded" if word == "smollm2" else word for word in words] + small
    if any("consolidation" in word for word in words):
        return [
            *words,
            "data.test_tokens=512",
            "data.corpora=[notes.txt]",
            "trainer.progress_bar=false",
        ]
    if "--resume" in words or words[-1] == "distill.py":
        return [
            *words,
            *(["data.corpora=[biographies]", *SMALL] if words[-1] == "distill.py" else []),
        ]
    other = "my-llama" if any("smollm2" in word for word in words) else "my-gpt2"
    given = {word.partition("=")[0] for word in words}
    mine = {"teacher": place / other, "data.corpora": "[notes.txt]"}
    return [
        *words,
        *(f"{name}={value}" for name, value in mine.items() if name not in given),
        *SMALL,
    ]


@pytest.mark.parametrize(
    "line",
    sorted(
        (line for line in LINES if not line.startswith("pip")),
        key=lambda line: "--write-memory" in line,
    ),  # which needs rows
    ids=lambda line: line.split("  #")[0].strip(),
)
def test_a_command_of_the_readme_does_what_it_says(line, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    if not (place / "lightning_logs").exists():  # the first of the two commands comes first
        first = next(line for line in LINES if line.endswith("&& python distill.py")).split("&& ")[
            1
        ]
        assert distill_main(told(first, place)[2:]) == 0
        assert (place / "lightning_logs" / "version_0" / "student").is_dir()
    program, *words = told(line, place)
    capsys.readouterr()
    if program == "python":
        assert words.pop(0) == "distill.py"
        code = distill_main(words)
    else:
        assert program == "dmt"
        code = main.main(words)
    said = capsys.readouterr()
    assert code == 0, said.err
    assert said.out.strip()


def test_the_two_commands_are_those_that_ci_runs():
    pair = [line for line in LINES if line.startswith("pip")]
    assert [line.split("&& ")[1] for line in pair] == ["python distill.py", "python -m pytest"]
    assert all(line.startswith("pip install -r requirements.txt && ") for line in pair)
    assert r"^    pip install -r requirements\.txt && " in (ROOT / ".ci" / "run").read_text()


@pytest.mark.filterwarnings(
    "ignore:.*found in sys.modules:RuntimeWarning"
)  # where another test has imported it
@pytest.mark.parametrize("command", BENCHMARKS)
def test_a_benchmark_that_the_readme_names_takes_the_words_it_is_given(
    command, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.syspath_prepend(
        str(ROOT / "benchmarks")
    )  # as python does with a script's own folder
    name, *words = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    run, name = (
        (runpy.run_path, name)
        if name.endswith(".py")
        else (runpy.run_module, name.replace(" ", ""))
    )
    with pytest.raises(SystemExit) as ended:
        run(name, run_name="__main__")
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert all(word in shown for word in words if word.startswith("--"))


def test_the_python_of_the_readme_runs(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    assert "pipeline" in code
    exec(compile(code, "README.md", "exec"), {})
    assert "The birthplace of" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["tell.py", "lightning_logs/version_0"])
    runpy.run_path(str(ROOT / "examples" / "tell.py"), run_name="__main__")
    assert capsys.readouterr().out.split("\n")[0] == "before"


def test_tensorboard_shows_the_runs_on_this_machine_alone(place):
    command = re.search(r"`(tensorboard --logdir lightning_logs[^`]*)`", README)[1]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    server = subprocess.Popen(
        [*command.split(), "--port", "0"],
        cwd=place,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        address = next(
            found[0] for line in server.stderr if (found := re.search(r"http://\S+", line))
        )
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


def test_every_target_that_the_readme_names_is_in_the_makefile():
    named = set(re.findall(r"`make (\w+)`", README))
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert named == targets - {"PHONY"}


def test_every_file_that_the_readme_names_is_there():
    named = set(
        re.findall(r"`((?:src|tests|configs|benchmarks|examples|docs)/[\w./]+)`", README)
    ) | set(re.findall(r"\]\(([\w./]+)\)", README))
    assert len(named) > 20
    assert not [name for name in named if not (ROOT / name).exists()]
