"""Commands beside a store of many facts, and beside an empty one.

    python -m benchmarks.many_facts [--facts 100000] [--repeats 3]

The student is the embedded teacher, converted without training. The facts go into its store without
the model: they are about made-up people, and share the rows of one that was written. Each command
runs in a new process; processor seconds and peak memory are medians, ratios and differences are to
the same command beside a store without facts. `write` is of one fact, `write many` of 1,000, which
gives the facts per second. Lookups are of eight names, as for one token, and of 10,000 names, as
for a long prompt; one in a hundred is a subject.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks.tables import Row, table

import dmt
from dmt.config import FeaturalConfig
from dmt.editing.edit import FALSE_POSITIVE_RATE, make_record
from dmt.editing.fact import parse_fact
from dmt.editing.fact_store import FactStore
from dmt.models.loading import load_teacher
from dmt.paths import FACTS_FILE
from dmt.store import RowStore
from dmt.store.fact_index import FactIndex
from dmt.store.facts import FactTable
from dmt.text import fold_text

SOURCE = Path(__file__).parents[1] / "src"
BATCH_SIZE = 1_000
WRITTEN = 1_000  # facts of `write many`
SYLLABLES = ("bo", "da", "fe", "gu", "ka", "li", "mo", "ne", "ru", "sha", "ti", "vo", "wen", "zar")
LOAD_MODEL = "import dmt, transformers; transformers.AutoModelForCausalLM.from_pretrained({!r})"


# A small process between this one and the command: a process begins with its parent's peak.
MEASURE = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(usage.ru_utime + usage.ru_stime, usage.ru_maxrss, file=sys.stderr)
sys.exit(code)
"""


def make_name(number: int) -> str:
    """Return a name of two words, another for each number."""
    words = [""]
    for position in range(6):
        number, syllable = divmod(number, len(SYLLABLES))
        words[-1] += SYLLABLES[syllable]
        if position == 2:
            words.append("")
    return " ".join(word.capitalize() for word in words) + (f" {number}" if number else "")


def make_sentence(number: int) -> str:
    """Return a fact about the person with this number."""
    return f"The birthplace of {make_name(number)} is Ravenhill."


def make_student(folder: Path) -> None:
    """Save a student whose store has been prepared for facts and has none."""
    teacher, tokenizer = load_teacher("embedded")
    dmt.convert(teacher, FeaturalConfig(k=32)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with FactStore.open(folder) as memory:
        memory.purge(memory.write(make_sentence(0)).fact.id)


def fill_store(folder: Path, count: int) -> tuple[float, int]:
    """Insert facts without the model; return processor seconds and bytes of the store."""
    with FactStore.open(folder) as memory:
        fact = memory.write(make_sentence(0)).fact
        (stored,) = memory.fact_table.load_rows([fact])
    start = time.process_time()
    with RowStore(str(folder / FACTS_FILE)) as store:
        fact_table = FactTable(store)
        for first in range(1, count, BATCH_SIZE):
            entries = []
            for number in range(first, min(first + BATCH_SIZE, count)):
                parsed = parse_fact(make_sentence(number), None, None, None, "", "")
                record = make_record(parsed, fact.answer_ids, FALSE_POSITIVE_RATE)
                entries.append((replace(record, id=0), stored.keys, stored.values))
            fact_table.add(entries)
    return time.process_time() - start, (folder / FACTS_FILE).stat().st_size


def run_process(*arguments: str) -> tuple[float, float, str]:
    """Return processor seconds, peak memory in MB, and the output of a new process."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-c", MEASURE, sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed: {process.stderr}")
    seconds, kilobytes = process.stderr.splitlines()[-1].split()
    return float(seconds), int(kilobytes) / 1024, process.stdout


def measure_commands(folder: Path, first: int) -> dict[str, tuple[float, float]]:
    """Run each command once, with facts about people from the number `first` on.

    Returns:
        Processor seconds and peak memory in MB by command.
    """

    def run_dmt(*arguments: str) -> tuple[float, float, str]:
        return run_process("-m", "dmt", *arguments, "--json", "--model", str(folder))

    figures = {}
    new = run_dmt("memory", "write", make_sentence(first))
    fact_id = str(json.loads(new[2])[0]["fact"]["id"])
    figures["memory write"] = new[:2]
    prompt = make_sentence(first).removesuffix(" Ravenhill.")
    generated = run_dmt("generate", prompt, "--max-new-tokens", "10")
    assert "Ravenhill" in generated[2], generated[2]
    figures["generate"] = generated[:2]
    figures["from_pretrained"] = run_process("-c", LOAD_MODEL.format(str(folder)))[:2]
    figures["memory list"] = run_dmt("memory", "list", "--id", fact_id)[:2]
    figures["memory forget"] = run_dmt("memory", "forget", "--id", fact_id)[:2]
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        for number in range(first + 1, first + 1 + WRITTEN):
            print(json.dumps({"sentence": make_sentence(number), "tag": "many"}), file=file)
        file.flush()
        figures["memory write many"] = run_dmt("memory", "write", "--file", file.name)[:2]
    run_dmt("memory", "forget", "--tag", "many")
    return figures


def measure_lookups(folder: Path, count: int) -> list[Row]:
    """Return a row for each kind of lookup: milliseconds when first asked, and asked again."""
    store = RowStore(str(folder / FACTS_FILE), read_only=True)
    start = time.process_time()
    FactIndex(FactTable(store)).lookup(["nobody"])
    rows: list[Row] = [{"lookup": "opening", "ms": 1e3 * (time.process_time() - start)}]
    for size in (8, 10_000):
        names = [f"no one {number}" for number in range(size - size // 100)]
        names += [fold_text(make_name(count - 1 - number)) for number in range(size // 100)]
        index = FactIndex(FactTable(store))
        index.lookup(["nobody"])

        def look_up(index: FactIndex = index, names: list[str] = names) -> None:
            assert len(index.lookup(names)) == len(names) // 100

        for times in ("first", "again"):
            rows.append({"lookup": f"{size:,} names, {times}", "ms": 1e3 * _timed(look_up)})
    return rows


def compare(folders: dict[int, Path], repeats: int) -> list[Row]:
    """Return a row for each number of facts and command, with ratios to no facts."""
    runs: dict[int, list[dict[str, tuple[float, float]]]] = {count: [] for count in folders}
    for repeat in range(repeats):
        for count, folder in folders.items():  # interleaved
            first = max(folders) + repeat * (WRITTEN + 1)
            runs[count].append(measure_commands(folder, first))
    rows = []
    for command in runs[0][0]:
        seconds, peak = (
            {
                count: statistics.median(figures[command][figure] for figures in results)
                for count, results in runs.items()
            }
            for figure in (0, 1)
        )
        for count in folders:
            rows.append(
                {
                    "command": command,
                    "facts": count,
                    "cpu s": seconds[count],
                    "ratio": seconds[count] / seconds[0],
                    "peak MB": peak[count],
                    "MB more": peak[count] - peak[0],
                }
            )
            if command == "memory write many":
                one = statistics.median(results["memory write"][0] for results in runs[count])
                rows[-1]["facts/s"] = WRITTEN / (seconds[count] - one)
    return rows


def _timed(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--facts", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dmt-") as scratch:
        folders = {count: Path(scratch) / str(count) for count in (0, args.facts)}
        for folder in folders.values():
            make_student(folder)
        seconds, size = fill_store(folders[args.facts], args.facts)
        print(f"{args.facts:,} facts put in in {seconds:.0f} cpu s, {size / 1e6:,.0f} MB on disk\n")
        print(table(measure_lookups(folders[args.facts], args.facts)), flush=True)
        print(f"\n{table(compare(folders, args.repeats))}")


if __name__ == "__main__":
    main()
