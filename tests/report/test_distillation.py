"""The report of a distillation: its numbers are those of `run.json`."""

import json
import re

from conftest import LAYERS, newest
from page_checks import check_self_contained

from dmt.cli.main import distill_main
from dmt.config import Config
from dmt.report import distillation
from dmt.report.distillation import format_percent
from dmt.training.run_dir import read_record, write_record


def test_the_page_shows_the_numbers_of_the_run(distill_args, tmp_path, capsys):
    assert distill_main([*distill_args, "stages.end_to_end_steps=6"]) == 0
    run_dir = newest(tmp_path)
    html, record = (run_dir / "report.html").read_text(encoding="utf-8"), read_record(run_dir)
    page = check_self_contained(html)
    scores = record["fidelity"]["text"]
    for number in (
        f"{scores['kl']:.4f}",
        f"{scores['student_perplexity']:.3f}",
        f"ratio {scores['ppl_ratio']:.4f}",
        format_percent(scores["top1_agreement"]),
    ):
        assert " ".join(number.split()) in page.words
    titles = (
        "Layer-wise stage",
        "End-to-end stage",
        "KL from the teacher while training",
        "Error of each layer",
    )
    assert [title for title in titles if title not in page.words] == []
    assert str(run_dir / "student") in page.words
    assert record["replay_command"] in page.words
    assert len(html) < 400_000

    tips = [" ".join(tip.split()) for tip in re.findall(r"<g [^>]*><title>(.*?)</title>", html)]
    errors = record["curves"]["val/fvu/layer_1"][1]
    assert f"layer 1, step 8: {errors[-1]:.4f}" in tips


def test_titles_name_settings_sizes_and_steps(distill_args, tmp_path):
    assert distill_main([*distill_args, "stages.end_to_end_steps=6"]) == 0
    page = check_self_contained((newest(tmp_path) / "report.html").read_text(encoding="utf-8"))
    title = page.words[: page.words.index("·")]
    assert title.startswith(f"{newest(tmp_path).name}: memory.mean_k=8, ")
    assert title.strip().endswith("more")
    assert f"{LAYERS} layers of 64 slots, " in page.words
    assert "4 layer-wise and 6 end-to-end steps" in page.words
    report = (newest(tmp_path) / "report.md").read_text(encoding="utf-8")
    assert report.startswith(f"# {newest(tmp_path).name}: memory.mean_k=8, ")


def test_console_and_files_show_the_same_rows(distill_args, tmp_path, capsys):
    assert distill_main(distill_args) == 0
    run_dir = newest(tmp_path)
    output = capsys.readouterr()
    printed = " ".join((output.out + output.err).split())
    assert str(run_dir / "report.html") in printed
    table = distillation.build_table(read_record(run_dir))
    report = (run_dir / "report.md").read_text(encoding="utf-8")
    page = check_self_contained((run_dir / "report.html").read_text(encoding="utf-8"))
    for row in table.rows:
        assert "| " + " | ".join((row.label, *row.cells)) + " |" in report
        for text in (row.label, *row.cells):
            assert text in page.words
            assert text in printed


def test_an_error_in_a_plot_costs_only_the_page(distill_args, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("no\nfonts")

    monkeypatch.setattr(distillation, "draw_plot", fail)
    assert distill_main(distill_args) == 0
    run_dir = newest(tmp_path)
    output = capsys.readouterr()
    assert "no report.html (RuntimeError: no fonts)" in output.out + output.err
    assert not list(run_dir.glob("report.html*"))
    assert "fidelity" in read_record(run_dir)
    assert "perplexity" in (run_dir / "report.md").read_text(encoding="utf-8")
    assert (run_dir / "student" / "model.safetensors").is_file()


def test_lists_of_numbers_are_written_on_one_line(tmp_path):
    results = {
        "curves": {"a": [[1, 2], [0.5, -1e-7]]},
        "texts": ["[\n 1\n]", "a"],
        "empty": [],
        "mixed": [1, "b"],
    }
    write_record(tmp_path, Config(), results)
    text = (tmp_path / "run.json").read_text()
    assert "[ 0.5, -1e-07 ]" in text
    assert {name: json.loads(text)[name] for name in results} == results
