"""What runs on the CPU runs on a GPU too: shown on a second device that is made of CPU tensors.

Each test runs one case of device_cases.py in a process of its own, because the device patches
torch.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from factories import CACHED, OFFLOADED, ROWS

ROOT = Path(__file__).parents[1]
CASES = Path(__file__).with_name("device_cases.py")
# Kinds of memory by layer.
ROUTED = (
    "student.layer_overrides=[{layers: 0, memory: {kind: experts, expert_size: 4}}, {layers: 1, "
    "memory: {kind: peer, heads: 2, k: 8}}, {layers: 2, memory: {kind: product_key, k: 8}}]"
)
FITTED = (
    "student.layer_overrides=[{layers: 0, memory: {kind: transcoder, k: 8}}, {layers: 1, memory: "
    "{kind: low_rank}}, {layers: 2, memory: {kind: pruned, num_slots: 8}}]"
)

LOOKUPS = (
    "student.layer_overrides=[{layers: 0, memory: {kind: token}}, {layers: 1, memory: {kind: ngram,"
    " num_rows: 50}}, {layers: 2, memory: {kind: sum, parts: [{kind: featural, k: 8}, {kind: ngram,"
    " num_rows: 50, learn_rows: true}]}}]"
)
LOOKUPS_IN_A_FILE = (
    "student.layer_overrides=[{layers: 0, memory: {kind: token, value_dtype: int8}}, {layers: 1-2, "
    "memory: {kind: ngram, num_rows: 50, offload: values, value_dtype: int8}}]"
)


def run_case(name, *arguments, device="cuda"):
    """Run a case on the device; return what it printed."""
    process = subprocess.run(
        [sys.executable, "-W", "ignore", str(CASES), device, name, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


def test_a_run_trains_as_on_the_cpu(artifacts_dir):
    """Calibration, both stages, a checkpoint, evaluation and the report."""
    result = run_case("distill", artifacts_dir)
    assert result["rows"] >= 3
    assert result["different"] == []


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param([*CACHED], id="cached-teacher"),
        pytest.param([*ROWS, "stages.end_to_end_steps=3"], id="stored-rows"),
        pytest.param(["memory.search=int8"], id="int8-keys"),
        pytest.param([*OFFLOADED, "memory.value_dtype=int8"], id="int8-values-in-a-file"),
        pytest.param(
            [*OFFLOADED, "memory.offload=slots", "memory.search=int8"], id="slots-in-a-file"
        ),
        pytest.param([ROUTED], id="kinds-with-a-router"),
        pytest.param([FITTED], id="kinds-that-are-fitted"),
        pytest.param([LOOKUPS], id="lookups"),
        pytest.param([LOOKUPS_IN_A_FILE], id="lookups-in-a-file"),
    ],
)
def test_runs_of_each_kind_train_as_on_the_cpu(artifacts_dir, arguments):
    assert run_case("distill", artifacts_dir, *arguments)["different"] == []


def test_bfloat16_is_chosen_and_trains(artifacts_dir):
    result = run_case("half_precision", artifacts_dir)
    full, half = result["losses"]
    assert result["precision"]
    assert half == pytest.approx(full, rel=0.05)
    assert half != full


def test_a_resumed_run_with_stored_rows_ends_with_equal_weights(artifacts_dir):
    assert run_case("resume", artifacts_dir) == {"checkpoints": 2, "different": []}


def test_facts_are_written_and_asked_for_as_on_the_cpu(artifacts_dir):
    outputs = run_case("write_facts", artifacts_dir)
    assert outputs["cuda"] == outputs["cpu"]
    answer, *_, answer_without_facts, num_rows = outputs["cuda"]
    assert answer != answer_without_facts
    assert num_rows > 0


def test_a_text_is_written_into_stored_rows_as_on_the_cpu(artifacts_dir):
    outputs = run_case("write_rows", artifacts_dir)
    assert outputs["cuda"] == outputs["cpu"]
    assert outputs["cuda"][0] > 0


def test_rows_are_inserted_merged_and_evicted_as_on_the_cpu():
    outputs = run_case("insert_rows")
    on_cpu, at_once, in_parts = outputs["waits"]
    assert (on_cpu, at_once) == (0, 2)  # for all memories together: what to insert, and its states
    assert in_parts > at_once
    for name in ("at once", "in parts"):
        for memory, expected in zip(outputs[name], outputs["cpu"], strict=True):
            ids, host_ids, *_ = memory
            assert ids == host_ids
            assert max(ids) > 40  # rows were evicted
            assert max(expected[4]) > 1  # and merged
            for values, expected_values in zip(memory, expected, strict=True):
                assert values == pytest.approx(expected_values, rel=1e-5, abs=1e-6)


def test_the_host_waits_at_most_so_often(tmp_path):
    """`benchmarks/host_waits.py` counts; nobody should add a wait without noticing."""
    path = tmp_path / "waits.json"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.host_waits", "--json", str(path)],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    waits = {row["what"]: row["waits"] for row in json.loads(path.read_text(encoding="utf-8"))}
    limits = {
        "step: default, layerwise": 1,
        "step: default, end_to_end": 1,
        "step: default, end_to_end, logged": 2,
        "step: cached, end_to_end": 1,
        "step: associative, end_to_end": 3,
        "token: teacher, dense": 1,  # by transformers
        "token: student, threshold": 1,
        "token: student, top k": 1,
        "token: student, stored rows": 1,
        "token: student with a fact, nobody named": 2,
    }
    assert {name: waits[name] for name in limits if waits[name] > limits[name]} == {}


def test_students_load_and_move_in_every_way(artifacts_dir):
    """Students with facts, with values in a file, and with stored rows."""
    folders = [artifacts_dir / "logs" / f"version_{run}" / "student" for run in range(3)]
    assert run_case("load_students", *folders) == []
