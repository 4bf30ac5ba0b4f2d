"""The part of the build that pyproject.toml cannot express: `csrc/` travels inside the package, and with
GENFT_PREBUILD=1 so do its kernels, compiled.
"""

import importlib
import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent


def load_build():
    """`genft_kernels/backends/compiled/build.py`, without the package around it, which needs torch."""
    folder = ROOT / "genft_kernels" / "backends" / "compiled"
    spec = importlib.util.spec_from_file_location("genft_compiled", folder / "__init__.py")
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])
    return importlib.import_module("genft_compiled.build")


class Prebuild(build_ext):
    """Compiles the kernels with the recipe that the first use follows, for every architecture that it lists."""

    def build_extension(self, extension):
        build = load_build()
        folder = Path(self.get_ext_fullpath(extension.name)).parent
        shutil.rmtree(folder, ignore_errors=True)
        recipe = build.Recipe.read(ROOT / "csrc")
        build.build(recipe, build.find_nvcc(), recipe.archs, folder)
        (folder / build.LOG).unlink()


def extensions():
    """None, or with GENFT_PREBUILD=1 the kernels."""
    wanted = os.environ.get("GENFT_PREBUILD", "0")
    if wanted not in ("0", "1"):
        raise ValueError(f"GENFT_PREBUILD must be 0 or 1; got {wanted!r}")
    if wanted == "0":
        return []
    module = load_build().Recipe.read(ROOT / "csrc").module
    return [Extension(f"genft_kernels.prebuilt.{module}", sources=[])]


setup(
    packages=[*find_packages(include=["genft_kernels", "genft_kernels.*"]), "genft_kernels.csrc"],
    package_dir={"genft_kernels": "genft_kernels", "genft_kernels.csrc": "csrc"},
    package_data={
        "genft_kernels": ["py.typed"],
        "genft_kernels.csrc": ["*.h", "*.cuh", "*.cu", "*.cpp", "build.txt"],
    },
    ext_modules=extensions(),
    cmdclass={"build_ext": Prebuild},
)
