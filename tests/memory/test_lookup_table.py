"""Rows that are read by number from a file: outputs, costs, reading ahead, and errors."""

import copy
import json
import pickle

import pytest
import torch
from conftest import LAYERS, WIDTH, make_llama, make_teacher, newest
from test_mmap_tensors import assert_same, save_and_load
from transformers import AutoModelForCausalLM

import dmt
from dmt.cli import main
from dmt.cli.main import distill_main
from dmt.errors import UserError
from dmt.evaluation.cost import measure_costs, sum_costs
from dmt.memory import mmap_tensors
from dmt.memory.lookup_table import LookupTable
from dmt.memory.mmap_tensors import dequantize_rows, quantize_rows
from dmt.memory.slot_table import SlotTable
from dmt.models.external_tensors import SLOTS_FILE, measure_bytes

NUM_ROWS = 50


def make(family=make_teacher, kinds=("ngram",), **options):
    """Create a student whose parameters all differ from their initial values."""
    configs = {
        "token": dmt.TokenConfig(**options),
        "ngram": dmt.NgramConfig(num_rows=NUM_ROWS, **options),
        "featural": dmt.FeaturalConfig(k=8, **options),
        "experts": dmt.ExpertsConfig(k=8, expert_size=4, **options),
        "peer": dmt.PeerConfig(k=8, heads=2, **options),
        "product_key": dmt.ProductKeyConfig(k=8, silu_gate=True, **options),
        "transcoder": dmt.TranscoderConfig(k=8, **options),
    }
    parts = [configs[kind] for kind in kinds]
    student = dmt.convert(family(), parts[0] if len(parts) == 1 else dmt.SumConfig(parts=parts))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return student.eval()


def get_tables(student):
    return {
        name: module for name, module in student.named_modules() if isinstance(module, LookupTable)
    }


@torch.no_grad()
def round_rows(student):
    """Round the rows and slots of a student as saving does."""
    for module in student.modules():
        if isinstance(module, LookupTable | SlotTable):
            rows = module.rows if isinstance(module, LookupTable) else module.values
            encoded, scales = quantize_rows(rows, module.value_dtype)
            rows.copy_(dequantize_rows(encoded, scales, torch.float32))
    return student


@pytest.mark.parametrize("offload", ["none", "values"])
@pytest.mark.parametrize("value_dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("family", [make_teacher, make_llama])
@pytest.mark.parametrize(
    "kinds",
    [
        ("token",),
        ("ngram",),
        ("featural", "ngram", "token"),
        ("product_key",),
        ("transcoder",),
    ],
)
def test_a_loaded_student_computes_what_the_saved_one_did(
    tokens, tmp_path, kinds, family, value_dtype, offload
):
    student = make(family, kinds, value_dtype=value_dtype, offload=offload)
    loaded = save_and_load(student, tmp_path)
    assert_same(round_rows(student), loaded, tokens)
    assert_same(loaded, copy.deepcopy(loaded), tokens)
    assert_same(loaded, pickle.loads(pickle.dumps(loaded)), tokens)
    assert_same(loaded, save_and_load(loaded, tmp_path / "again"), tokens)


@pytest.mark.parametrize("offload", ["none", "values"])
@pytest.mark.parametrize("value_dtype", ["float16", "int8"])
@pytest.mark.parametrize("family", [make_teacher, make_llama])
@pytest.mark.parametrize("kind", ["experts", "peer"])
def test_a_loaded_student_of_neurons_gathers_what_was_multiplied(
    tokens, tmp_path, kind, family, value_dtype, offload
):
    """In RAM, all neurons of many tokens are multiplied at once, so sums round differently."""
    student = make(family, (kind,), value_dtype=value_dtype, offload=offload)
    loaded = save_and_load(student, tmp_path)
    with torch.no_grad():
        expected, actual = (model(tokens).logits for model in (round_rows(student), loaded))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert_same(loaded, save_and_load(loaded, tmp_path / "again"), tokens)
    names = [name for name in student.state_dict() if name not in loaded.state_dict()]
    assert len(names) == LAYERS
    assert all(name.endswith(".values") for name in names)


def test_rows_on_disk_are_not_in_ram_and_are_counted(tokens, tmp_path):
    student = make(kinds=("featural", "ngram"), offload="values", value_dtype="int8")
    loaded = save_and_load(student, tmp_path)
    tables = get_tables(loaded)
    assert not {f"{name}.rows" for name in tables} & set(loaded.state_dict())
    num_rows = sum(table.num_rows for table in tables.values())
    assert num_rows == sum(len(table.rows) for table in get_tables(student).values())
    assert {table.rows.dtype for table in tables.values()} == {torch.int8}
    table_bytes = num_rows * WIDTH // 2
    featural = [memory for memory in loaded.modules() if isinstance(memory, dmt.FeaturalMemory)]
    slot_bytes = sum(memory.external_sizes()["disk"] for memory in featural)
    assert measure_bytes(loaded)["disk"] == table_bytes + slot_bytes
    cost, in_ram = (
        sum_costs(measure_costs(model, tokens[0]).values()) for model in (loaded, student)
    )
    assert cost.disk_bytes == table_bytes + slot_bytes
    assert cost.parameters == in_ram.parameters
    assert in_ram.ram_bytes - cost.ram_bytes > 3 * table_bytes, "rows were in float32"
    assert cost.read_bytes["int8"] > 0


def test_rows_in_fewer_bits_may_stay_in_ram(tmp_path):
    loaded = save_and_load(make(value_dtype="int8"), tmp_path)
    tables = get_tables(loaded).values()
    assert measure_bytes(loaded)["disk"] == 0
    assert all(
        table.external_sizes()["ram"] == table.num_rows * (table.width + 4) for table in tables
    )


def test_a_student_that_reads_a_file_is_not_trained(tokens, tmp_path):
    student = make(offload="values")
    loaded = save_and_load(student, tmp_path)
    with pytest.raises(UserError, match="offload=values and value_dtype=float32"):
        loaded.train()
    student.train()(tokens, labels=tokens).loss.backward()
    assert all(table.rows.grad is not None for table in get_tables(student).values())


def test_the_file_of_another_student_is_refused(tmp_path):
    for name in ("one", "two"):
        make(offload="values").save_pretrained(tmp_path / name)
    (tmp_path / "one" / SLOTS_FILE).replace(tmp_path / "two" / SLOTS_FILE)
    for name, message in (("one", "does not exist"), ("two", "belongs to another student")):
        with pytest.raises(UserError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path / name)


@pytest.mark.parametrize("kinds", [("token",), ("ngram",), ("featural", "ngram")])
def test_exactly_the_rows_of_a_pass_are_read_ahead(tokens, tmp_path, monkeypatch, kinds):
    advised, read = set(), set()

    def record_advice(address, num_bytes, advice):
        assert advice == "MADV_WILLNEED"
        assert not read - earlier, "all layers read ahead before one reads"
        advised.add((address, num_bytes))

    def record_rows(table, args):
        step = table.rows.stride(0) * table.rows.itemsize
        read.update((table.rows.data_ptr() + step * row, step) for row in args[0].unique().tolist())

    loaded = save_and_load(make(kinds=kinds, offload="values"), tmp_path / "disk")
    in_ram = save_and_load(make(kinds=kinds, value_dtype="int8"), tmp_path / "ram")
    monkeypatch.setattr(mmap_tensors, "_advise_range", record_advice)
    for table in get_tables(loaded).values():
        table.register_forward_pre_hook(record_rows)
    for part in (tokens[:, 2:10], tokens[:1, :1]):
        earlier = set(read)
        with torch.no_grad():
            loaded(part)
            num_advised = len(advised)
            in_ram(part)
        assert len(advised) == num_advised
        first_rows = {
            table.rows[head * table.num_rows // 2].data_ptr()
            for table in get_tables(loaded).values()
            for head in range(2)
        }
        assert advised <= read
        assert {address for address, _ in read - advised} <= first_rows, "read as nothing"


def test_a_table_without_its_file_says_so():
    table = LookupTable(3, 2, offload="values")
    table.release_tensors()
    with pytest.raises(UserError, match="not open"):
        table(torch.tensor([0]), torch.float32)


def test_a_run_saves_lookups_on_disk_and_measures_the_loaded_student(
    distill_args, tmp_path, capsys
):
    lookup = "{kind: ngram, num_rows: 50, offload: values, value_dtype: int8}"
    memory = f"memory={{kind: sum, parts: [{{kind: featural}}, {lookup}]}}"
    assert distill_main([*distill_args, memory]) == 0
    run_dir = newest(tmp_path)
    student, _ = dmt.load(run_dir)
    sizes = json.loads((run_dir / "run.json").read_text())
    assert sizes["bytes"]["student_offloaded"] == measure_bytes(student)["disk"] > 0
    assert sizes["costs"]["total"]["disk_bytes"] == measure_bytes(student)["disk"]
    capsys.readouterr()
    for command in (["generate", "the fox"], ["memory", "trace", "the fox"]):
        assert main.main([*command, "--model", str(run_dir)]) == 0
    assert main.main(["memory", "stats", "--json", "--model", str(run_dir)]) == 0
    assert "bytes_on_disk" in capsys.readouterr().out
