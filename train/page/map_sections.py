"""The sections for runs of segmentation networks."""

from collections.abc import Mapping
from typing import Any

from qpde import plots
from train.config.segmentation import SegmentationExperiment
from train.page import provenance, training
from train.page.html import Picture, figure, fill, table
from train.page.image_sections import bits_section, layer_error_section, sizes_section
from train.trained.scenes import COLUMNS, PROOFS, MeasuredScenes

_RESULTS = (
    ("mean intersection over union", "mean_iou", "{:.2%}"),
    ("the same, high-precision twin", "mean_iou_twin", "{:.2%}"),
    ("accuracy of pixels", "accuracy", "{:.2%}"),
    ("accuracy, high-precision twin", "accuracy_twin", "{:.2%}"),
    ("agreement with the twin", "agreement", "{:.2%}"),
    ("layer-wise error, mean", "mean_layer_error", "{:.4f}"),
    ("layer-wise error, relative, mean", "mean_relative_layer_error", "{:.4f}"),
)


def sections(
    experiment: SegmentationExperiment,
    results: Mapping[str, dict[str, Any]],
    measured: Mapping[str, MeasuredScenes],
    lines: Mapping[str, list[dict[str, Any]]],
) -> list[tuple[str, str]]:
    """Heading and HTML of every section that applies.

    Args:
      experiment: The first run's.
      results: By network, those of its run's summary.json.
      measured: By network, what was measured now.
      lines: By network, its lines of metrics.jsonl.
    """
    every, low = list(measured), {name: m for name, m in measured.items() if m.by_bits}
    best = {name: result.get("best_epoch") for name, result in results.items()}
    seconds = {name: result.get("training_seconds") for name, result in results.items()}
    found = [("Results", _results(results)), ("Scenes", _scenes(measured))]
    if low:
        errors = layer_error_section(experiment, {name: results[name] for name in low}, (), every)
        by_bits = bits_section(low, every, of_pixels=True)
        found += [("Layer-wise error", errors), ("Mean IoU and agreement against bits", by_bits)]
    if any(m.shares for m in measured.values()):
        found.insert(2, ("Proofs", _proofs({name: m for name, m in measured.items() if m.shares})))
    if any(m.smoothing for m in measured.values()):
        found.insert(2, ("Smoothing", _smoothing({name: m for name, m in measured.items() if m.smoothing})))
    if curves := training.section(lines, best, every):
        found.append(("Training", curves))
    found.append(("Sizes", sizes_section(measured)))
    found.append(("Where it comes from", provenance.section({name: m.about for name, m in measured.items()}, seconds)))
    return found


def _results(results: Mapping[str, dict[str, Any]]) -> str:
    rows = [
        (label, *("–" if r.get(key) is None else form.format(r[key]) for r in results.values()))
        for label, key, form in _RESULTS
        if any(r.get(key) is not None for r in results.values())
    ]
    classes = next(iter(results.values()))["iou"]
    of_classes = [
        (name, *("–" if r["iou"].get(name) is None else f"{r['iou'][name]:.2%}" for r in results.values()))
        for name in classes
    ]
    header = ("", *results)
    return table(header, rows, "On all test images, all shares being shares of pixels that have a class.") + table(
        header,
        of_classes,
        "Intersection over union by class: of the pixels that are of it or taken for it, the share of both.",
    )


def _scenes(measured: Mapping[str, MeasuredScenes]) -> str:
    pictures = []
    for i, (name, m) in enumerate(measured.items()):
        label = f"Test images with the true classes, those of {name} and those of its twin."
        pictures.append(Picture(f"scenes-{i}", plots.maps_figure(m.scenes, COLUMNS, heading=name), label))
    caption = (
        "The class of every pixel, as a colour over the image. The last column shows in colour the pixels to which the "
        "rounding of activations gives another class."
    )
    return "<p>What the networks see in test images.</p>" + figure(pictures, caption)


def _proofs(measured: Mapping[str, MeasuredScenes]) -> str:
    pictures = []
    for i, (name, m) in enumerate(measured.items()):
        label = f"Test images of {name}: pixels whose class rounding changes, provably does not change, and others."
        columns = [f"{bits} bits" for bits in m.shares]
        pictures.append(Picture(f"proofs-{i}", plots.maps_figure(m.proofs, columns, heading=name), label))
    rows = [
        (name, str(bits), *(f"{share:.1%}" for share in shares))
        for name, m in measured.items()
        for bits, shares in m.shares.items()
    ]
    steps = "; ".join(f"{name} {m.newton_steps}" for name, m in measured.items())
    caption = fill(
        "Green: the class is proven to be that of the high-precision twin. Olive: it is the same, without a proof. "
        "Red: rounding changed it. Steps of Newton's method before the proof: {steps}, half of the blocks on the "
        "longest way through the network. With as many as these, the candidate is the twin itself.",
        steps=steps,
    )
    lead = "<p>Which pixels' classes the rounding of activations provably does not change, at bits of activations.</p>"
    return (
        lead
        + table(("network", "bits", *PROOFS), rows, "Shares of the pixels of these images.")
        + figure(pictures, caption)
    )


def _smoothing(measured: Mapping[str, MeasuredScenes]) -> str:
    pictures, notes = [], []
    for i, (name, m) in enumerate(measured.items()):
        if m.smoothing is None:
            continue
        label = f"Feature maps of {name} with smoothing, with its smoothing turned off, and the difference."
        drawing = plots.maps_figure(m.smoothing.rows, m.smoothing.blocks, heading=name)
        pictures.append(Picture(f"smoothing-{i}", drawing, label))
        notes.append(f"{name} {', '.join(f'{change:.2f}' for change in m.smoothing.changes)}")
    caption = fill(
        "The first test image behind some blocks, in each column the channel of largest variation; colours of a column "
        "share one range. All smoothing is turned off at once, with the same weights. |x − y| / |x| of all channels, x "
        "with smoothing and y without: {notes}.",
        notes="; ".join(notes),
    )
    return "<p>Where smoothing changed the feature maps.</p>" + figure(pictures, caption)
