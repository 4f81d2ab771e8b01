"""A teacher's answers kept on disk: what a record holds, what the loss makes of it, and when a cache is refused."""

import csv
import json
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_teacher, newest, weights

from dmt import config_io
from dmt.cli.main import distill_main
from dmt.config import Config, FeaturalConfig, LossConfig
from dmt.data.windows import StepSampler, TextDataModule
from dmt.distillation import logit_cache
from dmt.distillation.calibration import calibrate_memories
from dmt.distillation.logit_cache import (
    MIN_PROB,
    SparseDistribution,
    pack_record,
    record_dtype,
    sample_distribution,
    sampled_kl,
    unpack_records,
)
from dmt.distillation.losses import Batch, LossScales, compute_loss_terms, kl, sampled_kl_with_grad
from dmt.distillation.module import DistillationModule
from dmt.errors import UserError
from dmt.models.conversion import convert_blocks
from dmt.models.forward import forward_with_activations
from dmt.models.loading import load_teacher

FILE = logit_cache.CACHE_FILE


def sample(tokens, vocab_size, k, spread=4.0):
    """Distributions of random logits, sampled at random offsets."""
    offsets = torch.rand(tokens, 1, dtype=torch.float64)
    return sample_distribution(torch.randn(tokens, vocab_size) * spread, k, offsets)


def round_trip(distribution):
    """What a cache gives back for one window."""
    return unpack_records(pack_record(3, distribution)[None])


# --- records


@pytest.mark.parametrize(
    ("vocab_size", "k"), [(50_257, 128), (2_048, 128), (300, 16), (128, 128), (1_000, 37)]
)
@pytest.mark.parametrize("spread", [0.01, 4.0, 60.0])  # flat, as a model's, nearly one-hot
def test_a_record_keeps_ids_exactly_and_probabilities_nearly(vocab_size, k, spread):
    original = sample(20, vocab_size, k, spread)
    restored = round_trip(original)
    assert torch.equal(restored.ids, original.ids)
    torch.testing.assert_close(restored.weights.sum(-1), torch.ones(20))
    shift = restored.log_probs - original.log_probs
    assert (shift.abs() <= 1e-3 * (1 + original.log_probs.abs())).all()
    torch.testing.assert_close(restored.threshold, original.threshold, rtol=1e-2, atol=1e-7)
    assert ((original.log_probs.exp() * shift.abs()).sum(-1) < 2e-3).all()


def test_a_record_takes_six_bytes_an_outcome():
    assert record_dtype(1, 128).itemsize == 6 * 128 + 4 + 16


def test_ids_at_both_ends_of_the_vocabulary_survive():
    ids = torch.stack([torch.arange(16), torch.arange(50_241, 50_257), torch.arange(16) * 3_350])
    log_probs = torch.full((3, 16), 1 / 32).log()
    restored = round_trip(SparseDistribution(ids, log_probs, torch.full((3, 1), 1 / 16)))
    assert torch.equal(restored.ids, ids)
    torch.testing.assert_close(restored.threshold, torch.full((3, 1), 1 / 16))
    torch.testing.assert_close(restored.log_probs, log_probs, atol=2e-3, rtol=0)


@pytest.mark.parametrize("spread", [0.01, 4.0, 60.0])
def test_what_is_taken_is_the_likeliest_and_a_fair_sample_of_the_rest(spread):
    logits = (torch.randn(1, 60) * spread).expand(4_000, 60)
    found = sample_distribution(logits, 16, torch.arange(4_000).double().div(4_000).unsqueeze(-1))
    p = torch.softmax(logits[0].double(), -1).clamp(min=MIN_PROB)
    met = torch.bincount(found.ids.flatten(), minlength=60) / 4_000
    chance = (p / found.threshold[0]).clamp(max=1)
    assert chance.sum() == pytest.approx(16, abs=1e-3)
    torch.testing.assert_close(met.double(), chance, atol=2e-3, rtol=0)
    counted = torch.zeros(60).index_add(0, found.ids.flatten(), found.weights.flatten()) / 4_000
    torch.testing.assert_close(counted.double(), p, atol=1e-3, rtol=0)


# --- the loss ---------------------------------------------------------------------------------------------------------


def far(teacher, by):
    return teacher + by * torch.randn_like(teacher)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("by", [0.3, 1.5])
def test_value_and_gradient_are_right_on_average(by, temperature):
    teacher, tries = torch.randn(1, 200) * 3, 4_000
    student = far(teacher, by).requires_grad_()
    full = kl(student, teacher, temperature)
    (wanted,) = torch.autograd.grad(full.sum(), student)
    places = torch.arange(tries).double().div(tries).unsqueeze(-1)
    records = sample_distribution(teacher.expand(tries, 200) / temperature, 32, places)
    many = student.detach().expand(tries, 200).clone().requires_grad_()
    values = sampled_kl(many, records, temperature)
    (slopes,) = torch.autograd.grad(values.sum(), many)
    assert values.mean().item() == pytest.approx(full.item(), rel=2e-3)
    torch.testing.assert_close(
        slopes.mean(0, keepdim=True), wanted, atol=2e-3 * wanted.abs().max().item() + 1e-6, rtol=0
    )


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_slope_is_the_gradient(temperature, dtype):
    records = round_trip(sample(12, 300, 32))
    student = (torch.randn(12, 300) * 3).to(dtype).requires_grad_()
    value = sampled_kl(student, records, temperature)
    (wanted,) = torch.autograd.grad(value.sum(), student)
    mine, slope = sampled_kl_with_grad(
        student.detach().clone(), records, torch.zeros(12), temperature
    )
    torch.testing.assert_close(mine, value)
    torch.testing.assert_close(
        slope.to(dtype), wanted, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-5
    )


def test_with_every_outcome_kept_it_is_the_kl():
    teacher = torch.randn(9, 40) * 2
    student = far(teacher, 0.5)
    records = sample_distribution(teacher, 40, torch.rand(9, 1))
    torch.testing.assert_close(sampled_kl(student, records), kl(student, teacher))


def test_a_student_that_is_the_teacher_costs_nothing_and_is_left_alone():
    teacher = (torch.randn(9, 400) * 2).requires_grad_()
    value = sampled_kl(teacher, sample_distribution(teacher.detach(), 32, torch.rand(9, 1)))
    torch.testing.assert_close(value, torch.zeros(9), atol=1e-5, rtol=0)
    (slope,) = torch.autograd.grad(value.sum(), teacher)
    assert slope.abs().max() < 1e-6


@pytest.mark.parametrize("terms", [{"kl": 1}, {"kl": 1, "ce": 0.3}])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunks_change_neither_value_nor_gradient(tokens, chunk, terms):
    student = make_teacher(300, initializer_range=0.3).requires_grad_(True)
    records, mask = sample(60, 300, 32), torch.ones_like(tokens)
    mask[0, 4:] = 0
    found = []
    for each in (0, chunk):
        chosen = LossConfig(
            **({"hidden_mse": 0, "block_fvu": 0, "temperature": 2.0} | terms), chunk_size=each
        )
        scales = LossScales(torch.ones(3), torch.ones(()))
        told = compute_loss_terms(
            forward_with_activations(student, tokens, mask),
            records,
            Batch.full_step(tokens, mask),
            chosen,
            scales,
        )
        assert set(told) == set(terms)
        total = 3 * sum(getattr(chosen, name) * value for name, value in told.items())
        found.append(
            (
                total.detach(),
                torch.autograd.grad(total, list(student.parameters()), materialize_grads=True),
            )
        )
    torch.testing.assert_close(found[0][0], found[1][0])
    for mine, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def prose():
    """The embedded teacher, eight windows of prose, and its logits there."""
    teacher, tokenizer = load_teacher("embedded")
    config = replace(Config(), data=replace(Config().data, corpora=["speeches"]))
    data = TextDataModule(config, tokenizer, 1)
    data.setup()
    return teacher, data.calibration_windows(8_192), data.corpora[0].train[100:108]


@pytest.mark.parametrize(("budget", "near"), [(60, 0.04), (8, 0.5)])
def test_it_agrees_with_the_live_teacher_on_prose(prose, budget, near):
    teacher, calibration, windows = prose
    student, _ = convert_blocks(teacher, [FeaturalConfig(mean_k=budget)] * 4)
    calibrate_memories(student, teacher, calibration)
    with torch.no_grad():
        live, mine = (model(windows).logits.flatten(0, 1) for model in (teacher, student.eval()))
    full = kl(mine, live).mean().item()
    assert near / 1.6 < full < near * 1.6
    records = round_trip(sample_distribution(live, 128, torch.rand(len(live), 1)))
    assert sampled_kl(mine, records).mean().item() == pytest.approx(full, abs=1e-3)
    mine.requires_grad_()
    (wanted,) = torch.autograd.grad(kl(mine, live).mean(), mine)
    (found,) = torch.autograd.grad(sampled_kl(mine, records).mean(), mine)
    assert (found - wanted).norm() < 0.12 * wanted.norm()


# --- the file ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path):
    return tmp_path / "kept"


@pytest.fixture
def kept(words, place):
    """The words of a small run with a cache."""
    return [
        *words,
        f"logit_cache.dir={place}",
        "logit_cache.top_k=32",
        "loss.hidden_mse=0",
        "loss.block_fvu=0",
    ]


@pytest.fixture
def no_teacher(monkeypatch):
    """In the end-to-end stage nobody may ask the teacher, but to validate."""
    original = DistillationModule.end_to_end_loss

    def alone(self, batch):
        with monkeypatch.context() as patch:
            patch.setattr(
                "dmt.distillation.module.forward_teacher",
                lambda *_, **__: pytest.fail("the teacher was asked"),
            )
            return original(self, batch)

    monkeypatch.setattr(DistillationModule, "end_to_end_loss", alone)


def same(first, second):
    return all(torch.equal(value, weights(second)[name]) for name, value in weights(first).items())


def test_a_run_writes_its_cache_once_and_a_second_reads_it(
    kept, place, tmp_path, capsys, no_teacher, monkeypatch
):
    assert distill_main(kept) == 0
    first = newest(tmp_path)
    assert {file.name for file in place.iterdir()} == {FILE, logit_cache.METADATA_FILE}
    monkeypatch.setattr(
        logit_cache, "sample_distribution", lambda *_: pytest.fail("it was written already")
    )
    assert distill_main(kept) == 0
    assert same(first, newest(tmp_path))
    assert distill_main([*kept, "stages.end_to_end_steps=3"]) == 0, (
        "a shorter run reads fewer of the windows"
    )


@pytest.mark.parametrize("chunk", [0, 5])
def test_micro_batches_change_nothing(kept, tmp_path, chunk):
    found = []
    for pieces in (4, 2, 1):
        assert (
            distill_main(
                [
                    *kept,
                    f"data.micro_batch_size={pieces}",
                    f"loss.chunk_size={chunk}",
                    "memory.k=64",
                    "memory.mean_k=",
                ]
            )
            == 0
        )
        with (newest(tmp_path) / "metrics.csv").open() as file:
            found.append(
                [float(row["train/kl"]) for row in csv.DictReader(file) if row.get("train/kl")]
            )
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert found[0] == pytest.approx(found[2], rel=1e-3)


def test_the_file_is_an_array_that_numpy_reads(kept, place):
    assert distill_main(kept) == 0
    records = np.load(place / FILE)
    assert records["ids"].shape == (20, 16, 32)
    assert records["log_probs"].dtype == np.float16
    assert (np.diff(records["window_id"]) > 0).all()
    metadata = json.loads((place / logit_cache.METADATA_FILE).read_text())
    assert (metadata["top_k"], metadata["version"]) == (32, logit_cache.FORMAT_VERSION)


def test_the_end_to_end_stage_learns_nearly_the_same_as_from_the_live_teacher(
    kept, words, tmp_path
):
    assert distill_main([*kept, "logit_cache.top_k=300"]) == 0  # of a vocabulary of 300
    assert distill_main([*words, "loss.hidden_mse=0", "loss.block_fvu=0"]) == 0
    live, whole = weights(newest(tmp_path)), weights(tmp_path / "logs" / "version_0")
    for name, value in live.items():
        torch.testing.assert_close(value, whole[name], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_each_window_is_answered_by_its_own_records(teacher, tmp_path, temperature):
    windows = torch.randint(1, 300, (9, 16))
    config = replace(
        Config(),
        data=replace(Config().data, seq_len=16),
        logit_cache=replace(Config().logit_cache, dir=str(tmp_path), top_k=300),
    )
    config = replace(
        config,
        trainer=replace(config.trainer, progress_bar=False),
        loss=LossConfig(temperature=temperature),
    )
    cache = logit_cache.open_logit_cache(config, teacher, windows, [1, 2, 5, 8])
    asked = torch.tensor([8, 1, 5])
    found = cache.read(asked)
    logits = teacher(windows[asked]).logits.flatten(0, 1) / temperature
    dense = torch.zeros_like(logits).scatter_(-1, found.ids, found.log_probs.exp())
    torch.testing.assert_close(dense, torch.softmax(logits, -1), atol=0.02, rtol=0.2)
    assert kl(dense.log(), logits).max() < 1e-3


def test_windows_are_those_the_sampler_will_read(kept, teacher, tokenizer):
    config = config_io.load_config(None, kept)
    data = TextDataModule(config, tokenizer, 9)
    data.setup()
    sizes = [len(corpus.train) for corpus in data.corpora]
    read = [
        number
        for batch in list(StepSampler(sizes, data.mixture_weights, 4, 9, config.seed))[4:]
        for number in batch
    ]
    assert data.window_indices_from(4) == sorted(set(read))
    tokens, numbers = next(iter(data.train_dataloader()))
    assert torch.equal(data.training_dataset().windows[numbers], tokens)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["logit_cache.top_k=64"], "logit_cache.top_k (32 in the cache, 64 in this run)"),
        (["loss.temperature=2"], "loss.temperature (1.0 in the cache, 2.0 in this run)"),
        (["data.seq_len=8"], "data.seq_len (16 in the cache, 8 in this run)"),
        (["seed=1"], "was made from other training windows: data.corpora, seed or the tokenizer differ"),
        (["stages.end_to_end_steps=9"], "of the 36 windows that this run reads"),
    ],
)
def test_a_cache_of_something_else_is_refused_in_one_line(
    kept, place, tmp_path, capsys, change, said
):
    assert distill_main(kept) == 0
    before = (place / FILE).read_bytes()
    capsys.readouterr()
    assert distill_main([*kept, *change]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert said in line
    assert f"name another logit_cache.dir or delete {place / FILE}" in line
    assert (place / FILE).read_bytes() == before
    assert newest(tmp_path).name == "version_0", "refused before a folder is made"


def test_another_teacher_or_text_is_refused(
    kept, place, tmp_path, teacher, tokenizer, text_file, capsys
):
    assert distill_main(kept) == 0
    with torch.no_grad():
        teacher.transformer.h[0].attn.c_attn.bias[0] += 1e-3
    teacher.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    assert distill_main([*kept, f"teacher={tmp_path / 'other'}"]) == 2
    assert "the teacher's weights differ" in capsys.readouterr().err.splitlines()[-1]
    text_file.write_text(text_file.read_text().replace("fox", "cat"))
    assert distill_main(kept) == 2
    assert "other training windows" in capsys.readouterr().err.splitlines()[-1]


def damage(path, how):
    """Damage the array, whose first record begins where numpy says."""
    records = np.load(path, mmap_mode="r")
    first, names = records.offset, records.dtype.fields
    content = bytearray(path.read_bytes())
    if how == "cut":
        content = content[:-1]
    elif how == "longer":
        content += b"x"
    elif how == "record":
        content[-500] ^= 1
    elif how == "header":
        content[20] ^= 255
    elif how == "window_id":
        content[first + names["window_id"][1] + 7] ^= 128
    elif how == "checksum":
        content[first + names["checksum"][1]] ^= 1
    elif how == "empty":
        content = b""
    path.write_bytes(content)


@pytest.mark.parametrize(
    "how", ["cut", "longer", "record", "header", "window_id", "checksum", "empty"]
)
def test_a_damaged_file_is_refused_before_training(kept, place, tmp_path, capsys, how):
    assert distill_main([*kept, "stages.end_to_end_steps=5"]) == 0
    damage(place / FILE, how)
    assert distill_main(kept) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"logit_cache.dir={place}" in line
    assert "damaged" in line
    assert newest(tmp_path).name == "version_0"


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_damaged_metadata_is_refused(kept, place, capsys, content):
    assert distill_main(kept) == 0
    (place / logit_cache.METADATA_FILE).write_text(content)
    assert distill_main(kept) == 2
    assert "damaged" in capsys.readouterr().err.splitlines()[-1]


def test_a_file_of_another_format_is_refused_by_its_version(kept, place, capsys, monkeypatch):
    monkeypatch.setattr(logit_cache, "FORMAT_VERSION", 0)
    assert distill_main(kept) == 0
    monkeypatch.undo()
    assert distill_main(kept) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "the format version (0 in the cache, 2 in this run) differ" in line


def test_an_interrupted_writing_leaves_nothing_that_is_used(kept, place, tmp_path, monkeypatch):
    original, calls = logit_cache._sample_window, []

    def stopped(*given):
        calls.append(given)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*given)

    monkeypatch.setattr(logit_cache, "_sample_window", stopped)
    assert distill_main(kept) == 128 + signal.SIGTERM
    assert not (place / FILE).exists()
    (place / f"{FILE}.1.partial").write_bytes(b"what a process that was killed left behind")
    monkeypatch.setattr(logit_cache, "_sample_window", original)
    assert distill_main(kept) == 0
    interrupted = (place / FILE).read_bytes()
    shutil.rmtree(place)
    assert distill_main(kept) == 0
    assert (place / FILE).read_bytes() == interrupted
    assert same(newest(tmp_path), tmp_path / "logs" / "version_0")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("stop_at", [2, 6])
def test_a_stopped_run_goes_on_with_its_cache(kept, place, tmp_path, monkeypatch, stop_at, lost):
    assert distill_main(kept) == 0
    whole = newest(tmp_path)
    original = DistillationModule.training_step

    def interrupted(self, given, batch_idx):
        if self.global_step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, given, batch_idx)

    monkeypatch.setattr(DistillationModule, "training_step", interrupted)
    assert distill_main(kept) == 128 + signal.SIGTERM
    monkeypatch.setattr(DistillationModule, "training_step", original)
    if lost:
        shutil.rmtree(place)
    assert distill_main(["--resume", str(newest(tmp_path))]) == 0
    assert same(whole, newest(tmp_path))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_no_room_on_the_disk_is_said_before_anything_is_written(kept, place, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    assert distill_main(kept) == 2
    assert "0.0 GB free" in capsys.readouterr().err.splitlines()[-1]
    assert not (place / FILE).exists()


def test_a_place_that_cannot_be_a_folder_is_refused(kept, place, capsys):
    place.write_text("a file")
    assert distill_main(kept) == 2
    assert f"logit_cache.dir={place} cannot be written" in capsys.readouterr().err.splitlines()[-1]


# --- settings that contradict a cache ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            [],
            "loss.hidden_mse and loss.block_fvu need more of the teacher than logit_cache.dir=kept keeps; set loss.hidden_mse=0 loss.block_fvu=0,",
        ),
        (
            ["loss.hidden_mse=0"],
            "loss.block_fvu needs more of the teacher than logit_cache.dir=kept keeps; set loss.block_fvu=0,",
        ),
        *(
            (
                ["loss.hidden_mse=0", "loss.block_fvu=0", f"loss.{term}=0.5"],
                f"loss.{term} needs more of the teacher",
            )
            for term in ("reverse_kl", "hidden_cosine")
        ),
        (
            ["loss.hidden_mse=0", "loss.block_fvu=0", "loss.kl=0", "loss.ce=1"],
            "serves loss.kl in the end-to-end stage, got loss.kl=0",
        ),
        (
            ["loss.hidden_mse=0", "loss.block_fvu=0", "stages.end_to_end_steps=0"],
            "got stages.end_to_end_steps=0",
        ),
        (
            ["loss.hidden_mse=0", "loss.block_fvu=0", "memory.kind=associative"],
            "memory.kind=associative learns from the teacher's hidden states",
        ),
        (
            [
                "loss.hidden_mse=0",
                "loss.block_fvu=0",
                "student.layer_overrides=[{layers: last, memory: {kind: associative}}]",
            ],
            "memory.kind=associative learns from",
        ),
        (
            ["loss.hidden_mse=0", "loss.block_fvu=0", "logit_cache.top_k=15"],
            "logit_cache.top_k must be at least 16, got 15",
        ),
    ],
)
def test_what_a_cache_cannot_serve_is_refused_with_both_names(words, said):
    with pytest.raises(UserError) as refused:
        config_io.load_config(None, ["logit_cache.dir=kept", *words])
    message = str(refused.value)
    assert said in message
    assert "logit_cache.dir" in message or "logit_cache.top_k" in message
    assert "\n" not in message


def test_more_outcomes_than_the_vocabulary_has_are_refused(kept, capsys):
    assert distill_main([*kept, "logit_cache.top_k=301"]) == 2
    assert (
        "logit_cache.top_k must be in [16, 300], the vocabulary of this teacher, got 301"
        in capsys.readouterr().err.splitlines()[-1]
    )
