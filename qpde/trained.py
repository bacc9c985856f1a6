"""A trained network in a folder of its own, which loads anywhere: no data, no training code, nothing that can execute.

    network.json            architecture and options, classes, input shape, mean and std, and where it came from
    weights.safetensors     parameters, clips, batch statistics as they were evaluated, spectral state

`network.json` is written last and holds a digest of the weights: a folder that was cut short or altered is refused.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax.core import unfreeze
from flax.traverse_util import unflatten_dict
from jaxtyping import Array

from qpde.batches import read_batch
from qpde.bits import Bits
from qpde.checks import check_variables
from qpde.files import write_whole
from qpde.graphs import from_edges
from qpde.models.graphs.layers import (
    AttentionLayer,
    ConvolutionLayer,
    GraphSmoothing,
    InitialResidualLayer,
    PDELayer,
)
from qpde.models.graphs.networks import GraphNetwork
from qpde.models.images.architecture import Architecture
from qpde.models.images.network import Network
from qpde.models.images.segmentation import SegmentationArchitecture
from qpde.models.options import NetworkOptions, Smoothing
from qpde.models.protocol import QuantizedNetwork
from qpde.models.registry import BLOCKS, image_network

__all__ = ["DESCRIPTION", "WEIGHTS", "TrainedNetwork", "load", "save", "weights_digest"]

DESCRIPTION, WEIGHTS = "network.json", "weights.safetensors"

_FORMAT, _VERSION = "qpde network", 1
_LAYERS = {
    "pde": PDELayer,
    "convolution": ConvolutionLayer,
    "initial_residual": InitialResidualLayer,
    "attention": AttentionLayer,
}
_ARCHITECTURES = {"image": Architecture, "segmentation": SegmentationArchitecture}
_KIND_OF = {architecture: kind for kind, architecture in _ARCHITECTURES.items()}
_LARGEST_BATCH = 256  # images that are computed at once
_LARGEST_LOGITS = 2**24  # numbers of logits that are computed at once


@dataclasses.dataclass(frozen=True)
class TrainedNetwork:
    """A network with its weights and what is needed to use it.

    Attributes:
      model: Flax Linen module of `qpde.models`, or a network of `qpde.quantized`.
      variables: Its collections, plain or a FrozenDict.
      classes: Names of the classes, in the order of the logits.
      input_shape: (height, width, channels) of the images that it was trained on, or None.
      mean: Mean of the training images by channel, a full pixel being 1, or None.
      std: Standard deviation alike, or None.
      centre: Share of a picture's short side that it was evaluated on, see `qpde.pictures.centre_crop`.
      about: Where it came from, as far as known: seed, command, versions, device, date, fingerprint of its data.
    """

    model: Any
    variables: Mapping[str, Any]
    classes: tuple[str, ...]
    input_shape: tuple[int, int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    centre: float = 1.0
    about: dict[str, Any] = dataclasses.field(default_factory=dict)

    def normalize(self, images: Any) -> Array:
        """The network's input: (x - mean) / std in float32.

        Args:
          images: (N, H, W, C), uint8 from 0 to 255, or floating from 0 to 1.
        Raises:
          ValueError: Images of another rank, dtype or number of channels.
        """
        x = jnp.asarray(images)
        if x.ndim != 4:
            raise ValueError(f"images must be (N, H, W, C); got shape {x.shape}: give one image as image[None]")
        channels = self._channels
        if channels is not None and x.shape[-1] != channels:
            raise ValueError(f"images have {x.shape[-1]} channels, the network takes {channels}: got shape {x.shape}")
        if x.dtype == jnp.uint8:
            x = x.astype(jnp.float32) / 255
        elif not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"images of dtype {x.dtype} must be uint8 (0 to 255) or floating (0 to 1)")
        x = x.astype(jnp.float32)
        if self.mean is None or self.std is None:
            return x
        mean, std = (jnp.asarray(v, jnp.float32).reshape(1, 1, 1, -1) for v in (self.mean, self.std))
        return (x - mean) / std

    def logits(self, inputs: Any, *, bits: Bits | None = None) -> np.ndarray:
        """Logits of images as `normalize` takes them, (N, classes), of their pixels, (N, H, W, classes), where the
        network segments, or of all nodes of a graph.

        Args:
          inputs: Images, any number of them; or a `jraph.GraphsTuple` for a network on graphs; or a pair of these and
            labels, which are not used.
          bits: Bits of this call. Default: the network's own.
        """
        if isinstance(inputs, Mapping | tuple):
            inputs = read_batch(inputs, self.variables)
        if isinstance(self.model, GraphNetwork):
            return np.asarray(_apply(self.model, self.variables, inputs, bits))
        if len(inputs) == 0:
            return np.zeros((0, *self._pixels(inputs), len(self.classes)), np.float32)
        # Batches of a power of two, so that few programs serve every number of images.
        of_image = math.prod(self._pixels(inputs)) * len(self.classes)
        fits = 1 << max(0, (_LARGEST_LOGITS // of_image).bit_length() - 1)
        size = min(_LARGEST_BATCH, fits, 1 << (len(inputs) - 1).bit_length())
        found = []
        for start in range(0, len(inputs), size):
            x = self.normalize(inputs[start : start + size])
            missing = size - len(x)
            padded = jnp.pad(x, [(0, missing), (0, 0), (0, 0), (0, 0)])
            found.append(np.asarray(_apply(self.model, self.variables, padded, bits))[: len(x)])
        return np.concatenate(found)

    @property
    def _channels(self) -> int | None:
        if isinstance(self.model, Network):
            return self.variables["params"]["stem"]["kernel"].shape[2]
        return None if self.input_shape is None else self.input_shape[-1]

    def _pixels(self, images: Any) -> tuple[int, ...]:
        """Axes of the logits that are pixels."""
        return tuple(images.shape[1:3]) if self.is_segmenting else ()

    @property
    def is_segmenting(self) -> bool:
        """Whether the network has a class for every pixel of an image."""
        return isinstance(getattr(self.model, "architecture", None), SegmentationArchitecture)

    def predict(self, inputs: Any, *, bits: Bits | None = None) -> np.ndarray:
        """Index of the predicted class of every image, pixel or node; names are in `classes`."""
        return self.logits(inputs, bits=bits).argmax(-1)


@functools.partial(jax.jit, static_argnames="model")
def _apply(model, variables, x, bits):
    return model.apply(variables, x, bits=bits)


def save(
    folder: str | Path,
    model: QuantizedNetwork,
    variables: Mapping[str, Any],
    *,
    classes: Sequence[str] | None = None,
    input_shape: Sequence[int] | None = None,
    mean: Any = None,
    std: Any = None,
    centre: float = 1.0,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Write a trained network to a folder, from which `load` reads it anywhere.

    Args:
      folder: Folder to write, made if need be. A network that is there is replaced.
      model: Network of `qpde.models`; or of `qpde.quantized`, whose code the folder does not hold.
      variables: Its collections, as they are to be evaluated.
      classes: Names of the classes. Default: their numbers.
      input_shape: (height, width, channels) of the images. A network of `qpde.quantized` needs it.
      mean: Mean of the training images by channel, a full pixel being 1. Default: images are used as they are.
      std: Standard deviation alike.
      centre: Share of a picture's short side that it is evaluated on, above 0 and at most 1.
      about: What else is known of it, values of JSON.
    Returns:
      The folder.
    Raises:
      ValueError: Neither a network of `qpde.models` nor of `qpde.quantized`, another number of classes, variables of
        other shapes, NaN or infinite, clips that are not positive, or moments of another number than channels.
      TypeError: A value in `about` is none of JSON.
    """
    if not 0 < centre <= 1:
        raise ValueError(f"`centre` (={centre}) must be a share above 0 and at most 1")
    described, variables = _described(model), unfreeze(dict(variables))
    count = _num_classes(model, variables, input_shape)
    classes = [str(k) for k in range(count)] if classes is None else [str(name) for name in classes]
    if len(classes) != count:
        raise ValueError(f"`classes` names {len(classes)} classes, the network has {count}")
    tensors = _flat({k: v for k, v in variables.items() if k != "observed"})
    _check_shapes(model, tensors, "variables", input_shape)
    check_variables(tensors, "variables")
    moments = {k: _moments(k, v, model, tensors) for k, v in (("mean", mean), ("std", std))}
    weights = safetensors.numpy.save(tensors)
    description = {
        "format": _FORMAT,
        "version": _VERSION,
        "network": described,
        "classes": classes,
        "input_shape": None if input_shape is None else [int(n) for n in input_shape],
        **moments,
        "centre": float(centre),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "about": dict(about or {}),
    }
    text = json.dumps(description, indent=2) + "\n"  # what is no JSON is found before anything is written
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DESCRIPTION).unlink(missing_ok=True)  # never a description beside weights that are not its own
    write_whole(folder / WEIGHTS, weights)
    write_whole(folder / DESCRIPTION, text.encode())
    return folder


def load(folder: str | Path, *, model: QuantizedNetwork | None = None) -> TrainedNetwork:
    """Read a network that `save`, or a finished run, wrote.

    Args:
      folder: Folder with network.json and weights.safetensors.
      model: The network of `qpde.quantized` that was saved, made anew from its code and rules; its bits, and the signs
        that data decided, are those of the folder. None for networks of `qpde.models`.
    Raises:
      FileNotFoundError: One of them is missing.
      ValueError: One of them is damaged, of another program or of an unknown version.
    """
    folder = Path(folder)
    path, weights = folder / DESCRIPTION, folder / WEIGHTS
    for file in (path, weights):
        if not file.is_file():
            raise FileNotFoundError(f"{folder} holds no trained network: it has no {file.name}")
    try:
        description = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(description, dict) or description.get("format") != _FORMAT:
        raise ValueError(f"{path} does not describe a network of qpde")
    if description.get("version") != _VERSION:
        raise ValueError(
            f"{path} is of version {description.get('version')!r}; this qpde reads version {_VERSION}: install another"
        )
    content = weights.read_bytes()
    if hashlib.sha256(content).hexdigest() != description.get("weights_sha256"):
        raise ValueError(f"{weights} was cut short or altered: its digest is not the one that {path.name} holds")
    try:
        tensors = safetensors.numpy.load(content)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{weights} is damaged: {error}") from None
    try:
        model = _built(description["network"], model)
        classes = tuple(str(name) for name in description["classes"])
        mean, std, shape = (
            None if description[k] is None else tuple(description[k]) for k in ("mean", "std", "input_shape")
        )
        centre = float(description.get("centre", 1.0))
        if not 0 < centre <= 1:
            raise ValueError(f"it looks at {centre} of a picture's short side")
        about = dict(description["about"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} describes no network that this qpde knows: {error}") from None
    _check_shapes(model, tensors, str(weights), shape)
    check_variables(tensors, str(weights))
    variables = _nested(tensors)
    count = _num_classes(model, variables, shape)
    if len(classes) != count:
        raise ValueError(f"{path} names {len(classes)} classes of a network that has {count}")
    return TrainedNetwork(model, variables, classes, shape, mean, std, centre, about)


def weights_digest(folder: str | Path) -> str | None:
    """SHA-256 of the weights of a trained network, or None where there is no network.

    Args:
      folder: Folder that `save` wrote. The digest is the one that its description holds.
    """
    try:
        found = json.loads((Path(folder) / DESCRIPTION).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found.get("weights_sha256") if isinstance(found, dict) else None


def _moments(name: str, values: Any, model: Any, tensors: dict[str, np.ndarray]) -> list | None:
    """A mean or standard deviation by channel as values of JSON, checked."""
    if values is None:
        return None
    found = np.asarray(values, np.float64).reshape(-1)
    channels = tensors["params/stem/kernel"].shape[2] if isinstance(model, Network) else len(found)
    if len(found) not in (1, channels):
        raise ValueError(f"`{name}` has {len(found)} values, the images have {channels} channels")
    if not np.isfinite(found).all() or (name == "std" and not (found > 0).all()):
        raise ValueError(f"`{name}` (={found.tolist()}) must be finite{', and positive' if name == 'std' else ''}")
    return found.tolist()


def _one_input(model: Any, input_shape: Sequence[int] | None) -> jax.ShapeDtypeStruct:
    """A batch of one input of a network of `qpde.quantized`, by its shape."""
    if input_shape is None:
        raise ValueError(f"{type(model).__name__} does not say what it takes: give `input_shape`, that of one input")
    return jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)


def _num_classes(model: Any, variables: Mapping[str, Any], input_shape: Sequence[int] | None) -> int:
    if hasattr(model, "num_classes"):
        return model.num_classes
    x = _one_input(model, input_shape)
    return jax.eval_shape(lambda variables, x: model.apply(variables, x, bits=Bits()), variables, x).shape[-1]


def _described(model: QuantizedNetwork) -> dict[str, Any]:
    """The network as values of JSON."""
    if hasattr(model, "description"):
        return {"kind": "own", **model.description()}
    if isinstance(model, Network):
        architecture = dataclasses.asdict(model.architecture)
        kinds = {kind: name for name, kind in BLOCKS.items()}
        if model.architecture.block not in kinds:
            raise ValueError(
                f"blocks of kind {model.architecture.block.__name__} have no name in qpde.models: add a row"
            )
        architecture["block"] = kinds[model.architecture.block]
        return {
            "kind": _KIND_OF[type(model.architecture)],
            "architecture": architecture,
            "num_classes": model.num_classes,
            "options": dataclasses.asdict(model.options),
        }
    if isinstance(model, GraphNetwork):
        (layer,) = [name for name, kind in _LAYERS.items() if type(model.layer) is kind]
        names = ("depth", "num_classes", "dropout", "weight_bits", "act_bits", "loop", "remat")
        described = {name: getattr(model, name) for name in names}
        return {"kind": "graph", "layer": layer, "layer_options": dataclasses.asdict(model.layer), **described}
    raise ValueError(
        f"{type(model).__name__} is no network of qpde.models, whose architecture a file can hold: save its variables "
        "with your own module's code"
    )


def _built(described: dict[str, Any], own: Any) -> QuantizedNetwork:
    """The network that `_described` described."""
    described = dict(described)
    kind = described.pop("kind")
    if kind == "own":
        if not hasattr(own, "described"):
            raise ValueError(
                f"it holds weights of your own module {described['module']}, not its code: give it, "
                f"qpde.load(folder, model=qpde.quantized({described['module']}(...), rules))"
            )
        return own.described(described)
    if own is not None:
        raise ValueError("it describes its network itself: leave `model` out")
    if kind in _ARCHITECTURES:
        architecture = dict(described["architecture"])
        architecture["block"] = BLOCKS[architecture["block"]]
        architecture["stages"] = tuple(tuple(int(n) for n in stage) for stage in architecture["stages"])
        options = dict(described["options"])
        if options.get("smoothing") is not None:
            options["smoothing"] = _dataclass(Smoothing, options["smoothing"])
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        # An option that is not there came later: its default is what the network had before.
        unknown = set(options) - {field.name for field in dataclasses.fields(NetworkOptions)}
        if unknown:
            raise ValueError(f"options {sorted(unknown)} are unknown: it was written by a newer qpde")
        return image_network(_ARCHITECTURES[kind](**architecture), num_classes=described["num_classes"], **options)
    if kind == "graph":
        options = dict(described.pop("layer_options"))
        if options.get("smoothing") is not None:
            options["smoothing"] = _dataclass(GraphSmoothing, options["smoothing"])
        return GraphNetwork(layer=_dataclass(_LAYERS[described.pop("layer")], options), **described)
    raise ValueError(f"unknown kind {kind!r}")


def _dataclass(kind: Any, values: dict[str, Any]) -> Any:
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _flat(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Arrays by "collection/a/b"."""
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.ascontiguousarray(leaf).reshape(np.shape(leaf))
        for path, leaf in leaves
    }


def _nested(tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    return unflatten_dict({name: jnp.asarray(value) for name, value in tensors.items()}, sep="/")


def _check_shapes(
    model: Any, tensors: dict[str, np.ndarray], where: str, input_shape: Sequence[int] | None = None
) -> None:
    """ValueError where parameters are missing, left over, or of another shape than the network's."""
    own = {name: value.shape for name, value in tensors.items() if name.startswith("params/")}
    needed = _parameter_shapes(model, tensors, input_shape)
    for name in sorted(own.keys() | needed.keys()):
        if own.get(name) != needed.get(name):
            raise ValueError(f"{where}: {name} has shape {own.get(name)}, the network needs {needed.get(name)}")


def _parameter_shapes(
    model: Any, tensors: dict[str, np.ndarray], input_shape: Sequence[int] | None
) -> dict[str, tuple[int, ...]]:
    if not isinstance(model, Network | GraphNetwork):
        return _shapes_of(model, _one_input(model, input_shape))
    stem = "params/stem/kernel" if isinstance(model, Network) else "params/stem_kernel"
    if stem not in tensors or tensors[stem].ndim < 2:
        raise ValueError(f"there is no {stem}, so these are no weights of {type(model).__name__}")
    if isinstance(model, Network):
        side = model.smallest_image
        x: Any = jnp.zeros((1, side, side, tensors[stem].shape[2]))
    else:
        x = from_edges(
            np.array([0]), np.array([1]), num_nodes=2, nodes=np.zeros((2, tensors[stem].shape[0]), np.float32)
        )
    return _shapes_of(model, x)


def _shapes_of(model: Any, x: Any) -> dict[str, tuple[int, ...]]:
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    leaves = jax.tree_util.tree_leaves_with_path({"params": shapes})
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}
