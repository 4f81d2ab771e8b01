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
from dmt.distill.finite import check_finite, clipped
from dmt.distill.stepping import adamw, gradients_apart, learning_rate
from dmt.evaluate import Tally, recall
from dmt.memory.together import averaged

END_OF_TEXT = "<|endoftext|>"
RECALL_PROBES = 320
"""Probes asked while training; all of them at the end."""


def train_tokenizer(documents: list[str], vocabulary: int, positions: int) -> Any:
    """A byte-level BPE tokenizer of at most `vocabulary` tokens: any text can be encoded and comes back as it was."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
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
        model_max_length=positions,
    )


def fresh_gpt2(config: Config, vocabulary: int) -> PreTrainedModel:
    """An untrained GPT-2 of the shape that `pretrain` names, without dropout."""
    shape = config.pretrain
    settings = GPT2Config(
        vocab_size=vocabulary,
        n_positions=config.data.block,
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
    return GPT2LMHeadModel(settings)


class Pretrainer(pl.LightningModule):
    """Next-token prediction with AdamW; one training step is one optimiser step."""

    def __init__(self, config: Config, model: PreTrainedModel, tokenizer: Any) -> None:
        super().__init__()
        self.save_hyperparameters({"config": asdict(config)})
        self.automatic_optimization = False
        self.settings, self.model, self._tokenizer = config, model, (tokenizer,)
        self.tallies: list[Tally] = []

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the run."""
        return self.settings.pretrain.steps

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self.model.parameters(), self.settings.optim)

    def training_step(self, tokens: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        rate = learning_rate(self.global_step, self.total_steps, self.settings.pretrain.lr, self.settings.optim)
        for group in optimizer.param_groups:  # type: ignore[union-attr]
            group["lr"] = rate
        optimizer.zero_grad()  # type: ignore[union-attr]
        pieces = tokens.split(self.settings.data.micro_batch)
        total = torch.zeros((), device=self.device)
        for number, piece in enumerate(pieces, 1):
            with gradients_apart(self, until=number == len(pieces)):
                loss = self.model(piece, labels=piece, use_cache=False).loss * len(piece) / len(tokens)
                self.manual_backward(loss)
            total += loss.detach()
        norm = clipped(optimizer, self.settings.optim.clip)  # type: ignore[arg-type]
        check_finite(
            self.global_step + 1, total, norm, self.model, lambda: [self.model(piece, use_cache=False) for piece in pieces]
        )
        optimizer.step()  # type: ignore[union-attr]
        self.log("loss", averaged(total), prog_bar=True)
        self.log("learning_rate", rate)

    def on_validation_start(self) -> None:
        self.tallies = [Tally() for _ in self.trainer.datamodule.corpora]  # type: ignore[attr-defined]

    def validation_step(self, tokens: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        logits = self.model(tokens, use_cache=False).logits
        self.tallies[dataloader_idx].add(logits, logits, tokens)

    def on_validation_epoch_end(self) -> None:
        for corpus, tally in zip(self.trainer.datamodule.corpora, self.tallies, strict=True):  # type: ignore[attr-defined]
            self.log(f"{corpus.name}/perplexity", tally.of_all().teacher_perplexity, prog_bar=True, sync_dist=True)
            if corpus.probes:
                some = corpus.probes[:: max(1, len(corpus.probes) // RECALL_PROBES)]
                self.log(f"{corpus.name}/recall", recall(self.model, self._tokenizer[0], some), prog_bar=True, sync_dist=True)
