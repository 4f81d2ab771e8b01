"""Distil a GPT-2 into one with memory: `python distill.py [config.yaml] [key=value ...]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "src"))  # a checkout runs without being installed

if __name__ == "__main__":
    from dmt import signals

    signals.exit_on_signal()
    from dmt.cli.main import distill_main

    code = distill_main(sys.argv[1:])
    signals.ignore_signals()
    sys.exit(code)
