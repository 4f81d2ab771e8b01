"""Conversion: all slots equal the teacher, and the report accounts for every tensor."""

import pytest
import torch
from conftest import LAYERS, SLOTS, WIDTH, make_llama, make_teacher
from transformers import AutoModelForCausalLM

from dmt.config import DenseConfig, FeaturalConfig
from dmt.config_io import EMBEDDED_TEACHER_DIR
from dmt.data.corpora import load_corpus
from dmt.data.synthetic import RELATIONS, make_probe, make_unseen_people
from dmt.errors import UserError
from dmt.evaluation.metrics import measure_recall
from dmt.memory import FeaturalMemory
from dmt.models.architectures import ACTIVATION_ALIASES, get_architecture
from dmt.models.conversion import convert_blocks
from dmt.models.loading import load_teacher
from dmt.models.memories import get_memories

ALL = FeaturalConfig(k=SLOTS)


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("selection", ["score", "contribution", "centered"])
@pytest.mark.parametrize("projections", [False, True])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu", "silu", "gelu_pytorch_tanh"])
def test_all_slots_equal_the_teacher(tokens, selection, projections, heads, activation):
    teacher = make_teacher(activation_function=activation)
    student, _ = convert_blocks(
        teacher,
        [FeaturalConfig(k=SLOTS, selection=selection, projections=projections, heads=heads)]
        * LAYERS,
    )
    expected = logits(teacher, tokens)
    assert expected.std() > 1, "near-uniform logits would hide mistakes"
    assert (logits(student, tokens) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize(
    "memory",
    [FeaturalConfig(k=SLOTS), FeaturalConfig(selection="score", k=SLOTS), FeaturalConfig()],
    ids=str,
)
@pytest.mark.parametrize(
    "changes",
    [{}, {"mlp_bias": True, "tie_word_embeddings": False}, {"hidden_act": "gelu"}],
    ids=str,
)
def test_all_slots_equal_a_gated_teacher(tokens, memory, changes):
    # With the default, k=auto, every slot is read before calibration.
    teacher = make_llama(**changes)
    student, report = convert_blocks(teacher, [memory] * LAYERS)
    expected = logits(teacher, tokens)
    assert expected.std() > 1, "near-uniform logits would hide mistakes"
    assert (logits(student, tokens) - expected).abs().max() <= 1e-4
    parts = 6 if "mlp_bias" in changes else 3
    assert sum(t.status == "memory" for t in report.transfers) == LAYERS * parts


@pytest.mark.parametrize("family", [make_teacher, make_llama])
def test_random_and_fewer_slots_work_in_any_family(tokens, family):
    student, report = convert_blocks(
        family(),
        [FeaturalConfig(init="random", num_slots=32), FeaturalConfig(k=4), DenseConfig()],
    )
    assert logits(student, tokens).isfinite().all()
    assert {t.status for t in report.transfers} == {"copied", "memory", "new", "dropped"}


def test_all_slots_equal_the_embedded_teacher():
    teacher, _ = load_teacher("embedded")
    student, _ = convert_blocks(
        teacher, [FeaturalConfig(k=teacher.config.n_embd * 4)] * teacher.config.n_layer
    )
    tokens = torch.randint(0, teacher.config.vocab_size, (2, 128))
    assert (logits(student, tokens) - logits(teacher, tokens)).abs().max() <= 1e-4


def test_fewer_slots_are_not_the_teacher(teacher, tokens):
    student, _ = convert_blocks(teacher, [FeaturalConfig(k=SLOTS // 16)] * LAYERS)
    assert (logits(student, tokens) - logits(teacher, tokens)).abs().max() > 0.1


@pytest.mark.parametrize("changes", [{"n_inner": 40}, {"tie_word_embeddings": False}], ids=str)
def test_other_shapes_of_gpt2_equal_the_teacher(tokens, changes, tmp_path):
    teacher = make_teacher(**changes)
    slots = changes.get("n_inner", SLOTS)
    student, _ = convert_blocks(teacher, [FeaturalConfig(k=slots)] * LAYERS)
    assert (logits(student, tokens) - logits(teacher, tokens)).abs().max() <= 1e-4
    student.save_pretrained(tmp_path)
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path), tokens), logits(student, tokens)
    )


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("part", ["mlp.values", "mlp.keys", "attn.c_proj.weight"])
def test_every_layer_matters(teacher, tokens, layer, part):
    student, _ = convert_blocks(teacher, [ALL] * LAYERS)
    before = logits(student, tokens)
    with torch.no_grad():
        student.get_parameter(f"transformer.h.{layer}.{part}").mul_(1.5)
    assert (logits(student, tokens) - before).abs().max() > 1e-3


def test_student_shares_no_storage_with_the_teacher(teacher):
    student, _ = convert_blocks(teacher, [ALL, DenseConfig(), ALL])
    teacher_pointers = {p.data_ptr() for p in teacher.parameters()}
    assert not teacher_pointers & {p.data_ptr() for p in student.parameters()}


def test_each_layer_has_its_own_config(teacher, tokens):
    student, report = convert_blocks(
        teacher, [DenseConfig(), FeaturalConfig(k=8), FeaturalConfig(k=SLOTS)]
    )
    assert {layer: memory.k for layer, memory in get_memories(student).items()} == {1: 8, 2: SLOTS}
    assert "transformer.h.0.mlp.c_fc.weight" in {
        t.source for t in report.transfers if t.status == "copied"
    }


def test_report_accounts_for_every_tensor_once(teacher):
    memories = [
        DenseConfig(),
        FeaturalConfig(projections=True),
        FeaturalConfig(init="random", num_slots=32, k=2),
    ]
    student, report = convert_blocks(teacher, memories)
    sources = [t.source for t in report.transfers if t.source != "-"]
    targets = [t.target for t in report.transfers if t.target != "-"]
    assert sorted(sources) == sorted(teacher.state_dict())
    assert sorted(targets) == sorted(student.state_dict())
    status = {t.source: t.status for t in report.transfers} | {
        t.target: t.status for t in report.transfers
    }
    assert status["transformer.h.1.mlp.c_fc.weight"] == "memory"
    assert status["transformer.h.2.mlp.c_fc.weight"] == "dropped"
    assert status["transformer.h.2.mlp.keys"] == "new"
    assert (
        status["transformer.h.1.mlp.query"]
        == status["transformer.h.1.mlp.skip_connection"]
        == "new"
    )
    assert status["lm_head.weight"] == "copied"
    assert sum(t.elements for t in report.transfers if t.status != "new") == sum(
        v.numel() for v in teacher.state_dict().values()
    )
    copied = [t.elements for t in report.transfers if t.status == "copied"]
    assert f"{len(copied)} copied ({sum(copied):,} weights)" in report.summary()
    assert len(report.format_table().splitlines()) == len(report.transfers)


def test_a_teacher_tensor_without_a_target_is_an_error(teacher):
    teacher.register_parameter("extra", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(RuntimeError, match="extra"):
        convert_blocks(teacher, [ALL] * LAYERS)


def test_a_student_tensor_without_a_source_is_an_error(teacher, monkeypatch):
    monkeypatch.setattr(
        FeaturalMemory,
        "state_dict",
        lambda self, *a, **k: torch.nn.Module.state_dict(self, *a, **k) if a or k else {},
    )
    with pytest.raises(RuntimeError, match=r"skip_connection"):
        convert_blocks(teacher, [FeaturalConfig(k=4)] * LAYERS)


def test_default_k_is_a_sixteenth_or_three_on_average(teacher):
    student, _ = convert_blocks(
        teacher,
        [
            FeaturalConfig(),
            FeaturalConfig(init="random", num_slots=128),
            FeaturalConfig(heads=8, k=None),
        ],
    )
    assert [memory.k for memory in get_memories(student).values()] == [12, 24, 8]


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        (FeaturalConfig(k=SLOTS + 1), rf"k must be in \[1, num_slots={SLOTS}\], got {SLOTS + 1}"),
        (FeaturalConfig(heads=3, k=3), "heads=3"),
    ],
)
def test_a_memory_that_does_not_fit_is_rejected(teacher, memory, message):
    with pytest.raises(UserError, match=message):
        convert_blocks(teacher, [memory] * LAYERS)


def test_an_unknown_activation_is_rejected():
    with pytest.raises(UserError, match=r"quick_gelu.*set activation=relu"):
        convert_blocks(make_teacher(activation_function="quick_gelu"), [FeaturalConfig()] * LAYERS)


@pytest.mark.parametrize("alias", ACTIVATION_ALIASES)
def test_other_names_of_an_activation_are_accepted(tokens, alias, tmp_path):
    teacher = make_teacher(activation_function=alias)
    student, _ = convert_blocks(teacher, [ALL, ALL, DenseConfig()])
    assert (logits(student, tokens) - logits(teacher, tokens)).abs().max() <= 1e-4
    student.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(reloaded, tokens), logits(student, tokens))


def test_a_student_is_rejected_as_a_teacher(teacher, tokenizer, tmp_path):
    student, _ = convert_blocks(teacher, [FeaturalConfig()] * LAYERS)
    student.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="student of dmt already"):
        load_teacher(str(tmp_path))


def test_the_embedded_teacher_recalls_its_biographies():
    teacher, tokenizer = load_teacher("embedded")
    assert measure_recall(teacher, tokenizer, load_corpus("biographies").probes[::12]) >= 0.9
    assert (
        measure_recall(
            teacher,
            tokenizer,
            [make_probe(p, r, 0) for p in make_unseen_people(4) for r in RELATIONS],
        )
        <= 0.1
    )


class _Planted:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("planted", [False, True])
def test_pickled_weights_are_never_read(teacher, teacher_folder, tmp_path, planted):
    marker = tmp_path / "trace"
    (teacher_folder / "model.safetensors").unlink()
    torch.save(
        _Planted(marker) if planted else teacher.state_dict(), teacher_folder / "pytorch_model.bin"
    )
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_teacher(str(teacher_folder))
    assert not marker.exists()


def test_an_unknown_family_is_rejected():
    with pytest.raises(UserError, match=r"'bert'.*gpt2"):
        get_architecture("bert")


def test_random_memories_differ_from_each_other_and_are_finite(teacher, tokens):
    student, _ = convert_blocks(teacher, [FeaturalConfig(init="random", projections=True)] * LAYERS)
    first, second, _ = get_memories(student).values()
    assert not torch.equal(first.keys, second.keys)
    assert logits(student, tokens).isfinite().all()
    assert first.width == WIDTH


def test_teacher_is_frozen_float32_and_embedded_assets_are_small():
    teacher, _ = load_teacher("embedded")
    assert not teacher.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in teacher.parameters())
    assert sum(f.stat().st_size for f in EMBEDDED_TEACHER_DIR.iterdir()) <= 10e6
    assert not list(EMBEDDED_TEACHER_DIR.glob("*.bin"))
