"""`DistillationModule` in a custom Trainer with other loaders, loggers and callbacks."""

from dataclasses import replace
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from conftest import LAYERS, POSITIONS
from pytorch_lightning.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from dmt.config import Config, DataConfig, FeaturalConfig, StagesConfig, TrainerConfig
from dmt.distillation.losses import Batch
from dmt.distillation.module import DistillationModule
from dmt.errors import UserError
from dmt.evaluation.metrics import measure_fidelity
from dmt.models.conversion import convert_blocks
from dmt.models.memories import get_memories

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*logging interval.*"),
    pytest.mark.filterwarnings("ignore:.*val_check_interval.*"),
    pytest.mark.filterwarnings("ignore:GPU available.*"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but.*"),
]


@pytest.fixture
def module(teacher):
    config = Config(
        data=DataConfig(seq_len=16, batch_size=4, micro_batch_size=2),
        stages=StagesConfig(calibration_tokens=64, layerwise_steps=2, end_to_end_steps=3),
        trainer=TrainerConfig(log_every=1),
    )
    student, _ = convert_blocks(teacher, [FeaturalConfig(k=8)] * LAYERS)
    module = DistillationModule(config, student, teacher)
    module.calibrate(make_windows(8))
    return module


def make_windows(count, seed=0):
    return torch.randint(1, 300, (count, 16), generator=torch.Generator().manual_seed(seed))


def make_trainer(module, tmp_path, **changes):
    options = {
        "max_steps": module.total_steps,
        "logger": CSVLogger(tmp_path, flush_logs_every_n_steps=1),
        "accelerator": "cpu",
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "val_check_interval": module.total_steps,
        "check_val_every_n_epoch": None,
    }
    return pl.Trainer(**(options | changes))


def loader(count, batch_size=4, seed=0):
    return DataLoader(make_windows(count, seed), batch_size=batch_size)


class RecordLosses(pl.Callback):
    """A custom callback."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, *args):
        self.losses.append(float(trainer.progress_bar_metrics["loss"]))


def test_custom_loaders_loggers_and_callbacks(module, tmp_path):
    record = RecordLosses()
    before = {name: value.clone() for name, value in module.student.state_dict().items()}
    trainer = make_trainer(module, tmp_path, callbacks=[record])
    trainer.fit(module, loader(20), {"news": loader(4, seed=1), "notes": loader(4, seed=2)})
    assert trainer.global_step == 5
    assert len(record.losses) == 5
    metrics = trainer.callback_metrics
    for name in ("news", "notes"):
        assert metrics[f"val/{name}/kl"] > 0
        assert metrics[f"val/{name}/ppl_ratio"] > 0
    for layer in get_memories(module.student):
        assert f"val/fvu/layer_{layer}" in metrics
    header = Path(trainer.logger.log_dir, "metrics.csv").read_text().splitlines()[0]
    for name in ("train/layerwise_loss", "train/loss", "train/kl", "lr", "val/news/kl"):
        assert name in header
    after = module.student.state_dict()
    assert any(not torch.equal(before[name], value) for name, value in after.items())


@pytest.mark.parametrize(
    ("loaders", "names"),
    [
        (lambda: loader(4), ["data"]),
        (lambda: [loader(4), loader(4, seed=1)], ["data_0", "data_1"]),
    ],
)
def test_loaders_without_names_are_numbered(module, tmp_path, loaders, names):
    trainer = make_trainer(module, tmp_path)
    trainer.validate(module, loaders(), verbose=False)
    kls = {name for name in trainer.callback_metrics if name.endswith("/kl")}
    assert kls == {f"val/{name}/kl" for name in names}


class CustomData(pl.LightningDataModule):
    """A custom data module, with batches like those of transformers' collators."""

    def train_dataloader(self):
        return DataLoader(make_windows(20), batch_size=4, collate_fn=self.collate)

    def val_dataloader(self):
        return DataLoader(make_windows(4, seed=1), batch_size=4, collate_fn=self.collate)

    @staticmethod
    def collate(windows):
        tokens = torch.stack(windows)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def test_a_data_module_of_dictionaries_trains_the_same_weights(module, teacher, tmp_path):
    start = {name: value.clone() for name, value in module.state_dict().items()}
    make_trainer(module, tmp_path).fit(module, datamodule=CustomData())
    trained = {name: value.clone() for name, value in module.student.state_dict().items()}
    module.load_state_dict(start)
    make_trainer(module, tmp_path).fit(module, loader(20), loader(4, seed=1))
    for name, value in module.student.state_dict().items():
        assert torch.equal(value, trained[name]), name


def pad(texts, side="right", pad_id=0, extra=0):
    """Pad texts as transformers does, `extra` tokens more than needed."""
    width = max(map(len, texts)) + extra
    rows = {"input_ids": [], "attention_mask": [], "labels": []}
    for text in texts:
        padding = (0, width - len(text)) if side == "right" else (width - len(text), 0)
        for name, values, fill in (
            ("input_ids", text, pad_id),
            ("attention_mask", torch.ones_like(text), 0),
            ("labels", text, -100),
        ):
            rows[name].append(torch.nn.functional.pad(values, padding, value=fill))
    return {name: torch.stack(values) for name, values in rows.items()}


def as_loader(batches):
    return DataLoader(batches, batch_size=None)


def make_texts():
    return [row[:length] for row, length in zip(make_windows(5), (3, 9, 3, 16, 1), strict=True)]


def test_padding_changes_neither_weights_nor_metrics(module, tmp_path):
    texts, start = make_texts(), {n: v.clone() for n, v in module.state_dict().items()}
    expected, metrics = {}, {}
    for batch in (pad(texts), pad(texts, "left", pad_id=7, extra=4)):
        module.load_state_dict(start)
        trainer = make_trainer(module, tmp_path)
        trainer.fit(module, as_loader([batch] * 5), as_loader([batch]))
        metrics = metrics or trainer.callback_metrics
        for name, value in module.student.state_dict().items():
            assert torch.equal(value, expected.setdefault(name, value.clone())), name
        assert trainer.callback_metrics == metrics
    assert any(not torch.equal(start[f"student.{name}"], expected[name]) for name in expected)
    fidelity, targets = 0.0, 0.0
    for text in texts[:4]:
        single = measure_fidelity(module.student, module.teacher, text[None])
        fidelity, targets = fidelity + single.kl_sum, targets + single.tokens
    assert float(metrics["val/data/kl"]) == pytest.approx(fidelity / targets, rel=1e-5)


def test_a_step_of_padded_texts_is_the_mean_over_their_tokens(module):
    texts = make_texts()
    micro_batches = module.split_batch(pad(texts))
    total = sum(map(len, texts))
    assert {(m.tokens_in_step, m.targets_in_step) for m in micro_batches} == {(total, total - 5)}
    assert max(len(m.tokens) for m in micro_batches) == 2
    for loss in (module.layerwise_loss, module.end_to_end_loss):
        alone = [loss(Batch.full_step(text[None]))[0].detach() * len(text) for text in texts]
        value = sum(float(loss(micro_batch)[0].detach()) for micro_batch in micro_batches)
        assert value == pytest.approx(float(sum(alone)) / total, rel=1e-4)


def test_batches_of_a_tensor_dataset_train_the_same_weights(module, tmp_path):
    start = {name: value.clone() for name, value in module.state_dict().items()}
    make_trainer(module, tmp_path).fit(module, loader(20))
    trained = {name: value.clone() for name, value in module.student.state_dict().items()}
    module.load_state_dict(start)
    dataset = TensorDataset(make_windows(20))
    make_trainer(module, tmp_path).fit(module, DataLoader(dataset, batch_size=4))
    for name, value in module.student.state_dict().items():
        assert torch.equal(value, trained[name]), name


TOKENS = torch.ones(2, 4, dtype=torch.long)
GAPS = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"tokens": TOKENS}, "needs the key input_ids, got tokens"),
        ({"input_ids": TOKENS, "attention_mask": GAPS}, "attention_mask has gaps"),
        ({"input_ids": TOKENS, "attention_mask": 0 * TOKENS}, "masks every token"),
        ({"input_ids": TOKENS, "attention_mask": TOKENS[0]}, r"shape of input_ids \(2, 4\), got"),
        ({"input_ids": TOKENS.tolist()}, r"integer token ids of shape \(windows, time\), got \["),
        ((TOKENS, TOKENS), "pass an attention mask in a dict"),
        ((TOKENS, TOKENS[:, 0], TOKENS), r"got \[int64 of shape \(2, 4\), int64 of shape"),
        (TOKENS[0], r"got int64 of shape \(4,\)"),
        (TOKENS.float(), "got float32 of shape"),
        (TOKENS[:0], "integer token ids of shape"),
        (["a text"], "got str"),
        ([], "got NoneType"),
        (torch.ones(1, POSITIONS + 1, dtype=torch.long), "the model reads 32 at most"),
    ],
)
def test_other_batches_are_refused(module, batch, message):
    with pytest.raises(UserError, match=message):
        module.split_batch(batch)


def test_a_loader_of_single_tokens_cannot_validate(module, tmp_path):
    loaders = {"news": loader(4), "words": DataLoader(make_windows(2)[:, :1])}
    with pytest.raises(UserError, match="validation loader words has no window of two tokens"):
        make_trainer(module, tmp_path).validate(module, loaders, verbose=False)


def test_a_data_module_may_have_corpora_of_its_own(module, tmp_path):
    data = CustomData()
    data.corpora = ["news", "notes"]
    trainer = make_trainer(module, tmp_path)
    trainer.validate(module, datamodule=data, verbose=False)
    assert trainer.callback_metrics["val/data/kl"] > 0


def test_training_ends_with_the_schedule(module, tmp_path):
    trainer = make_trainer(module, tmp_path, max_steps=-1, max_epochs=-1)
    trainer.fit(module, loader(8))
    assert trainer.global_step == module.total_steps


def test_a_trainer_that_scales_the_loss_is_refused(module, tmp_path, monkeypatch):
    monkeypatch.setattr(pl.Trainer, "precision", "16-mixed")  # on a CPU Lightning changes it
    with pytest.raises(UserError, match="use bf16-mixed or 32-true"):
        make_trainer(module, tmp_path).fit(module, loader(8))


def test_a_checkpoint_holds_the_settings(module, tmp_path):
    trainer = make_trainer(module, tmp_path)
    trainer.fit(module, loader(20))
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    student, _ = convert_blocks(module.teacher, [FeaturalConfig(k=8)] * LAYERS)
    loaded = DistillationModule.load_from_checkpoint(
        tmp_path / "own.ckpt", student=student, teacher=module.teacher, weights_only=True
    )
    assert loaded.settings == module.settings
    for name, value in module.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


def test_a_checkpoint_without_its_store_is_refused(module):
    with pytest.raises(UserError, match="are in the store of its run; resume with dmt distill"):
        module.on_load_checkpoint({"rows": {}, "state_dict": {}})


def test_checkpoints_of_a_custom_trainer_have_no_teacher(module, tmp_path):
    trainer = make_trainer(module, tmp_path)
    trainer.fit(module, loader(20), loader(4, seed=1))
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    state = torch.load(tmp_path / "own.ckpt", weights_only=True)["state_dict"]
    assert not [name for name in state if "teacher" in name]
    assert {name for name in state if name.startswith("student.")}


def test_settings_can_be_changed_before_training(module):
    config = replace(module.settings, stages=replace(module.settings.stages, layerwise_steps=0))
    assert DistillationModule(config, module.student, module.teacher).stage_at(0)[0] == "end_to_end"
