"""Train a small GPT-2 from scratch, to be a teacher: the recipe behind `src/dmt/assets`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytorch_lightning as pl
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from dmt.config import Config
from dmt.distributed import all_reduce_mean
from dmt.evaluation.metrics import FidelityMetrics, measure_recall
from dmt.training.checkpoints import check_finite, clip_gradients
from dmt.training.trainer import build_adamw, lr_schedule, no_sync

END_OF_TEXT = "<|endoftext|>"
RECALL_PROBES = 320
"""Probes asked while training; all of them at the end."""


def train_tokenizer(documents: list[str], vocab_size: int, max_length: int) -> Any:
    """A byte-level BPE tokenizer of at most `vocabulary` tokens: any text can be encoded and comes back as it was."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=max_length,
    )


def create_gpt2(config: Config, vocab_size: int) -> PreTrainedModel:
    """An untrained GPT-2 of the shape that `pretrain` names, without dropout."""
    shape = config.pretrain
    gpt2_config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=config.data.seq_len,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(gpt2_config)


class PretrainingModule(pl.LightningModule):
    """Next-token prediction with AdamW; one training step is one optimiser step."""

    def __init__(self, config: Config, model: PreTrainedModel, tokenizer: Any) -> None:
        super().__init__()
        self.save_hyperparameters({"config": asdict(config)})
        self.automatic_optimization = False
        self.settings, self.model, self._tokenizer_ref = config, model, (tokenizer,)
        self.val_metrics: list[FidelityMetrics] = []

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the run."""
        return self.settings.pretrain.steps

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_adamw(self.model.parameters(), self.settings.optim)

    def training_step(self, tokens: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        lr = lr_schedule(
            self.global_step, self.total_steps, self.settings.pretrain.lr, self.settings.optim
        )
        for group in optimizer.param_groups:  # type: ignore[union-attr]
            group["lr"] = lr
        optimizer.zero_grad()  # type: ignore[union-attr]
        micro_batches = tokens.split(self.settings.data.micro_batch_size)
        total_loss = torch.zeros((), device=self.device)
        for index, micro_batch in enumerate(micro_batches, 1):
            with no_sync(self, is_last=index == len(micro_batches)):
                loss = (
                    self.model(micro_batch, labels=micro_batch, use_cache=False).loss
                    * len(micro_batch)
                    / len(tokens)
                )
                self.manual_backward(loss)
            total_loss += loss.detach()
        grad_norm = clip_gradients(optimizer, self.settings.optim.grad_clip)  # type: ignore[arg-type]
        check_finite(
            self.global_step + 1,
            total_loss,
            grad_norm,
            self.model,
            lambda: [self.model(micro_batch, use_cache=False) for micro_batch in micro_batches],
        )
        optimizer.step()  # type: ignore[union-attr]
        self.log("loss", all_reduce_mean(total_loss), prog_bar=True)
        self.log("learning_rate", lr)

    def on_validation_start(self) -> None:
        self.val_metrics = [FidelityMetrics() for _ in self.trainer.datamodule.corpora]  # type: ignore[attr-defined]

    def validation_step(self, tokens: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        logits = self.model(tokens, use_cache=False).logits
        self.val_metrics[dataloader_idx].update(logits, logits, tokens)

    def on_validation_epoch_end(self) -> None:
        for corpus, metrics in zip(self.trainer.datamodule.corpora, self.val_metrics, strict=True):  # type: ignore[attr-defined]
            self.log(
                f"{corpus.name}/perplexity",
                metrics.all_reduce().teacher_perplexity,
                prog_bar=True,
                sync_dist=True,
            )
            if corpus.probes:
                probes = corpus.probes[:: max(1, len(corpus.probes) // RECALL_PROBES)]
                self.log(
                    f"{corpus.name}/recall",
                    measure_recall(self.model, self._tokenizer_ref[0], probes),
                    prog_bar=True,
                    sync_dist=True,
                )
