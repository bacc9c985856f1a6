"""Write a folded network as one C99 source file, for microcontrollers.

No heap, no libraries but libm's rintf. Kernels are packed at their bit-width, one kernel for K and K^T, and unpacked
layer by layer into a static buffer. Maps that a convolution reads lie in a static arena, codes in one byte each. What
lies between them (sums, affines, rounding) is computed pixel by pixel and never stored.

    void NAME_run(const float *images, float *logits);      one image (H, W, C) to its logits
    NAME_RAM_BYTES, NAME_ROM_BYTES                          static memory, and size of the constants
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from qpde.deploy.folded import Folded
from qpde.deploy.packing import pack
from qpde.deploy.program import (
    Affine,
    Clip,
    Concat,
    Conv,
    Mean,
    Op,
    Pool,
    Quantize,
    Smooth,
    Snap,
    consumers,
    whole_bounds,
)
from qpde.files import write_whole

__all__ = ["c_source", "save_c"]


def save_c(path: str | Path, folded: Folded, *, image_size: tuple[int, int], name: str = "network") -> Path:
    """Write a folded network as a C99 source file.

    Args:
      path: Path of the file.
      folded: Folded network, see `c_source`.
      image_size: Height and width, see `c_source`.
      name: Prefix of the functions, see `c_source`.
    Returns:
      The path.
    """
    return write_whole(path, c_source(folded, image_size=image_size, name=name).encode())


def c_source(folded: Folded, *, image_size: tuple[int, int], name: str = "network", codes: bool = False) -> str:
    """Make C99 source of a folded network.

    Args:
      folded: Result of `fold` or `settle`.
      image_size: Height and width, fixed.
      name: Name of the function and prefix of the constants, a C identifier.
      codes: Call `void NAME_codes(const char *quantizer, const float *codes, int count)`, which the caller defines, for
        every pixel of every quantizer: for tests.
    Returns:
      The source.
    Raises:
      ValueError: A network that segments, a kind of smoothing without C code, images that are too small, or a name that
        is no identifier.
    """
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise ValueError(f"name={name!r} must be a C identifier")
    if min(image_size) < folded.smallest_image:
        raise ValueError(f"images of {image_size} are too small: at least {folded.smallest_image} on each side")
    if folded.of_pixels:
        raise ValueError(
            f"{folded.name} has dilated convolutions and interpolated maps, for which there is no C code: export by "
            "onnx or stablehlo"
        )
    return _Source(folded, image_size, name, codes).text()


class _Source:
    def __init__(self, folded: Folded, image_size: tuple[int, int], name: str, codes: bool):
        folded = dataclasses.replace(folded, ops=_single_steps(folded.ops))
        self.folded, self.name, self.wants_codes = folded, name, codes
        self.shapes = _shapes(folded, image_size)
        self.bounds, self.readers = whole_bounds(folded), consumers(folded.ops)
        self.made = {op.out: op for op in folded.ops}
        self.stored = {op.out for op in folded.ops if self.is_stored(op)}
        self.places, self.arena_size = self.arena()
        self.tables: list[str] = []
        self.rom = 0
        self.table_names: dict[bytes, str] = {}
        self.kernel_index = {key: i for i, key in enumerate(folded.kernels)}
        self.unpacked: dict[str, str] = {}  # where the codes of a convolution's kernel lie
        self.scratch = 0
        self.conv_types: dict[tuple[str, tuple[str, str, str]], None] = {}
        self.fluxes: dict[str, None] = {}

    # Which values lie in memory, and where.

    def is_stored(self, op: Op) -> bool:
        """Convolutions, smoothing and means read neighbours; sums that two read are not made twice."""
        readers = self.readers.get(op.out, [])
        if op.out == "logits" or isinstance(op, (Pool, Smooth, Mean)):
            return True
        if any(isinstance(r, (Conv, Pool, Smooth, Mean)) for r in readers):
            return True
        return isinstance(op, (Conv, Affine, Quantize, Snap)) and len(readers) > 1

    def ctype(self, value: str) -> str:
        op = self.made.get(value)
        if isinstance(op, (Quantize, Snap)) and value in self.bounds:
            low, high = self.bounds[value]
            if low >= 0 and high < 256:
                return "uint8_t"
            return "int8_t" if high < 128 else "int16_t" if high < 2**15 else "float"
        if isinstance(op, Conv) and self.is_integer(op):
            return "int32_t"
        return "float"

    def size(self, value: str) -> int:
        width = {"uint8_t": 1, "int8_t": 1, "int16_t": 2}.get(self.ctype(value), 4)
        return -(-math.prod(self.shapes[value]) * width // 4) * 4

    def arena(self) -> tuple[dict[str, int], int]:
        """Offsets of the stored values: first fit among those that live at the same time."""
        order = [op.out for op in self.folded.ops if op.out in self.stored and op.out != "logits"]
        places: dict[str, int] = {}
        ends = {value: self.last_use(value) for value in order}
        index = {op.out: i for i, op in enumerate(self.folded.ops)}
        for value in order:
            alive = sorted((places[v], places[v] + self.size(v)) for v in places if ends[v] >= index[value])
            offset = 0
            for start, end in alive:
                if offset + self.size(value) <= start:
                    break
                offset = max(offset, end)
            places[value] = offset
        return places, max((places[v] + self.size(v) for v in places), default=0)

    def last_use(self, value: str) -> int:
        """Index of the last stored operation that reads the value, itself or through what is computed on the way."""
        index = {op.out: i for i, op in enumerate(self.folded.ops)}
        last = index[value]
        for reader in self.readers.get(value, []):
            is_end = reader.out in self.stored
            last = max(last, index[reader.out] if is_end else self.last_use(reader.out))
        return last

    # Text.

    def text(self) -> str:
        steps = [self.step(op) for op in self.folded.ops if op.out in self.stored]
        kernels = self.kernels()
        ram = self.arena_size + self.scratch
        height, width, channels = self.shapes["images"]
        name, upper = self.name, self.name.upper()
        head = f"""/* {self.folded.name}, written by qpde: one image of {height}x{width}x{channels} to \
{self.folded.num_classes} logits.
   Static memory: {ram} bytes, {self.arena_size} of maps and {self.scratch} for unpacked kernels.
   Constants: {self.rom} bytes. */
#include <math.h>
#include <stdint.h>

#define {upper}_RAM_BYTES {ram}
#define {upper}_ROM_BYTES {self.rom}
#define {upper}_IMAGE_SIZE {height * width * channels}
#define {upper}_CLASSES {self.folded.num_classes}

void {name}_run(const float *images, float *logits);
"""
        if self.wants_codes:
            head += f"void {name}_codes(const char *quantizer, const float *codes, int count);\n"
        memory = f"static union {{ float aligned; uint8_t bytes[{max(self.arena_size, 4)}]; }} arena;\n"
        if self.scratch:
            memory += f"static int8_t unpacked[{self.scratch}];\n"
        calls = "".join(f"  {{\n{step}  }}\n" for step in steps)
        main = f"void {name}_run(const float *images, float *logits) {{\n{calls}}}\n"
        return "\n".join([head, *self.tables, *kernels, memory, *self.helpers(), main])

    def helpers(self) -> list[str]:
        """The functions that are called, and no others."""
        found = [_UNPACK] if self.scratch else []
        kinds = {type(op) for op in self.folded.ops}
        if kinds & {Clip, Quantize} or "huber" in self.fluxes:
            found.append(_CLIP)
        if Snap in kinds:
            found.append(_SNAP)
        for shape, types in self.conv_types:
            text = _CONVS[shape].replace("\\\n", "").replace("NAME", _conv_name(shape, types))
            for letter, ctype in zip("XKA", types, strict=True):
                text = re.sub(rf"\b{letter}\b", ctype, text)
            found.append(text)
        found += [_SMOOTH.replace("KIND", kind).replace("FLUX", _FLUXES[kind]) for kind in self.fluxes]
        return found

    def kernels(self) -> list[str]:
        lines = []
        for i, kernel in enumerate(self.folded.kernels.values()):
            if kernel.bits is not None:
                data = pack(kernel.values, kernel.bits)
                values, ctype = ",".join(map(str, data.tolist())), "uint8_t"
            else:
                data = kernel.values
                values, ctype = ",".join(_number(v) for v in kernel.values.reshape(-1)), "float"
            self.rom += data.nbytes
            lines.append(f"static const {ctype} kernel{i}[{data.size}] = {{{values}}};")
        return lines

    def table(self, values: np.ndarray) -> str:
        data = np.asarray(values, np.float32)
        key = data.tobytes()
        if key not in self.table_names:
            self.table_names[key] = f"t{len(self.table_names)}"
            self.rom += data.nbytes
            numbers = ",".join(_number(v) for v in data.reshape(-1))
            self.tables.append(f"static const float {self.table_names[key]}[{data.size}] = {{{numbers}}};")
        return self.table_names[key]

    def pointer(self, value: str) -> str:
        """A C expression of type (const ctype *)."""
        if value == "images":
            return "images"
        if value == "logits":
            return "logits"
        return f"(({self.ctype(value)} *)(void *)(arena.bytes + {self.places[value]}))"

    def step(self, op: Op) -> str:
        """Statements that compute one stored value from stored ones."""
        height, width, channels = self.shapes[op.out]
        if isinstance(op, Smooth):
            return self.smooth(op)
        if isinstance(op, Mean):
            return self.mean(op)
        lines = [f"    {self.ctype(op.out)} *out = {self.pointer(op.out)};\n    int i, j, c;\n"]
        lines += self.unpack(op)
        lines.append(f"    for (i = 0; i < {height}; i++) for (j = 0; j < {width}; j++) {{\n")
        result = self.pixel(op.out, lines, {}, is_target=True)
        lines.append(f"      for (c = 0; c < {channels}; c++) *out++ = ({self.ctype(op.out)}){result}[c];\n    }}\n")
        return "".join(lines)

    def convs(self, op: Op) -> list[Conv]:
        """The convolutions that are computed on the way to one stored value."""
        found = [op] if isinstance(op, Conv) else []
        for x in op.inputs:
            if x not in self.stored and x in self.made:
                found += self.convs(self.made[x])
        return found

    def unpack(self, op: Op) -> list[str]:
        """Calls that unpack the kernels of one step, one behind the other."""
        lines, offset = [], 0
        for conv in dict.fromkeys(self.convs(op)):
            kernel, index = self.folded.kernels[conv.kernel], self.kernel_index[conv.kernel]
            if kernel.is_whole:
                self.unpacked[conv.out] = f"unpacked + {offset}"
                lines.append(f"    unpack(kernel{index}, {kernel.bits}, {kernel.values.size}, unpacked + {offset});\n")
                offset += kernel.values.size
        self.scratch = max(self.scratch, offset)
        return lines

    def pixel(self, value: str, lines: list[str], declared: dict[str, str], is_target: bool = False) -> str:
        """Emit what computes a value at pixel (i, j); the name of the array of its channels."""
        if value in declared:
            return declared[value]
        local = declared[value] = f"v{len(declared)}"
        channels = self.shapes[value][2]
        emit: Callable[[str], None] = lines.append
        if not is_target and (value in self.stored or value == "images"):
            width = self.shapes[value][1]
            source = f"{self.pointer(value)}[(i * {width} + j) * {channels} + c]"
            emit(f"      float {local}[{channels}]; for (c = 0; c < {channels}; c++) {local}[c] = (float){source};\n")
            return local
        op = self.made[value]
        if isinstance(op, Conv):
            ctype = "int32_t" if self.is_integer(op) else "float"
            emit(f"      {ctype} {local}[{channels}];\n      {self.conv(op, local)}\n")
            return local
        if isinstance(op, Pool):
            width, source = self.shapes[op.x][1], self.pointer(op.x)
            at = [f"{source}[((2 * i + {a}) * {width} + 2 * j + {b}) * {channels} + c]" for a, b in np.ndindex(2, 2)]
            expression = f"(({at[0]} + {at[2]}) + ({at[1]} + {at[3]})) * 0.25f"
        elif isinstance(op, Concat):
            x, y = self.pixel(op.x, lines, declared), self.pixel(op.y, lines, declared)
            kept = self.shapes[op.x][2]
            expression = f"c < {kept} ? {x}[c] : {y}[c - {kept}]"
        elif isinstance(op, Affine):
            expression = self.affine(op, lines, declared)
        else:
            x = self.pixel(op.x, lines, declared) + "[c]"
            if isinstance(op, Snap):
                expression = (
                    f"snap({x}, {self.table(op.table)}, {self.table(op.middles)}, {op.table.size}, {int(op.signed)})"
                )
            else:
                assert isinstance(op, (Quantize, Clip)), "others stand for whole maps and are stored"
                x = f"rintf({x})" if isinstance(op, Quantize) else f"(float){x}"
                expression = f"clip({x}, {_number(op.low)}, {_number(op.high)})"
        emit(f"      float {local}[{channels}]; for (c = 0; c < {channels}; c++) {local}[c] = {expression};\n")
        if isinstance(op, (Quantize, Snap)) and self.wants_codes:
            emit(f'      {self.name}_codes("{op.out}", {local}, {channels});\n')
        return local

    def affine(self, op: Affine, lines: list[str], declared: dict[str, str]) -> str:
        total = ""
        for x, factor in zip(op.inputs, op.factors, strict=True):
            value = f"(float){self.pixel(x, lines, declared)}[c]"
            if np.any(factor != 1):
                value = f"{self.factor(factor)} * {value}"
            total = f"({total} + {value})" if total else f"({value})"
        return total if op.bias is None else f"{total} + {self.factor(op.bias)}"

    def factor(self, values: np.ndarray) -> str:
        flat = values.reshape(-1)
        return _number(flat[0]) if flat.size == 1 else f"{self.table(flat)}[c]"

    def is_integer(self, op: Conv) -> bool:
        return op.out in self.bounds and max(map(abs, self.bounds[op.out])) < 2**31

    def conv(self, op: Conv, local: str) -> str:
        """A call that computes all channels of a convolution at one pixel."""
        kernel = self.folded.kernels[op.kernel]
        height, width, channels_in = self.shapes[op.x]
        weights = self.unpacked.get(op.out, f"kernel{self.kernel_index[op.kernel]}")
        types = (
            self.ctype(op.x),
            "int8_t" if kernel.is_whole else "float",
            "int32_t" if self.is_integer(op) else "float",
        )
        shape = "depthwise" if kernel.depthwise else "conv"
        self.conv_types[shape, types] = None
        return (
            f"{_conv_name(shape, types)}({self.pointer(op.x)}, {height}, {width}, {channels_in}, {weights}, "
            f"{kernel.values.shape[0]}, {self.shapes[op.out][2]}, {op.stride}, {op.padding}, {int(op.adjoint)}, i, j, "
            f"{local});"
        )

    def smooth(self, op: Smooth) -> str:
        height, width, channels = self.shapes[op.out]
        if op.kind not in _FLUXES:
            raise ValueError(
                f"smoothing of kind {op.kind!r} has no C code: retrain with one of {', '.join(_FLUXES)}, or export by "
                "stablehlo, which takes every kind"
            )
        self.fluxes[op.kind] = None
        return (
            f"    smooth_{op.kind}({self.pointer(op.x)}, {height}, {width}, {channels}, {_number(op.gamma2)}, "
            f"{_number(op.eps)}, {self.pointer(op.out)});\n"
        )

    def mean(self, op: Mean) -> str:
        height, width, channels = self.shapes[op.x]
        return f"""    float *out = {self.pointer(op.out)};
    int i, c;
    for (c = 0; c < {channels}; c++) out[c] = 0.0f;
    for (i = 0; i < {height * width}; i++)
      for (c = 0; c < {channels}; c++) out[c] += (float){self.pointer(op.x)}[i * {channels} + c];
    for (c = 0; c < {channels}; c++) out[c] *= {_number(1 / (height * width))};
"""


def _single_steps(ops: tuple[Op, ...]) -> tuple[Op, ...]:
    """Smoothing steps one by one: each reads the neighbours of the one before."""
    single: list[Op] = []
    for op in ops:
        if isinstance(op, Smooth):
            names = [op.x, *(f"{op.out}.{i}" for i in range(1, op.steps)), op.out]
            single += [dataclasses.replace(op, x=x, out=out, steps=1) for x, out in itertools.pairwise(names)]
        else:
            single.append(op)
    return tuple(single)


def _shapes(folded: Folded, image_size: tuple[int, int]) -> dict[str, tuple[int, int, int]]:
    """(H, W, C) of every value."""
    shapes = {"images": (*image_size, folded.channels)}
    for op in folded.ops:
        height, width, channels = shapes[op.inputs[0]]
        if isinstance(op, Conv):
            kernel = folded.kernels[op.kernel]
            reach = kernel.values.shape[0] - 1
            height, width = ((n + 2 * op.padding - reach - 1) // op.stride + 1 for n in (height, width))
            channels = kernel.values.shape[2 if op.adjoint and not kernel.depthwise else 3]
        elif isinstance(op, Pool):
            height, width = height // 2, width // 2
        elif isinstance(op, Concat):
            channels += op.channels
        elif isinstance(op, Mean):
            height = width = 1
        shapes[op.out] = (height, width, channels)
    return shapes


def _number(value: float | int | np.floating) -> str:
    """A float32 as a C constant, exact."""
    value = float(np.float32(value))
    if math.isinf(value):
        return "INFINITY" if value > 0 else "-INFINITY"
    return f"{value.hex()}f"


def _conv_name(shape: str, types: tuple[str, str, str]) -> str:
    return "_".join([shape, *(t.removesuffix("_t") for t in types)])


_UNPACK = """
static void unpack(const uint8_t *data, int bits, int count, int8_t *codes) {
  int i, half = 1 << (bits - 1), mask = (1 << bits) - 1;
  for (i = 0; i < count; i++) {
    long bit = (long)i * bits;
    int shift = (int)(bit & 7), word = data[bit >> 3];
    if (shift + bits > 8) word |= data[(bit >> 3) + 1] << 8;
    codes[i] = (int8_t)((((word >> shift) & mask) ^ half) - half);
  }
}
"""

_CLIP = """
static float clip(float x, float low, float high) { return x < low ? low : x > high ? high : x; }
"""

_SNAP = """
static float snap(float x, const float *levels, const float *middles, int count, int is_signed) {
  float magnitude = is_signed ? fabsf(x) : x;
  int k = 0;
  while (k < count - 1 && magnitude > middles[k]) k++;
  return is_signed && x < 0.0f ? -levels[k] : levels[k];
}
"""

# One pixel of a convolution. The kernel is (taps, taps, I, O); its adjoint reads it flipped, its channels swapped.
_CONVS = {
    "conv": """
static void NAME(const X *x, int h, int w, int n, const K *k, int taps, int m, int stride, int pad, int adjoint, \
int i, int j, A *out) {
  int a, b, c, o;
  for (o = 0; o < m; o++) out[o] = 0;
  for (a = 0; a < taps; a++) for (b = 0; b < taps; b++) {
    int y = i * stride + a - pad, z = j * stride + b - pad;
    const X *in = x + ((long)y * w + z) * n;
    const K *tap = k + (long)(adjoint ? taps * taps - 1 - (a * taps + b) : a * taps + b) * n * m;
    if (y < 0 || y >= h || z < 0 || z >= w) continue;
    if (adjoint) {
      for (o = 0; o < m; o++) {
        A sum = 0;
        for (c = 0; c < n; c++) sum += (A)in[c] * (A)tap[o * n + c];
        out[o] += sum;
      }
    } else {
      for (c = 0; c < n; c++) {
        A value = (A)in[c];
        if (value != 0) for (o = 0; o < m; o++) out[o] += value * (A)tap[c * m + o];
      }
    }
  }
}
""",
    "depthwise": """
static void NAME(const X *x, int h, int w, int n, const K *k, int taps, int m, int stride, int pad, int adjoint, \
int i, int j, A *out) {
  int a, b, c;
  for (c = 0; c < m; c++) out[c] = 0;
  for (a = 0; a < taps; a++) for (b = 0; b < taps; b++) {
    int y = i * stride + a - pad, z = j * stride + b - pad;
    const X *in = x + ((long)y * w + z) * n;
    const K *tap = k + (adjoint ? taps * taps - 1 - (a * taps + b) : a * taps + b) * m;
    if (y < 0 || y >= h || z < 0 || z >= w) continue;
    for (c = 0; c < m; c++) out[c] += (A)in[c] * (A)tap[c];
  }
}
""",
}

# Flux along H of the differences along H and W; that along W is the same with both exchanged.
_FLUXES = {
    "huber": "clip(d / eps, -1.0f, 1.0f) + 0.0f * other",
    "linear": "d + 0.0f * other * eps",
    "isotropic": "d / sqrtf(d * d + other * other + eps * eps)",
    "anisotropic": "d / sqrtf(d * d + eps * eps) + 0.0f * other",
    "charbonnier": "eps * d / sqrtf(d * d + other * other + eps * eps)",
}

_SMOOTH = """
static float flux_KIND(const float *x, int h, int w, int n, int i, int j, int along_w, float eps) {
  const float *at = x + ((long)i * w + j) * n;
  float dh = i + 1 < h ? at[w * n] - at[0] : 0.0f, dw = j + 1 < w ? at[n] - at[0] : 0.0f;
  float d = along_w ? dw : dh, other = along_w ? dh : dw;
  return FLUX;
}

static void smooth_KIND(const float *x, int h, int w, int n, float gamma2, float eps, float *out) {
  int i, j, c;
  for (i = 0; i < h; i++) for (j = 0; j < w; j++) for (c = 0; c < n; c++) {
    float flow = flux_KIND(x + c, h, w, n, i, j, 0, eps) + flux_KIND(x + c, h, w, n, i, j, 1, eps);
    if (i > 0) flow -= flux_KIND(x + c, h, w, n, i - 1, j, 0, eps);
    if (j > 0) flow -= flux_KIND(x + c, h, w, n, i, j - 1, 1, eps);
    out[((long)i * w + j) * n + c] = x[((long)i * w + j) * n + c] + gamma2 * flow;
  }
}
"""
