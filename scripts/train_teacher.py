"""Train a small GPT-2 to be a teacher: how the built-in teachers in `src/dmt/assets` were made.

    python scripts/train_teacher.py scripts/teacher.yaml --output src/dmt/assets
    python scripts/train_teacher.py scripts/teacher.yaml stages.end_to_end_steps=100 model.width=64
    python scripts/train_teacher.py --resume lightning_logs/version_0

A config file has `seed` and the groups `data`, `optim`, `stages` (steps and rate of `end_to_end`)
and `trainer` of dmt's settings, and `model`: the shape of a new model, or `start`, a teacher to
continue from.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import time
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dmt.config import Config, DataConfig, OptimConfig, StagesConfig, TrainerConfig
from dmt.errors import UserError
from dmt.training.run_dir import check_run_name_free, check_writable

MODEL_FILE = "model.yaml"  # the settings in `model`, in the folder of a run
GROUPS = {
    "data": DataConfig,
    "optim": OptimConfig,
    "stages": StagesConfig,
    "trainer": TrainerConfig,
}
NUM_VALIDATION_PROBES = 320  # probes of a validation during training
RESUME_PATTERN = re.compile(r"(python )?\S*(distill\.py|dmt distill) --resume")


@dataclass(frozen=True)
class ModelConfig:
    """The model to train.

    Attributes:
        start: teacher to continue from; its shape and tokenizer are used instead of the rest.
        width: hidden size.
        layers: transformer blocks.
        heads: attention heads.
        vocab_size: tokens of the BPE vocabulary, which is trained on the training text.
        output: folder that the finished teacher is written to.
    """

    start: str | None = None
    width: int = 128
    layers: int = 4
    heads: int = 4
    vocab_size: int = 2_048
    output: str = "teacher"

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("width", "layers", "heads"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} must be at least 1, got {getattr(self, name)}")
        if self.vocab_size < 257:
            raise UserError(f"model.vocab_size must be at least 257, got {self.vocab_size}")
        if self.width % self.heads:
            raise UserError(
                f"model.width={self.width} must be a multiple of model.heads={self.heads}"
            )


def load_settings(path: str | Path, overrides: list[str]) -> tuple[Config, ModelConfig]:
    """Read a config file and overrides.

    Args:
        path: a YAML file.
        overrides: `group.name=value`; later ones win.

    Raises:
        UserError: the file cannot be read, a setting does not exist or a value is not accepted.
    """
    try:
        values: Any = OmegaConf.to_container(
            OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(overrides))
        )
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from None
    model = _build(ModelConfig, values.get("model") or {}, "model")
    groups = {name: _build(cls, values.get(name) or {}, name) for name, cls in GROUPS.items()}
    return Config(seed=values.get("seed", 0), **groups), model


def load_run_settings(run_dir: Path) -> tuple[Config, ModelConfig]:
    """Read the settings of a run that is to be resumed.

    Raises:
        UserError: the folder is not that of a run of this script.
    """
    if not (run_dir / MODEL_FILE).is_file():
        raise UserError(f"--resume {run_dir}: no run of this script is there (no {MODEL_FILE})")
    config, _ = load_settings(run_dir / "config.yaml", [])
    return config, _build(ModelConfig, OmegaConf.load(run_dir / MODEL_FILE), "model")


def _build(cls: Any, values: dict[str, Any], group: str) -> Any:
    names = [field.name for field in fields(cls)]
    if unknown := [name for name in values if name not in names]:
        raise UserError(f"{group}.{unknown[0]} is not a setting; {group} has {', '.join(names)}")
    return cls(**values)


def train(model_config: ModelConfig, config: Config, run_dir: Path | None) -> Path:
    """Train a teacher and write it, in half precision, to `model.output`.

    Args:
        model_config: the model to train.
        config: the other settings.
        run_dir: the folder of a run to resume.

    Returns:
        The folder of the run.
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from dmt import files
    from dmt.data.corpora import load_corpus
    from dmt.data.tokenizer import train_tokenizer
    from dmt.data.windows import TextDataModule, select_first_windows
    from dmt.evaluation.metrics import FidelityMetrics, measure_fidelity, measure_recall
    from dmt.models.loading import load_teacher
    from dmt.report.curves import read_curves
    from dmt.training.autotune import autotune
    from dmt.training.launch import get_rank, make_on_rank_zero
    from dmt.training.module import TrainingModule
    from dmt.training.optimization import build_adamw, lr_schedule
    from dmt.training.run_dir import create_run_dir, write_record
    from dmt.training.trainer import fit, keep_freed_memory, use_training_kernels

    class TeacherModule(TrainingModule):
        """Next-token prediction."""

        def __init__(self, config: Config, model: Any, tokenizer: Any) -> None:
            super().__init__(config)
            self.model, self._tokenizer_ref = model, (tokenizer,)
            self.val_metrics: list[FidelityMetrics] = []

        @property
        def total_steps(self) -> int:
            return self.settings.stages.end_to_end_steps

        @property
        def trained_model(self) -> Any:
            return self.model

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return build_adamw(self.model.parameters(), self.settings.optim)

        def get_lr(self, step: int) -> float:
            peak_lr = self.settings.stages.end_to_end_lr
            return lr_schedule(step, self.total_steps, peak_lr, self.settings.optim)

        def split_batch(self, batch: Any) -> list[tuple[torch.Tensor, float]]:
            micro_batches = batch.split(self.settings.data.micro_batch_size)
            return [(tokens, len(batch)) for tokens in micro_batches]

        def compute_terms(self, micro_batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            tokens, batch_size = micro_batch
            output = self.model(tokens, labels=tokens, use_cache=False)
            loss = output.loss * len(tokens) / batch_size
            return loss, {"loss": loss}

        def on_validation_start(self) -> None:
            self.val_metrics = [FidelityMetrics() for _ in self.trainer.datamodule.corpora]

        def validation_step(self, tokens: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            logits = self.model(tokens, use_cache=False).logits
            self.val_metrics[dataloader_idx].update(logits, logits, tokens)

        def on_validation_epoch_end(self) -> None:
            corpora = self.trainer.datamodule.corpora
            for corpus, metrics in zip(corpora, self.val_metrics, strict=True):
                perplexity = metrics.all_reduce().teacher_perplexity
                self.log(f"val/{corpus.name}/perplexity", perplexity, sync_dist=True)
                if corpus.probes:
                    stride = max(1, len(corpus.probes) // NUM_VALIDATION_PROBES)
                    recall = measure_recall(
                        self.model, self._tokenizer_ref[0], corpus.probes[::stride]
                    )
                    self.log(f"val/{corpus.name}/recall", recall, sync_dist=True)

    logger, start_time = logging.getLogger("dmt.scripts"), time.perf_counter()
    if model_config.start is None:
        documents = [
            text
            for source in config.data.corpora
            for text in load_corpus(source, config.seed).train
        ]
        tokenizer = train_tokenizer(documents, model_config.vocab_size, config.data.seq_len)
        model: Any = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer),
                n_positions=config.data.seq_len,
                n_embd=model_config.width,
                n_layer=model_config.layers,
                n_head=model_config.heads,
                activation_function="gelu_pytorch_tanh",
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    else:
        model, tokenizer = load_teacher(model_config.start)
        model.requires_grad_(True).train()
    data = TextDataModule(config, tokenizer, config.stages.end_to_end_steps)
    data.setup()
    keep_freed_memory()  # not before: the tokenizer's threads would wait for each other's memory
    micro_batch_tokens = config.data.seq_len * config.data.micro_batch_size
    config = autotune(config, model, data.calibration_windows(micro_batch_tokens))
    run_dir = run_dir or make_on_rank_zero(lambda: create_run_dir(config))
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    logger.info("%s: %s weights, %d steps", run_dir, f"{num_weights:,}", data.steps)
    if get_rank() == 0:
        files.atomic_write(run_dir / MODEL_FILE, OmegaConf.to_yaml(asdict(model_config)))
        write_record(run_dir, config, {}, is_start=True)
    with use_training_kernels(config, model):
        fit(config, TeacherModule(config, model, tokenizer), data, run_dir, [])
    if get_rank():
        return run_dir
    model = model.cpu().half().float().eval()  # measured as it is saved
    fidelity: dict[str, Any] = {}
    for corpus in data.corpora:
        windows = select_first_windows(corpus.test, config.data.test_tokens)
        metrics = measure_fidelity(model, model, windows, config.data.micro_batch_size)
        scores: dict[str, Any] = {
            "perplexity": metrics.teacher_perplexity,
            "tokens": metrics.tokens,
            "window": config.data.seq_len,
        }
        probes_by_name = {"recall": corpus.probes, "recall_paraphrased": corpus.unseen_probes}
        for name, probes in probes_by_name.items():
            if probes:
                recall = measure_recall(model, tokenizer, probes)
                scores[name] = {"teacher": recall, "num_probes": len(probes)}
        fidelity[corpus.name] = scores
        logger.info("%s: %s", corpus.name, scores)
    output_dir = Path(model_config.output).expanduser()
    with files.atomic_directory(output_dir) as folder:
        model.to(torch.float16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    seconds = {"total": time.perf_counter() - start_time}
    results = {"fidelity": fidelity, "seconds": seconds, "curves": read_curves(run_dir)}
    write_record(run_dir, config, results)
    logger.info("the teacher is in %s: teacher=%s", output_dir, output_dir)
    return run_dir


def main(args: list[str] | None = None) -> int:
    """Train as the command line says.

    Returns:
        The exit code: 0, 2 for a user's mistake, 128 plus the number of a signal.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", help="a config file, such as scripts/teacher.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    parser.add_argument("--output", metavar="DIR", help="where the teacher goes (model.output)")
    parser.add_argument("--resume", metavar="RUN_DIR", help="resume this run")
    options = parser.parse_args(args)
    if (options.config is None) == (options.resume is None):
        parser.error("give a config file, or --resume RUN_DIR")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        run_dir = None if options.resume is None else Path(options.resume)
        if run_dir is None:
            overrides = options.overrides
            if options.output is not None:
                overrides = [*overrides, f"model.output={options.output}"]
            config, model = load_settings(options.config, overrides)
            check_run_name_free(config)
        else:
            config, model = load_run_settings(run_dir)
        check_writable(config.trainer.log_dir)
        check_writable(model.output, "model.output")
        from dmt.signals import stop_at_step_end
        from dmt.training.execution import execute
        from dmt.training.interrupts import hide_disk_errors_in_threads
        from dmt.training.trainer import silence_libraries

        silence_libraries()
        with stop_at_step_end(), hide_disk_errors_in_threads():
            execute(partial(train, model), config, run_dir)
    except UserError as error:
        print(f"error: {_use_own_command(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(_use_own_command(str(interrupt)), file=sys.stderr)
        return 128 + getattr(interrupt, "signum", 2)
    return 0


def _use_own_command(message: str) -> str:
    """Name this script where a message says how to resume."""
    return RESUME_PATTERN.sub("python scripts/train_teacher.py --resume", message)


if __name__ == "__main__":
    sys.exit(main())
