"""Virtual environments with other libraries, for the benchmarks that compare with them."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path


def python_with(name: str, needed: list[str], without_deps: list[str]) -> Path:
    """Return the interpreter of an environment, created if missing.

    It is in the folder for temporary files and can also import the packages of this environment.

    Args:
        name: name of the environment.
        needed: packages to install with their dependencies.
        without_deps: packages to install without them.
    """
    home = Path(tempfile.gettempdir()) / f"dmt-{name}"
    python = home / "bin" / "python"
    ready, packages = home / "ready", " ".join(needed + without_deps)
    if not ready.exists() or ready.read_text() != packages:
        venv.create(home, with_pip=True, clear=True)
        site_packages = next((home / "lib").glob("python*/site-packages"))
        (site_packages / "outer.pth").write_text(
            "\n".join(p for p in sys.path if p.endswith("site-packages")) + "\n"
        )
        subprocess.run([python, "-m", "pip", "install", "-q", *needed], check=True)
        subprocess.run(
            [python, "-m", "pip", "install", "-q", "--no-deps", *without_deps], check=True
        )
        ready.write_text(packages)
    return python
