"""What runs on the CPU runs on a GPU too: shown on a second device that is made of CPU tensors.

Each test runs one case of device_cases.py in a process of its own, because the device patches
torch.
"""

import json
import subprocess
import sys
from pathlib import Path

CASES = Path(__file__).with_name("device_cases.py")


def run_case(name, *arguments, device="cuda"):
    """Run a case on the device; return what it printed."""
    process = subprocess.run(
        [sys.executable, "-W", "ignore", str(CASES), device, name, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


def test_students_load_and_move_in_every_way(artifacts_dir):
    """Students with facts, with values in a file, and with stored rows."""
    folders = [artifacts_dir / "logs" / f"version_{run}" / "student" for run in range(3)]
    assert run_case("load_students", *folders) == []
