"""A command does not look for garbage in what it has imported."""

import subprocess
import sys

import pytest

COLLECTIONS = """
import gc
from sorsa_ds.runtime import exit_codes

def main():
    import sorsa_ds.train.setup
    print(gc.get_stats()[2]["collections"])

exit_codes.run(main)
"""


@pytest.mark.slow
def test_no_collection_goes_through_all_that_is_there_before_a_command_begins():
    done = subprocess.run([sys.executable, "-c", COLLECTIONS], text=True, capture_output=True, check=True)
    assert done.stdout == "0\n"
