"""Distil a GPT-2 into one with memory: `python distill.py [config.yaml] [key=value ...]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "src"))  # a checkout runs without being installed

from dmt.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
