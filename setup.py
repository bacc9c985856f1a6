"""The native kernels, which are optional: without a compiler qpde installs all the same. The rest is in setup.cfg."""

from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup


def native_kernels() -> list[Extension]:
    """A plain library, which needs XLA's headers but not Python's, so that one build serves every Python."""
    jaxlib = find_spec("jaxlib")
    if jaxlib is None or jaxlib.origin is None:
        return []
    kernels = Extension(
        "qpde.native.kernels",
        ["qpde/native/kernels.cpp"],
        depends=["qpde/native/both_types.h", "qpde/native/loops.h"],
        include_dirs=[str(Path(jaxlib.origin).parent / "include")],
        extra_compile_args=["-O3", "-std=c++17", "-ffp-contract=fast", "-g0"],
        language="c++",
        optional=True,
        py_limited_api=True,
    )
    return [kernels]


setup(ext_modules=native_kernels())
