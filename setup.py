"""The native kernels, which are optional: without a compiler qpde is installed without them. All else is in setup.cfg."""

from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup


def native_kernels() -> Extension:
    """A plain library, which needs XLA's headers but not Python's, so that one build serves every Python."""
    jaxlib = find_spec("jaxlib")
    assert jaxlib is not None and jaxlib.origin is not None, "pyproject.toml asks for it"
    return Extension(
        "qpde.native.kernels",
        ["qpde/native/kernels.cpp"],
        depends=["qpde/native/loops.h"],
        include_dirs=[str(Path(jaxlib.origin).parent / "include")],
        extra_compile_args=["-O3", "-std=c++17", "-ffp-contract=fast", "-g0"],
        language="c++",
        optional=True,
        py_limited_api=True,
    )


setup(ext_modules=[native_kernels()])
