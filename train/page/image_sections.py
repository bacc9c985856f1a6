"""The sections for runs on images."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from qpde import plots
from train.config.images import Experiment
from train.page import provenance, published_curves, training
from train.page.html import Picture, Thumbnail, figure, fill, table, thumbnails
from train.page.mathml import formula, name, over, root, row, sub, sup, words
from train.page.statistics import decibels, mcnemar, wilson
from train.trained.certificates import tightness
from train.trained.figures import NEWTON_STEPS, Measured, as_histogram

_SHARES = (
    ("accuracy", "accuracy"),
    ("accuracy, high-precision twin", "accuracy_twin"),
    ("agreement with the twin", "agreement"),
)
_NUMBERS = (
    ("Kullback-Leibler divergence", "kl", "{:.4f}"),
    ("best validation accuracy", "validation_accuracy", "{:.2%}"),
)
_EXAMPLES = 6
"""Images of a list."""

Curves = Mapping[str, Sequence[float] | np.ndarray]


def sections(
    experiment: Experiment,
    results: Mapping[str, dict[str, Any]],
    measured: Mapping[str, Measured],
    lines: Mapping[str, list[dict[str, Any]]],
) -> list[tuple[str, str]]:
    """Heading and HTML of every section that applies.

    Args:
      experiment: The first run's.
      results: By network, those of its run's summary.json.
      measured: By network, what was measured now.
      lines: By network, its lines of metrics.jsonl.
    """
    low = {name: m for name, m in measured.items() if m.by_bits}
    every = list(measured)  # a network has one colour in all figures
    depths = [m.stages for m in low.values()]
    stages = depths[0] if depths and all(stages == depths[0] for stages in depths) else ()
    seconds = {name: result.get("training_seconds") for name, result in results.items()}
    best = {name: result.get("best_epoch") for name, result in results.items()}
    found = [("Results", _results(results, measured) + _comparison(measured))]
    if not low:
        found.append(("Faithfulness", "<p>No activation of these networks is quantized: there is no twin.</p>"))
    else:
        found += [
            ("Layer-wise error", layer_error_section(experiment, {n: results[n] for n in low}, stages, every)),
            ("Accuracy and agreement against bits", bits_section(low, every)),
            ("Where network and twin disagree", _disagreements(low)),
        ]
    found.append(("Which classes are confused", _confusion(measured)))
    if low:
        smoothed = any(m.maps is not None and m.maps.smoothing is not None for m in low.values())
        found += [
            ("What is rounded", _inputs(low, stages, every)),
            ("Smoothing" if smoothed else "Feature maps", _maps(low)),
        ]
    found.append(("Does a step amplify?", _spectra(measured, every)))
    if any(m.certified for m in low.values()):
        found.append(("Errors and what is proven about them", _certificates(low, every)))
        found.append(("Certified and uncertified images", _examples(low)))
    if curves := training.section(lines, best, every):
        found.append(("Training", curves))
    found.append(("Sizes", sizes_section(measured)))
    found.append(("Where it comes from", provenance.section({name: m.about for name, m in measured.items()}, seconds)))
    return found


def _results(results, measured) -> str:
    def has(key):
        return any(_number(result.get(key)) is not None for result in results.values())

    counts = {n: _count(results[n].get("samples")) or m.test_count for n, m in measured.items()}
    rows: list[tuple[Any, ...]] = [
        ("parameters, without clips", *(f"{m.cost.parameters:,}" for m in measured.values()))
    ]
    rows += [
        (label, *(_share(_number(result.get(key)), counts[n]) for n, result in results.items()))
        for label, key in _SHARES
        if has(key)
    ]
    if has("layer_error"):
        rows.append(("layer-wise error, mean", *(_error(result, "mean_layer_error") for result in results.values())))
        relative = [(_error(result, "mean_relative_layer_error"), _sqnr(result)) for result in results.values()]
        rows.append(("layer-wise error, relative, mean; SQNR", *relative))
    rows += [
        (label, *("–" if (v := _number(r.get(key))) is None else form.format(v) for r in results.values()))
        for label, key, form in _NUMBERS
        if has(key)
    ]
    total = {count for count in counts.values() if count}
    images = f"all {total.pop():,} test images" if len(total) == 1 else "all test images"
    caption = f"At the end of the runs, on {images}; below a share its 95 % interval (Wilson)."
    return table(("", *results), rows, caption)


def _number(value: Any) -> Any:
    """A number or a list of them, as they are in a file that anyone may have written; else None."""
    if isinstance(value, list):
        return value if value and all(_number(v) is not None for v in value) else None
    return value if isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value) else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


def _share(value: float | None, count: int | None) -> str | tuple[str, str]:
    if value is None:
        return "–"
    if not count:
        return f"{value:.2%}"
    low, high = wilson(min(max(round(value * count), 0), count), count)
    return f"{value:.2%}", f"{100 * low:.1f}–{100 * high:.1f}"


def _error(result: Mapping[str, Any], key: str) -> str:
    value = _number(result.get(key))
    return "–" if value is None else f"{value:.4f}"


def _sqnr(result: Mapping[str, Any]) -> str:
    values = _number(result.get("relative_layer_error"))
    return "" if values is None else f"{np.mean([decibels(v) for v in values]):.1f} dB"


def _comparison(measured: Mapping[str, Measured]) -> str:
    """McNemar's test of all pairs of networks that were tested on the same images."""
    rows = []
    for (first, a), (second, b) in itertools.combinations(measured.items(), 2):
        if a.data == b.data and len(a.predictions.labels) == len(b.predictions.labels):
            mine, theirs, p = mcnemar(a.predictions.is_right, b.predictions.is_right)
            rows.append((f"{first} and {second}", f"{mine}", f"{theirs}", f"{p:.2g}"))
    if not rows:
        return ""
    images = len(next(iter(measured.values())).predictions.labels)
    text = (
        "<h3>Is one more accurate than the other?</h3>"
        "<p>Only the images that one network gets right and the other wrong can answer that. p, of McNemar's exact "
        "test, is the probability that two equally accurate networks divide them at least as unevenly. A large p means "
        "that these images do not tell the two apart. The test compares these trained networks; another seed may give "
        "another answer.</p>"
    )
    return text + table(("", "only the first right", "only the second", "p"), rows, f"On {images:,} test images.")


def layer_error_section(experiment, results, stages, every) -> str:
    drawn: list[tuple[str, str, str, str, Callable]] = [
        ("layer-error", "Absolute error", "rms difference from the twin", "layer_error", np.asarray),
        ("layer-error-relative", "Relative error", "divided by the twin's rms", "relative_layer_error", np.asarray),
        ("sqnr", "SQNR", "dB, more is better", "relative_layer_error", _decibels),
    ]
    pictures = []
    for file, heading, unit, key, value in drawn:
        curves = {name: value(result[key]) for name, result in results.items()}
        drawing = plots.along_depth_figure(
            curves, heading=heading, unit=unit, stages=stages, among=every, is_signed=value is _decibels
        )
        pictures.append(Picture(file, drawing, f"{heading} of each block: {_means(curves)}."))
    published, curves = published_curves.nearest(experiment)
    drawing = plots.along_depth_figure(curves, heading=f"Published: {published}", unit="absolute error", among=every)
    label = f"Absolute error of the published {published}: {_means(curves)}."
    pictures.append(Picture("layer-error-published", drawing, label))
    caption = fill(
        "Lower error is more faithful. The absolute error rewards a network whose activations are small, the relative "
        "one does not. SQNR is the relative error in decibels: 6 dB more is half the error, or one bit. The last panel "
        "shows the paper's curves ({source}), where the symmetric network has {ratio} times the plain one's mean "
        "error. It is another network on other images: compare shapes and ratios.",
        source=published_curves.SOURCE,
        ratio=f"{np.mean(curves['symmetric']) / np.mean(curves['plain']):.2f}",
    )
    difference = row("‖a−", sub("a", "q"), "‖")
    what = formula(
        over(difference, root("n")),
        words("and"),
        over(difference, "‖a‖"),
    ) + formula(name("SQNR"), "=−20", sub(name("log"), "10"), over(difference, "‖a‖"))
    lead = (
        "<p>How far rounding moves the output of each block, over all test images. <i>a</i> is the output of the "
        "high-precision twin, whose activations are clipped and not rounded; <i>a<sub>q</sub></i> is that of the "
        "quantized network, and <i>n</i> counts its numbers.</p>"
    )
    return lead + what + figure(pictures, caption)


def _decibels(errors: Sequence[float]) -> np.ndarray:
    """An error of 0 is drawn as one of the last bit of a float32."""
    return np.array([min(decibels(error), 144.0) for error in errors])


def bits_section(measured, every, *, of_pixels: bool = False) -> str:
    """Accuracy, agreement and error against bits; shares of pixels, which are not independent, have no interval.

    Networks of pixels have their mean intersection over union in the place of the accuracy.
    """
    of_labels = ("bits-accuracy", "accuracy, %", lambda f: f.accuracy, True)
    quantities = (
        ("bits-iou", "mean IoU, %", lambda f: f.mean_iou, True) if of_pixels else of_labels,
        ("bits-agreement", "agreement, %", lambda f: f.agreement, True),
        ("bits-error", "relative error", lambda f: f.mean_relative_layer_error, False),
    )
    pictures = []
    for file, quantity, value, is_share in quantities:
        curves = {
            name: {str(bits): _point(value(f), f.samples, is_share, of_pixels) for bits, f in m.by_bits.items()}
            for name, m in measured.items()
        }
        drawing = plots.against_bits_figure({quantity: curves}, x="bits of activations", legend_below=True, among=every)
        ends = ", ".join(f"{name} from {_ends([v for v, _ in points.values()])}" for name, points in curves.items())
        pictures.append(Picture(file, drawing, f"{quantity} against bits of activations: {ends}."))
    what = (
        "the share of pixels that the network and its high-precision twin classify alike, of {images} test images."
        if of_pixels
        else "the share of images that the network and its high-precision twin classify alike. Bars are 95 % intervals "
        "(Wilson) over {images} test images."
    )
    caption = fill(
        "The weights were trained at the run's own bits and stay at them. Only the bits of the activations change, and "
        f"batch statistics are estimated again for each. Agreement is {what}",
        images=f"{_samples(measured):,}",
    )
    return figure(pictures, caption)


def _samples(measured) -> int:
    return next(iter(next(iter(measured.values())).by_bits.values())).samples


def _point(value: float, samples: int, is_share: bool, of_pixels: bool) -> tuple[float, Any]:
    """A value and its interval, in per cent where it is a share."""
    if is_share and not of_pixels:
        return _with_interval(value, samples)
    return 100 * value if is_share else value, float("nan")


def _with_interval(share: float, samples: int) -> tuple[float, tuple[float, float]]:
    low, high = wilson(round(share * samples), samples)
    return 100 * share, (100 * max(share - low, 0), 100 * max(high - share, 0))


def _disagreements(measured) -> str:
    parts = [
        "<p>Test images that the network and its twin put into different classes. Below each: its true class, then the "
        "predictions.</p>"
    ]
    for network, m in measured.items():
        p = m.predictions
        (where,) = np.nonzero(p.predicted != p.twin)
        text = fill(
            "<h3>{network}</h3><p>{count} of {total} images at {bits} bits{shown}.</p>",
            network=network,
            count=len(where) or "None",
            total=f"{len(p.labels):,}",
            bits=m.bits.activations,
            shown=f", the first {_EXAMPLES}" if len(where) > _EXAMPLES else "",
        )
        captions = (
            f"{m.classes[p.labels[i]]}: twin {m.classes[p.twin[i]]}, network {m.classes[p.predicted[i]]}"
            for i in where[:_EXAMPLES]
        )
        parts.append(text + _thumbnails(p.images, where[:_EXAMPLES], captions))
    return "".join(parts)


def _thumbnails(images: np.ndarray, where: Iterable[int], captions: Iterable[str]) -> str:
    found = [Thumbnail(_png(images[i]), caption) for i, caption in zip(where, captions, strict=True)]
    return thumbnails(found) if found else ""


def _png(image: np.ndarray) -> bytes:
    """The bytes of a PNG file of an image (H, W, C), C 1 or 3, at most 96 pixels a side."""
    file = BytesIO()
    picture = Image.fromarray(np.asarray(image).squeeze(-1) if image.shape[-1] == 1 else np.asarray(image))
    picture.thumbnail((96, 96))
    picture.save(file, "PNG", optimize=True)
    return file.getvalue()


def _confusion(measured) -> str:
    pictures, notes = [], []
    for i, (network, m) in enumerate(measured.items()):
        p, number = m.predictions, len(m.classes)
        counts = np.zeros((number, number), int)
        np.add.at(counts, (p.labels, p.predicted), 1)
        wrong = counts * (1 - np.eye(number, dtype=int))
        pairs = [divmod(int(k), number) for k in np.argsort(-wrong, axis=None, kind="stable")[:3]]
        worst = ", ".join(f"{m.classes[a]} as {m.classes[b]} ({wrong[a, b]})" for a, b in pairs if wrong[a, b])
        label = f"Confusion matrix of {network}: {counts.trace()} of {counts.sum()} right; {worst or 'no mistakes'}."
        drawing = plots.confusion_figure(counts, m.classes, heading=network)
        pictures.append(Picture(f"confusion-{i}", drawing, label))
        notes.append(f"{network}: {worst or 'none'}")
    caption = fill(
        "A row for each true class, a column for each prediction, on {images} test images. Shades are shares of a "
        "row: blue is right, orange wrong. The commonest mistakes: {notes}.",
        images=f"{len(next(iter(measured.values())).predictions.labels):,}",
        notes="; ".join(notes),
    )
    return figure(pictures, caption)


def _inputs(measured, stages, every) -> str:
    depth = min(len(m.inputs) for m in measured.values())
    chosen = sorted({0, depth // 2, depth - 1})
    pictures = []
    for i in chosen:
        spread = {f"block {i + 1}": {name: as_histogram(m.inputs[i]) for name, m in measured.items()}}
        label = f"Histogram of the inputs of block {i + 1}, in clips, its axis logarithmic."
        pictures.append(Picture(f"inputs-{i}", plots.histogram_figure(spread, among=every), label))
    quantities = (
        ("inputs-kurtosis", "Kurtosis", "3 is normal, more has outliers", lambda d: d.kurtosis),
        ("inputs-outliers", "Outliers", "% beyond 4 standard deviations", lambda d: 100 * d.outliers),
        ("inputs-saturated", "Saturation", "% beyond the clip", lambda d: 100 * d.saturated),
        ("inputs-entropy", "Entropy of the levels", "bits", lambda d: d.entropy),
    )
    numbers = []
    for file, heading, unit, value in quantities:
        curves = {name: np.asarray([value(d) for d in m.inputs]) for name, m in measured.items()}
        drawing = plots.along_depth_figure(curves, heading=heading, unit=unit, stages=stages, among=every)
        numbers.append(Picture(file, drawing, f"{heading} ({unit}) along depth: {_means(curves)}."))
    lead = "<p>The activations at the entrance of each block before they are rounded, of some test images.</p>"
    what = formula(name("entropy"), "=−", sub("∑", "k"), sub("p", "k"), sub(name("log"), "2"), sub("p", "k"))
    spread_caption = (
        "Shares of the values, on a logarithmic axis, in clips. What lies beyond the dashed line is clipped. A long "
        "tail leaves few levels to the many small values."
    )
    caption = fill(
        "In the entropy p<sub>k</sub> is the share of level k. With a long tail kurtosis and outliers are high, and "
        "the entropy is low. Fewest levels in use at any block: {used}.",
        used="; ".join(f"{name} {min(d.used_levels for d in m.inputs)}" for name, m in measured.items()),
    )
    return lead + figure(pictures, spread_caption) + what + figure(numbers, caption)


def _maps(measured) -> str:
    pictures, notes = [], []
    for i, (network, m) in enumerate(measured.items()):
        drawing = plots.maps_figure(m.maps.rows, [f"block {block}" for block in m.maps.blocks], heading=network)
        label = f"Feature maps of {network} through depth: {', '.join(m.maps.rows)}."
        pictures.append(Picture(f"maps-{i}", drawing, label))
        shown = [np.mean([errors[k] for errors in m.maps.errors]) for k in range(len(m.maps.errors[0]))]
        notes.append(f"{network} {' → '.join(f'{error:.3f}' for error in shown)}")
    caption = fill(
        "One test image at the entrance of some blocks, in each column the channel of largest variation; colours of a "
        "column share one range. Relative rounding error of the maps, |x − Q(x)| / |x|, mean of the columns{arrow}: "
        "{notes}.",
        arrow=", before and after smoothing" if any(m.maps.smoothing for m in measured.values()) else "",
        notes="; ".join(notes),
    )
    body = figure(pictures, caption)
    smoothed = {network: m for network, m in measured.items() if m.maps.smoothing is not None}
    if not smoothed:
        return "<p>Feature maps before and after rounding.</p>" + body
    return _smoothing(smoothed) + body + _smoothed_spread(smoothed)


def _smoothing(measured) -> str:
    lead = fill(
        "<p>The inputs of some blocks before and after total-variation smoothing. {how}.</p>", how=_smoothings(measured)
    )
    gradient = row("∇x")
    what = formula(
        "S(x)=x−", sup("γ", "2"), sup("∇", "T"), "(g", gradient, "),",
        words("with"), "g=", over("1", root(sup(row("|∇x|"), "2"), "+", sup("ε", "2"))),
        words("where the kind is isotropic"),
    )  # fmt: skip
    return lead + what


def _smoothed_spread(measured) -> str:
    first, m = next(iter(measured.items()))
    pictures = [
        Picture(
            f"maps-spread-{i}",
            plots.histogram_figure({heading: spread}),
            f"Histograms of the input of {heading} of {first} before and after smoothing.",
        )
        for i, (heading, spread) in enumerate(m.maps.spread.items())
    ]
    caption = fill("Outliers of {first} before and after smoothing: shares of the values, in clips.", first=first)
    return figure(pictures, caption)


def _smoothings(measured) -> str:
    """How each network smooths, in plain text; networks that do so alike share a clause."""
    alike: dict[str, list[str]] = {}
    for network, m in measured.items():
        s = m.maps.smoothing
        origin = "as in the network" if m.maps.is_own else "added for this page"
        steps = f"{s.steps} explicit step{'s' if s.steps > 1 else ''}"
        text = f"{steps}, γ² = {s.gamma2:.3g}, ε = {s.eps:g}, {s.kind}, {origin}"
        alike.setdefault(text, []).append(network)
    return "; ".join(f"{', '.join(names)}: {text}" for text, names in alike.items())


def _spectra(measured, every) -> str:
    spectra = {name: m.spectra for name, m in measured.items() if m.spectra}
    if not spectra:
        return "<p>No block of these networks keeps the shape of what enters it.</p>"
    drawing = plots.spectrum_figure(spectra, heading="Jacobian of each block", among=every)
    rows = [
        (name, f"{min(map(np.min, blocks.values())):.3f}", f"{max(map(np.max, blocks.values())):.3f}")
        for name, blocks in spectra.items()
    ]
    lead = (
        "<p>A step that is a gradient step on a convex energy has a symmetric Jacobian with eigenvalues between −1 and "
        "1. It passes an error on, and never amplifies it.</p>"
    )
    what = formula(
        "J=I−h", sup("K", "T"), "DK,", words("with"), "0≤D≤1,", "h", sup(row("‖K‖"), "2"), "≤2", "⇒", "−1≤λ≤1"
    )
    caption = (
        "Dashes are Ritz values at four test images: estimates of eigenvalues, best for the outermost, that lie inside "
        "the true spectrum. A network whose dashes leave the grey band amplifies some perturbations. The published "
        "blocks are not gradient steps. The first block and blocks that change the shape are left out."
    )
    alt = "; ".join(f"{name}: from {low} to {high}" for name, low, high in rows)
    numbers = table(("", "smallest eigenvalue", "largest"), rows)
    return lead + what + figure([Picture("spectra", drawing, f"Eigenvalues by block. {alt}.")], caption + numbers)


def _certificates(measured, every) -> str:
    pictures, rows = [], []
    for bits in next(iter(measured.values())).certified:
        points = {name: (m.certified[bits]["error"], m.certified[bits]["bound"]) for name, m in measured.items()}
        for network, m in measured.items():
            found, (error, bound) = m.certified[bits], points[network]
            shares = (
                _share(float(found[key].mean()), len(found[key])) for key in ("agreement", "certified", "a_priori")
            )
            rows.append((f"{bits} bits, {network}", *shares, f"{tightness(bound, error):.3g}"))
        thinned = {name: tuple(v[:: max(1, len(v) // 600)] for v in pair) for name, pair in points.items()}
        if any((error > 0).any() for error, _ in thinned.values()):
            drawing = plots.bound_figure(thinned, heading=f"{bits}-bit activations", among=every)
            label = f"Proven bound over measured error at {bits} bits: every point above the diagonal."
            pictures.append(Picture(f"bound-{bits}", drawing, label))
    lead = (
        "<p>For each image it is proven how far rounding can move the difference of two logits. The figures compare "
        "this bound with what rounding does move. Where the bound is smaller than the margin the image is certified: "
        "its class provably does not change.</p>"
    )
    j, before = "j", row("j−1")
    states = formula(
        "‖", sub("x", j), "−", sub("c", j), "‖≤", sub("E", j), "=", sub("L", j), sub("E", before), "+‖", sub("c", j),
        "−", sub("B", j), "(", sub("c", before), ")‖",
    )  # fmt: skip
    logits = formula(
        "|Δ(", sub("z", "i"), "−", sub("z", "k"), ")|≤|", sub("Δ", "c"), "|+‖", sub("w", "i"), "−", sub("w", "k"),
        "‖", over("E", root("HW")),
    )  # fmt: skip
    caption = (
        "Each point is one logit difference of one test image. On the dashed diagonal the bound would equal the error: "
        "all points lie above it, and the closer they are, the tighter is the bound. x are the states of the twin. The "
        f"states c start as those of the quantized network; {NEWTON_STEPS} steps of Newton's method bring them near x. "
        "L is 1 where the step is proven non-expansive. “A priori” counts images for which clips and bits alone "
        "suffice."
    )
    header = ("", "agree", "certified", "a priori", "bound / error")
    drawn = figure(pictures, caption) if pictures else f"<p>{caption}</p>"
    images = len(next(iter(next(iter(measured.values())).certified.values()))["certified"])
    return lead + states + logits + drawn + table(header, rows, f"Shares of {images} images; median of the ratio.")


def _examples(measured) -> str:
    """Of each network some images with a certificate and some without, at the fewest bits that have both."""
    parts = []
    for network, m in measured.items():
        p = m.predictions
        mixed = [bits for bits, found in m.certified.items() if 0 < found["certified"].sum() < len(found["certified"])]
        bits = min(mixed or m.certified)
        certified = m.certified[bits]["certified"]
        parts.append(fill("<h3>{network}, {bits} bits</h3>", network=network, bits=bits))
        for heading, chosen in (("Certified", certified), ("Not certified", ~certified)):
            (where,) = np.nonzero(chosen)  # of the first images, which may be fewer than those that were predicted
            text = "{heading}: {count} of {total} images." if len(where) else "{heading}: none of {total} images."
            parts.append(fill(f"<p>{text}</p>", heading=heading, count=len(where), total=len(certified)))
            where = where[:_EXAMPLES]
            captions = (
                m.classes[p.labels[i]] + ("" if p.is_right[i] else f", taken for {m.classes[p.predicted[i]]}")
                for i in where
            )
            parts.append(_thumbnails(p.images, where, captions))
    lead = (
        "<p>A certificate says that the twin chooses the same class. It does not say that the class is right. The "
        "predictions shown are those at the network's own bits.</p>"
    )
    return lead + "".join(parts)


def sizes_section(measured) -> str:
    costs = {network: m.cost for network, m in measured.items()}
    rows = [
        (
            network,
            f"{cost.parameters:,}",
            f"{cost.weight_bytes / 1024:,.0f} KiB",
            f"{4 * cost.parameters / 1024:,.0f} KiB",
            f"{cost.macs / 1e6:,.1f} M",
            f"{cost.bit_operations / 1e9:,.2f} G",
            f"{cost.macs * 1024 / cost.bit_operations:.1f}",
        )
        for network, cost in costs.items()
    ]
    header = ("", "parameters", "bytes", "in float32", "MACs", "bit-operations", "saved, times")
    what = formula(name("bit-operations"), "=∑", name("MACs"), "×", name("weight bits"), "×", name("activation bits"))
    text = (
        "<p>The cost of one image, and the size of the parameters when kernels are packed at their bits. A symmetric "
        "step stores one kernel and uses it twice. Full precision counts as 32 bits.</p>"
    )
    return text + what + table(header, rows)


def _means(curves: Curves) -> str:
    return ", ".join(f"{name} {np.mean(curve):.3g} in the mean" for name, curve in curves.items())


def _ends(values: Sequence[float]) -> str:
    return f"{values[0]:.3g} to {values[-1]:.3g}"
