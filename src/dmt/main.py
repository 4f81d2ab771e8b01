"""The words of `distill.py` to a run, and every way a run can end to a line and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

from dmt import disk, settings, starting, stopping
from dmt.distill.folder import check_free, check_writable, open_run
from dmt.errors import UserError
from dmt.texts import check_words

USAGE = "python distill.py [CONFIG.yaml | --config CONFIG.yaml] [key=value ...]\n       python distill.py --resume RUN_FOLDER"
RATES = ("stages.layerwise_lr", "stages.end_to_end_lr", "pretrain.lr", "optim.clip")
"""Settings with which a run may be gone on with that are not those it began with."""
ABOUT = """Clone a GPT-2, put memories in place of its feed-forward blocks, distil the clone from the original.

Without arguments the embedded teacher is distilled with the defaults below. A config file holds differences from
them, key=value words go last. configs/ has ready ones. Exit code 0: done, 2: a mistake that the last line names,
130 or 143: stopped by a signal, saved."""


def main(words: list[str]) -> int:
    """Run what `words` ask for; the exit code."""
    try:
        return _main(words)
    except UserError as error:
        number = os.environ.get("RANK", "0")  # of several processes started by torchrun
        who = "" if number == "0" else f"process {number}: "
        print(f"{who}error: {' '.join(str(error).split())}", file=sys.stderr)  # on one line, whoever worded it
        return 2
    except KeyboardInterrupt as stopped:
        return stopping.told(stopped, "stopped; nothing was being trained at that moment, so there is nothing more to save")
    except Exception as error:
        if (said := disk.told(error)) is None:
            raise
        print(f"error: {said}", file=sys.stderr)
        return 2


def _main(words: list[str]) -> int:
    check_words(words)
    parser = argparse.ArgumentParser(
        usage=USAGE, description=ABOUT, epilog="settings, as key=default:\n\n" + settings.describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.error = _refuse  # type: ignore[method-assign]
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml or key=value", help="a config file (at most one) and settings")
    parser.add_argument("--config", metavar="FILE", help="the config file, if not given as a word")
    parser.add_argument("--resume", metavar="RUN_FOLDER", help="go on with a stopped run, with its own settings")
    given = parser.parse_intermixed_args(words)
    files = [word for word in given.words if "=" not in word] + ([] if given.config is None else [given.config])
    changes = [word for word in given.words if "=" in word]
    if len(files) > 1:
        raise UserError(f"one config file at most, got {', '.join(files)}")
    resumed = None if given.resume is None else Path(given.resume)
    if resumed and (own := files + [word for word in changes if word.partition("=")[0] not in RATES]):
        raise UserError(
            f"--resume goes on with the run's own settings; leave out {' '.join(own)} (only {', '.join(RATES)} may be given)"
        )
    config = open_run(resumed, changes) if resumed else settings.load(files[0] if files else None, changes)
    if not resumed:
        check_writable(config.trainer.log_dir, "trainer.log_dir")
        check_free(config)
    if config.task == "pretrain":
        check_writable(config.pretrain.output, "pretrain.output")

    if config.trainer.devices > 1 or "RANK" in os.environ:  # DDP warns of a setting that only one of two stages needs
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    print("loading torch and transformers ...", file=sys.stderr)
    with starting.libraries():  # only once the words are known to be right
        from dmt.tasks import run
    return run(config, resumed)


def _refuse(message: str) -> NoReturn:
    advice = "a setting is written key=value, without dashes; " if message.startswith("unrecognized") else ""
    raise UserError(f"{message}; {advice}python distill.py --help lists what there is")
