"""Fixtures of all tests: tiny models, a tokenizer, arguments of a small run.

The models have peaked logits, because those of a fresh GPT-2 are near-uniform and hide mistakes.
"""

import os
import shutil
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from dmt.data.tokenizer import train_tokenizer
from dmt.models.loading import load_teacher

SENTENCES = [
    "the quick brown fox jumps over the lazy dog and runs away",
    "a memory is a table of rows and every row can be read",
    "Ada Holbrook was born in the town of Ravenhill on March 3, 1950.",
]
WIDTH, LAYERS, SLOTS, POSITIONS = 16, 3, 64, 32
# Files that take longest; they go first, so that the processes end at about the same time.
LONG = (
    "distributed",
    "row_sync",
    "kill",
    "module",
    "docs",
    "run",
    "disk_errors",
    "logit_cache",
    "mmap_tensors",
    "signals",
    "benchmarks",
)
# Tests of more than five seconds, by the beginning of their node id below tests/. They get the
# marker `slow`, which the default options leave out: `make test-all` and CI run them too.
SLOW = (
    "clients/",
    "faults/",
    "test_benchmark",
    "test_catalogue.py::test_a_comparison",
    "test_edit_protocols.py::test_the_table",
    "test_facts_in_text.py::test_the_table",
    "test_readme.py::test_a_command",
    "test_second_device.py::test_students",
    "test_second_device.py::test_runs",
    "test_second_device.py::test_bfloat16",
    "test_second_device.py::test_a_resumed",
    "test_second_device.py::test_a_text",
    "test_second_device.py::test_the_host",
    "test_scripts.py::test_the_check_of_a_gpu_runs",
    "test_docs.py::test_commands",
    "distillation/test_kinds.py::test_it",
    "distillation/test_knowledge.py::test_a_run_ends",
    "distillation/test_knowledge.py::test_the_pack_is",
    "distillation/test_knowledge.py::test_the_commands",
    "distillation/test_knowledge.py::test_own_facts",
    "distillation/test_knowledge.py::test_export",
    "distillation/test_knowledge.py::test_a_resumed",
    "distillation/test_knowledge.py::test_a_pack",
    "distillation/test_knowledge.py::test_a_result",
    "distillation/test_knowledge.py::test_stored_rows",
    "training/test_distributed.py",
    "models/test_compile.py::test_slots_in_a_file",
    "models/test_compile.py::test_compiled_training",
    "test_architecture.py::test_every_config_parses_and_runs_a_step",
)


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(items):
    for item in items:
        if item.nodeid.removeprefix("tests/").startswith(SLOW):
            item.add_marker(pytest.mark.slow)
    order = {f"test_{name}.py": index for index, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _interruptible():
    """Let SIGINT and SIGHUP reach programs that tests start, even if a background shell or nohup
    ignores them."""
    for signum, handler in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(signum) is signal.SIG_IGN:
            signal.signal(signum, handler)


@pytest.fixture(autouse=True)
def _no_autotune_cache(tmp_path_factory, monkeypatch):
    """Keep timings of this machine out of tests, and those of tests off this machine."""
    from dmt.training import autotune

    path = tmp_path_factory.mktemp("autotune") / "autotune.json"
    monkeypatch.setattr(autotune, "get_autotune_path", lambda: path)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(SENTENCES * 3, 300, POSITIONS)


def make_teacher(vocabulary: int = 300, **changes):
    """Make a GPT-2 of three layers with large weights and with biases and norms that matter."""
    settings = {
        "n_layer": LAYERS,
        "n_embd": WIDTH,
        "n_head": 2,
        "n_positions": POSITIONS,
        "vocab_size": vocabulary,
    }
    settings |= {
        "activation_function": "gelu_new",
        "bos_token_id": 0,
        "eos_token_id": 0,
        "initializer_range": 0.4,
    }
    return _perturb(GPT2LMHeadModel, GPT2Config(**(settings | changes)))


def make_llama(vocabulary: int = 300, **changes):
    """Make such a Llama: gated blocks, rotary positions, grouped queries, RMS norms."""
    settings = {
        "num_hidden_layers": LAYERS,
        "hidden_size": WIDTH,
        "intermediate_size": SLOTS,
        "vocab_size": vocabulary,
    }
    settings |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": POSITIONS,
    }
    settings |= {
        "bos_token_id": 0,
        "eos_token_id": 0,
        "initializer_range": 0.4,
        "tie_word_embeddings": True,
    }
    return _perturb(LlamaForCausalLM, LlamaConfig(**(settings | changes)))


def _perturb(kind, config):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = kind(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval().requires_grad_(False)


@pytest.fixture
def teacher(tokenizer):
    return make_teacher(len(tokenizer))


@pytest.fixture(params=[make_teacher, make_llama])
def any_teacher(request, tokenizer):
    """A teacher of each model family."""
    return request.param(len(tokenizer))


@pytest.fixture
def teacher_folder(teacher, tokenizer, tmp_path):
    """The folder of the tiny teacher and its tokenizer, as `teacher=` accepts it."""
    folder = tmp_path / "teacher"
    teacher.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def text_file(tmp_path):
    """A file of paragraphs with enough text for every split."""
    file = tmp_path / "text.txt"
    file.write_text(
        "\n\n".join(f"{i} {SENTENCES[i % 3]} {i * 7 % 13}" for i in range(400)), encoding="utf-8"
    )
    return file


@pytest.fixture(scope="session")
def shared_artifacts(tmp_path_factory):
    """One file or folder of each kind that dmt reads and writes."""
    from factories import build

    with pytest.MonkeyPatch.context() as patched:
        return build(tmp_path_factory.mktemp("shared_artifacts"), patched)


@pytest.fixture
def artifacts_dir(shared_artifacts, tmp_path, monkeypatch):
    """A copy of `shared_artifacts` that a test may damage, as the working directory."""
    shutil.copytree(shared_artifacts, tmp_path / "artifacts")
    monkeypatch.chdir(tmp_path / "artifacts")
    return tmp_path / "artifacts"


@pytest.fixture
def tokens():
    return torch.randint(1, 300, (3, 20))


def small_run_args(teacher, text, logs):
    """Return arguments of a run: four layer-wise steps, five end to end, checkpoints every two."""
    return [
        f"teacher={teacher}",
        f"data.corpora=[{text}]",
        f"trainer.log_dir={logs}",
        "data.seq_len=16",
        "data.batch_size=4",
        "data.micro_batch_size=2",
        "data.validation_tokens=64",
        "data.test_tokens=128",
        "stages.calibration_tokens=64",
        "stages.lookup_tokens=64",
        "stages.layerwise_steps=4",
        "stages.end_to_end_steps=5",
        "optim.warmup_steps=1",
        "trainer.num_threads=1",
        "trainer.log_every=1",
        "trainer.validate_every=3",
        "trainer.checkpoint_every=2",
        "trainer.progress_bar=false",
        "trainer.accelerator=cpu",
        "memory.mean_k=8",
        "trainer.precision=32-true",
    ]


@pytest.fixture
def distill_args(teacher_folder, text_file, tmp_path):
    """Arguments of a small run: four layer-wise steps, five end-to-end steps."""
    return small_run_args(teacher_folder, text_file, tmp_path / "logs")


def newest(tmp_path):
    """Return the folder of the latest run."""
    return max((tmp_path / "logs").glob("version_*"), key=lambda p: int(p.name[8:]))


def weights(run):
    """Return the tensors of the student that a run saved."""
    return AutoModelForCausalLM.from_pretrained(run / "student").state_dict()


@pytest.fixture(scope="module")
def embedded():
    """The teacher that ships with dmt, and its tokenizer."""
    return load_teacher("embedded")
