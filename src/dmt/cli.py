"""The `dmt` command: `memory` opens a student's memory, `ask` lets it speak, `consolidate` and `sleep` let it learn by itself,
`compare` puts runs side by side.

Words to a command to an exit code.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any, NoReturn

from dmt import disk, starting, stopping
from dmt.errors import UserError
from dmt.texts import check_words

ABOUT = """Open the memory of a distilled student: read it, write facts into it, take them out, give them away. Let it learn
a context (consolidate), or take what was written into its slots (sleep); both make a new student.

A student is a folder that save_pretrained made, or the run that distilled it; without --student the newest run in
lightning_logs/. Facts and what was remembered lie in memory.db beside the weights, which they never change. Exit code 0: done,
2: a mistake that the last line names, 130 or 143: stopped by a signal."""
VERBS: dict[str, tuple[str, str, str]] = {
    "stats": ("looking", "stats", "layers, slots, rows, facts and what they weigh"),
    "list": ("looking", "listing", "facts, or with --rows what associative memory holds"),
    "show": ("looking", "show", "one fact, or with --slot one slot, and the tokens its values push up"),
    "search": ("looking", "search", "facts by their words, and by the state at the end of a text"),
    "read": ("looking", "read", "which slots, rows and facts each token of a text reads, with what weight, saying what"),
    "write": ("changing", "write", "write a fact from a sentence that states it, or thousands from a file"),
    "forget": ("changing", "forget", "take facts out, by number, tag or words"),
    "restore": ("changing", "restore", "bring back a fact that was forgotten, replaced or evicted"),
    "evict": ("changing", "evict", "keep what answers most lately and take out the rest"),
    "export": ("giving", "export", "put facts, or with --rows associative memory, into a pack: a .safetensors file or a folder"),
    "import": ("giving", "take", "write the facts or rows of a pack into a student"),
    "merge": ("giving", "merged", "one pack of several, contradictions reported"),
    "diff": ("giving", "compared", "what differs between two packs, students or runs"),
}
"""Verb of `dmt memory`: module of `dmt.commands`, function in it, what it does."""


def main(words: list[str]) -> int:
    """Do what `words` ask for; the exit code."""
    try:
        return _main(words)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        return stopping.told(stopped, "stopped; what was finished is kept")
    except BrokenPipeError:  # whoever read what we print has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if (said := disk.told(error)) is None:
            raise
        print(f"error: {said}", file=sys.stderr)
        return 2


def run() -> NoReturn:
    """The console script."""
    stopping.leave_at_once()
    code = main(sys.argv[1:])
    stopping.leave_be()
    sys.exit(code)


def _main(words: list[str]) -> int:
    check_words(words)
    words_of = parser()
    given, rest = words_of.parse_known_args(words)
    if rest and (not hasattr(given, "settings") or any(word.startswith("-") or "=" not in word for word in rest)):
        words_of.error(f"unrecognized arguments: {' '.join(rest)}")
    elif rest:  # settings may stand between options
        given.settings += rest
    if not hasattr(given, "does"):
        (given.parser if hasattr(given, "parser") else words_of).print_help()
        return 0
    module, function = given.does
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with starting.libraries():  # only once the words are known to be right
        from dmt.distill.fitting import quiet

        quiet()
        from dmt.commands.printing import Output

        command: Callable[[argparse.Namespace, Any], None] = getattr(import_module(f"dmt.commands.{module}"), function)
    command(given, Output(given.json))
    return 0


class _Parser(argparse.ArgumentParser):
    """One whose complaints are ours, and that does not guess what an option was meant to be."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **(named | {"allow_abbrev": False}))

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help lists what there is")


def parser() -> argparse.ArgumentParser:
    """What the words of `dmt` may be; those of a command have `does`, its module and function."""
    raw: Any = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    whole = _Parser(prog="dmt", description=ABOUT, **raw)
    commands = whole.add_subparsers(metavar="COMMAND")
    ask = commands.add_parser("ask", help="let a student go on from a prompt", **raw, description=(
        "Let a student go on from a prompt. --trace tells which slots, rows and facts answered each token; --remember writes\n"
        "what was said into the student's associative memory, within its capacity."))  # fmt: skip
    ask.add_argument("prompt", help="what it goes on from")
    ask.add_argument("--tokens", type=int, default=30, metavar="N", help="most tokens it says (30)")
    ask.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0: what is likeliest (default); above: drawn")
    ask.add_argument("--seed", type=int, default=0, help="of what is drawn (0)")
    ask.add_argument("--trace", action="store_true", help="which slots, rows and facts answered each token")
    ask.add_argument("--pack", action="append", metavar="PACK", help="with the facts of a pack, for this once; may be repeated")
    ask.add_argument("--remember", action="store_true", help="keep what was said in associative memory")
    ask.add_argument("--tag", default="conversation", help="with --remember, what the rows are filed under (conversation)")
    _depth(ask)
    _common(ask, ("asking", "ask"))
    about = "put a context into a student's memory, weights or memory tokens"
    _consolidate(commands.add_parser("consolidate", help=about, description=(
        f"{about.capitalize()}, so that it answers without as it would with it. The result is a run of its own.")))  # fmt: skip
    about = "move rows that are read into the slots of a new student, which then knows without them"
    _sleep(commands.add_parser("sleep", help=about, description=(
        f"{about.capitalize()}. Facts and rows of associative memory leave once slots have learnt them by distillation; what\n"
        "earlier nights have learnt is gone through again. The student of the evening stays as it is."), **raw))  # fmt: skip
    about = "runs side by side: results, settings that differ, and with --html their curves"
    compare = commands.add_parser("compare", help=about, description=f"{about.capitalize()}.")
    compare.add_argument("runs", nargs="+", metavar="RUN", help="two or more: a folder, or a name or number in lightning_logs/")
    compare.add_argument("--html", metavar="FILE.html", help="write a page with their curves laid over each other")
    _common(compare, ("comparing", "compare"), student=False)
    memory = commands.add_parser("memory", help="look into a student's memory, or change it", **raw, description=ABOUT)
    memory.set_defaults(parser=memory)
    verbs = memory.add_subparsers(metavar="VERB")
    made = {
        verb: verbs.add_parser(verb, help=what, description=f"{what[0].upper()}{what[1:]}.") for verb, (_, _, what) in VERBS.items()
    }
    _options(made)
    for verb, (module, function, _) in VERBS.items():
        _common(made[verb], (module, function), student=verb not in ("merge", "diff"))
    return whole


def _sleep(parser: _Parser) -> None:
    """What `dmt sleep` takes."""
    parser.add_argument("--tag", help="only what is filed under this; the rest stays awake, as rows")
    parser.add_argument("--least", type=int, default=0, metavar="N", help="only what has answered at least so many times (0)")
    parser.add_argument("--steps", type=_positive, default=200, metavar="N", help="of training (200)")
    parser.add_argument("--lr", type=float, default=0.03, metavar="X", help="length of the longest step (0.03)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(0)")
    parser.add_argument(
        "--corpora", nargs="+", metavar="TEXT", help="what the student was trained on (as its run says, or built in)"
    )
    parser.add_argument("--output", metavar="FOLDER", help="of the new student (a run of its own in lightning_logs/)")
    _common(parser, ("sleeping", "sleep"))


def _consolidate(parser: _Parser) -> None:
    """What `dmt consolidate` takes; each option is a setting of `distill.py`."""
    parser.add_argument("text", nargs="?", help="the context; or --file")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="any setting of distill.py")
    parser.add_argument("--file", metavar="TEXT.txt", help="that holds the context")
    parser.add_argument("--questions", metavar="FILE.jsonl", help='asked before and after: {"prompt": ..., "answer": ...} a line')
    parser.add_argument("--into", metavar="WHERE", help="memory (default), weights or tokens")
    parser.add_argument("--objective", metavar="WHAT", help="causal_lm, logits, hidden_last, hidden_all or generated (default)")
    parser.add_argument("--write", metavar="HOW", help="into memory: difference (default), gradient or trained")
    parser.add_argument("--weights", metavar="WHICH", help="into weights: lora (default), all or slots")
    for name, what in (
        ("rank", "of lora (8)"),
        ("tokens", "into tokens: how many (16)"),
        ("steps", "of training (200)"),
        ("seed", "(0)"),
    ):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=what)
    for name, what in (("lr", "peak learning rate (0.002)"), ("temperature", "of both sides in the loss (1)")):
        parser.add_argument(f"--{name}", type=float, metavar="X", help=what)
    parser.add_argument("--model", metavar="NAME", help="instead of a student: embedded, smollm2, a folder, a hub name")
    _common(parser, ("consolidating", "consolidate"))


def _options(made: dict[str, _Parser]) -> None:
    """What each verb takes."""
    for verb in ("list", "forget", "export"):
        _selection(made[verb])
    for verb in ("list", "forget", "evict", "export"):
        made[verb].add_argument("--rows", action="store_true", help="rows of associative memory, not facts")
    made["list"].add_argument("--all", action="store_true", help="those that were forgotten, replaced or evicted, too")
    for verb, limit in (("list", 50), ("search", 5), ("diff", 50)):
        made[verb].add_argument("--limit", type=_positive, default=limit, metavar="N", help=f"most that are shown ({limit})")
    made["show"].add_argument("number", nargs="?", type=int, help="of a fact")
    made["show"].add_argument("--slot", metavar="LAYER:NUMBER", help="a slot instead")
    made["search"].add_argument("text", help="words, or a question up to its answer")
    made["read"].add_argument("text", help="what is read")
    made["read"].add_argument("--layers", metavar="WHICH", help="such as last, 3 or 0-2 (all)")
    _depth(made["read"])
    write = made["write"]
    write.add_argument("sentence", nargs="?", help="states the fact; its last name, number or word is the answer")
    write.add_argument("--prompt", help="the text that asks, if not found in the sentence rightly")
    write.add_argument("--answer", help="what follows it")
    write.add_argument("--subject", help="whom it is about, as in the prompt; '' for nobody in particular")
    write.add_argument("--file", metavar="FACTS.jsonl", help='a fact a line: {"sentence": ...} or {"prompt": ..., "answer": ...}')
    write.add_argument("--tag", default="", help="what it is filed under")
    write.add_argument("--source", default="", help="where it comes from")
    write.add_argument("--rate", type=float, default=0.01, help="share of places that may answer unasked (0.01)")
    write.add_argument("--calibrate-on", metavar="TEXT", help="held-out text for the first fact's measurement (built-in speeches)")
    made["restore"].add_argument("number", type=int, help="of a fact")
    made["evict"].add_argument("--keep", type=int, required=True, metavar="N", help="how many stay (with --rows: in each layer)")
    made["export"].add_argument("pack", help="a .safetensors file or a folder to make")
    made["export"].add_argument("--licence", default="", help="under which it is given")
    made["import"].add_argument("pack", help="a .safetensors file or a folder")
    made["merge"].add_argument("packs", nargs="+", metavar="PACK")
    made["merge"].add_argument("-o", "--output", required=True, metavar="PACK", help="the pack to make")
    made["merge"].add_argument("--prefer", choices=("newest", "first"), default="newest", help="of two that contradict (newest)")
    for verb in ("export", "merge"):
        made[verb].add_argument("--name", help="of the pack (its file's)")
    made["diff"].add_argument("first", help="a pack, student or run")
    made["diff"].add_argument("second", help="another")


def _selection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--id", type=int, action="append", metavar="N", help="of this number; may be repeated")
    parser.add_argument("--tag", help="filed under this")
    parser.add_argument("--query", metavar="WORDS", help="whose sentence or subject has all these words")


def _depth(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--most", type=_positive, default=3, metavar="N", help="slots and rows shown of a token and layer (3)")
    parser.add_argument("--lens", type=_positive, default=3, metavar="N", help="tokens of the vocabulary shown of each (3)")


def _common(parser: argparse.ArgumentParser, does: tuple[str, str], student: bool = True) -> None:
    parser.set_defaults(does=does)
    if student:
        parser.add_argument("-s", "--student", metavar="FOLDER", help="a run or a saved student (the newest run)")
    parser.add_argument("--json", action="store_true", help="one JSON document, for programs")


def _positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word} is not 1 or more")
    return number
