"""Puts ds_configs/ and launch/ into the wheel, below sorsa_ds/shipped/. Everything else stands in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithShipped(build_py):
    """Copies the modules, and then the folders that commands look into; there is one copy of each in the repository."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for folder in ("ds_configs", "launch"):
            for file in sorted(Path(folder).rglob("*")):
                if file.is_file() and "__pycache__" not in file.parts:
                    target = Path(self.build_lib, "sorsa_ds", "shipped", file)
                    self.mkpath(str(target.parent))
                    self.copy_file(str(file), str(target))


setup(cmdclass={"build_py": BuildWithShipped})
