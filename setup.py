"""The part of the build that pyproject.toml cannot express: `csrc/` travels inside the package."""

from setuptools import setup

setup(
    packages=["genft_kernels", "genft_kernels.backends", "genft_kernels.csrc"],
    package_dir={"genft_kernels": "genft_kernels", "genft_kernels.csrc": "csrc"},
    package_data={"genft_kernels": ["py.typed"], "genft_kernels.csrc": ["*.h", "*.cuh", "*.cu", "*.cpp"]},
)
