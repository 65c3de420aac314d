"""Lets `python benchmarks/steps.py` import the package `benchmarks`, as `python -m benchmarks.steps` can.

Python puts a script's own folder on its search path, not the repository's root, and so finds this module under the
package's name. It stands in for the package, and puts the root where the folder was.
"""

import sys
from pathlib import Path

FOLDER = Path(__file__).parent
__path__ = [str(FOLDER)]
sys.path[sys.path.index(str(FOLDER))] = str(FOLDER.parent)
