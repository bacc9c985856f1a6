"""The sections for runs on images."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from qpde import plots
from train.config.images import Experiment
from train.page import published_curves
from train.page.html import figure, formula, table
from train.trained.certificates import tightness
from train.trained.figures import SCENE_COLUMNS, Maps, Measured, as_histogram

# Rows of the table: what, key in summary.json, format.
_RESULTS = (
    ("mean intersection over union", "mean_iou", "{:.2%}"),
    ("the same, high-precision twin", "mean_iou_twin", "{:.2%}"),
    ("accuracy", "accuracy", "{:.2%}"),
    ("accuracy, high-precision twin", "accuracy_twin", "{:.2%}"),
    ("agreement with the twin", "agreement", "{:.2%}"),
    ("layer-wise error, mean", "mean_layer_error", "{:.4f}"),
    ("layer-wise error, relative, mean", "mean_relative_layer_error", "{:.4f}"),
    ("Kullback-Leibler divergence", "kl", "{:.4f}"),
    ("best validation accuracy", "validation_accuracy", "{:.2%}"),
)


def sections(
    experiment: Experiment,
    results: Mapping[str, dict[str, Any]],
    measured: Mapping[str, Measured],
    folder: Path,
) -> list[tuple[str, str]]:
    """Heading and HTML of every section that applies; the figures are written to the folder.

    Args:
      experiment: of the first run.   results, measured: by network, of its run's summary.json and measured now.
      folder: for the figures.
    """
    low = {name: m for name, m in measured.items() if m.by_bits}
    every = list(measured)  # a network has one colour in all figures
    found = [("Results", _results(results, measured))]
    if not low:
        found.append(("Faithfulness", "<p>No activation of these networks is quantized: there is no twin.</p>"))
    else:
        depths = [m.stages for m in low.values()]
        stages = depths[0] if all(stages == depths[0] for stages in depths) else ()
        found += [
            ("Layer-wise error", _layer_error(experiment, {n: results[n] for n in low}, stages, folder, every)),
            ("Accuracy and agreement against bits", _bits(low, folder, every)),
            ("What is rounded", _inputs(low, stages, folder, every)),
            ("Smoothing", _smoothing(low, folder)),
        ]
    found.append(("Does a step amplify?", _spectra(measured, folder)))
    if any(m.scenes for m in measured.values()):
        found.insert(1, ("Scenes", _scenes(results, measured, folder)))
    if any(m.certified for m in low.values()):
        found.append(("Errors and what is proven about them", _certificates(low, folder, every)))
    found.append(("Sizes", _sizes(measured, folder)))
    return found


def _results(results, measured) -> str:
    rows = [
        (label, *(form.format(r[key]) if r.get(key) is not None else "–" for r in results.values()))
        for label, key, form in _RESULTS
        if any(r.get(key) is not None for r in results.values())
    ]
    rows.insert(0, ("parameters, without clips", *(f"{m.cost.parameters:,}" for m in measured.values())))
    return table(("", *results), rows, "At the end of the runs, on all test images.")


def _scenes(results, measured, folder) -> str:
    pictures = []
    for i, (name, m) in enumerate(measured.items()):
        path = folder / f"scenes_{i}.png"
        plots.maps_figure(m.scenes, SCENE_COLUMNS, path, heading=name)
        pictures.append((path, f"Test images with the true classes, those of {name}, and those of its twin."))
    classes = next(iter(results.values()))["iou"]
    rows = [
        (name, *("–" if r["iou"].get(name) is None else f"{r['iou'][name]:.2%}" for r in results.values()))
        for name in classes
    ]
    lead = "<p>The class of every pixel, as a colour over the image. Accuracy and agreement are shares of pixels.</p>"
    what = formula("IoU = |true ∩ predicted| / |true ∪ predicted|")
    caption = "The last column shows in colour the pixels to which rounding of the activations gives another class."
    return lead + what + figure(pictures, caption) + table(("", *results), rows, "Intersection over union by class.")


def _layer_error(experiment, results, stages, folder, every) -> str:
    drawn = [
        ("layer_error", "Absolute error", "rms difference from the twin", "layer_error"),
        ("layer_error_relative", "Relative error", "divided by the rms of the twin's output", "relative_layer_error"),
    ]
    pictures = []
    for file, heading, unit, key in drawn:
        curves = {name: np.asarray(result[key]) for name, result in results.items()}
        pictures.append((folder / f"{file}.png", f"{heading} of each block: {_means(curves)}."))
        plots.along_depth_figure(curves, pictures[-1][0], heading=heading, unit=unit, stages=stages, among=every)
    name, published = published_curves.nearest(experiment)
    path = folder / "layer_error_published.png"
    heading = f"Published: {name}"
    plots.along_depth_figure(published, path, heading=heading, unit="absolute error")
    pictures.append((path, f"Absolute error of the published {name}: {_means(published)}."))
    ratio = np.mean(published["symmetric"]) / np.mean(published["plain"])
    caption = (
        "Lower is more faithful. The absolute error rewards a network whose activations are small, the relative one "
        f"does not. The last panel shows the paper's curves ({escape(published_curves.SOURCE)}), where the symmetric "
        f"network has {ratio:.2f} times the plain one's mean error; another network on other images: compare shapes "
        "and ratios."
    )
    what = formula("‖a − a<sub>q</sub>‖ / √numel &nbsp; and &nbsp; ‖a − a<sub>q</sub>‖ / ‖a‖")
    lead = (
        "<p>What the rounding of activations changes in each block's output: <i>a</i> of the high-precision twin, "
        "whose activations are clipped and not rounded, <i>a<sub>q</sub></i> of the quantized network, over all test "
        "images.</p>"
    )
    return lead + what + figure(pictures, caption)


def _bits(measured, folder, every) -> str:
    quantities = (
        ("bits_accuracy", "accuracy, %", lambda f: 100 * f.accuracy),
        ("bits_agreement", "agreement, %", lambda f: 100 * f.agreement),
        ("bits_error", "relative error", lambda f: f.mean_relative_layer_error),
    )
    pictures = []
    for file, quantity, value in quantities:
        curves = {
            name: {str(bits): (value(f), float("nan")) for bits, f in m.by_bits.items()} for name, m in measured.items()
        }
        plots.against_bits_figure(
            {quantity: curves}, folder / f"{file}.png", x="bits of activations", legend_below=True, among=every
        )
        ends = ", ".join(f"{name} from {_ends([v for v, _ in points.values()])}" for name, points in curves.items())
        pictures.append((folder / f"{file}.png", f"{quantity} against bits of activations: {ends}."))
    images = next(iter(next(iter(measured.values())).by_bits.values())).samples
    caption = (
        "One set of weights, trained at the run's own bits, run at other bits of activations; the weights keep "
        "theirs, and batch statistics are estimated again each time. Agreement is the share of images that the "
        f"network and its high-precision twin classify alike; {images:,} test images."
    )
    return figure(pictures, caption)


def _inputs(measured, stages, folder, every) -> str:
    depth = min(len(m.inputs) for m in measured.values())
    chosen = sorted({0, depth // 2, depth - 1})
    rows = {f"block {i + 1}": {name: as_histogram(m.inputs[i]) for name, m in measured.items()} for i in chosen}
    spread = folder / "inputs_histogram.png"
    plots.histogram_figure(rows, spread, among=every)
    pictures = [(spread, f"Histograms of the inputs of blocks {', '.join(str(i + 1) for i in chosen)}, in clips.")]
    quantities = (
        ("inputs_kurtosis", "Kurtosis", "3 is normal, more has outliers", lambda d: d.kurtosis),
        ("inputs_outliers", "Outliers", "% beyond 4 standard deviations", lambda d: 100 * d.outliers),
        ("inputs_saturated", "Saturation", "% beyond the clip", lambda d: 100 * d.saturated),
        ("inputs_entropy", "Entropy of the levels", "bits", lambda d: d.entropy),
    )
    for file, heading, unit, value in quantities:
        curves = {name: np.asarray([value(d) for d in m.inputs]) for name, m in measured.items()}
        path = folder / f"{file}.png"
        plots.along_depth_figure(curves, path, heading=heading, unit=unit, stages=stages, among=every)
        pictures.append((path, f"{heading} ({unit}) along depth: {_means(curves)}."))
    used = "; ".join(f"{escape(name)} {min(d.used_levels for d in m.inputs)}" for name, m in measured.items())
    lead = "<p>The activations at the entrance of each block, before they are rounded.</p>"
    what = formula(
        "entropy = −Σ p<sub>k</sub> log<sub>2</sub> p<sub>k</sub>, &nbsp; p<sub>k</sub> the share of level k"
    )
    caption = (
        "A histogram with a long tail (its axis is logarithmic) leaves few levels to the many small values: kurtosis "
        "and outliers are high, the entropy is low. What lies beyond the dashed line is clipped. Fewest levels in use "
        f"at any block: {used}."
    )
    return lead + what + figure(pictures, caption)


def _smoothing(measured, folder) -> str:
    pictures, notes = [], []
    for i, (name, m) in enumerate(measured.items()):
        maps: Maps = m.maps
        path = folder / f"maps_{i}.png"
        plots.maps_figure(maps.rows, [f"block {block}" for block in maps.blocks], path, heading=name)
        pictures.append((path, f"Feature maps of {name} through depth, before and after smoothing, and rounded."))
        before, after = np.mean(maps.errors, axis=0)
        notes.append(f"{escape(name)} {before:.3f} → {after:.3f}")
    first = next(iter(measured.values())).maps
    path = folder / "maps_histogram.png"
    plots.histogram_figure(first.spread, path)
    pictures.append((path, f"Histograms of the inputs of {next(iter(measured))} before and after smoothing."))
    lead = f"<p>What total-variation smoothing makes of the inputs of blocks. {_smoothings(measured)}.</p>"
    what = formula("S(x) = x − γ² ∇<sup>T</sup>( g ∇x ), &nbsp; g = 1 / √(|∇x|² + ε²) where the kind is isotropic")
    caption = (
        "One test image, in each column the channel of largest variation; colours of a column share one range. The "
        "histograms (of the first network) show what becomes of outliers. Relative rounding error of the maps, ‖x − "
        f"Q(x)‖ / ‖x‖, mean of the columns: {'; '.join(notes)}."
    )
    return lead + what + figure(pictures, caption)


def _smoothings(measured) -> str:
    """How each network smooths, in HTML; networks that do so alike share a clause."""
    alike: dict[str, list[str]] = {}
    for name, m in measured.items():
        s = m.maps.smoothing
        origin = "as in the network" if m.maps.is_own else "added for this page"
        steps = f"{s.steps} explicit step{'s' if s.steps > 1 else ''}"
        text = f"{steps}, γ² = {s.gamma2:.3g}, ε = {s.eps:g}, {escape(s.kind)}, {origin}"
        alike.setdefault(text, []).append(escape(name))
    return "; ".join(f"{', '.join(names)}: {text}" for text, names in alike.items())


def _spectra(measured, folder) -> str:
    path = folder / "spectra.png"
    plots.spectrum_figure(
        {name: {block: values for block, (values, _) in m.spectra.items()} for name, m in measured.items()},
        path,
        heading="Jacobian of each block",
    )
    rows = [
        (
            name,
            f"{min(v.min() for v, _ in m.spectra.values()):.3f}",
            f"{max(v.max() for v, _ in m.spectra.values()):.3f}",
            f"{max(gain for _, gain in m.spectra.values()):.3f}",
        )
        for name, m in measured.items()
    ]
    lead = (
        "<p>A step that is a gradient step on a convex energy has a symmetric Jacobian with eigenvalues between −1 and "
        "1: it carries an error along and never amplifies it.</p>"
    )
    what = formula("J = I − h K<sup>T</sup> D K, &nbsp; 0 ≤ D ≤ 1, &nbsp; h ‖K‖² ≤ 2 &nbsp; ⇒ &nbsp; −1 ≤ λ ≤ 1")
    caption = (
        "Dashes are Ritz values: they lie inside the true spectrum, the outermost first, at four test images. A "
        "network whose dashes leave the grey band amplifies some perturbations; the published blocks are no "
        "gradient steps. Blocks that change the shape, and the first, are left out."
    )
    alt = "; ".join(f"{name}: from {low} to {high}" for name, low, high, _ in rows)
    header = ("", "smallest eigenvalue", "largest", "largest gain")
    return lead + what + figure([(path, f"Eigenvalues by block. {alt}.")], caption) + table(header, rows)


def _certificates(measured, folder, every) -> str:
    pictures, rows = [], []
    for bits in next(iter(measured.values())).certified:
        points = {name: (m.certified[bits]["error"], m.certified[bits]["bound"]) for name, m in measured.items()}
        for name, m in measured.items():
            found, (error, bound) = m.certified[bits], points[name]
            shares = (f"{found[key].mean():.1%}" for key in ("agreement", "certified", "a_priori"))
            rows.append((f"{bits} bits, {name}", *shares, f"{tightness(bound, error):.3g}"))
        path = folder / f"bound_{bits}.png"
        thinned = {name: tuple(v[:: max(1, len(v) // 1500)] for v in pair) for name, pair in points.items()}
        plots.bound_figure(thinned, path, heading=f"{bits}-bit activations", among=every)
        pictures.append((path, f"Proven bound over measured error at {bits} bits: every point above the diagonal."))
    lead = (
        "<p>A bound on how far rounding can move the difference of two logits, proven for each image, above what it "
        "moves it in fact. An image is certified where the bound is smaller than the margin: its class provably does "
        "not change.</p>"
    )
    what = formula(
        "‖x<sub>j</sub> − c<sub>j</sub>‖ ≤ E<sub>j</sub> = L<sub>j</sub> E<sub>j−1</sub> + "
        "‖c<sub>j</sub> − B<sub>j</sub>(c<sub>j−1</sub>)‖, &nbsp; "
        "|Δ(z<sub>i</sub> − z<sub>k</sub>)| ≤ |Δ<sub>c</sub>| + ‖w<sub>i</sub> − w<sub>k</sub>‖ E / √(HW)"
    )
    caption = (
        "Each point is one logit difference of one test image. All lie above the dashed diagonal, where the bound "
        "would be the error; the closer the tighter. The states c are the quantized network's after two sweeps of "
        "Newton's method towards those of its twin, x; L is 1 where the step is proven non-expansive. “A priori” "
        "counts images for which clips and bits alone suffice."
    )
    header = ("", "agree", "certified", "a priori", "bound / error")
    return lead + what + figure(pictures, caption) + table(header, rows, "Shares of the images; median of the ratio.")


def _sizes(measured, folder) -> str:
    costs = {name: m.cost for name, m in measured.items()}
    rows = [
        (
            name,
            f"{cost.parameters:,}",
            f"{cost.weight_bytes / 1024:,.0f} KiB",
            f"{4 * cost.parameters / 1024:,.0f} KiB",
            f"{cost.macs / 1e6:,.1f} M",
            f"{cost.bit_operations / 1e9:,.2f} G",
            f"{cost.macs * 1024 / cost.bit_operations:.1f}",
        )
        for name, cost in costs.items()
    ]
    header = ("", "parameters", "bytes", "in float32", "MACs", "bit-operations", "saved, times")
    what = formula("bit-operations = Σ MACs × weight bits × activation bits, full precision counted as 32")
    text = (
        "<p>What one image costs, and what the parameters take when kernels are packed at their bits. A symmetric "
        "step stores one kernel and uses it twice.</p>"
    )
    return text + what + table(header, rows)


def _means(curves: Mapping[str, Sequence[float] | np.ndarray]) -> str:
    return ", ".join(f"{name} {np.mean(curve):.3g} in the mean" for name, curve in curves.items())


def _ends(values: Sequence[float]) -> str:
    return f"{values[0]:.3g} to {values[-1]:.3g}"
