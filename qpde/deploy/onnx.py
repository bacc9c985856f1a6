"""Write a folded network as an ONNX graph of QuantizeLinear, DequantizeLinear, Conv, Mul and Add.

Everything is in units of one code, so every scale is 1 and no runtime has a factor to fold into a kernel: kernels are
int8 or int4 initializers, activations uint8 or int8. A Clip for fewer than 8 bits comes behind QuantizeLinear, where
runtimes still recognise the pattern. K^T is a second initializer, never a ConvTranspose.

The exact graph gives the codes of `run_reference`. `fast=True` also rounds the residual branch to 8 bits and biases to
whole units of the sums, which is the form that ONNX Runtime computes in integers alone. It flips about a fifth of the
codes of a 4-bit network, and is a different network.

OpenVINO computes in bfloat16 where the processor can, and rounds the inputs of 8-bit kernels that are not codes.
Compile with `OPENVINO_OPTIONS`, or its numbers are others.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from qpde.deploy.folded import Folded
from qpde.deploy.packing import pack
from qpde.deploy.program import (
    EXACT_LIMIT,
    Affine,
    Clip,
    Concat,
    Conv,
    Kernel,
    Mean,
    Op,
    Pool,
    Quantize,
    Resize,
    Smooth,
    Snap,
    accumulator_bound,
    consumers,
)
from qpde.files import write_whole

__all__ = ["OPENVINO_OPTIONS", "onnx_model", "require", "save_onnx"]

OPENVINO_OPTIONS = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
"""For `openvino.Core.compile_model`: float32 stays float32."""

OPSET = 21
_IR_VERSION = 10
_SMOOTHINGS = ("huber", "linear", "isotropic", "anisotropic", "charbonnier")
_TINY_SCALE = 2.0**-16  # of a channel whose factor is 0


def require(package: str) -> ModuleType:
    """Import a package of the extra [deploy], or say how to install it.

    Args:
      package: Its name.
    Raises:
      ImportError: It is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"this needs the package {package}, which is missing: pip install {package}") from error


def save_onnx(path: str | Path, folded: Folded, **options: Any) -> Path:
    """Write a folded network as an ONNX file.

    Args:
      path: Path of the file.
      folded: Result of `fold` or `settle`.
      **options: Options of `onnx_model`.
    Returns:
      The path.
    """
    return write_whole(path, onnx_model(folded, **options).SerializeToString())


def onnx_model(
    folded: Folded,
    *,
    image_size: tuple[int, int] | None = None,
    kernel_bits: int = 8,
    fast: bool = False,
    codes: bool = False,
) -> Any:
    """Make the ONNX model of a folded network, checked by `onnx.checker`.

    Its input "images" is (batch, H, W, C) float32 with a symbolic batch, its output "logits" (batch, classes), or
    (batch, H, W, classes) where it segments.

    Args:
      folded: Result of `fold` or `settle`.
      image_size: Height and width, or None for symbolic ones.
      kernel_bits: Type of the kernels' initializers: 8, or 4 for a file of about half the size, which OpenVINO computes
        in float32. Kernels of 8 bits stay int8.
      fast: Round the residual branch too. See the module for what that costs.
      codes: Also output the codes of every quantizer by name, (batch, C, H, W).
    Returns:
      `onnx.ModelProto`, opset 21.
    Raises:
      ValueError: A kind of smoothing without a graph; `fast` for a settled network; another `kernel_bits`.
      ImportError: The package onnx is missing.
    """
    if kernel_bits not in (4, 8):
        raise ValueError(f"kernel_bits={kernel_bits} must be 8 or 4")
    if fast and folded.settled:
        raise ValueError("fast=True rounds the branch, which undoes what settle did: pass the network before settle")
    graph = _Graph(folded, kernel_bits, fast, codes)
    return graph.model(image_size)


class _Graph:
    """Nodes and initializers so far, and the names of every value: as float, and as 8-bit codes."""

    def __init__(self, folded: Folded, kernel_bits: int, fast: bool, codes: bool):
        self.onnx = require("onnx")
        self.folded, self.kernel_bits, self.wants_codes = folded, kernel_bits, codes
        self.nodes: list[Any] = []
        self.initializers: dict[str, Any] = {}
        self.constants: dict[Any, str] = {}
        self.outputs: list[tuple[str, int]] = []
        self.codes: dict[str, str] = {}  # 8-bit codes of a value
        self.dequantized: dict[str, str] = {}
        self.kernels: dict[tuple[str, bool], str] = {}
        self.rounded = _branches(folded) if fast else {}
        self.count = 0

    def model(self, image_size: tuple[int, int] | None) -> Any:
        helper, proto = self.onnx.helper, self.onnx.TensorProto
        self.node("Transpose", ["images"], "images.nchw", perm=[0, 3, 1, 2])
        for op in self.folded.ops:
            self.emit(op)
        height, width = image_size or ("height", "width")
        images = helper.make_tensor_value_info("images", proto.FLOAT, ["batch", height, width, self.folded.channels])
        of_pixels = [height, width] if self.folded.of_pixels else []
        shape = ["batch", *of_pixels, self.folded.num_classes]
        outputs = [helper.make_tensor_value_info("logits", proto.FLOAT, shape)]
        outputs += [
            helper.make_tensor_value_info(name, kind, ["batch", None, None, None]) for name, kind in self.outputs
        ]
        graph = helper.make_graph(self.nodes, self.folded.name, [images], outputs, list(self.initializers.values()))
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=_IR_VERSION, producer_name="qpde"
        )
        form = "branch rounded" if self.rounded else "exact"
        helper.set_model_props(model, {"form": form, "settled": str(self.folded.settled).lower()})
        self.onnx.checker.check_model(model, full_check=True)
        return model

    # Pieces of a graph.

    def node(self, kind: str, inputs: list[str], out: str | None = None, **attributes: Any) -> str:
        self.count += 1
        out = f"{kind.lower()}{self.count}" if out is None else out
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [out], name=f"n{self.count}", **attributes))
        return out

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """An initializer, shared by equal ones."""
        array = np.asarray(value, dtype)
        key = (array.dtype, array.shape, array.tobytes())
        if key not in self.constants:
            name = self.constants[key] = f"c{len(self.constants)}"
            self.initializers[name] = self.onnx.numpy_helper.from_array(array, name)
        return self.constants[key]

    def channels(self, value: np.ndarray) -> str:
        return self.constant(value if value.size == 1 else value.reshape(-1, 1, 1))

    def float(self, name: str) -> str:
        """A value as float32."""
        if name == "images":
            return "images.nchw"
        if name not in self.codes:
            return name
        if name not in self.dequantized:
            self.dequantized[name] = self.dequantize(self.codes[name], 1.0)
        return self.dequantized[name]

    def dequantize(self, codes: str, scale: Any) -> str:
        return self.node("DequantizeLinear", [codes, self.constant(scale)])

    def quantize(self, x: str, scale: Any, low: int, high: int, out: str | None = None) -> str:
        dtype = np.int8 if low < 0 else np.uint8
        info = np.iinfo(dtype)
        inputs = [x, self.constant(scale), self.constant(0, dtype)]
        if (low, high) == (max(low, info.min), info.max) and low in (0, info.min):
            return self.node("QuantizeLinear", inputs, out)
        codes = self.node("QuantizeLinear", inputs)
        return self.node("Clip", [codes, self.constant(low, dtype), self.constant(high, dtype)], out)

    def kernel(self, name: str, adjoint: bool) -> str:
        """A kernel as float32, OIHW; whole ones from int8 or int4."""
        if (name, adjoint) not in self.kernels:
            kernel = self.folded.kernels[name]
            key = f"{name}.adjoint" if adjoint else name
            self.kernels[name, adjoint] = self.stored(key, kernel, _oihw(kernel, adjoint))
        return self.kernels[name, adjoint]

    def stored(self, key: str, kernel: Kernel, values: np.ndarray) -> str:
        if not kernel.is_whole:
            self.initializers[key] = self.onnx.numpy_helper.from_array(values, key)
            return key
        if kernel.bits is not None and kernel.bits <= 4 == self.kernel_bits:
            make, data = self.onnx.helper.make_tensor, pack(values, 4).tobytes()
            self.initializers[key] = make(key, self.onnx.TensorProto.INT4, values.shape, data, raw=True)
        else:
            self.initializers[key] = self.onnx.numpy_helper.from_array(values, key)
        return self.dequantize(key, 1.0)

    def conv(self, op: Conv, x: str, kernel: str, bias: list[str], out: str | None) -> str:
        shape = self.folded.kernels[op.kernel]
        side = shape.values.shape[:2]
        return self.node(
            "Conv",
            [x, kernel, *bias],
            out,
            kernel_shape=list(side),
            strides=[op.stride] * 2,
            pads=[op.padding] * 4,
            dilations=[op.dilation] * 2,
            group=shape.values.shape[3] if shape.depthwise else 1,
        )

    # Operations.

    def added(self, terms: Iterable[str]) -> str:
        """The sum of values, from the first on; each is made when it is added."""
        return functools.reduce(lambda total, term: self.node("Add", [total, term]), terms)

    def emit(self, op: Op) -> None:
        if op.out in self.rounded:
            self.emit_rounded(op.out, *self.rounded[op.out])
            return
        if any(op.out in skipped for _, _, skipped in self.rounded.values()):
            return
        getattr(self, f"emit_{type(op).__name__.lower()}")(op)

    def emit_conv(self, op: Conv) -> None:
        self.conv(op, self.float(op.x), self.kernel(op.kernel, op.adjoint), [], op.out)

    def emit_affine(self, op: Affine) -> None:
        def term(x: str, factor: np.ndarray) -> str:
            return self.node("Mul", [self.float(x), self.channels(factor)]) if np.any(factor != 1) else self.float(x)

        total = self.added(map(term, op.inputs, op.factors))
        if op.bias is not None:
            total = self.node("Add", [total, self.channels(op.bias)])
        if op.out == "logits":
            self.node("Squeeze", [total, self.constant([2, 3], np.int64)], op.out)
        else:
            self.node("Identity", [total], op.out)

    def emit_quantize(self, op: Quantize) -> None:
        x = self.float(op.x)
        if max(-op.low, op.high) > (127 if op.low < 0 else 255):
            self.node("Clip", [self.node("Round", [x]), self.constant(op.low), self.constant(op.high)], op.out)
            kind = self.onnx.TensorProto.FLOAT
        else:
            self.codes[op.out] = self.quantize(x, 1.0, op.low, op.high, op.out)
            kind = self.onnx.TensorProto.INT8 if op.low < 0 else self.onnx.TensorProto.UINT8
        if self.wants_codes:
            self.outputs.append((op.out, kind))

    def emit_snap(self, op: Snap) -> None:
        x = self.float(op.x)
        magnitude = self.node("Abs", [x]) if op.signed else x

        def rise(middle: Any, step: Any) -> str:
            above = self.node("Greater", [magnitude, self.constant(middle)])
            return self.node("Where", [above, self.constant(step), self.constant(0.0)])

        total = self.added(map(rise, op.middles, np.diff(op.table)))
        if op.signed:
            total = self.node("Mul", [self.node("Sign", [x]), total])
        self.node("Identity", [total], op.out)
        if self.wants_codes:
            self.outputs.append((op.out, self.onnx.TensorProto.FLOAT))

    def emit_clip(self, op: Clip) -> None:
        if (op.low, op.high) == (0, math.inf):
            self.node("Relu", [self.float(op.x)], op.out)
        else:
            self.node("Clip", [self.float(op.x), self.constant(op.low), self.constant(op.high)], op.out)

    def emit_pool(self, op: Pool) -> None:
        self.node("AveragePool", [self.float(op.x)], op.out, kernel_shape=[2, 2], strides=[2, 2])

    def emit_mean(self, op: Mean) -> None:
        self.node("GlobalAveragePool", [self.float(op.x)], op.out)

    def emit_concat(self, op: Concat) -> None:
        copied = self.slice(self.float(op.y), 1, 0, op.channels)
        self.node("Concat", [self.float(op.x), copied], op.out, axis=1)

    def emit_resize(self, op: Resize) -> None:
        def shape(x: str, start: int, end: int) -> str:
            return self.node("Shape", [x], start=start, end=end)

        x, like = self.float(op.x), self.float(op.like)
        sizes = self.node("Concat", [shape(x, 0, 2), shape(like, 2, 4)], axis=0)
        linear = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
        if op.out == "logits":
            wide = self.node("Resize", [x, "", "", sizes], **linear)
            self.node("Transpose", [wide], op.out, perm=[0, 2, 3, 1])
        else:
            self.node("Resize", [x, "", "", sizes], op.out, **linear)

    def slice(self, x: str, axis: int, start: int, end: int) -> str:
        return self.node("Slice", [x, *(self.constant([v], np.int64) for v in (start, end, axis))])

    def emit_smooth(self, op: Smooth) -> None:
        if op.kind not in _SMOOTHINGS:
            raise ValueError(
                f"smoothing of kind {op.kind!r} has no ONNX graph: retrain with one of {', '.join(_SMOOTHINGS)}, or "
                "export by stablehlo, which takes every kind"
            )
        x = self.float(op.x)
        for _ in range(op.steps):
            x = self.smoothed(op, x)
        self.node("Identity", [x], op.out)

    def smoothed(self, op: Smooth, x: str) -> str:
        """x + gamma2 div F(D x); the last difference along each axis is 0."""
        differences = []
        for axis in (2, 3):
            d = self.node("Sub", [self.slice(x, axis, 1, 2**31), self.slice(x, axis, 0, -1)])
            differences.append(self.pad(d, axis, behind=1))
        for axis, flux in zip((2, 3), self.fluxes(op, differences), strict=True):
            before = self.pad(self.slice(flux, axis, 0, -1), axis, before=1)
            inflow = self.node("Mul", [self.node("Sub", [flux, before]), self.constant(op.gamma2)])
            x = self.node("Add", [x, inflow])
        return x

    def pad(self, x: str, axis: int, before: int = 0, behind: int = 0) -> str:
        pads = [0] * 8
        pads[axis], pads[axis + 4] = before, behind
        return self.node("Pad", [x, self.constant(pads, np.int64)])

    def fluxes(self, op: Smooth, differences: list[str]) -> list[str]:
        if op.kind == "linear":
            return differences
        if op.kind == "huber":
            inverse = self.constant(1 / op.eps)
            return [
                self.node("Clip", [self.node("Mul", [d, inverse]), self.constant(-1.0), self.constant(1.0)])
                for d in differences
            ]
        squares = [self.node("Mul", [d, d]) for d in differences]
        if op.kind != "anisotropic":
            squares = [self.node("Add", squares)] * 2
        roots = {
            s: self.node("Sqrt", [self.node("Add", [s, self.constant(op.eps**2)])]) for s in dict.fromkeys(squares)
        }
        fluxes = [self.node("Div", [d, roots[s]]) for d, s in zip(differences, squares, strict=True)]
        if op.kind == "charbonnier":
            fluxes = [self.node("Mul", [f, self.constant(op.eps)]) for f in fluxes]
        return fluxes

    # The fast form.

    def emit_rounded(self, out: str, affine: Affine, quantize: Quantize, skipped: dict[str, Any]) -> None:
        shares = [np.broadcast_to(affine.shift, np.broadcast_shapes(affine.shift.shape, affine.factors[-1].shape))]
        terms = []
        step = float(quantize.high - min(quantize.low, 0)) * 2 / 127
        for x, factor in reversed(list(zip(affine.inputs, affine.factors, strict=True))):
            if x in skipped:
                bias = shares.pop() if shares else None
                y = self.requantized(skipped[x], factor, bias)
                if len(affine.inputs) > 1:
                    y = self.dequantize(self.quantize(y, step, -128, 127), step)
            else:
                y = self.dequantize(self.codes[x], float(factor.reshape(-1)[0]))
            terms.append(y)
        total = terms[0] if len(terms) == 1 else self.node("Add", terms[::-1])
        self.codes[out] = self.quantize(total, 1.0, quantize.low, quantize.high, out)
        if self.wants_codes:
            kind = self.onnx.TensorProto.INT8 if quantize.low < 0 else self.onnx.TensorProto.UINT8
            self.outputs.append((out, kind))

    def requantized(self, op: Conv, factor: np.ndarray, bias: np.ndarray | None) -> str:
        """A convolution whose kernel has a scale for each channel, and a bias in whole units of its sums."""
        kernel = self.folded.kernels[op.kernel]
        values = _oihw(kernel, op.adjoint)
        factor = np.broadcast_to(factor, values.shape[:1]).astype(np.float64)
        sign = np.where(factor < 0, -1, 1).astype(np.int8)
        scale = np.where(factor == 0, _TINY_SCALE, np.abs(factor)).astype(np.float32)
        values = values * np.where(factor == 0, 0, sign).astype(np.int8)[:, None, None, None]
        key = f"{op.out}.kernel"
        self.initializers[key] = self.onnx.numpy_helper.from_array(values, key)
        weights = self.node("DequantizeLinear", [key, self.constant(scale)], axis=0)
        more = []
        if bias is not None:
            limit = 2**31 - 1
            whole = np.clip(np.round(np.broadcast_to(bias, scale.shape) / scale.astype(np.float64)), -limit, limit)
            more = [self.node("DequantizeLinear", [self.constant(whole, np.int32), self.constant(scale)], axis=0)]
        return self.conv(op, self.float(op.x), weights, more, None)


def _oihw(kernel: Kernel, adjoint: bool) -> np.ndarray:
    values = kernel.adjoint() if adjoint else kernel.values
    return np.ascontiguousarray(values.transpose(3, 2, 0, 1))


def _branches(folded: Folded) -> dict[str, tuple[Affine, Quantize, dict[str, Any]]]:
    """Quantizers of convolutions of 8-bit codes, with what they read: (affine, quantizer, convolutions)."""
    made, readers = {op.out: op for op in folded.ops}, consumers(folded.ops)
    bounds, found = accumulator_bound(folded), {}

    def is_short(x):
        op = made.get(x)
        return isinstance(op, Quantize) and max(-op.low, op.high) <= (127 if op.low < 0 else 255)

    for op in folded.ops:
        if not isinstance(op, Quantize):
            continue
        affine = made.get(op.x)
        if (
            not isinstance(affine, Affine)
            or affine.bias is None
            or len(readers[affine.out]) > 1
            or not is_short(op.out)
        ):
            continue
        convs = {x: read for x in affine.inputs if isinstance(read := made.get(x), Conv)}
        fits = all(
            is_short(c.x) and folded.kernels[c.kernel].is_whole and len(readers[n]) == 1 and bounds[n] < EXACT_LIMIT
            for n, c in convs.items()
        )
        others = [
            f.size == 1 and float(f.reshape(-1)[0]) > 0 and is_short(x)
            for x, f in zip(affine.inputs, affine.factors, strict=True)
            if x not in convs
        ]
        if fits and affine.inputs[-1] in convs and all(others) and len(affine.inputs) <= 2:
            found[op.out] = (affine, op, {**convs, affine.out: affine})
    return found
