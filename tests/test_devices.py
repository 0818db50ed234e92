"""The tests of `device_cases.py`, in a process of their own: torch takes the device that they register for that of the
machine, in all tests that come after."""

import subprocess
import sys
from pathlib import Path

CASES = Path(__file__).with_name("device_cases.py")


def test_everything_runs_on_a_device_that_is_not_the_cpu():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", str(CASES)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=CASES.parents[1])
    assert run.returncode == 0, run.stdout[-5000:]
