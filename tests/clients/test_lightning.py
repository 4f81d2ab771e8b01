"""A Lightning Trainer of one's own: data module, padded batches, validation, checkpoints."""

import pytest
import pytorch_lightning as pl
import torch
from conftest import LAYERS, SENTENCES
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling

import dmt
from dmt.config import Config, DataConfig, FeaturalConfig, StagesConfig, TrainerConfig
from dmt.distillation.module import DistillationModule


class Sentences(pl.LightningDataModule):
    """Texts of different lengths, padded by transformers."""

    def __init__(self, tokenizer):
        super().__init__()
        self.rows = [tokenizer(sentence) for sentence in SENTENCES]
        self.collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)

    def train_dataloader(self):
        return DataLoader(self.rows * 8, batch_size=6, collate_fn=self.collator)

    def val_dataloader(self):
        return DataLoader(self.rows, batch_size=2, collate_fn=self.collator)


@pytest.fixture
def config():
    return Config(
        data=DataConfig(micro_batch_size=4),
        memory=FeaturalConfig(k=8),
        stages=StagesConfig(calibration_tokens=64, layerwise_steps=8, end_to_end_steps=8),
        trainer=TrainerConfig(log_every=1),
    )


def test_padded_texts_are_distilled_measured_and_saved(
    config, long_teacher, student_tokenizer, tmp_path
):
    data = Sentences(student_tokenizer)
    lengths = {len(row["input_ids"]) for row in data.rows}
    assert len(lengths) > 1
    windows = torch.randint(1, 300, (8, 16))
    module = DistillationModule(config, dmt.convert(long_teacher, config.memory), long_teacher)
    module.calibrate(windows)
    checkpoints = ModelCheckpoint(tmp_path, monitor="val/data/kl", save_top_k=-1)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[checkpoints],
        enable_progress_bar=False,
        enable_model_summary=False,
        check_val_every_n_epoch=1,
    )
    before = trainer.validate(module, datamodule=data, verbose=False)[0]
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == module.total_steps
    after = trainer.validate(module, datamodule=data, verbose=False)[0]
    assert after["val/data/kl"] < 0.8 * before["val/data/kl"]
    assert {f"val/fvu/layer_{layer}" for layer in range(LAYERS)} <= set(after)

    loaded = DistillationModule.load_from_checkpoint(
        checkpoints.best_model_path,
        student=dmt.convert(long_teacher, config.memory),
        teacher=long_teacher,
        weights_only=True,
    )
    assert loaded.settings == config
    again = trainer.validate(loaded, datamodule=data, verbose=False)[0]
    assert again["val/data/kl"] == pytest.approx(float(checkpoints.best_model_score), rel=1e-5)
    loaded.student.save_pretrained(tmp_path / "student")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    with torch.no_grad():
        torch.testing.assert_close(saved(windows).logits, loaded.student.eval()(windows).logits)
