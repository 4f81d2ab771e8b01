"""`DistillationModule` in a custom Trainer with other loaders, loggers and callbacks."""

from dataclasses import replace
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from conftest import LAYERS
from pytorch_lightning.loggers import CSVLogger
from torch.utils.data import DataLoader

from dmt.config import Config, DataConfig, FeaturalConfig, StagesConfig, TrainerConfig
from dmt.distillation.module import DistillationModule
from dmt.errors import UserError
from dmt.models.conversion import convert_blocks
from dmt.models.memories import get_memories

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*logging interval.*"),
    pytest.mark.filterwarnings("ignore:.*val_check_interval.*"),
    pytest.mark.filterwarnings("ignore:GPU available.*"),
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


def test_padding_is_refused(module):
    tokens = make_windows(4)
    mask = torch.ones_like(tokens)
    mask[0, -1] = 0
    with pytest.raises(UserError, match="without padding"):
        module.split_batch({"input_ids": tokens, "attention_mask": mask})
    with pytest.raises(UserError, match="needs the key input_ids, got tokens"):
        module.split_batch({"tokens": tokens})


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
