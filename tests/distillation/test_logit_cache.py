"""The logit cache: records, the sampled loss, files, and settings that contradict a cache."""

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
from dmt.models.calibration import calibrate_memories
from dmt.models.conversion import convert_blocks
from dmt.models.forward import forward_with_activations
from dmt.models.loading import load_teacher

FILE = logit_cache.CACHE_FILE


def sample(tokens, vocab_size, k, spread=4.0):
    """Distributions of random logits, sampled at random offsets."""
    offsets = torch.rand(tokens, 1, dtype=torch.float64)
    return sample_distribution(torch.randn(tokens, vocab_size) * spread, k, offsets)


def round_trip(distribution):
    """Pack and unpack the distributions of one window."""
    return unpack_records(pack_record(3, distribution)[None])


# --- records


@pytest.mark.parametrize(
    ("vocab_size", "k"), [(50_257, 128), (2_048, 128), (300, 16), (128, 128), (1_000, 37)]
)
@pytest.mark.parametrize("spread", [0.01, 4.0, 60.0])  # flat, as a model's, nearly one-hot
def test_records_have_exact_ids_and_close_probabilities(vocab_size, k, spread):
    original = sample(20, vocab_size, k, spread)
    restored = round_trip(original)
    assert torch.equal(restored.ids, original.ids)
    torch.testing.assert_close(restored.weights.sum(-1), torch.ones(20))
    shift = restored.log_probs - original.log_probs
    assert (shift.abs() <= 1e-3 * (1 + original.log_probs.abs())).all()
    torch.testing.assert_close(restored.threshold, original.threshold, rtol=1e-2, atol=1e-7)
    assert ((original.log_probs.exp() * shift.abs()).sum(-1) < 2e-3).all()


def test_a_record_takes_six_bytes_per_outcome():
    assert record_dtype(1, 128).itemsize == 6 * 128 + 4 + 16


def test_ids_at_both_ends_of_the_vocabulary_are_restored():
    ids = torch.stack([torch.arange(16), torch.arange(50_241, 50_257), torch.arange(16) * 3_350])
    log_probs = torch.full((3, 16), 1 / 32).log()
    restored = round_trip(SparseDistribution(ids, log_probs, torch.full((3, 1), 1 / 16)))
    assert torch.equal(restored.ids, ids)
    torch.testing.assert_close(restored.threshold, torch.full((3, 1), 1 / 16))
    torch.testing.assert_close(restored.log_probs, log_probs, atol=2e-3, rtol=0)


@pytest.mark.parametrize("spread", [0.01, 4.0, 60.0])
def test_samples_have_the_likeliest_outcomes_and_an_unbiased_sample_of_the_rest(spread):
    logits = (torch.randn(1, 60) * spread).expand(4_000, 60)
    samples = sample_distribution(logits, 16, torch.arange(4_000).double().div(4_000).unsqueeze(-1))
    p = torch.softmax(logits[0].double(), -1).clamp(min=MIN_PROB)
    frequency = torch.bincount(samples.ids.flatten(), minlength=60) / 4_000
    chance = (p / samples.threshold[0]).clamp(max=1)
    assert chance.sum() == pytest.approx(16, abs=1e-3)
    torch.testing.assert_close(frequency.double(), chance, atol=2e-3, rtol=0)
    counted = torch.zeros(60).index_add(0, samples.ids.flatten(), samples.weights.flatten()) / 4_000
    torch.testing.assert_close(counted.double(), p, atol=1e-3, rtol=0)


# --- the loss


def perturb(teacher, scale):
    return teacher + scale * torch.randn_like(teacher)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("scale", [0.3, 1.5])
def test_value_and_gradient_are_unbiased(scale, temperature):
    teacher, num_samples = torch.randn(1, 200) * 3, 4_000
    student = perturb(teacher, scale).requires_grad_()
    full = kl(student, teacher, temperature)
    (expected_grad,) = torch.autograd.grad(full.sum(), student)
    offsets = torch.arange(num_samples).double().div(num_samples).unsqueeze(-1)
    records = sample_distribution(teacher.expand(num_samples, 200) / temperature, 32, offsets)
    repeated = student.detach().expand(num_samples, 200).clone().requires_grad_()
    values = sampled_kl(repeated, records, temperature)
    (grads,) = torch.autograd.grad(values.sum(), repeated)
    assert values.mean().item() == pytest.approx(full.item(), rel=2e-3)
    torch.testing.assert_close(
        grads.mean(0, keepdim=True),
        expected_grad,
        atol=2e-3 * expected_grad.abs().max().item() + 1e-6,
        rtol=0,
    )


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_analytic_gradient_equals_autograd(temperature, dtype):
    records = round_trip(sample(12, 300, 32))
    student = (torch.randn(12, 300) * 3).to(dtype).requires_grad_()
    value = sampled_kl(student, records, temperature)
    (expected_grad,) = torch.autograd.grad(value.sum(), student)
    value_with_grad, grad = sampled_kl_with_grad(
        student.detach().clone(), records, torch.zeros(12), temperature
    )
    torch.testing.assert_close(value_with_grad, value)
    torch.testing.assert_close(
        grad.to(dtype), expected_grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-5
    )


def test_with_all_outcomes_the_loss_is_the_kl():
    teacher = torch.randn(9, 40) * 2
    student = perturb(teacher, 0.5)
    records = sample_distribution(teacher, 40, torch.rand(9, 1))
    torch.testing.assert_close(sampled_kl(student, records), kl(student, teacher))


def test_loss_and_gradient_are_zero_for_a_student_that_equals_the_teacher():
    teacher = (torch.randn(9, 400) * 2).requires_grad_()
    value = sampled_kl(teacher, sample_distribution(teacher.detach(), 32, torch.rand(9, 1)))
    torch.testing.assert_close(value, torch.zeros(9), atol=1e-5, rtol=0)
    (grad,) = torch.autograd.grad(value.sum(), teacher)
    assert grad.abs().max() < 1e-6


@pytest.mark.parametrize("terms", [{"kl": 1}, {"kl": 1, "ce": 0.3}])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunks_change_neither_value_nor_gradient(tokens, chunk, terms):
    student = make_teacher(300, initializer_range=0.3).requires_grad_(True)
    records, mask = sample(60, 300, 32), torch.ones_like(tokens)
    mask[0, 4:] = 0
    results = []
    for chunk_size in (0, chunk):
        config = LossConfig(
            **({"hidden_mse": 0, "block_fvu": 0, "temperature": 2.0} | terms), chunk_size=chunk_size
        )
        scales = LossScales(torch.ones(3), torch.ones(()))
        terms_by_name = compute_loss_terms(
            forward_with_activations(student, tokens, mask),
            records,
            Batch.full_step(tokens, mask),
            config,
            scales,
        )
        assert set(terms_by_name) == set(terms)
        total = 3 * sum(getattr(config, name) * value for name, value in terms_by_name.items())
        results.append(
            (
                total.detach(),
                torch.autograd.grad(total, list(student.parameters()), materialize_grads=True),
            )
        )
    torch.testing.assert_close(results[0][0], results[1][0])
    for actual, expected in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def prose():
    """The embedded teacher, windows for calibration, and eight windows of training text."""
    teacher, tokenizer = load_teacher("embedded")
    config = replace(Config(), data=replace(Config().data, corpora=["speeches"]))
    data = TextDataModule(config, tokenizer, 1)
    data.setup()
    return teacher, data.calibration_windows(8_192), data.corpora[0].train[100:108]


@pytest.mark.parametrize(("budget", "expected_kl"), [(60, 0.04), (8, 0.5)])
def test_the_sampled_loss_is_close_to_the_live_kl_on_prose(prose, budget, expected_kl):
    teacher, calibration, windows = prose
    student, _ = convert_blocks(teacher, [FeaturalConfig(mean_k=budget)] * 4)
    calibrate_memories(student, teacher, calibration)
    with torch.no_grad():
        teacher_logits, student_logits = (
            model(windows).logits.flatten(0, 1) for model in (teacher, student.eval())
        )
    full = kl(student_logits, teacher_logits).mean().item()
    assert expected_kl / 1.6 < full < expected_kl * 1.6
    records = round_trip(
        sample_distribution(teacher_logits, 128, torch.rand(len(teacher_logits), 1))
    )
    assert sampled_kl(student_logits, records).mean().item() == pytest.approx(full, abs=1e-3)
    student_logits.requires_grad_()
    (expected_grad,) = torch.autograd.grad(
        kl(student_logits, teacher_logits).mean(), student_logits
    )
    (grad,) = torch.autograd.grad(sampled_kl(student_logits, records).mean(), student_logits)
    assert (grad - expected_grad).norm() < 0.12 * expected_grad.norm()


# --- the file


@pytest.fixture
def cache_dir(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def cache_args(distill_args, cache_dir):
    """Arguments of a small run with a cache."""
    return [
        *distill_args,
        f"logit_cache.dir={cache_dir}",
        "logit_cache.top_k=32",
        "loss.hidden_mse=0",
        "loss.block_fvu=0",
    ]


@pytest.fixture
def no_teacher(monkeypatch):
    """Let the test fail if the end-to-end stage runs the teacher; validation may."""
    original = DistillationModule.end_to_end_loss

    def end_to_end_loss(self, batch):
        with monkeypatch.context() as patch:
            patch.setattr(
                "dmt.distillation.module.forward_teacher",
                lambda *_, **__: pytest.fail("the teacher was run"),
            )
            return original(self, batch)

    monkeypatch.setattr(DistillationModule, "end_to_end_loss", end_to_end_loss)


def have_equal_weights(first, second):
    return all(torch.equal(value, weights(second)[name]) for name, value in weights(first).items())


def test_a_run_writes_its_cache_once_and_a_second_reads_it(
    cache_args, cache_dir, tmp_path, capsys, no_teacher, monkeypatch
):
    assert distill_main(cache_args) == 0
    first = newest(tmp_path)
    assert {file.name for file in cache_dir.iterdir()} == {FILE, logit_cache.METADATA_FILE}
    monkeypatch.setattr(
        logit_cache, "sample_distribution", lambda *_: pytest.fail("it was written already")
    )
    assert distill_main(cache_args) == 0
    assert have_equal_weights(first, newest(tmp_path))
    assert distill_main([*cache_args, "stages.end_to_end_steps=3"]) == 0, (
        "a shorter run reads fewer of the windows"
    )


@pytest.mark.parametrize("chunk", [0, 5])
def test_micro_batches_change_nothing(cache_args, tmp_path, chunk):
    kls = []
    for micro_batch_size in (4, 2, 1):
        assert (
            distill_main(
                [
                    *cache_args,
                    f"data.micro_batch_size={micro_batch_size}",
                    f"loss.chunk_size={chunk}",
                    "memory.k=64",
                    "memory.mean_k=",
                ]
            )
            == 0
        )
        with (newest(tmp_path) / "metrics.csv").open() as file:
            kls.append(
                [float(row["train/kl"]) for row in csv.DictReader(file) if row.get("train/kl")]
            )
    assert kls[0] == pytest.approx(kls[1], rel=1e-3)
    assert kls[0] == pytest.approx(kls[2], rel=1e-3)


def test_numpy_reads_the_file(cache_args, cache_dir):
    assert distill_main(cache_args) == 0
    records = np.load(cache_dir / FILE)
    assert records["ids"].shape == (20, 16, 32)
    assert records["log_probs"].dtype == np.float16
    assert (np.diff(records["window_id"]) > 0).all()
    metadata = json.loads((cache_dir / logit_cache.METADATA_FILE).read_text())
    assert (metadata["top_k"], metadata["version"]) == (32, logit_cache.FORMAT_VERSION)


def test_training_from_a_cache_of_all_outcomes_is_close_to_the_live_teacher(
    cache_args, distill_args, tmp_path
):
    assert distill_main([*cache_args, "logit_cache.top_k=300"]) == 0  # of a vocabulary of 300
    assert distill_main([*distill_args, "loss.hidden_mse=0", "loss.block_fvu=0"]) == 0
    live, cached = weights(newest(tmp_path)), weights(tmp_path / "logs" / "version_0")
    for name, value in live.items():
        torch.testing.assert_close(value, cached[name], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_windows_have_their_own_records(teacher, tmp_path, temperature):
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
    indices = torch.tensor([8, 1, 5])
    records = cache.read(indices)
    logits = teacher(windows[indices]).logits.flatten(0, 1) / temperature
    dense = torch.zeros_like(logits).scatter_(-1, records.ids, records.log_probs.exp())
    torch.testing.assert_close(dense, torch.softmax(logits, -1), atol=0.02, rtol=0.2)
    assert kl(dense.log(), logits).max() < 1e-3


def test_cached_windows_are_those_of_the_sampler(cache_args, teacher, tokenizer):
    config = config_io.load_config(None, cache_args)
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
    ("change", "message"),
    [
        (["logit_cache.top_k=64"], "logit_cache.top_k (32 in the cache, 64 in this run)"),
        (["loss.temperature=2"], "loss.temperature (1.0 in the cache, 2.0 in this run)"),
        (["data.seq_len=8"], "data.seq_len (16 in the cache, 8 in this run)"),
        (
            ["seed=1"],
            "was made from other training windows: data.corpora, seed or the tokenizer differ",
        ),
        (["stages.end_to_end_steps=9"], "of the 36 windows that this run reads"),
    ],
)
def test_a_cache_of_other_settings_is_refused_in_one_line(
    cache_args, cache_dir, tmp_path, capsys, change, message
):
    assert distill_main(cache_args) == 0
    before = (cache_dir / FILE).read_bytes()
    capsys.readouterr()
    assert distill_main([*cache_args, *change]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert message in line
    assert f"name another logit_cache.dir or delete {cache_dir / FILE}" in line
    assert (cache_dir / FILE).read_bytes() == before
    assert newest(tmp_path).name == "version_0", "refused before a folder is made"


def test_another_teacher_or_text_is_refused(
    cache_args, cache_dir, tmp_path, teacher, tokenizer, text_file, capsys
):
    assert distill_main(cache_args) == 0
    with torch.no_grad():
        teacher.transformer.h[0].attn.c_attn.bias[0] += 1e-3
    teacher.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    assert distill_main([*cache_args, f"teacher={tmp_path / 'other'}"]) == 2
    assert "the teacher's weights differ" in capsys.readouterr().err.splitlines()[-1]
    text_file.write_text(text_file.read_text().replace("fox", "cat"))
    assert distill_main(cache_args) == 2
    assert "other training windows" in capsys.readouterr().err.splitlines()[-1]


def damage(path, kind):
    """Damage the header or a record of the file."""
    records = np.load(path, mmap_mode="r")
    first, names = records.offset, records.dtype.fields
    content = bytearray(path.read_bytes())
    if kind == "cut":
        content = content[:-1]
    elif kind == "longer":
        content += b"x"
    elif kind == "record":
        content[-500] ^= 1
    elif kind == "header":
        content[20] ^= 255
    elif kind == "window_id":
        content[first + names["window_id"][1] + 7] ^= 128
    elif kind == "checksum":
        content[first + names["checksum"][1]] ^= 1
    elif kind == "empty":
        content = b""
    path.write_bytes(content)


@pytest.mark.parametrize(
    "kind", ["cut", "longer", "record", "header", "window_id", "checksum", "empty"]
)
def test_a_damaged_file_is_refused_before_training(cache_args, cache_dir, tmp_path, capsys, kind):
    assert distill_main([*cache_args, "stages.end_to_end_steps=5"]) == 0
    damage(cache_dir / FILE, kind)
    assert distill_main(cache_args) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"logit_cache.dir={cache_dir}" in line
    assert "damaged" in line
    assert newest(tmp_path).name == "version_0"


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_damaged_metadata_is_refused(cache_args, cache_dir, capsys, content):
    assert distill_main(cache_args) == 0
    (cache_dir / logit_cache.METADATA_FILE).write_text(content)
    assert distill_main(cache_args) == 2
    assert "damaged" in capsys.readouterr().err.splitlines()[-1]


def test_a_file_of_another_format_is_refused_by_its_version(
    cache_args, cache_dir, capsys, monkeypatch
):
    monkeypatch.setattr(logit_cache, "FORMAT_VERSION", 0)
    assert distill_main(cache_args) == 0
    monkeypatch.undo()
    assert distill_main(cache_args) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "the format version (0 in the cache, 2 in this run) differ" in line


def test_a_partial_file_of_an_interrupted_run_is_ignored(
    cache_args, cache_dir, tmp_path, monkeypatch
):
    original, calls = logit_cache._sample_window, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(logit_cache, "_sample_window", interrupted)
    assert distill_main(cache_args) == 128 + signal.SIGTERM
    assert not (cache_dir / FILE).exists()
    (cache_dir / f"{FILE}.1.partial").write_bytes(b"left by a killed process")
    monkeypatch.setattr(logit_cache, "_sample_window", original)
    assert distill_main(cache_args) == 0
    content = (cache_dir / FILE).read_bytes()
    shutil.rmtree(cache_dir)
    assert distill_main(cache_args) == 0
    assert (cache_dir / FILE).read_bytes() == content
    assert have_equal_weights(newest(tmp_path), tmp_path / "logs" / "version_0")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.mark.parametrize("is_deleted", [False, True])
@pytest.mark.parametrize("stop_at", [2, 6])
def test_a_stopped_run_resumes_with_or_without_its_cache(
    cache_args, cache_dir, tmp_path, monkeypatch, stop_at, is_deleted
):
    assert distill_main(cache_args) == 0
    expected = newest(tmp_path)
    original = DistillationModule.training_step

    def interrupted(self, batch, batch_idx):
        if self.global_step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(DistillationModule, "training_step", interrupted)
    assert distill_main(cache_args) == 128 + signal.SIGTERM
    monkeypatch.setattr(DistillationModule, "training_step", original)
    if is_deleted:
        shutil.rmtree(cache_dir)
    assert distill_main(["--resume", str(newest(tmp_path))]) == 0
    assert have_equal_weights(expected, newest(tmp_path))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_a_full_disk_is_reported_before_anything_is_written(
    cache_args, cache_dir, monkeypatch, capsys
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    assert distill_main(cache_args) == 1
    assert "0.0 GB free" in capsys.readouterr().err.splitlines()[-1]
    assert not (cache_dir / FILE).exists()


def test_a_cache_dir_that_is_a_file_is_refused(cache_args, cache_dir, capsys):
    cache_dir.write_text("a file")
    assert distill_main(cache_args) == 2
    assert (
        f"logit_cache.dir={cache_dir} cannot be written" in capsys.readouterr().err.splitlines()[-1]
    )


# --- settings that contradict a cache


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            [],
            "loss.hidden_mse and loss.block_fvu need more of the teacher than "
            "logit_cache.dir=cached stores; set loss.hidden_mse=0 loss.block_fvu=0,",
        ),
        (
            ["loss.hidden_mse=0"],
            "loss.block_fvu needs more of the teacher than logit_cache.dir=cached stores; "
            "set loss.block_fvu=0,",
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
def test_settings_that_contradict_a_cache_are_named(args, message):
    with pytest.raises(UserError) as raised:
        config_io.load_config(None, ["logit_cache.dir=cached", *args])
    error_text = str(raised.value)
    assert message in error_text
    assert "logit_cache.dir" in error_text or "logit_cache.top_k" in error_text
    assert "\n" not in error_text


def test_a_top_k_above_the_vocabulary_size_is_refused(cache_args, capsys):
    assert distill_main([*cache_args, "logit_cache.top_k=301"]) == 2
    assert (
        "logit_cache.top_k must be in [16, 300], the vocabulary of this teacher, got 301"
        in capsys.readouterr().err.splitlines()[-1]
    )
