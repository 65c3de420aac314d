"""`--help` of every command answers at once: PyTorch, transformers and DeepSpeed take seconds to import."""

import subprocess
import sys

SLOW = "torch", "transformers", "deepspeed", "datasets"
PROGRAM = f"""
import importlib, sys
from sorsa_ds.cli.completion import OPTIONS

for command, module in OPTIONS.items():
    try:
        importlib.import_module(f"sorsa_ds.{{module}}").parse(["--help"])
    except SystemExit as end:
        assert end.code == 0, command
    else:
        raise AssertionError(command)
    assert not [name for name in {SLOW} if name in sys.modules], command
"""


def test_no_commands_help_waits_for_a_library():
    done = subprocess.run([sys.executable, "-c", PROGRAM], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Compare SORSA with other methods" in done.stdout
