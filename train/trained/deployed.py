"""What becomes of a trained image network when it is deployed: equality, accuracy, proofs and latency, by runtime."""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qpde import deploy
from qpde.bits import Bits
from qpde.certify import step_bounds
from qpde.deploy import Folded, FoldedGraph
from qpde.models import converge_norms
from qpde.models.graphs.networks import GraphNetwork
from qpde.models.images.network import Network
from train.trained.certificates import certified_with_twin
from train.trained.runtimes import Runtime, float_runtimes, one_core, runtimes

BATCHES = (1, 32)
"""Images at once, for latencies."""

_AT_ONCE, _PIXELS_AT_ONCE = 50, 2**18
"""Images whose codes are held at once, and the pixels that they have at most."""


@dataclasses.dataclass
class RuntimeRow:
    """One line of the table; None where it was not measured.

    Attributes:
      runtime: Its name.
      differing: Codes that differ from those of the NumPy integers.
      codes: How many there are.
      logits_off: Largest difference of a logit from theirs.
      accuracy: Share of right answers.
      agreement: Share of answers that are the twin's.
      certified: Share of answers that are proven to be the twin's.
      milliseconds: By batch, for the whole batch on one core.
      against_float32: The same over that of float32 in onnxruntime, or in JAX without it.
    """

    runtime: str
    differing: int | None = None
    codes: int | None = None
    logits_off: float | None = None
    accuracy: float | None = None
    agreement: float | None = None
    certified: float | None = None
    milliseconds: dict[int, float] = dataclasses.field(default_factory=dict)
    against_float32: dict[int, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Deployed:
    """All of it for one network.

    Attributes:
      images: Test images, or test nodes.
      accuracy_twin: Accuracy of the high-precision twin.
      rows: By runtime.
      missing: Reasons of runtimes that are not there, by name.
      what: What was counted: "images" or "nodes".
    """

    images: int
    accuracy_twin: float
    rows: list[RuntimeRow]
    missing: dict[str, str]
    what: str = "images"


def measure(
    model: Network,
    variables: dict[str, Any],
    folded: Folded,
    bits: Bits,
    batches: Iterable[tuple[Any, Any]],
    *,
    newton_steps: int | None = None,
    rounds: int = 10,
) -> Deployed:
    """Run what is deployed on test images, in every runtime, beside the network and its twin.

    Args:
      model: The network.
      variables: Its collections.
      folded: What is deployed.
      bits: Bits that it was folded at.
      batches: Pairs of network inputs (N, H, W, C) and labels.
      newton_steps: As for `qpde.certify`; the certificate is left out where activations are not rounded.
      rounds: Measured calls for the latencies. 0 leaves them out.
    Returns:
      `Deployed`.
    """
    images, labels = (np.concatenate([np.asarray(v) for v in part]) for part in zip(*batches, strict=True))
    counted, at_once = labels >= 0, _at_once(images)
    size, variables = images.shape[1:3], converge_norms(model, variables, images[:1], bits=bits)
    with tempfile.TemporaryDirectory() as scratch:
        found, missing = runtimes(model, variables, folded, bits, size, Path(scratch))
        rows = {name: RuntimeRow(name, 0, 0, 0.0) for name in found}
        answers: dict[str, list[np.ndarray]] = {name: [] for name in found}
        for x in _cut(images, at_once):
            logits, codes = deploy.run_reference(folded, x)
            for name, runtime in found.items():
                answers[name].append(_compare(rows[name], runtime, _padded(x, at_once), logits, codes))
        predictions = {name: np.concatenate(parts) for name, parts in answers.items()}
        twin, proven = _proofs(model, variables, folded, bits, _cut(images, at_once), newton_steps)
        for name, row in rows.items():
            row.accuracy = float(np.mean((predictions[name] == labels)[counted]))
            row.agreement = float(np.mean((predictions[name] == twin)[counted]))
            if proven is not None:
                row.certified = float(np.mean((predictions[name] == proven)[counted]))
        if rounds:
            exact, absent = float_runtimes(model, variables, Path(scratch))
            missing |= absent
            rows |= {name: RuntimeRow(name) for name in exact}
            _time(rows, found | exact, images, rounds)
    return Deployed(len(images), float(np.mean((twin == labels)[counted])), list(rows.values()), missing)


def measure_graph(
    model: GraphNetwork, variables: dict[str, Any], folded: FoldedGraph, bits: Bits, graph: Any, labels: Any
) -> Deployed:
    """Run what is deployed of a network on a graph beside the network and its twin.

    Args:
      model: The network.
      variables: Its collections.
      folded: What is deployed.
      bits: Bits that it was folded at.
      graph: The `jraph.GraphsTuple`, its features sparse or not.
      labels: Class of each node, -1 where it does not count.
    Returns:
      `Deployed`, without codes, proofs and latencies.
    """
    labels = np.asarray(labels)
    counted = labels >= 0
    nodes = graph.nodes.todense() if hasattr(graph.nodes, "todense") else graph.nodes
    artefact = deploy.export_graph(folded, len(nodes), len(graph.senders)).serialize()
    logits = {
        "packed": folded(graph),
        "JAX, fake-quantized": jax.jit(model.apply)(variables, graph, bits=bits),
        "StableHLO": jax.jit(jax.export.deserialize(artefact).call)(nodes, graph.senders, graph.receivers),
    }
    twin = np.argmax(jax.jit(model.apply)(variables, graph, bits=bits.twin), -1)
    rows = []
    for name, found in logits.items():
        right, same = np.argmax(found, -1) == labels, np.argmax(found, -1) == twin
        off = float(np.abs(np.asarray(found) - np.asarray(logits["packed"])).max())
        rows.append(RuntimeRow(name, None, None, off, float(right[counted].mean()), float(same[counted].mean())))
    return Deployed(int(counted.sum()), float((twin == labels)[counted].mean()), rows, {}, "nodes")


def _compare(row: RuntimeRow, runtime: Runtime, x, logits, codes) -> np.ndarray:
    """Count what differs into the row; the answers."""
    count = len(logits)
    if runtime.codes is not None:
        own = runtime.codes(x)
        for name, value in own.items():
            row.differing = (row.differing or 0) + int((np.abs(value[:count] - codes[name]) > 1e-3).sum())
            row.codes = (row.codes or 0) + codes[name].size
    found = runtime.logits(x)[:count]
    row.logits_off = max(row.logits_off or 0.0, float(np.abs(found - logits).max()))
    return found.argmax(-1)


def _padded(x: np.ndarray, count: int) -> np.ndarray:
    """All batches have one size, for one compiled program."""
    return np.pad(x, [(0, count - len(x)), (0, 0), (0, 0), (0, 0)])


def _proofs(model, variables, folded, bits, batches, newton_steps) -> tuple[np.ndarray, np.ndarray | None]:
    """The twin's answers, and the deployed ones that are proven to be the twin's, -1 elsewhere."""
    if bits.activations is None:
        logits = jax.jit(partial(model.apply, variables, bits=bits))
        parts = [np.asarray(logits(_padded(x, len(batches[0]))))[: len(x)].argmax(-1) for x in batches]
        return np.concatenate(parts), None
    if model.clip_bits is not None:
        model, variables = model.at_bits(variables, bits)
    run = deploy.run(folded, return_states=True)
    steps = step_bounds(model, variables, batches[0].shape[1:3], bits)
    twins, proven = [], []
    for x in batches:
        count, x = len(x), _padded(x, len(batches[0]))
        given: dict[str, Any] = {"steps": steps, "deployed": run(x)}
        found, twin = certified_with_twin(model, variables, x, bits, newton_steps=newton_steps, **given)
        twins.append(twin[:count].argmax(-1))
        proven.append(np.where(found.certified, found.prediction, -1)[:count])
    return np.concatenate(twins), np.concatenate(proven)


def _at_once(images: np.ndarray) -> int:
    return max(1, min(_AT_ONCE, _PIXELS_AT_ONCE // (images.shape[1] * images.shape[2])))


def _cut(images: np.ndarray, count: int) -> list[np.ndarray]:
    return [images[start : start + count] for start in range(0, len(images), count)]


def _time(rows: dict[str, RuntimeRow], programs: dict[str, Runtime], images: np.ndarray, rounds: int) -> None:
    for batch in BATCHES:
        x = np.resize(images, (batch, *images.shape[1:]))
        with one_core():
            seconds = latencies({name: partial(runtime.logits, x) for name, runtime in programs.items()}, rounds)
        base = seconds.get("onnxruntime, float32", seconds["JAX, float32"])
        for name, value in seconds.items():
            rows[name].milliseconds[batch] = 1000 * value
            rows[name].against_float32[batch] = value / base


def latencies(programs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of a call of each, taken in turns, after two calls that are not counted.

    Args:
      programs: By name.
      rounds: Calls of each.
    """
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for i in range(2 + rounds):
        for name, program in programs.items():
            start = time.perf_counter()
            program()
            if i >= 2:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}
