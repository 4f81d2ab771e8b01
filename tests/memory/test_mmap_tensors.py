"""Slots in a file: the same answers as from RAM, rows read where they are asked for, and refusals in one line."""

import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import POSITIONS, WIDTH, make_llama, make_teacher, newest
from conftest import SLOTS as NEURONS
from safetensors import safe_open
from test_featural import KINDS
from transformers import AutoModelForCausalLM

import dmt
from dmt.cli.main import distill_main
from dmt.config import MEMORY_CONFIGS, DenseConfig
from dmt.config_io import load_config
from dmt.editing.edit import solve_value
from dmt.errors import UserError
from dmt.evaluation.metrics import measure_sizes as reported
from dmt.evaluation.trace import trace
from dmt.memory import FeaturalMemory, featural, mmap_tensors
from dmt.memory.mmap_tensors import (
    MmapTensorFile,
    TensorSpec,
    dequantize_rows,
    make_spec,
    quantize_rows,
    write_tensor_file,
)
from dmt.models import external_tensors
from dmt.models.conversion import convert_blocks, get_associative_memories, get_featural_memories
from dmt.models.fingerprint import hash_model

assert dmt
GENERATED = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
DISKS = ["values", "slots"]


def make(family=make_teacher, threshold=0.3, **changes):
    """A student with nothing left at a value that a fresh model has too."""
    settings = {
        "mean_k": None if "k" in changes else 8,
        "search": "int8" if changes.get("offload") == "slots" else "exact",
    } | changes
    config_class = MEMORY_CONFIGS[settings.pop("kind", "featural")]
    memory = config_class(**settings)
    student, _ = convert_blocks(family(), [memory, DenseConfig(), memory])
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
        for part in get_featural_memories(student).values():
            if part.metric is not None:
                part.metric.add_(0.1 * torch.randn_like(part.metric))
            if part.threshold is not None:
                part.threshold.fill_(threshold)
    for associative in get_associative_memories(student).values():
        associative.writing = True
    return student.eval()


@torch.no_grad()
def rounded(student):
    """The same student with each value rounded as it is kept."""
    for memory in get_featural_memories(student).values():
        rows, scales = quantize_rows(memory.values, memory.value_dtype)
        memory.values.copy_(dequantize_rows(rows, scales, torch.float32))
    return student


def saved(student, folder, dtype=torch.float32):
    student.save_pretrained(folder)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True
        )
    assert not [
        str(each.message)
        for each in said
        if "slots" in str(each.message) or "buffer" in str(each.message)
    ]
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    for part in (*model.parameters(), *model.buffers()):
        part.data = part.data.clone()  # weights begin where the file has them, and sums of one token depend on that in the last bit
    return model


@torch.no_grad()
def assert_same(one, other, tokens):
    """Logits of whole windows, of one token, of two; generated from caches, alone and together: all to the last bit."""
    for given in (tokens, tokens[:1], tokens[:1, :1], tokens[:2, :1]):
        assert torch.equal(one(given).logits, other(given).logits)
    for prompts in (tokens[:1, :6], tokens[:, :6]):
        mask = torch.ones_like(prompts)
        said = [model.generate(prompts, attention_mask=mask, **GENERATED) for model in (one, other)]
        assert torch.equal(*said)
    assert one(tokens).logits.isfinite().all()


@pytest.mark.parametrize("value_type", ["float32", "float16", "int8"])
@pytest.mark.parametrize("family", [make_teacher, make_llama])
@pytest.mark.parametrize(
    "changes",
    [
        {"offload": "none"},
        {"offload": "values"},
        {"offload": "slots"},
        {"offload": "values", "k": 8},
        {"offload": "slots", "k": 8},
        {"offload": "values", "selection": "centered", "projections": True, "heads": 2},
        {"offload": "slots", "selection": "centered"},
        {"offload": "values", "search": "int8"},
        {"offload": "values", "search": "ivf"},
        {"offload": "values", "search": "ivf", "k": 8},
        {"offload": "values", "kind": "associative"},
        {"offload": "slots", "kind": "associative"},
    ],
    ids=str,
)
def test_a_student_in_a_file_says_what_it_said(family, changes, value_type, tokens, tmp_path):
    if family is make_llama and changes.get("search") == "ivf":
        pytest.skip("one key")
    student = make(family, value_dtype=value_type, **changes)
    loaded = saved(student, tmp_path)
    assert_same(loaded, rounded(student), tokens)


@pytest.mark.parametrize("value_type", ["float32", "float16", "int8"])
@pytest.mark.parametrize(("weighting", "ranking"), KINDS)
@pytest.mark.parametrize("disk", DISKS)
@torch.no_grad()
def test_every_kind_of_memory_reads_a_file(
    weighting, ranking, disk, value_type, tmp_path, monkeypatch
):
    if disk == "slots" and weighting == "distance":
        pytest.skip("refused")
    monkeypatch.setattr(
        mmap_tensors, "MAX_CONVERTED_VALUES", 5 * 16
    )  # so that sums are made in several pieces
    how = {
        "activation": weighting,
        "selection": ranking,
        "value_dtype": value_type,
        "offload": disk,
    }
    how |= {"metric": "fisher", "search": "int8" if disk == "slots" else "exact"}
    there = FeaturalMemory(16, 64, 8, **how).eval()
    there.values.normal_()
    there.metric.normal_()
    if there.means is not None:
        there.means.normal_()
    write_tensor_file(
        tmp_path / "slots", {f"m.{name}": table for name, table in there.export_specs().items()}
    )
    there.values.copy_(dequantize_rows(*quantize_rows(there.values, value_type), torch.float32))
    other = FeaturalMemory(16, 64, 8, **how).eval()
    other.load_state_dict(
        {
            **other.state_dict(),
            **{k: v for k, v in there.state_dict().items() if k not in there.external_names},
        }
    )
    other.release_tensors()
    assert not set(there.external_names) & set(other.state_dict())
    other.attach_file(MmapTensorFile(tmp_path / "slots"), "m")
    for tokens in (1, 2, 40, *([] if weighting == "distance" else [0])):
        hidden = torch.randn(tokens, 16)
        assert torch.equal(there(hidden), other(hidden))
        if tokens:
            for mine, theirs in zip(
                there.select_with_weights(hidden), other.select_with_weights(hidden), strict=True
            ):
                assert torch.equal(mine, theirs)
            with torch.enable_grad():
                hidden.requires_grad_(True)
                directions = torch.randn(tokens, 16)
                grads = [
                    torch.autograd.grad((memory(hidden) * directions).sum(), hidden)[0]
                    for memory in (there, other)
                ]
            torch.testing.assert_close(*grads)
            torch.testing.assert_close(other(hidden.detach()), other.forward(hidden).detach())
    assert torch.equal(other.value_norms(), there.value_norms())
    assert torch.equal(other.constant_output(), there.constant_output())
    assert 0 <= other.measure_recall(torch.randn(9, 16)) <= 1


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_slots_on_the_disk_are_found_by_codes_and_weighed_exactly(tokens, grad):
    memory = FeaturalMemory(16, 256, 8, search="int8", offload="slots").eval()
    hidden = torch.randn(tokens, 16)
    with torch.set_grad_enabled(grad):
        assert memory._uses_candidates(tokens)
        assert memory.train()._looks_up(tokens) == (tokens < 16 and not grad)
        memory.eval()
        chosen = memory.select_slots(hidden)
        wanted = (
            memory.compute_weights(hidden, memory.compute_scores(hidden)) * chosen
        ) @ memory.values + memory.constant_output()
        torch.testing.assert_close(memory(hidden), wanted)


def test_rows_are_converted_so_many_at_a_time(monkeypatch):
    monkeypatch.setattr(mmap_tensors, "MAX_CONVERTED_VALUES", 5 * 16)
    table, asked = torch.randn(64, 16), []
    ids, weights = torch.randint(0, 64, (9, 3)), torch.randn(9, 3)
    said = mmap_tensors.sum_embedding_bags(
        lambda rows: asked.append(len(rows)) or table[rows], 16, ids, weights
    )
    torch.testing.assert_close(said, (table[ids] * weights.unsqueeze(-1)).sum(1))
    assert len(asked) == 9
    assert max(asked) <= 5
    wide = mmap_tensors.sum_embedding_bags(
        lambda rows: table[rows], 16, torch.randint(0, 64, (2, 40)), torch.ones(2, 40)
    )  # one bag is more than that
    assert wide.shape == (2, 16)


def test_rounding_is_as_stated(tokens):
    values = torch.randn(50, 16) * torch.logspace(-3, 3, 50).unsqueeze(-1)
    values[7] = 0
    for kind, bound in (("float32", 0.0), ("float16", 2.0**-11), ("int8", 0.5 / 127)):
        rows, scales = quantize_rows(values, kind)
        error = (dequantize_rows(rows, scales, torch.float32) - values).abs()
        assert (
            error
            <= bound * values.abs().amax(-1, keepdim=True) * 1.001 + 2**-24 * (kind == "float16")
        ).all()
        assert rows.element_size() == {"float32": 4, "float16": 2, "int8": 1}[kind]
        assert error.any() == (kind != "float32")
    assert quantize_rows(values, "int8")[0].abs().amax(-1)[0] == 127


def test_a_rounded_student_is_near(tokens, tmp_path):
    plain = make(k=NEURONS)
    near = []
    for kind in ("float16", "int8"):
        torch.manual_seed(0)
        loaded = saved(make(k=NEURONS, value_dtype=kind), tmp_path / kind)
        torch.manual_seed(0)
        plain = make(k=NEURONS)
        with torch.no_grad():
            near.append(
                float(
                    (loaded(tokens).logits - plain(tokens).logits).norm()
                    / plain(tokens).logits.norm()
                )
            )
    assert 0 < near[0] < 1e-3
    assert near[0] < near[1] < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("disk", DISKS)
def test_a_model_in_half_precision_reads_the_file(dtype, disk, tokens, tmp_path):
    student = make(k=NEURONS, offload=disk)
    half = saved(student, tmp_path, dtype)
    with torch.no_grad():
        said, wanted = half(tokens).logits.float(), student(tokens).logits
        alone = half(tokens[:1, :1]).logits
    assert (said - wanted).norm() < 0.1 * wanted.norm()
    assert alone.dtype == dtype


@pytest.mark.parametrize("disk", DISKS)
def test_saved_again_it_is_the_same(disk, tokens, tmp_path):
    student = make(offload=disk, value_dtype="int8")
    once = saved(student, tmp_path / "one")
    before = (tmp_path / "one" / external_tensors.SLOTS_FILE).read_bytes()
    again = saved(once, tmp_path / "two")
    assert_same(once, again, tokens)
    assert (tmp_path / "two" / external_tensors.SLOTS_FILE).read_bytes() == before
    inode = (tmp_path / "one" / external_tensors.SLOTS_FILE).stat().st_ino
    same = saved(once, tmp_path / "one")  # onto the file that is mapped
    assert (tmp_path / "one" / external_tensors.SLOTS_FILE).stat().st_ino == inode
    assert_same(once, same, tokens)
    saved(
        make(offload=disk, value_dtype="int8", threshold=0.1), tmp_path / "one"
    )  # another one in its place: a file of its own
    assert_same(once, again, tokens)
    assert hash_model(once) == hash_model(again)
    assert not list(tmp_path.rglob("*.partial"))


def test_a_student_in_ram_goes_on_after_it_was_saved(tokens, tmp_path):
    student = make(offload="values")
    loaded = saved(student, tmp_path)
    assert student.config.external_tensors is None
    assert (
        loaded.config.external_tensors
        == json.loads((tmp_path / "config.json").read_text())["slots"]
    )
    student.train()
    student(tokens, labels=tokens).loss.backward()
    assert get_featural_memories(student)[0].values.grad is not None
    student.eval()
    assert_same(saved(student, tmp_path), loaded, tokens)


def test_other_values_are_another_model(tmp_path):
    student = make(offload="values")
    before = hash_model(saved(student, tmp_path / "a"))
    with torch.no_grad():
        get_featural_memories(student)[2].values[5, 3] += 1
    assert hash_model(saved(student, tmp_path / "b")) != before


def test_what_is_in_the_file_is_not_among_the_weights(tmp_path):
    for disk, gone in (
        ("none", {"values"}),
        ("values", {"values", "metric"}),
        ("slots", {"values", "metric", "keys"}),
    ):
        student = make(offload=disk, value_dtype="float16")
        held = set(student.state_dict())
        loaded = saved(student, tmp_path / disk)
        parts = {f"transformer.h.{layer}.{block}" for layer, block in ((0, "mlp"), (2, "mlp"))}
        positions = {"transformer.wpe.weight"} if disk == "slots" else set()
        assert (
            held - set(loaded.state_dict())
            == {f"{part}.{name}" for part in parts for name in gone} | positions
        )
        with safe_open(tmp_path / disk / "model.safetensors", "pt") as weights:
            assert not {
                name for name in weights.keys() if name.rpartition(".")[2] in gone and "mlp" in name
            }  # noqa: SIM118
        with safe_open(
            tmp_path / disk / external_tensors.SLOTS_FILE, "pt"
        ) as file:  # which anybody's safetensors can read
            for part in parts:
                assert torch.equal(
                    file.get_tensor(f"{part}.values"), loaded.get_submodule(part).values
                )
    assert not (tmp_path / "plain").exists()
    make().save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / external_tensors.SLOTS_FILE).exists()
    assert (
        "slots" not in json.loads((tmp_path / "plain" / "config.json").read_text())
        or not make().config.external_tensors
    )


def test_sizes_are_counted_where_they_are(tmp_path):
    teacher, numbers = make_teacher(), {}
    for disk in ("none", "values", "slots"):
        loaded = saved(
            make(offload=disk, value_dtype="int8", skip_connection=False), tmp_path / disk
        )
        numbers[disk] = (
            external_tensors.measure_bytes(loaded),
            reported(teacher, loaded, tmp_path / disk),
        )
    table = 2 * NEURONS * WIDTH
    assert numbers["none"][0]["disk"] == 0
    assert "student_offloaded" not in numbers["none"][1]
    assert numbers["values"][0]["disk"] == table + 2 * 4 * WIDTH**2
    positions = 4 * POSITIONS * WIDTH
    assert numbers["slots"][0]["disk"] == table + 2 * 4 * WIDTH**2 + 4 * table + positions
    # what goes with the file in RAM: scales and lengths; and codes of keys with a scale for each
    assert numbers["none"][0]["ram"] - numbers["values"][0]["ram"] == table + 2 * 4 * WIDTH**2
    assert (
        numbers["values"][0]["ram"] - numbers["slots"][0]["ram"]
        == positions + 4 * table - table - 2 * 4 * NEURONS
    )
    for disk, (mine, said) in numbers.items():
        assert said.get("student_offloaded", 0) == mine["disk"]
        files = [
            tmp_path / disk / name for name in ("model.safetensors", external_tensors.SLOTS_FILE)
        ]
        assert said["student_on_disk"] == sum(file.stat().st_size for file in files)
    parameters = sum(p.numel() * 4 for p in loaded.parameters())
    kept = sum(memory.mmap_tensors.num_bytes for memory in get_featural_memories(loaded).values())
    assert numbers["slots"][1]["student"] == parameters + kept
    assert kept == table + 2 * 3 * 4 * NEURONS  # codes; scales of codes and of values, lengths


ANONYMOUS = """
import re, sys, torch
from pathlib import Path
from dmt.memory import FeaturalMemory
from dmt.memory.paging import Mapped
torch.set_num_threads(1)
def anonymous(): return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024
kind, disk = sys.argv[2:]
with torch.device("meta"):
    memory = FeaturalMemory(512, 32768, 32, value_type=kind, disk=disk, search="int8" if disk == "slots" else "exact").eval()
memory.leave()
memory.to_empty(device="cpu")
with torch.no_grad():
    for part in memory.parameters():
        part.zero_()
mapped = Mapped(Path(sys.argv[1]))
before = anonymous()
memory.take(mapped, "m")
taken = anonymous() - before
with torch.no_grad():
    for tokens in (1, 1, 20, 300):
        memory(torch.randn(tokens, 512))
    ids = torch.arange(32768)
    for part in ids.split(1000):
        memory.value_rows(part)
print(taken, anonymous() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc")
@pytest.mark.parametrize("kind", ["float32", "float16", "int8"])
def test_a_large_table_takes_no_memory_of_its_own(kind, tmp_path):
    dtype, of = (
        {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}[kind],
        (32_768, 512),
    )
    rows = torch.randint(-100, 100, (1024, 512)).to(dtype)
    tables = {
        "m.values": TensorSpec(dtype, of, (rows for _ in range(32))),
        "m.lengths": make_spec(torch.rand(32_768)),
    }
    if kind == "int8":
        tables["m.scales"] = make_spec(torch.rand(32_768))
    write_tensor_file(tmp_path / "file", tables)
    done = subprocess.run(
        [sys.executable, "-c", ANONYMOUS, tmp_path / "file", kind, "values"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    taken, after = map(float, done.stdout.split())
    assert taken < 4  # MB; the table has 16, 32 or 64
    # scores of 300 tokens, their masks and rows converted are freed again; some of it stays with the allocator
    assert after < taken + 200


def test_tables_are_mapped_and_the_file_is_never_written(tmp_path):
    loaded = saved(make(offload="slots"), tmp_path)
    before = (tmp_path / external_tensors.SLOTS_FILE).read_bytes()
    if sys.platform.startswith("linux"):
        with open("/proc/self/maps") as maps:
            spans = [
                line.split()[0].split("-")
                for line in maps
                if line.rstrip().endswith(str(tmp_path / external_tensors.SLOTS_FILE))
            ]
        for memory in get_featural_memories(loaded).values():
            for name in ("values", "keys", "metric"):
                place = getattr(memory, name).data_ptr()
                assert any(int(begin, 16) <= place < int(end, 16) for begin, end in spans), name
            place = (
                memory.mmap_tensors.key_codes.rows.data_ptr()
            )  # a quarter of the keys: what does not fit may be read again
            assert any(int(begin, 16) <= place < int(end, 16) for begin, end in spans)
            place = memory.mmap_tensors.value_norms.data_ptr()
            assert not any(int(begin, 16) <= place < int(end, 16) for begin, end in spans)
    with torch.no_grad():
        loaded(torch.zeros(1, 4, dtype=torch.long))
        assert not any(
            memory._tensor_cache._entries for memory in get_featural_memories(loaded).values()
        ), "nothing is made from whole tables"
        get_featural_memories(loaded)[0].values.zero_()
    assert (tmp_path / external_tensors.SLOTS_FILE).read_bytes() == before


def test_it_cannot_be_trained(tokens, tmp_path):
    for how in ({"offload": "values"}, {"offload": "slots"}, {"value_dtype": "int8"}):
        loaded = saved(make(**how), tmp_path)
        with pytest.raises(
            UserError, match=r"memory\.disk=none memory\.value_type=float32"
        ) as refused:
            loaded.train()
        assert "\n" not in str(refused.value)
        loaded.eval()
        loaded(tokens).logits.sum().backward()  # in eval mode what is not in the file has gradients
        assert loaded.get_input_embeddings().weight.grad.abs().sum() > 0


@pytest.mark.parametrize("disk", DISKS)
def test_a_fact_can_be_drafted_for_it(disk, tokens, tmp_path):
    student = make(offload=disk).requires_grad_(False)
    loaded = saved(student, tmp_path).requires_grad_(False)
    columns = torch.arange(5)
    found = [
        solve_value(
            model, tokens[:1], torch.zeros_like(columns), columns, tokens[0, 1:6], 1, 2
        ).values
        for model in (student, loaded)
    ]
    torch.testing.assert_close(
        *found, rtol=1e-4, atol=1e-4
    )  # with gradients, RAM multiplies by all values, the file sums those read


def test_inspection_is_the_same(tokenizer, tokens, tmp_path):
    for how in (
        {"offload": "values"},
        {"offload": "slots"},
        {"offload": "values", "k": 8, "projections": True},
    ):
        student = make(**how)
        found = [
            trace(model, tokenizer, tokens[0]) for model in (student, saved(student, tmp_path))
        ]
        assert found[0] == found[1]
        assert any(each.activations for each in found[0])
    nothing = make(offload="values", threshold=1e9)
    assert not any(each.activations for each in trace(nothing, tokenizer, tokens[0]))


def refusal(folder):
    with pytest.raises(UserError) as refused:
        AutoModelForCausalLM.from_pretrained(folder)
    assert "\n" not in str(refused.value)
    assert str(folder / external_tensors.SLOTS_FILE) in str(refused.value)
    return str(refused.value)


def test_a_file_that_is_missing_cut_short_or_foreign_is_refused_in_a_line(tmp_path):
    make(offload="values").save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / external_tensors.SLOTS_FILE
    good = file.read_bytes()
    for length in (0, 5, 8, 100, 4096, len(good) // 2, len(good) - 1):
        file.write_bytes(good[:length])
        assert "not a whole file" in refusal(tmp_path / "a")
    for wrong in (good + b"x", b"\xff" * 8 + good[8:], b"{}" * 3000):
        file.write_bytes(wrong)
        assert "not a whole file" in refusal(tmp_path / "a")
    for version, advice in (("2", "a newer dmt made it"), ("0", "save the student anew")):
        file.write_bytes(good.replace(b'"format": "1"', f'"format": "{version}"'.encode()))
        assert f"its format is {version}, this dmt knows 1; {advice}" in refusal(tmp_path / "a")
    file.write_bytes(good.replace(b'"F32"', b'"F99"', 1))
    assert "not a whole file" in refusal(tmp_path / "a")
    file.unlink()
    assert "is not there" in refusal(tmp_path / "a")
    torch.manual_seed(5)
    make(offload="values").save_pretrained(tmp_path / "b")
    shutil.copy(tmp_path / "b" / external_tensors.SLOTS_FILE, file)
    assert "another student" in refusal(tmp_path / "a")
    file.write_bytes(good)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config["memory"]["0"]["value_type"] = "float16"
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    assert "than config.json says" in refusal(tmp_path / "a")
    config["memory"]["0"] |= {"value_dtype": "float32", "offload": "slots", "search": "int8"}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    assert "does not hold" in refusal(tmp_path / "a")


def test_a_file_that_went_away_cannot_be_saved_along(tmp_path):
    loaded = saved(make(offload="values"), tmp_path / "a")
    (tmp_path / "a" / external_tensors.SLOTS_FILE).unlink()
    with pytest.raises(UserError, match="cannot be copied"):
        loaded.save_pretrained(tmp_path / "b")
    make(offload="values", threshold=0.1).save_pretrained(tmp_path / "a")
    torch.manual_seed(5)
    make(offload="values").save_pretrained(tmp_path / "a")
    with pytest.raises(UserError, match="another file than the one"):
        loaded.save_pretrained(tmp_path / "b")
    assert not list((tmp_path / "b").glob("slots*"))


def test_what_is_not_opened_says_so(tokens, tmp_path):
    make(offload="values").save_pretrained(tmp_path)
    config = AutoModelForCausalLM.from_pretrained(tmp_path).config
    with pytest.raises(UserError, match="from_pretrained"):
        AutoModelForCausalLM.from_config(config).eval()(tokens)


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    write_tensor_file(tmp_path / "file", {"a": make_spec(torch.ones(3, 4))})
    before = (tmp_path / "file").read_bytes()
    with pytest.raises(AssertionError, match="pieces"):
        write_tensor_file(
            tmp_path / "file", {"a": TensorSpec(torch.float32, (3, 4), [torch.ones(2, 4)])}
        )
    assert (tmp_path / "file").read_bytes() == before
    with pytest.raises(UserError, match="cannot be written"):
        write_tensor_file(tmp_path / "nowhere" / "file", {"a": make_spec(torch.ones(3, 4))})


def test_tables_come_back_as_they_were_given(tmp_path):
    given = {
        "bytes": torch.randint(-128, 127, (7, 3), dtype=torch.int8),
        "halves": torch.randn(5, 3).half(),
        "one": torch.randn(()),
        "floats": torch.randn(9, 2),
        "none": torch.zeros(0, 4),
        "turned": torch.randn(4, 6).t(),
    }
    digest = write_tensor_file(
        tmp_path / "file", {name: make_spec(tensor) for name, tensor in given.items()}
    )
    mapped = MmapTensorFile(tmp_path / "file")
    assert mapped.digest == digest
    for name, tensor in given.items():
        assert torch.equal(mapped[name], tensor)
        assert mapped[name].dtype == tensor.dtype
    given["bytes"][0, 0] += 1
    assert (
        write_tensor_file(
            tmp_path / "other", {name: make_spec(tensor) for name, tensor in given.items()}
        )
        != digest
    )
    assert (
        int.from_bytes((tmp_path / "file").read_bytes()[:8], "little") % 4096 == 4088
    )  # tables begin where pages do


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ("memory.offload=slots",),
            "set memory.search=int8 or memory.offload=values, got memory.search=exact",
        ),
        (("memory.offload=slots", "memory.search=ivf"), "got memory.search=ivf"),
        (("memory.offload=tape",), "memory.offload"),
        (("memory.value_dtype=int4",), "memory.value_dtype"),
        (
            (
                "memory.offload=slots",
                "memory.search=int8",
                "memory.k=32",
                "memory.activation=distance",
                "memory.selection=score",
            ),
            "set memory.offload=values",
        ),
        (
            ("student.layer_overrides=[{layers: 0, memory: {offload: slots}}]",),
            "student.layer_overrides[0].memory.search=int8",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(words, told):
    with pytest.raises(UserError, match=re.escape(told)):
        load_config(None, words)


@pytest.mark.parametrize(
    "how",
    [
        {"offload": "slots"},
        {"offload": "slots", "search": "ivf"},
        {"offload": "all"},
        {"value_dtype": "int4"},
        {"offload": "slots", "search": "int8", "activation": "distance", "selection": "score"},
    ],
    ids=str,
)
def test_memories_that_cannot_be_are_refused(how):
    with pytest.raises(ValueError, match=r"disk|value_type"):
        FeaturalMemory(8, 16, 4, **how)


@pytest.mark.parametrize("kind", ["featural", "associative"])
def test_a_run_measures_the_student_that_it_saved(kind, words, tmp_path, monkeypatch):
    measured = []
    from dmt.distillation import run

    real = run.evaluate_student
    monkeypatch.setattr(
        run,
        "evaluate_student",
        lambda config, student, *rest: measured.append(student) or real(config, student, *rest),
    )
    changes = [
        "memory.offload=slots",
        "memory.search=int8",
        "memory.value_dtype=int8",
        f"memory.kind={kind}",
    ]
    assert distill_main([*words, *changes]) == 0
    folder = newest(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(folder / "student")
    tokens = torch.randint(0, 300, (2, 12))
    with torch.no_grad():
        assert torch.equal(measured[0](tokens).logits, loaded(tokens).logits)
    assert all(
        memory.mmap_tensors is not None for memory in get_featural_memories(measured[0]).values()
    )
    record = json.loads((folder / "run.json").read_text())
    assert record["bytes"]["student_offloaded"] == external_tensors.measure_bytes(loaded)["disk"]
    assert "stay there" in (folder / "report.md").read_text()
    assert all(0.9 < used["search_recall"] <= 1 for used in record["slots"].values())
    assert "recall of the slot search" in (folder / "report.md").read_text()


def test_more_slots_than_are_scored_at_once_are_the_same(tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(featural, "MAX_EXACT_SLOTS", 0)
    student = rounded(make(offload="values", search="int8", value_dtype="int8"))
    assert_same(saved(student, tmp_path), student, tokens)


def test_the_benchmark_makes_its_tables(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    from benchmarks import disk

    lines = disk.rows(quick=True, turns=1)
    assert [line["variant"] for line in lines] == [
        "in RAM",
        "on the disk",
        "dense",
        "disk=slots value_type=int8",
    ]
    assert all(line.get("same tokens", True) for line in lines)
    assert "| in RAM |" in disk.table(lines)
