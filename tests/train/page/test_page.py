"""`python -m train report`: what the page holds, and that a browser shows it."""

import dataclasses
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from rich.console import Console

from qpde.models import Architecture, Smoothing, registry
from qpde.models.images.blocks import StableBlock
from qpde.plots import along_depth_figure
from train.commands import report
from train.commands.cli import main
from train.config.graphs import GraphExperiment, GraphVariant
from train.config.images import Data, Experiment, Model, Variant
from train.config.serialize import to_json
from train.page import image_sections, published_curves
from train.page.html import Picture, Thumbnail, facts, figure, fill, page, table, thumbnails
from train.tasks import images
from train.trained import figures
from train.trained.figures import Maps

pytestmark = pytest.mark.usefixtures("compiled_once")

TINY = Architecture("tiny", StableBlock, ((8, 8, 3, 1, 1),))

CONFIG = """
from train.config import Data, Experiment, Model, Variant

recipes = {"fast": Experiment(
    name="tiny",
    variants=(
        Variant("symmetric"),
        Variant("full_plain", {"symmetric": False, "weight_bits": None, "act_bits": None}),
    ),
    data=Data("digits", size=8, crop_padding=1, flip=False),
    model=Model("tiny"),
    epochs=1,
    batch_size=256,
)}
"""


def untrained(state, plan, *, run, checkpoints, display):
    """In place of `train.loop.fit`, whose program takes long to compile: the first state is the best."""
    state = state.replace(step=state.step + 1)
    checkpoints.save(1, (state, plan.totals), {"accuracy": 0.1, "loss": 1.0})
    run.log(variant=plan.variant, epoch=1, step=1, validation_accuracy=0.1, seconds=0.0)
    return state


@pytest.fixture(scope="module")
def shown(tmp_path_factory, compiled_once):
    """A folder with a run of a tiny network, its page, and what was measured for it."""
    folder, measured = tmp_path_factory.mktemp("shown"), {}

    def spy(finished, **options):
        measured[finished.name] = found = measure(finished, **options)
        return found

    measure = report.measure
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.ARCHITECTURES, "tiny", TINY)
        patch.chdir(folder)
        patch.setattr(report, "measure", spy)
        patch.setattr(images, "fit", untrained)
        (folder / "tiny.py").write_text(CONFIG)
        assert main(["run", "tiny.py"]) == 0
        # All 320 test images, so that the run's own numbers must come out again.
        options = ["--bits", "2", "4", "--certify", "4", "--images", "320", "--certify-images", "48"]
        assert main(["report", "runs/tiny", *options]) == 0
    return folder, measured


class Elements(HTMLParser):
    """All elements of a page, with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def of(self, *tags):
        return [attributes for tag, attributes in self.found if tag in tags]


def read(folder):
    path = folder / "runs" / "tiny" / "report"
    text = (path / "report.html").read_text()
    return path, text, Elements(text)


def test_the_page_holds_its_figures_and_asks_for_nothing_else(shown):
    path, text, elements = read(shown[0])
    assert [file.name for file in path.iterdir()] == ["report.html"]
    assert len(elements.of("svg")) > 16
    assert not elements.of("script", "iframe", "object", "embed")
    for element in (attributes for _, attributes in elements.found):
        for key in ("src", "href"):
            assert element.get(key, "#").startswith(("#", "data:"))
    assert set(re.findall(r"url\((.)", text)) == {"#"}
    assert "@import" not in text
    assert len(text) < 1.5e6


def test_ids_are_unique_and_every_reference_is_answered(shown):
    _, text, elements = read(shown[0])
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) <= set(ids)


def test_every_figure_says_what_it_shows_and_how_to_read_it(shown):
    _, text, elements = read(shown[0])
    assert all(len(drawing["aria-label"]) > 20 for drawing in elements.of("svg"))
    assert all(image["alt"] for image in elements.of("img"))
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", text, re.S)
    assert len(captions) == len(elements.of("figure"))
    assert all(len(caption) > 60 for caption in captions)
    anchors = [link["href"] for link in elements.of("a")]
    assert anchors == [f"#{heading['id']}" for heading in elements.of("h2")]
    assert ("viewport", "width=device-width, initial-scale=1") in [
        (meta.get("name"), meta.get("content")) for meta in elements.of("meta")
    ]


def test_colours_of_figures_are_the_page_s_and_rows_are_full(shown):
    _, text, elements = read(shown[0])
    assert not re.search(r"(?:fill|stroke): ?(?:#|rgb|white|black)", text)
    for number, row in {"two": 2, "three": 3}.items():
        rows = re.findall(rf'<div class="panels {number}">(.*?)</div>', text, re.S)
        assert rows
        assert {drawn.count("<svg") for drawn in rows} == {row}
    assert len(elements.of("math")) >= 6


def test_the_run_s_origin_and_training_are_shown(shown):
    folder, measured = shown
    _, text, _ = read(folder)
    about = measured["symmetric"].about
    for value in (about["command"], about["date"], f"jax {about['versions']['jax']}", "training time"):
        assert value in text
    assert 'aria-label="Validation accuracy by epoch: symmetric 10 to 10' in text


def test_the_numbers_are_those_of_the_run(shown):
    folder, measured = shown
    results = json.loads((folder / "runs" / "tiny" / "summary.json").read_text())["variants"]
    _, text, _ = read(folder)
    for name, result in results.items():
        assert f"{result['accuracy']:.2%}" in text
        assert f"{result['parameters']:,}" in text
        assert measured[name].predictions.is_right.mean() == pytest.approx(result["accuracy"], abs=1.01 / 320)
    found, own = measured["symmetric"].by_bits[4], results["symmetric"]
    predictions = measured["symmetric"].predictions
    assert np.mean(predictions.predicted == predictions.twin) == pytest.approx(own["agreement"], abs=2.01 / 320)
    assert len(predictions.images) == 320
    assert found.samples == own["samples"] == 320
    # One image's weight: statistics of traced and of static widths differ by rounding.
    assert found.accuracy == pytest.approx(own["accuracy"], abs=1.01 / 320)
    np.testing.assert_allclose(found.layer_error, own["layer_error"], rtol=0.02)
    assert measured["symmetric"].by_bits[2].mean_relative_layer_error > found.mean_relative_layer_error


def test_what_is_measured_is_true_to_its_name(shown):
    symmetric, plain = shown[1]["symmetric"], shown[1]["full_plain"]
    error, bound = (symmetric.certified[4][key] for key in ("error", "bound"))
    assert error.shape == bound.shape == (48 * 9,)
    assert (bound >= error - 1e-5).all()
    assert [d.block for d in symmetric.inputs] == [0, 1, 2]
    assert all(d.index == 0 for d in symmetric.inputs)
    assert list(symmetric.spectra) == list(plain.spectra) == [2, 3]
    assert all(len(values) == 4 * 24 for values in symmetric.spectra.values())
    maps = symmetric.maps
    assert maps.blocks == [2, 3]
    assert list(maps.rows) == ["as it is", "rounded"], "smoothing is added where it is asked for alone"
    assert all(len(np.unique(rounded)) <= 16 for rounded in maps.rows["rounded"])


def test_smoothing_is_added_where_it_is_asked_for():
    model = registry.image_network(TINY, num_classes=10, weight_bits=4, act_bits=4)
    x = jax.random.uniform(jax.random.key(0), (2, 8, 8, 1))
    variables = model.init(jax.random.key(1), x)
    states = [jax.nn.relu(jax.random.normal(jax.random.key(i), (2, 8, 8, 8))) for i in range(3)]
    maps = figures._maps(model, variables, states, True)
    assert not maps.is_own
    assert list(maps.rows) == ["as it is", "rounded", "smoothed", "then rounded"]
    for raw, smoothed in zip(maps.rows["as it is"], maps.rows["smoothed"], strict=True):
        assert smoothed.min() >= raw.min() - 1e-6
        assert smoothed.max() <= raw.max() + 1e-6
        assert not np.array_equal(raw, smoothed)
    text = image_sections._maps({"net": SimpleNamespace(maps=maps)})
    assert "added for this page" in text
    assert text.count("<svg") == 3


def test_a_full_precision_network_has_no_twin_and_still_a_place(shown):
    plain = shown[1]["full_plain"]
    assert (plain.by_bits, plain.inputs, plain.maps, plain.certified) == ({}, [], None, {})
    assert plain.cost.weight_bytes == 4 * plain.cost.parameters


def test_networks_of_several_runs_are_told_apart_by_the_run(shown, monkeypatch):
    folder, measured = shown
    monkeypatch.chdir(folder)
    monkeypatch.setitem(registry.ARCHITECTURES, "tiny", TINY)
    monkeypatch.setattr(report, "measure", lambda finished, **_: measured[finished.name])
    shutil.copytree("runs/tiny", "runs/again")
    assert main(["report", "runs/tiny", "runs/again", "--output", "both"]) == 0
    text = (folder / "both" / "report.html").read_text()
    for name in ("tiny/symmetric", "tiny/full_plain", "again/symmetric", "again/full_plain"):
        assert f'<th scope="row">{name}</th>' in text
    assert "<title>tiny, again: tiny on digits</title>" in text
    assert "from the runs tiny, again on" in text


def test_the_title_names_every_run_and_what_it_trained(tmp_path):
    of_images = Experiment("b", (Variant("plain"),), model=Model("resnet56"), data=Data("cifar10"))
    experiments = {tmp_path / "a": Experiment("a", (Variant("plain"),)), tmp_path / "b": of_images}
    report._work(experiments, ["a/plain", "b/plain"], tmp_path, lambda _: [])(Console(quiet=True))
    text = (tmp_path / "report.html").read_text()
    assert "<title>a: resnet20 on digits; b: resnet56 on cifar10</title>" in text
    assert "from the runs a, b on" in text


def test_each_network_is_said_to_smooth_as_it_was_smoothed():
    def maps(smoothing, is_own):
        return SimpleNamespace(maps=Maps([2], {}, [], {}, smoothing, is_own))

    strong = Smoothing(gamma2=0.125, eps=0.5, output=True)
    measured = {
        "none": maps(Smoothing(), False),
        "inside": maps(dataclasses.replace(strong, output=False), True),
        "huber": maps(dataclasses.replace(strong, kind="huber", steps=2), True),
        "behind": maps(strong, True),
    }
    text = image_sections._smoothing(measured)
    for clause in (
        "none: 1 explicit step, γ² = 0.025, ε = 0.1, isotropic, added for this page; ",
        "inside, behind: 1 explicit step, γ² = 0.125, ε = 0.5, isotropic, as in the network; ",
        "huber: 2 explicit steps, γ² = 0.125, ε = 0.5, huber, as in the network.",
    ):
        assert clause in text


PROBE = """
<script>
var errors = [];
window.addEventListener("error", function (event) { errors.push(String(event.message)) }, true);
window.addEventListener("load", function () {
  var drawings = Array.from(document.querySelectorAll("img, svg"));
  function all(what) { return drawings.map(function (drawing) { return what(drawing.getBoundingClientRect()) }) }
  var formulas = Array.from(document.querySelectorAll("math"));
  parent.postMessage({errors: errors, inner: innerWidth, content: document.documentElement.scrollWidth,
    drawings: all(function (box) { return box.width * box.height }),
    widest: Math.max.apply(null, all(function (box) { return box.right })),
    formulas: formulas.map(function (formula) { return formula.getBoundingClientRect().height })
  }, "*");
});
</script>
"""

OUTER = """<!DOCTYPE html><title>waiting</title><link rel="icon" href="data:,">
<script>window.addEventListener("message", function (event) { document.title = JSON.stringify(event.data) })</script>
<iframe src="probe.html" style="border: 0; width: WIDTHpx; height: 900px"></iframe>
"""


@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_all_figures_without_errors_or_overflow(shown, tmp_path, width):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here: `apt-get install chromium`")
    _, text, elements = read(shown[0])
    # The page as it is, with a reporter inside, in a frame as wide as a telephone: a window cannot be so narrow.
    (tmp_path / "probe.html").write_text(text.replace("<head>", "<head>" + PROBE, 1))
    (tmp_path / "outer.html").write_text(OUTER.replace("WIDTH", str(width)))
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--virtual-time-budget=9000",
    ]
    run = subprocess.run(
        [browser, *options, f"--user-data-dir={tmp_path}/profile", "--dump-dom", (tmp_path / "outer.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    report = json.loads(re.search(r"<title>(.*?)</title>", run.stdout).group(1))
    assert report["errors"] == []
    assert "CONSOLE" not in run.stderr
    assert len(report["drawings"]) == len(elements.of("img", "svg"))
    assert min(report["drawings"]) > 2000
    assert min(report["formulas"]) > 10
    assert report["inner"] == width
    assert report["content"] <= width
    assert report["widest"] <= width


NASTY = """<img src=x onerror="alert('&')">"""


def test_text_from_runs_cannot_break_the_page():
    drawing = along_depth_figure({NASTY: [1.0, 2.0]}, heading=NASTY, unit=NASTY)
    body = figure([Picture("a", drawing, NASTY)], fill("<p>{name}</p>", name=NASTY))
    body += table((NASTY,), [(NASTY, NASTY, (NASTY, NASTY))], NASTY) + facts([(NASTY, NASTY)])
    text = page(NASTY, fill("{name}", name=NASTY), [(NASTY, body + thumbnails([Thumbnail(b"", NASTY)]))], NASTY)
    found = Elements(text)
    assert NASTY not in text
    assert [image["alt"] for image in found.of("img")] == [NASTY]
    assert found.of("svg")[0]["aria-label"] == NASTY
    assert not any("onerror" in attributes for _, attributes in found.found)


def test_names_of_networks_classes_and_origins_are_text(shown):
    """A page of what `shown` measured, with markup wherever a name or a file can put it."""
    folder, measured = shown
    found, name = measured["symmetric"], f"{NASTY}$a$_"
    nasty = dataclasses.replace(found, classes=(NASTY,) * 10, about=dict.fromkeys(("seed", "command", "date"), NASTY))
    results = json.loads((folder / "runs" / "tiny" / "summary.json").read_text())["variants"]["symmetric"]
    results |= {"kl": NASTY, "samples": NASTY, "training_seconds": NASTY, "best_epoch": NASTY}
    lines = [{"variant": name, "epoch": 1, "train_loss": NASTY, "validation_accuracy": 0.5}]
    sections = image_sections.sections(
        Experiment("e", (Variant("plain"),)), {name: results}, {name: nasty}, {name: lines}
    )
    elements = Elements(page(NASTY, "", sections, NASTY))
    assert not any("onerror" in attributes for _, attributes in elements.found)
    assert all(image["src"].startswith("data:image/png;base64,") for image in elements.of("img"))


@pytest.fixture
def graph_run(tmp_path):
    """What a finished run on a graph leaves, made up."""
    experiment = GraphExperiment(
        "nodes", variants=(GraphVariant("a"), GraphVariant("b")), bits=((4, 8), (4, 4)), seeds=2
    )
    quantized = {
        "accuracy": [0.9, 0.8],
        "accuracy_twin": [0.91, 0.82],
        "agreement": [0.97, 0.99],
        "layer_error": [[0.1, 0.2, 0.3]] * 2,
        "relative_layer_error": [[0.2, 0.2, 0.2]] * 2,
    }
    full = {"accuracy": [0.9, 0.92], "energy": [[0.3, 0.2, 0.1]] * 2}
    variant = {"parameters": 1234, "full": full, "W4A8": quantized, "W4A4": quantized}
    run = tmp_path / "nodes"
    run.mkdir()
    line = {"variant": "a/full", "epoch": 10, "train_loss": [1.0, 2.0], "validation_accuracy": [0.5, NASTY]}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (run / "config.json").write_text(to_json(experiment))
    (run / "summary.json").write_text(json.dumps({"name": "nodes", "variants": {"a": variant, "b": variant}}))
    return run


def test_a_run_on_a_graph_is_shown_with_the_sections_that_apply(graph_run, tmp_path):
    assert main(["report", str(graph_run), "--output", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.html").read_text()
    headings = re.findall(r"<h2.*?>(.*?)</h2>", text)
    assert headings == [
        "Results",
        "Layer-wise error",
        "Accuracy and agreement against bits",
        "Over-smoothing",
        "Training in full precision",
        "Sizes",
        "Where it comes from",
    ]
    assert "85.0 ± 7.1" in text
    assert "14.0" in text, "SQNR of a relative error of 0.2"
    assert len(Elements(text).of("svg")) == 6


def test_names_of_a_run_are_text(graph_run, tmp_path):
    """Of its folder, and everything that its files say; variants cannot be called so."""
    run = tmp_path / NASTY.replace("/", "")
    graph_run.rename(run)
    for name in ("a", "b"):
        (run / name / "full").mkdir(parents=True)
        about = {"seed": 1, "command": NASTY, "versions": {NASTY: NASTY}}
        (run / name / "full" / "network.json").write_text(json.dumps({"about": about}))
    assert main(["report", str(run), "--output", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.html").read_text()
    found = Elements(text)
    assert not found.of("img")
    assert not any("onerror" in attributes for _, attributes in found.found)
    assert text.count("&lt;img src=x onerror=") >= 5  # title, heading, footer, command, versions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "name a run"),
        (["nowhere"], "no folder of a run"),
        (["RUN", "--bits", "4", "33"], "--bits holds 33: give bits from 2 to 32"),
        (["RUN", "--certify", "16"], "--certify holds 16: give bits from 2 to 15"),
        (["RUN", "--images", "0"], r"images (=0) must be at least 1"),
        (["RUN", "--certify-images", "0"], r"certify_images (=0) must be at least 1"),
        (["RUN", "RUN"], "two runs have the same name"),
        (["RUN", "OTHER"], "give it a page of its own"),
    ],
)
def test_what_cannot_be_shown_is_refused(graph_run, options, message, capsys):
    shutil.copytree(graph_run, graph_run.parent / "other")
    places = {"RUN": str(graph_run), "OTHER": str(graph_run.parent / "other")}
    assert main(["report", *(places.get(option, option) for option in options)]) == 2
    assert message in capsys.readouterr().err
    (graph_run / "summary.json").unlink()
    assert main(["report", str(graph_run)]) == 2
    assert "holds no finished run" in capsys.readouterr().err
    assert not (graph_run / "report").exists()


def test_a_page_that_cannot_be_written_is_an_error_of_one_line(graph_run, capsys):
    output = graph_run.parent / "taken"
    output.write_text("mine")
    assert main(["report", str(graph_run), "--output", str(output)]) == 2
    assert f"{output} is not a folder: choose another --output" in capsys.readouterr().err
    assert main(["report", str(graph_run), "--output", str(output / "below")]) == 1
    assert capsys.readouterr().err == f"error: [Errno 20] Not a directory: '{output / 'below'}'\n"


@pytest.mark.parametrize("command", ["report", "reproduce"])
@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", "{", "config.json is unreadable: Expecting property name"),
        ("summary.json", "{", "summary.json is unreadable (JSONDecodeError('Expecting property name"),
        ("summary.json", "{}", "summary.json is unreadable (KeyError('variants'))"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(graph_run, command, file, text, message, capsys):
    (graph_run / file).write_text(text)
    assert main([command, str(graph_run)]) == 2
    assert f"error: {graph_run}/{message}" in capsys.readouterr().err


def test_the_published_curves_have_the_published_means():
    """The ratios of the means that the paper's claim is quoted with: 0.33, 0.13 and 0.42."""
    for curves, ratio in zip(published_curves.CURVES.values(), (0.33, 0.13, 0.42), strict=True):
        symmetric, plain = (np.mean([float(v) for v in curves[form].split()]) for form in ("symmetric", "plain"))
        assert round(symmetric / plain, 2) == ratio
