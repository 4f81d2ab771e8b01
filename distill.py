"""Distil a GPT-2 into one with memory: `python distill.py [config.yaml] [key=value ...]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "src"))  # a checkout runs without being installed

if __name__ == "__main__":
    from dmt import stopping

    stopping.leave_at_once()
    from dmt.main import main

    code = main(sys.argv[1:])
    stopping.leave_be()
    sys.exit(code)
