"""Environments with other libraries, for the benchmarks that compare with them: made once, beside the packages of this one."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path


def python_with(name: str, needed: list[str], alone: list[str]) -> Path:
    """The interpreter of the environment `name`, which has `needed`, and `alone` without what these would bring.

    It lies in the folder for temporary files and sees this environment's packages too.
    """
    home = Path(tempfile.gettempdir()) / f"dmt-{name}"
    python = home / "bin" / "python"
    ready, wanted = home / "ready", " ".join(needed + alone)
    if not ready.exists() or ready.read_text() != wanted:
        venv.create(home, with_pip=True, clear=True)
        inside = next((home / "lib").glob("python*/site-packages"))
        (inside / "outer.pth").write_text(
            "\n".join(p for p in sys.path if p.endswith("site-packages")) + "\n"
        )
        subprocess.run([python, "-m", "pip", "install", "-q", *needed], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", *alone], check=True)
        ready.write_text(wanted)
    return python
