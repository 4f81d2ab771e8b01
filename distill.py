"""Distill a student from a checkout: `python distill.py [...]` is `dmt distill [...]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "src"))  # works without an installation

if __name__ == "__main__":
    from dmt import signals

    signals.exit_on_signal()  # before the imports that take time
    from dmt.cli.main import run

    run(["distill", *sys.argv[1:]])
