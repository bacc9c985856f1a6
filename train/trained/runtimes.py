"""A folded image network in every runtime there is: its logits, and the codes of all its quantizers.

Codes come from a program of their own, the same network with more outputs, since a runtime may compute one with fewer
outputs by other kernels. So logits are those of the file as it is, and both are compared with the reference.
"""

import contextlib
import ctypes
import dataclasses
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qpde import deploy, quantizers
from qpde.bits import Bits
from qpde.deploy import Folded
from qpde.models.images.network import Network

Run = Callable[[np.ndarray], Any]

_GUARDED = (ImportError, ValueError, OSError, RuntimeError, subprocess.CalledProcessError)


@dataclasses.dataclass(frozen=True)
class Runtime:
    """One program.

    Attributes:
      logits: Of images (N, H, W, C) float32.
      codes: Of images, by name, (N, H, W, C); None where nothing is rounded.
    """

    logits: Run
    codes: Run | None = None


def runtimes(
    model: Network, variables: dict[str, Any], folded: Folded, bits: Bits, size: tuple[int, int], scratch: Path
) -> tuple[dict[str, Runtime], dict[str, str]]:
    """The runtimes of a network, and why others are missing.

    Args:
      model: The network.
      variables: Its collections.
      folded: What is deployed.
      bits: Bits that it was folded at.
      size: Height and width of the images.
      scratch: An empty folder for files that runtimes read.
    Returns:
      Programs by name, and reasons by name.
    """
    makers = {
        "JAX, fake-quantized": lambda: _fake(model, variables, folded, bits),
        "JAX, integers": lambda: _integers(folded),
        "onnxruntime": lambda: onnx_runtime(folded, optimized=True),
        "onnxruntime, not optimized": lambda: onnx_runtime(folded, optimized=False),
        "OpenVINO": lambda: openvino_runtime(folded, scratch),
        "C": lambda: _compiled_c(folded, size, scratch),
        "StableHLO": lambda: _stablehlo(folded, size),
    }
    return _made(makers)


def _made(makers: dict[str, Callable[[], Runtime]]) -> tuple[dict[str, Runtime], dict[str, str]]:
    """Programs by name, and reasons of those that cannot be made."""
    found, missing = {}, {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except _GUARDED as error:
            missing[name] = str(error)
    return found, missing


def float_runtimes(
    model: Network, variables: dict[str, Any], scratch: Path
) -> tuple[dict[str, Runtime], dict[str, str]]:
    """The network in float32, nothing rounded and nothing clipped: what latencies are held against.

    Args:
      model: The network.
      variables: Its collections.
      scratch: A folder for files that runtimes read.
    Returns:
      Programs by name, and reasons of those that are missing.
    """
    exact = Bits(None, None)
    folded = deploy.fold(model, variables, bits=exact)
    return _made(
        {
            "JAX, float32": lambda: _network(model, variables, exact),
            "onnxruntime, float32": lambda: onnx_runtime(folded, optimized=True),
            "OpenVINO, float32": lambda: openvino_runtime(folded, scratch),
        }
    )


def _network(model, variables, bits) -> Runtime:
    program = jax.jit(partial(model.apply, variables, bits=bits))
    return Runtime(lambda images: np.asarray(program(images)))


def _fake(model, variables, folded, bits) -> Runtime:
    """The network as it is trained. An activation's code is its value in units of its clip's last level."""
    tops = {op.out: float(op.high if hasattr(op, "high") else op.table[-1]) for op in folded.ops if ".q" in op.out}

    def observe(x, clip, quantizer):
        if quantizer.is_weight or quantizer.bits is None:
            return jnp.zeros(()), clip
        options = {"levels": quantizer.levels, "signed": quantizer.signed}
        return quantizers.quantize_activation(x, clip, quantizer.bits, **options) / clip, clip

    program = jax.jit(partial(model.apply, variables, bits=bits, observe=observe, mutable=["observed"]))

    def codes(images):
        observed, found, block = program(images)[1]["observed"], {}, 0
        for stage, name, _, count in model.stacks:
            for i in range(count):
                for k, record in enumerate(observed[stage][name]["act_clips"]):
                    if (key := f"block{block}.q{k}") in tops:
                        found[key] = np.asarray(record[i]) * tops[key]
                block += 1
        return found

    return dataclasses.replace(_network(model, variables, bits), codes=codes)


def _integers(folded) -> Runtime:
    program, observed = deploy.run(folded), deploy.run(folded, return_codes=True)
    return Runtime(lambda images: np.asarray(program(images)), lambda images: jax.device_get(observed(images)[1]))


def onnx_runtime(folded: Folded, *, optimized: bool = True, **options_of_graph: Any) -> Runtime:
    """A network in onnxruntime, on one thread.

    Args:
      folded: Result of `fold` or `settle`.
      optimized: Whether onnxruntime may fuse.
      **options_of_graph: Options of `qpde.deploy.onnx_model`.
    """
    onnxruntime = deploy.require("onnxruntime")
    options = onnxruntime.SessionOptions()
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 3

    def session(codes):
        model = deploy.onnx_model(folded, codes=codes, **options_of_graph).SerializeToString()
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    plain, observed = session(False), session(True)
    names = [output.name for output in observed.get_outputs()]

    def codes(images):
        values = dict(zip(names, observed.run(None, {"images": images}), strict=True))
        del values["logits"]
        return {name: np.moveaxis(value, 1, 3) for name, value in values.items()}

    return Runtime(lambda images: plain.run(["logits"], {"images": images})[0], codes)


def openvino_runtime(folded: Folded, scratch: Path, **options_of_graph: Any) -> Runtime:
    """A network in OpenVINO, on one thread.

    Args:
      folded: Result of `fold` or `settle`.
      scratch: A folder for the file that it reads.
      **options_of_graph: Options of `qpde.deploy.onnx_model`.
    """
    core = _openvino_core()

    def compiled(codes):
        path = scratch / "openvino.onnx"
        model = deploy.onnx_model(folded, codes=codes, **options_of_graph)
        path.write_bytes(model.SerializeToString())
        options = {**deploy.OPENVINO_OPTIONS, "INFERENCE_NUM_THREADS": 1}
        known = {output.name for output in model.graph.output}
        return core.compile_model(core.read_model(path), "CPU", options), known

    plain, (observed, known) = compiled(False)[0], compiled(True)

    def codes(images):
        values = {next(iter(known & key.get_names())): value for key, value in observed({"images": images}).items()}
        del values["logits"]
        return {name: np.moveaxis(value, 1, 3) for name, value in values.items()}

    return Runtime(lambda images: plain({"images": images})[0], codes)


@cache
def _openvino_core() -> Any:
    """OpenVINO itself, one for the life of the process.

    Each one gives the thread a stack of its own to handle signals on, and puts back what it found when it goes. Of two
    that go in the order in which they came, the second puts back the stack of the first, whose memory is gone: the next
    signal then kills the process without a word.
    """
    # OpenVINO reports its use from a forked process, which JAX warns of; where it sees a test system, it does not.
    os.environ.setdefault("CI", "true")
    return deploy.require("openvino").Core()


def _stablehlo(folded, size) -> Runtime:
    def program(codes):
        data = deploy.export_images(folded, size, codes=codes).serialize()
        return jax.jit(jax.export.deserialize(data).call)

    plain, observed = program(False), program(True)
    return Runtime(lambda images: np.asarray(plain(images)), lambda images: jax.device_get(observed(images)[1]))


_SHIM = """
#include <string.h>
static const char *const names[] = {NAMES, 0};
static float *places[COUNT + 1];
void network_set(int i, float *place) { places[i] = place; }
void network_codes(const char *quantizer, const float *codes, int count) {
  int i = 0;
  while (names[i] && strcmp(names[i], quantizer)) i++;
  memcpy(places[i], codes, 4 * (size_t)count);
  places[i] += count;
}
"""


def _compiled_c(folded, size, scratch) -> Runtime:
    compiler = next(filter(None, map(shutil.which, ("gcc", "cc", "clang"))), None)
    if compiler is None:
        raise OSError("there is no C compiler: gcc, cc or clang")
    names = [op.out for op in folded.ops if ".q" in op.out]
    plain = _shared_object(compiler, scratch / "plain", deploy.c_source(folded, image_size=size))
    listed = ",".join(f'"{name}"' for name in names)
    shim = _SHIM.replace("NAMES", listed).replace("COUNT", str(len(names)))
    observed = _shared_object(
        compiler, scratch / "observed", deploy.c_source(folded, image_size=size, codes=True) + shim
    )

    def logits(images, library=plain):
        images = np.ascontiguousarray(images, np.float32)
        found = np.zeros((len(images), folded.num_classes), np.float32)
        for image, row in zip(images, found, strict=True):
            library.network_run(*(v.ctypes.data_as(ctypes.c_void_p) for v in (image, row)))
        return found

    shapes = {name: value.shape[1:] for name, value in deploy.run_reference(folded, _zeros(folded, size))[1].items()}

    def codes(images):
        found = {name: np.zeros((len(images), *shapes[name]), np.float32) for name in names}
        for i, value in enumerate(found.values()):
            observed.network_set(i, value.ctypes.data_as(ctypes.c_void_p))
        logits(images, observed)
        return found

    return Runtime(logits, codes)


def _zeros(folded, size):
    return np.zeros((1, *size, folded.channels), np.float32)


def _shared_object(compiler: str, path: Path, source: str) -> ctypes.CDLL:
    path.with_suffix(".c").write_text(source)
    command = [compiler, "-std=c99", "-O3", "-march=native", "-shared", "-fPIC"]
    subprocess.run([*command, path.with_suffix(".c"), "-o", path.with_suffix(".so"), "-lm"], check=True)
    return ctypes.CDLL(str(path.with_suffix(".so")))


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Within, all threads of this process share one core, where the system can do that."""
    tasks = Path("/proc/self/task")
    if not hasattr(os, "sched_setaffinity") or not tasks.is_dir():
        yield
        return
    before = {int(task.name): os.sched_getaffinity(int(task.name)) for task in tasks.iterdir()}
    core = {min(os.sched_getaffinity(0))}

    def set_all(wanted):
        for thread, cores in wanted.items():
            with contextlib.suppress(OSError):  # it has ended
                os.sched_setaffinity(thread, cores)

    set_all(dict.fromkeys(before, core))
    try:
        yield
    finally:
        set_all(before)
