"""Packed networks as safetensors files.

    program     uint8: the operations and the kernels' shapes, JSON, deflated
    codes2, codes3, codes4, codes8
                uint8: codes of all kernels of that bit-width, one after the other, each packed by `qpde.deploy.packing`
    floats      float32: float kernels, factors, biases and tables, one after the other

The metadata holds a SHA-256 digest of all that. So a file that was cut, altered or padded is refused; the digest is no
signature, and tells nothing about who wrote the file. Joined arrays keep the header short.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import typing
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from qpde.deploy import program
from qpde.deploy.folded import Folded, Note, State
from qpde.deploy.graphs import FoldedGraph
from qpde.deploy.packing import PACKED_BITS, pack, packed_size, unpack
from qpde.files import write_whole

__all__ = ["load_packed", "packed_bytes", "save_packed", "seal", "theoretical_bytes", "unseal"]

FORMAT = "qpde packed network 1"
_LARGEST_PROGRAM = 2**26  # bytes, inflated
_OPS = {op.__name__: op for op in typing.get_args(program.Op)}


def save_packed(path: str | Path, folded: Folded | FoldedGraph) -> Path:
    """Write a folded network into one packed file.

    Args:
      path: Path of the file, "network.safetensors" for instance.
      folded: Result of `fold`, `settle` or `fold_graph`.
    Returns:
      The path.
    """
    return write_whole(path, packed_bytes(folded))


def theoretical_bytes(folded: Folded | FoldedGraph) -> int:
    """Bytes of the numbers alone: codes at their bit-width, all else in float32.

    Args:
      folded: Result of `fold`, `settle` or `fold_graph`.
    """
    arrays = _Arrays()
    _described(folded, arrays)
    return sum(tensor.nbytes for tensor in arrays.tensors().values())


def packed_bytes(folded: Folded | FoldedGraph) -> bytes:
    """Content of the packed file of a folded network."""
    arrays = _Arrays()
    description = {"kind": type(folded).__name__, "network": _described(folded, arrays)}
    text = json.dumps(description, separators=(",", ":")).encode()
    tensors = {"program": np.frombuffer(zlib.compress(text, 9), np.uint8), **arrays.tensors()}
    return seal(tensors, FORMAT)


def load_packed(path: str | Path) -> Folded | FoldedGraph:
    """Read what `save_packed` wrote.

    Args:
      path: Path of the file.
    Returns:
      The folded network, equal to the one that was written, number for number.
    Raises:
      ValueError: The file is no packed network, or was cut, altered or padded; the message names it.
      FileNotFoundError: There is no such file.
    """
    tensors, _ = unseal(path, FORMAT, "packed network")
    try:
        return _read(tensors)
    except (KeyError, TypeError, ValueError, AttributeError, zlib.error, RecursionError) as error:
        raise ValueError(f"{path} does not describe a network: {error}") from None


def seal(tensors: dict[str, np.ndarray], form: str, network: str | None = None) -> bytes:
    """Content of a safetensors file that holds the digest of its tensors.

    Args:
      tensors: The tensors.
      form: Name of the format.
      network: Description of the network, where it is no tensor.
    """
    metadata = {"format": form} if network is None else {"format": form, "network": network}
    return safetensors.numpy.save(tensors, metadata | {"sha256": _digest(tensors, metadata)})


def unseal(path: str | Path, form: str, what: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read a file with content of `seal`.

    Args:
      path: Path of the file.
      form: Name of its format.
      what: What a file of this format is, for messages.
    Returns:
      Tensors and metadata.
    Raises:
      FileNotFoundError: There is no such file.
      ValueError: The file is of another format, or was cut, altered or padded; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or was cut or padded: {error}") from None
    if metadata.get("format") != form:
        raise ValueError(f"{path} is no {what} of qpde: format {metadata.get('format')!r}, not {form!r}")
    if metadata.get("sha256") != _digest(tensors, metadata):
        raise ValueError(f"{path} was altered: its content does not have the digest that it states")
    return tensors, metadata


def _digest(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    """SHA-256 of the tensors behind the description, or the format where that is a tensor."""
    digest = hashlib.sha256(metadata.get("network", metadata["format"]).encode())
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(f"{name} {array.dtype} {array.shape};".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _read(tensors):
    inflater = zlib.decompressobj()
    text = inflater.decompress(tensors["program"].tobytes(), _LARGEST_PROGRAM)
    if not inflater.eof:
        raise ValueError(f"the program is cut, or longer than {_LARGEST_PROGRAM} bytes")
    description = json.loads(text)
    arrays = _Arrays({name: array for name, array in tensors.items() if name != "program"})
    kinds: dict[str, Any] = {"Folded": Folded, "FoldedGraph": FoldedGraph}
    folded: Any = _restored(description["network"], arrays)
    if not isinstance(folded, kinds[description["kind"]]):
        raise ValueError(f"kind {description['kind']} holds {type(folded).__name__}")
    arrays.check_exhausted()
    folded.check()
    return folded


class _Arrays:
    """Streams of codes and floats, written and read in one order."""

    def __init__(self, tensors: dict[str, np.ndarray] | None = None):
        self.streams: dict[str, list[np.ndarray]] = {}
        self.tensors_read = tensors or {}
        self.places = dict.fromkeys(self.tensors_read, 0)

    def add(self, stream: str, array: np.ndarray) -> None:
        self.streams.setdefault(stream, []).append(array.reshape(-1))

    def tensors(self) -> dict[str, np.ndarray]:
        return {name: np.concatenate(arrays) for name, arrays in self.streams.items()}

    def take(self, stream: str, count: int) -> np.ndarray:
        start = self.places[stream]
        if count < 0 or start + count > self.tensors_read[stream].size:
            raise ValueError(f"{stream} end too early")
        self.places[stream] = start + count
        return self.tensors_read[stream][start : start + count]

    def check_exhausted(self) -> None:
        left = [name for name, array in self.tensors_read.items() if self.places[name] != array.size]
        if left:
            raise ValueError(f"{', '.join(left)} are longer than the network")


_RECORDS: dict[str, Any] = {
    **_OPS,
    "Kernel": program.Kernel,
    "Note": Note,
    "State": State,
    "Folded": Folded,
    "FoldedGraph": FoldedGraph,
}


def _described(value: Any, arrays: _Arrays) -> Any:
    """JSON of a tree of records; its arrays go to the streams."""
    if isinstance(value, program.Kernel) and value.bits is not None:
        arrays.add(f"codes{value.bits}", pack(value.values, value.bits))
        return {"codes": [value.bits, value.depthwise, *value.values.shape]}
    if isinstance(value, np.ndarray):
        arrays.add("floats", value.astype(np.float32))
        return {"floats": list(value.shape)}
    if dataclasses.is_dataclass(value):
        fields = {f.name: _described(getattr(value, f.name), arrays) for f in dataclasses.fields(value)}
        return {"record": type(value).__name__, **fields}
    if isinstance(value, dict):
        return {"dict": [[k, _described(v, arrays)] for k, v in value.items()]}
    if isinstance(value, (tuple, list)):
        return [_described(v, arrays) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"cannot write {type(value).__name__}")


def _restored(value: Any, arrays: _Arrays) -> Any:
    if isinstance(value, list):
        return tuple(_restored(v, arrays) for v in value)
    if not isinstance(value, dict):
        return value
    if "codes" in value:
        bits, depthwise, *shape = value["codes"]
        if bits not in PACKED_BITS:
            raise ValueError(f"codes of {bits} bits")
        data = arrays.take(f"codes{bits}", packed_size(math.prod(shape), bits))
        return program.Kernel(unpack(data, bits, tuple(shape)), bits, depthwise)
    if "floats" in value:
        shape = tuple(value["floats"])
        return arrays.take("floats", math.prod(shape)).reshape(shape).astype(np.float32)
    if "dict" in value:
        return {k: _restored(v, arrays) for k, v in value["dict"]}
    kind = _RECORDS[value["record"]]
    return kind(**{k: _restored(v, arrays) for k, v in value.items() if k != "record"})
