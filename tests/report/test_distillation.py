"""report.html: one file that needs nothing else, and whose numbers are the run's."""

import json
import re
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO

import pytest
import torch
from conftest import LAYERS, newest
from PIL import Image
from transformers import AutoModelForCausalLM

from dmt import config_io
from dmt.cli.main import distill_main
from dmt.config import Config, FeaturalConfig
from dmt.data.windows import TextDataModule, select_first_windows
from dmt.evaluation.metrics import measure_fidelity
from dmt.evaluation.samples import (
    K_FACTORS,
    _split_spans,
    diff_tokens,
    paired_samples,
    sparsity_sweep,
)
from dmt.memory.sparsity_budget import initialize_threshold
from dmt.models.conversion import convert, get_featural_memories
from dmt.models.forward import forward_with_activations
from dmt.models.loading import load_teacher
from dmt.report import distillation
from dmt.report import distillation as pages
from dmt.report import html as whole
from dmt.report.compare import MAX_POINTS, read_curves
from dmt.report.html import HtmlTable, Page, Sample, draw_usage_maps
from dmt.report.svg import Series, draw_plot, format_tick, make_axis
from dmt.training.run_dir import read_record, write_record

VOID = {"meta", "img", "br"}


class Read(HTMLParser):
    """Tags with their attributes, the text, and whether what is opened is closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def names(self):
        return {tag for tag, _ in self.tags}


def check_alone(text):
    """Nothing is fetched, nothing runs, colours are the page's own, and nothing is named twice."""
    read = Read(text)
    assert not read.names() & {"script", "link", "iframe", "object", "embed", "form"}
    for tag, attributes in read.tags:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,")), (
                tag,
                attributes,
            )
    assert "@import" not in text
    assert set(re.findall(r"url\(([^)]?)", text)) <= {"#"}
    assert "prefers-color-scheme: dark" in text
    ids = [attributes["id"] for _, attributes in read.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    return read


@pytest.fixture
def run(words, tmp_path):
    assert distill_main(words) == 0
    return newest(tmp_path)


def test_a_run_ends_in_a_page_of_its_own_numbers(words, tmp_path, capsys):
    assert distill_main([*words, "stages.end_to_end_steps=6"]) == 0
    run = newest(tmp_path)
    assert str(run / "report.html") in capsys.readouterr().out
    text, record = (run / "report.html").read_text(encoding="utf-8"), read_record(run)
    read = check_alone(text)
    said = " ".join(" ".join(read.text).split())
    found = record["fidelity"]["text"]
    for number in (
        f"{found['kl']:.4f}",
        f"{found['student_perplexity']:.3f}",
        f"× {found['ppl_ratio']:.4f}",
        pages.format_percent(found["top1_agreement"]),
    ):
        assert " ".join(number.split()) in said
    titles = (
        "First stage",
        "Second stage",
        "Distance from the teacher while training",
        "Error of each layer",
        "What reading more",
    )
    assert [title for title in titles if title not in said] == []
    assert len([tag for tag, _ in read.tags if tag == "img"]) == LAYERS
    assert str(run / "student") in said
    assert record["replay"] in said
    assert len(text) < 400_000

    tips = [" ".join(tip.split()) for tip in re.findall(r"<g [^>]*><title>(.*?)</title>", text)]
    errors = record["curves"]["block_error/layer_1"][1]
    assert f"layer 1, step 8: {errors[-1]:.4f}" in tips
    budgets = record["budgets"]["points"]
    assert [point["factor"] for point in budgets] == list(K_FACTORS)
    assert all(
        any(f"KL {point['corpora']['text']['kl']:.4f}" in tip for tip in tips) for point in budgets
    )
    reads = [used["reads"] for used in record["slots"].values()]
    assert [
        sum(each) / used["tokens"]
        for each, used in zip(reads, record["slots"].values(), strict=True)
    ] == pytest.approx([used["read"] for used in record["slots"].values()])


def test_a_picture_that_fails_costs_nothing_else(words, tmp_path, monkeypatch, capsys):
    def fails(*_, **__):
        raise RuntimeError("no\nfonts")

    monkeypatch.setattr(pages, "draw_plot", fails)
    assert distill_main(words) == 0
    run = newest(tmp_path)
    assert "no report.html (RuntimeError: no fonts)" in capsys.readouterr().out
    assert not list(run.glob("report.html*"))
    assert "fidelity" in read_record(run)
    assert "ppl_ratio" in (run / "report.md").read_text(encoding="utf-8")
    assert (run / "student" / "model.safetensors").is_file()


def test_text_of_a_corpus_is_shown_and_not_obeyed(tmp_path):
    evil = "<script>alert(1)</script>\"'&amp;\x00\ud800"
    page = Page(
        evil, evil, evil, provenance=evil, notes=[evil], locations=[(evil, evil)], context=evil
    )
    page.tables = [HtmlTable(evil, (evil,), [whole.HtmlRow(evil, evil, (evil,))], evil)]
    page.cards = [whole.Card(evil, evil, evil)]
    page.samples = [Sample(evil, evil, [(evil, [(evil, True), (evil, False)])], evil)]
    page.plots = [
        draw_plot(evil, evil, evil, [Series(evil, [1, 2], [3, 4], tips=[evil, evil])], evil)
    ]
    whole.write_page(page, tmp_path / "page.html")
    read = check_alone((tmp_path / "page.html").read_bytes().decode())
    assert "".join(read.text).count("<script>alert(1)</script>\"'&amp;") >= 12


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "page.html"
    file.write_text("before")
    with pytest.raises(Exception, match="no attribute"):
        whole.write_page(Page("a", "b", "c", cards=["no card"]), file)
    assert file.read_text() == "before"

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(file), "replace", full)
    assert "no page.html (OSError" in whole.write_report_safely(lambda: Page("a", "b", "c"), file)
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


def test_plots_show_what_they_are_given():
    made = draw_plot(
        "a",
        "step",
        "b",
        [Series("one & two", [1, 10], [0.5, 0.25], ["x", "y"]), Series("", [1], [0.1])],
        log_axes="xy",
    )
    assert "one &amp; two" in made.picture
    places = re.findall(r'translate\(([\d.]+) ([\d.]+)\)"><title>(.)', made.picture)
    assert [tip for _, _, tip in places] == ["x", "y"]
    assert float(places[0][0]) < float(places[1][0]), "to the right is more"
    assert float(places[0][1]) < float(places[1][1]), "and up is more"
    assert 'class="point c1" transform' in made.picture, "a line of one point is a point"


def test_axes_have_round_numbers_and_room():
    for numbers, log, ticks in (
        ([0, 1_400], False, (0, 250, 500, 750, 1_000, 1_250)),
        ([0.031, 0.046], False, (0.0325, 0.035, 0.0375, 0.04, 0.0425, 0.045)),
        ([0.012, 0.3], True, (0.02, 0.05, 0.1, 0.2)),
        ([1e-7, 1], True, (1e-6, 1e-4, 0.01, 1)),
        ([0.0, 1.0], True, (0, 0.2, 0.4, 0.6, 0.8, 1)),  # nought has no logarithm: drawn as it is
        ([3, 3], False, None),
        ([0], False, None),
        ([-2, -2], False, None),
        ([5], True, None),
        ([1.30, 1.31], True, None),
    ):
        found = make_axis(numbers, log)
        assert ticks is None or found.ticks == pytest.approx(ticks), (numbers, found.ticks)
        assert len(found.ticks) >= 2
        assert all(0 < found.locate(number) < 1 for number in numbers)
        assert all(-0.01 <= found.locate(tick) <= 1.01 for tick in found.ticks)
    assert [format_tick(number) for number in (0, 0.05, 1_400, 20_000, 2.5e6, 1e-6)] == [
        "0",
        "0.05",
        "1400",
        "20k",
        "2.5M",
        "1e-06",
    ]


# Curves.


def test_curves_go_on_after_a_resume(tmp_path):
    (tmp_path / "metrics.before-20260101-000000.csv").write_text(
        "a,epoch,step\n1,0,0\n2,0,10\n3,0,20\nbroken"
    )
    (tmp_path / "metrics.csv").write_text("a,b,epoch,step\n2.5,,0,10\n3.5,nan,0,20\n,7,0,30\n\0")
    assert read_curves(tmp_path) == {"a": ([0, 10, 20], [1.0, 2.5, 3.5]), "b": ([30], [7.0])}
    assert read_curves(tmp_path / "nowhere") == {}


def test_long_curves_are_thinned_and_end_where_they_ended(tmp_path):
    (tmp_path / "metrics.csv").write_text(
        "a,step\n" + "".join(f"{step / 2},{step}\n" for step in range(1_000))
    )
    steps, values = read_curves(tmp_path)["a"]
    assert MAX_POINTS / 2 < len(steps) <= MAX_POINTS
    assert (steps[-1], values[-1]) == (999, 499.5)
    assert values == [step / 2 for step in steps]


def test_lists_of_numbers_have_a_line_each(tmp_path):
    results = {
        "curves": {"a": [[1, 2], [0.5, -1e-7]]},
        "texts": ["[\n 1\n]", "a"],
        "none": [],
        "mixed": [1, "b"],
    }
    write_record(tmp_path, Config(), results)
    text = (tmp_path / "run.json").read_text()
    assert "[ 0.5, -1e-07 ]" in text
    assert {name: json.loads(text)[name] for name in results} == results


# Slots.


@pytest.mark.parametrize(("slots", "expected"), [(512, (32, 16)), (3_072, (96, 32)), (70, (32, 3))])
def test_a_map_has_a_cell_for_each_slot(slots, expected):
    reads = list(range(slots))
    used = {
        "reads": reads,
        "reads_of": 1,
        "tokens": 10 * slots,
        "read": 4.0,
        "slots": slots,
        "dead": 1.0,
    }
    found = draw_usage_maps({str(layer): used for layer in range(12)})
    assert len(found) == 12
    assert (found[0].width, found[0].height) == expected
    assert len(found[0].bands) == expected[1]
    assert f"slot {slots - 1} for" in found[0].caption
    assert "1 never" in found[0].caption
    assert _cells(found[0])[:3] == [(116, 98, 214, 255), *_cells(found[0])[1:3]]
    opacity = [cell[3] for cell in _cells(found[0])[1:slots]]
    assert opacity == sorted(opacity)
    assert opacity[-1] == 255
    assert all(cell[3] == 0 for cell in _cells(found[0])[slots:])
    assert sum(len(each.picture) for each in found) < 200_000


def _cells(found):
    image = Image.open(BytesIO(b64decode(found.picture.partition(",")[2])))
    return [
        image.getpixel((at % image.width, at // image.width))
        for at in range(image.width * image.height)
    ]


def test_a_million_slots_are_added_up():
    reads = torch.zeros(1_000_000, dtype=torch.long)
    reads[999_999] = 5
    found = distillation.bin_slot_reads(reads)
    assert len(found["reads"]) <= distillation.MAX_USAGE_BINS
    assert sum(found["reads"]) == found["reads"][-1] == 5
    used = found | {"tokens": 10, "read": 1.0, "slots": 1_000_000, "dead": 999_999.0}
    found = draw_usage_maps({"0": used})[0]
    assert "the 245 slots from 999,845 on for" in found.caption
    assert "to 999,999: 5 reads" in found.bands[-1]


# Other budgets.


def _student(teacher, **memory):
    student, _ = convert(teacher, [replace(FeaturalConfig(k=8, mean_k=None), **memory)] * LAYERS)
    return student.eval()


@pytest.mark.parametrize(
    "memory",
    [
        {},
        {"k": "auto", "budget": 8},
        {"k": "auto", "budget": 8, "search": "int8"},
        {"search": "ivf"},
        {"k": 4, "heads": 2, "projections": True},
    ],
    ids=str,
)
def test_other_budgets_are_tried_and_taken_back(teacher, tokens, memory):
    student = _student(teacher, **memory)
    memories = get_featural_memories(student)
    given = forward_with_activations(student, tokens, capture_blocks=True).block_inputs
    initialize_threshold(memories.values(), [given[layer].flatten(0, -2) for layer in memories])
    for each in memories.values():
        each.count_reads()
        each.read_counts.fill_(7)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    own = measure_fidelity(student, teacher, tokens)
    for each in memories.values():
        each.read_counts.fill_(7)
    found = sparsity_sweep(student, teacher, {"a": tokens, "b": tokens[:1]}, tokens)
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())
    assert all(each.k == (4 if "heads" in memory else 8) for each in memories.values())
    assert all(each.read_counts.tolist() == [7] * each.num_slots for each in memories.values())
    assert found["tokens"] == 4 * 19
    points = {point["factor"]: point for point in found["points"]}
    assert list(points) == [
        factor for factor in K_FACTORS if "heads" not in memory or factor != 0.5
    ], "half of 4 is 2, as a quarter"
    assert points[1.0]["corpora"]["a"]["kl"] == pytest.approx(own.kl, rel=1e-6)
    read = [point["read"] for point in found["points"]]
    assert read == sorted(read)
    if "auto" not in str(memory):
        assert read == [point["k"] for point in found["points"]]
    else:
        assert points[4.0]["read"] == pytest.approx(32, rel=0.3), (
            "a threshold of its own for each budget"
        )
        assert points[0.25]["read"] == pytest.approx(2, rel=0.3)


def test_a_budget_of_everything_is_the_teacher(teacher, tokens):
    student = _student(teacher, k=16, linear=False)
    points = sparsity_sweep(student, teacher, {"a": tokens}, tokens)["points"]
    assert [point["k"] for point in points] == [4, 8, 16, 32, 64]
    assert points[-1]["corpora"]["a"]["kl"] == pytest.approx(0, abs=1e-5)
    assert points[0]["corpora"]["a"]["kl"] > points[2]["corpora"]["a"]["kl"] > 1e-3
    all_read = sparsity_sweep(_student(teacher, k=64), teacher, {"a": tokens}, tokens)["points"]
    assert [point["factor"] for point in all_read] == [0.25, 0.5, 1.0], (
        "more than all there are is nothing else"
    )


def test_what_is_saved_is_the_student_with_its_own_budget(run):
    """And what a saved student is measured to be afterwards is what its run says."""
    record = read_record(run)
    assert [point["factor"] for point in record["budgets"]["points"]] == list(K_FACTORS)
    student = AutoModelForCausalLM.from_pretrained(run / "student").eval()
    config = config_io.load_config(run / "config.yaml")
    teacher, tokenizer = load_teacher(config.teacher)
    data = TextDataModule(config, tokenizer, 1)
    data.setup()
    windows = select_first_windows(data.corpora[0].test, config.data.test_tokens)
    assert measure_fidelity(student, teacher, windows).kl == pytest.approx(
        record["fidelity"]["text"]["kl"], rel=1e-5
    )
    own = next(point for point in record["budgets"]["points"] if point["factor"] == 1)
    assert own["corpora"]["text"]["kl"] == pytest.approx(
        record["fidelity"]["text"]["kl"], rel=1e-5
    ), "so little text is all of it"


def test_a_teachers_own_training_ends_in_a_page(text_file, tmp_path, capsys):
    recipe = [
        "task=pretrain",
        f"data.corpora=[{text_file}]",
        f"trainer.log_dir={tmp_path / 'logs'}",
        "data.seq_len=16",
        "data.batch_size=4",
        "data.validation_tokens=32",
        "data.test_tokens=32",
        "pretrain.width=16",
        "pretrain.layers=2",
        "pretrain.heads=2",
        "pretrain.vocabulary=300",
        "pretrain.steps=4",
        "trainer.num_threads=1",
        "trainer.precision=32-true",
        "trainer.log_every=1",
        "trainer.accelerator=cpu",
        "trainer.validate_every=2",
        "trainer.progress_bar=false",
        f"pretrain.output={tmp_path / 'made'}",
    ]
    assert distill_main(recipe) == 0
    text = (newest(tmp_path) / "report.html").read_text(encoding="utf-8")
    check_alone(text)
    perplexity = read_record(newest(tmp_path))["fidelity"]["text"]["perplexity"]
    assert f"{perplexity:.3f}" in text
    assert "Training loss" in text
    assert "Perplexity on validation text, text" in text
    assert str(newest(tmp_path) / "report.html") in capsys.readouterr().out


# Continuations.


def test_what_differs_is_what_one_side_says_alone(student_of_another, teacher, tokenizer, tokens):
    assert diff_tokens([1, 2, 3, 4], [1, 9, 2, 3]) == (
        [False, False, False, True],
        [False, True, False, False],
    )
    assert diff_tokens([1, 2], [1, 2]) == ([False, False], [False, False])
    found = paired_samples(student_of_another, teacher, tokenizer, tokens)
    for each in found:
        assert (
            bool(each.differing)
            == any(alone for _, alone in each.student)
            == (each.teacher != each.student)
        )
        assert all(
            first[1] != second[1]
            for first, second in zip(each.student, each.student[1:], strict=False)
        )
    for each in paired_samples(teacher, teacher, tokenizer, tokens):
        assert each.differing == 0
        assert each.teacher == each.student
        assert not any(alone for _, alone in each.student)


@pytest.fixture
def student_of_another():
    from conftest import make_teacher

    return make_teacher(initializer_range=0.35)


def test_pieces_put_together_are_the_text(tokenizer):

    ids = tokenizer("häuser – 東京 and ☃")["input_ids"]
    marks = [number % 2 == 0 for number in range(len(ids))]
    pieces = _split_spans(tokenizer, ids, marks)
    assert (
        "".join(text for text, _ in pieces)
        == tokenizer.decode(ids, skip_special_tokens=True)
        == "häuser – 東京 and ☃"
    )
