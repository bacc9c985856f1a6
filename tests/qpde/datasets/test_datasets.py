"""Datasets: what is read equals what was written, splits are sound, and bad files are refused by name."""

import codecs
import copyreg
import dataclasses
import os
import pickle
from collections import defaultdict

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.sparse import csr_array, csr_matrix

from qpde.datasets import (
    IGNORED,
    NodeGraph,
    SparseRows,
    load_camvid,
    load_cifar10,
    load_digits,
    load_digits_graph,
    load_planetoid,
    random_split,
)
from qpde.datasets.containers import stratified_parts

SEEDS = st.integers(0, 2**31 - 1)


def assert_same(a, b):
    """Equal arrays in equal places, of two `Images` or two `NodeGraph`s."""
    for left, right in zip(jax.tree.leaves(vars(a)), jax.tree.leaves(vars(b)), strict=True):
        np.testing.assert_array_equal(left, right)


# ---- splits ----------------------------------------------------------------------------------------------------


@given(seed=SEEDS, counts=st.lists(st.integers(1, 60), min_size=1, max_size=6), share=st.floats(0, 1))
def test_stratified_parts_are_disjoint_sorted_and_balanced(seed, counts, share):
    labels = np.repeat(np.arange(len(counts)), counts)
    first = round(share * len(labels))
    parts = stratified_parts(labels, (first, len(labels) - first), seed=seed)
    assert [len(part) for part in parts] == [first, len(labels) - first]
    assert sorted(np.concatenate(parts)) == list(range(len(labels)))
    for part in parts:
        assert (np.diff(part) > 0).all()
        # When the class quantile t is reached, class c has n_c t items within half an item, so the cut lies at t
        # within half an item per class, and class c is off by its share of these.
        expected = len(part) * np.array(counts) / len(labels)
        slack = 0.5 + 0.5 * len(counts) * np.array(counts) / len(labels)
        assert (np.abs(np.bincount(labels[part], minlength=len(counts)) - expected) <= slack + 1e-9).all()


def test_parts_larger_than_the_whole_are_refused():
    with pytest.raises(ValueError, match=r"3 items .* \[2, 2\]"):
        stratified_parts(np.zeros(3, int), (2, 2), seed=0)


@given(seed=SEEDS)
def test_random_split_draws_disjoint_labelled_nodes_with_equal_classes(seed):
    graph = toy_graph()
    split = random_split(graph, seed=seed, labels_per_class=5, validation=20, test=30)
    nodes = np.concatenate([split.train, split.validation, split.test])
    assert len(set(nodes.tolist())) == len(nodes)
    assert (graph.labels[nodes] >= 0).all()
    np.testing.assert_array_equal(np.bincount(graph.labels[split.train]), [5, 5, 5])
    assert (len(split.validation), len(split.test)) == (20, 30)
    assert_same(split, random_split(split, seed=seed, labels_per_class=5, validation=20, test=30))
    assert split.features is graph.features


def test_random_split_refuses_more_nodes_than_there_are():
    graph = toy_graph()
    with pytest.raises(ValueError, match=r"class 0 has 30 labelled nodes, fewer than labels_per_class=31"):
        random_split(graph, seed=0, labels_per_class=31)
    with pytest.raises(ValueError, match=r"75 labelled nodes remain .* validation=50 and test=26"):
        random_split(graph, seed=0, labels_per_class=5, validation=50, test=26)
    with pytest.raises(ValueError, match="test=0"):
        random_split(graph, seed=0, test=0)


@pytest.mark.parametrize("part", ["train", "validation", "test"])
@pytest.mark.parametrize("label", [-1, 3])
def test_a_graph_refuses_a_node_in_a_split_whose_label_is_none(part, label):
    graph = toy_graph()
    labels = np.where(np.arange(100) == 7, label, graph.labels).astype(np.int32)
    outside = dataclasses.replace(graph, labels=labels)  # in no split, so nobody asks
    with pytest.raises(ValueError, match=f"{part} node 7 has the label {label}.*0 to 2"):
        dataclasses.replace(outside, **{part: np.array([6, 7], np.int32)})


def test_an_edge_or_a_feature_that_is_none_is_refused_before_it_reaches_a_network():
    graph, one = toy_graph(), np.zeros(1, np.int32)
    with pytest.raises(ValueError, match="node 100, outside the graph's nodes 0 to 99"):
        dataclasses.replace(graph, senders=one, receivers=one + 100).to_jraph()
    with pytest.raises(ValueError, match="NaN or infinite"):
        dataclasses.replace(graph, features=SparseRows(one, one, np.float32([np.nan]))).to_jraph()


def toy_graph():
    """Ninety labelled nodes in three classes and ten without a label; no splits, no edges, no features."""
    none = np.empty(0, np.int32)
    return NodeGraph(
        senders=none,
        receivers=none,
        features=SparseRows(none, none, np.empty(0, np.float32)),
        labels=np.concatenate([np.repeat(np.arange(3), 30), np.full(10, -1)]).astype(np.int32),
        train=none,
        validation=none,
        test=none,
        num_features=1,
        num_classes=3,
    )


# ---- CIFAR-10 --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cifar_records():
    """Standard-size records; the label and the first pixels of image i encode i."""
    records = np.random.default_rng(0).integers(0, 256, (10_000, 3073), np.uint8)
    records[:, 0] = np.arange(10_000) % 10
    return records


@pytest.fixture(scope="module")
def cifar_folder(tmp_path_factory, cifar_records):
    folder = tmp_path_factory.mktemp("cifar") / "cifar10" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for name in ("data_batch_2.bin", "test_batch.bin"):
        cifar_records.tofile(folder / name)
    return folder


@pytest.fixture
def broken_cifar(tmp_path, cifar_folder):
    """A copy whose files are links until a test replaces one."""
    for path in cifar_folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def test_cifar10_pixels_and_labels_are_where_the_format_has_them(cifar_folder, cifar_records):
    data = load_cifar10(cifar_folder)
    assert data.test.images.shape == (10_000, 32, 32, 3)
    np.testing.assert_array_equal(data.test.labels, cifar_records[:, 0])
    for row, column, channel in ((0, 0, 0), (3, 17, 1), (31, 31, 2)):
        pixel = cifar_records[:, 1 + channel * 1024 + row * 32 + column]
        np.testing.assert_array_equal(data.test.images[:, row, column, channel], pixel)
    assert data.num_classes == 10


def test_cifar10_is_found_from_each_folder_above(cifar_folder):
    # Two levels are searched; statistics are of the same split each time.
    means = [load_cifar10(folder).mean for folder in (cifar_folder, cifar_folder.parent, str(cifar_folder.parents[1]))]
    np.testing.assert_array_equal(means[0], means[1])
    np.testing.assert_array_equal(means[0], means[2])


def test_cifar10_holds_out_a_tenth_disjoint_stratified_and_repeatable(cifar_folder, cifar_records):
    first, again, other = (load_cifar10(cifar_folder, seed=seed) for seed in (0, 0, 1))
    assert_same(first, again)
    assert not np.array_equal(first.validation.images, other.validation.images)
    np.testing.assert_array_equal(np.bincount(first.train.labels), np.full(10, 900))
    np.testing.assert_array_equal(np.bincount(first.validation.labels), np.full(10, 100))
    together = np.concatenate([first.train.images, first.validation.images]).reshape(10_000, -1)
    planes = cifar_records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1).reshape(10_000, -1)
    # Random images are told apart by their first eight bytes.
    key = lambda rows: np.sort(np.ascontiguousarray(rows[:, :8]).view(np.uint64).ravel())  # noqa: E731
    np.testing.assert_array_equal(key(together), key(planes))
    assert len(load_cifar10(cifar_folder, validation_fraction=0.0).validation.labels) == 0


def test_cifar10_says_which_training_files_it_found(cifar_folder, caplog):
    load_cifar10(cifar_folder)
    assert "1 of 5 training files" in caplog.text
    assert "data_batch_2.bin" in caplog.text


def test_normalized_training_images_have_mean_zero_and_deviation_one(cifar_folder):
    data = load_cifar10(cifar_folder)
    pixels = np.asarray(data.normalize(data.train.images[:200]), np.float64)
    formula = (data.train.images[:200] / 255.0 - data.mean) / data.std
    np.testing.assert_allclose(pixels, formula, atol=1e-6)
    for channel in range(3):  # float64 sums of nine million pixels, kept as float32
        plane = data.train.images[..., channel]
        np.testing.assert_allclose(plane.mean() / 255, data.mean[channel], rtol=1e-6)
        np.testing.assert_allclose(plane.std() / 255, data.std[channel], rtol=1e-6)
    images = data.test.images[:4]
    eager = data.normalize(images)
    np.testing.assert_allclose(jax.jit(data.normalize)(images), eager, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(data.normalize)(images), eager, atol=1e-6)


def test_cifar10_refuses_missing_files(tmp_path, broken_cifar):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/nowhere.*cs.toronto.edu"):
        load_cifar10(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=f"{broken_cifar}/data_batch_3.bin is missing"):
        load_cifar10(broken_cifar, batches=(2, 3))
    (broken_cifar / "test_batch.bin").unlink()
    with pytest.raises(FileNotFoundError, match=f"{broken_cifar}/test_batch.bin is missing"):
        load_cifar10(broken_cifar)
    (broken_cifar / "data_batch_2.bin").rename(broken_cifar / "test_batch.bin")
    with pytest.raises(FileNotFoundError, match=f"no training images: {broken_cifar}"):
        load_cifar10(broken_cifar)


@pytest.mark.parametrize("name", ["data_batch_2.bin", "test_batch.bin"])
@pytest.mark.parametrize("size", [0, 30_729_999, 30_730_001, 30_730_000 // 2])
def test_cifar10_refuses_files_of_another_size_naming_both_sizes(broken_cifar, name, size):
    path = broken_cifar / name
    path.unlink()
    path.touch()
    os.truncate(path, size)
    with pytest.raises(ValueError, match=f"{path} has {size:,} bytes, expected 30,730,000"):
        load_cifar10(broken_cifar)


def test_cifar10_refuses_a_label_above_nine(broken_cifar, cifar_records):
    path = broken_cifar / "data_batch_2.bin"
    path.unlink()
    damaged = cifar_records.copy()
    damaged[1234, 0] = 10
    damaged.tofile(path)
    with pytest.raises(ValueError, match=f"{path}: record 1234 has label 10"):
        load_cifar10(broken_cifar)


@pytest.mark.parametrize("options", [{"batches": ()}, {"batches": (2, 2)}, {"batches": (0,)}, {"batches": (6,)},
                                     {"validation_fraction": 1.0}, {"validation_fraction": -0.1}])  # fmt: skip
def test_cifar10_refuses_options_out_of_range(cifar_folder, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        load_cifar10(cifar_folder, **options)


def test_real_cifar10_has_the_published_statistics(data_dir):
    data = load_cifar10(data_dir, batches=(1,))
    np.testing.assert_array_equal(np.bincount(data.test.labels), np.full(10, 1000))
    assert len(data.train.labels) + len(data.validation.labels) == 10_000
    # The published constants of all 50,000; a fifth of them estimates these to about 0.003.
    np.testing.assert_allclose(data.mean, (0.4914, 0.4822, 0.4465), atol=0.006)
    np.testing.assert_allclose(data.std, (0.2470, 0.2435, 0.2616), atol=0.006)
    assert data.classes[data.test.labels[0]] == "cat"


# ---- digits ----------------------------------------------------------------------------------------------------


def test_digits_at_their_own_size_are_the_original_pixels():
    from sklearn.datasets import load_digits as original

    data, bunch = load_digits(size=8), original()
    labels = {image.tobytes(): label for image, label in zip(bunch.images.astype(int), bunch.target, strict=True)}
    for split in (data.train, data.validation, data.test):
        levels = np.round(split.images[..., 0] * (16 / 255)).astype(int)
        np.testing.assert_array_equal([labels[image.tobytes()] for image in levels], split.labels)


@pytest.mark.parametrize("size", [8, 16, 32])
def test_digits_splits_are_disjoint_balanced_and_repeatable(size):
    data = load_digits(size=size)
    splits = (data.train, data.validation, data.test)
    assert [split.images.shape for split in splits] == [(n, size, size, 1) for n in (1280, 197, 320)]
    for split in splits:
        assert np.ptp(np.bincount(split.labels)) <= 0.05 * len(split.labels)
    everything = np.concatenate([split.images for split in splits]).reshape(1797, -1)
    assert len(np.unique(everything, axis=0)) == 1797  # no digit occurs twice in the original
    assert_same(data, load_digits(size=size))
    assert not np.array_equal(data.train.images, load_digits(size=size, seed=1).train.images)


def test_enlarged_digits_keep_grey_levels_and_average_back_to_the_original():
    small, large = load_digits(size=8), load_digits(size=32)
    np.testing.assert_array_equal(small.test.labels, large.test.labels)
    means = large.test.images[..., 0].reshape(-1, 8, 4, 8, 4).mean((2, 4))
    # Blocks of 4 x 4 sample the interpolant evenly around the old pixel: a smoothing by (1, 6, 1) / 8 per axis.
    padded = np.pad(small.test.images[..., 0].astype(float), ((0, 0), (1, 1), (1, 1)), mode="edge")
    rows = (padded[:, :-2] + 6 * padded[:, 1:-1] + padded[:, 2:]) / 8
    smoothed = (rows[:, :, :-2] + 6 * rows[:, :, 1:-1] + rows[:, :, 2:]) / 8
    np.testing.assert_allclose(means, smoothed, atol=1.0)  # both sides were rounded to whole levels
    assert large.test.images.max() <= 255


def test_digits_refuse_a_size_that_is_no_doubling():
    with pytest.raises(ValueError, match=r"`size` \(=20\) must be 8, 16 or 32"):
        load_digits(size=20)


def test_missing_scikit_learn_is_explained(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        load_digits()


def test_digits_graph_joins_nearest_neighbours_once():
    graph = load_digits_graph(neighbours=3)
    dense = graph.dense_features()
    assert dense.shape == (1797, 64)
    assert dense.max() == 1.0
    assert (graph.senders < graph.receivers).all()
    edges = set(zip(graph.senders.tolist(), graph.receivers.tolist(), strict=True))
    assert len(edges) == len(graph.senders)
    for node in (0, 5, 1796):
        distances = ((dense.astype(np.float64) - dense[node]) ** 2).sum(1)
        nearest = np.argsort(np.where(np.arange(1797) == node, np.inf, distances), kind="stable")[:3]
        assert all((min(node, other), max(node, other)) in edges for other in nearest.tolist())
    assert 1797 * 3 / 2 <= len(edges) <= 1797 * 3
    np.testing.assert_array_equal(np.bincount(graph.labels[graph.train]), np.full(10, 20))
    assert (graph.num_features, graph.num_classes) == (64, 10)
    assert_same(graph, load_digits_graph(neighbours=3))


@pytest.mark.parametrize("neighbours", [0, 1797])
def test_digits_graph_refuses_neighbours_out_of_range(neighbours):
    with pytest.raises(ValueError, match=f"={neighbours}"):
        load_digits_graph(neighbours=neighbours)


# ---- Planetoid -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cora", "citeseer", "pubmed"])
def test_planetoid_equals_the_plain_arrays(data_dir, name):
    graph = load_planetoid(name, data_dir, normalize_features=False)
    with np.load(data_dir / "planetoid" / f"{name}.npz") as oracle:
        np.testing.assert_array_equal(graph.labels, oracle["labels"])
        for split, key in ((graph.train, "train_idx"), (graph.validation, "val_idx"), (graph.test, "test_idx")):
            np.testing.assert_array_equal(split, oracle[key])
        np.testing.assert_array_equal(graph.features.column, oracle["feat_indices"])
        np.testing.assert_array_equal(graph.features.value, oracle["feat_values"])
        starts = np.searchsorted(graph.features.row, np.arange(graph.num_nodes + 1))
        np.testing.assert_array_equal(starts, oracle["feat_indptr"])
        assert (graph.num_nodes, graph.num_features) == tuple(oracle["feat_shape"])
        assert graph.num_classes == oracle["num_classes"]
        once = oracle["senders"] < oracle["receivers"]  # the arrays list both directions
        np.testing.assert_array_equal(graph.senders, oracle["senders"][once])
        np.testing.assert_array_equal(graph.receivers, oracle["receivers"][once])


def test_citeseer_keeps_its_undescribed_nodes_without_features_and_out_of_every_split(data_dir):
    unknown = np.flatnonzero(load_planetoid("citeseer", data_dir).labels < 0)
    assert len(unknown) == 15
    for split in ("public", "full", "random"):
        graph = load_planetoid("citeseer", data_dir, split=split)
        nodes = [graph.train, graph.validation, graph.test, graph.features.row]
        assert not np.isin(unknown, np.concatenate(nodes)).any()


NODES, TESTED, FEATURES = 560, 30, 4  # 20 training, 500 validation, 10 other and 30 test nodes


@pytest.fixture(scope="module")
def planetoid_parts():
    """A small graph in the pieces of the format; test nodes 540 and 541 are missing, the others shuffled."""
    rng = np.random.default_rng(3)
    labels = np.arange(NODES) % 3
    labels[10] = 2
    dense = np.round(rng.random((NODES, FEATURES)), 3).astype(np.float32)
    dense[dense < 0.5] = 0
    dense[7] = 0
    test_nodes = rng.permutation(np.setdiff1d(np.arange(NODES - TESTED, NODES), (540, 541)))
    one_hot = np.eye(3, dtype=np.int32)[labels]
    graph = {0: [1, 2, 1, 0], 1: [0], 2: [559], 559: [2]}
    known = NODES - TESTED
    parts = {
        "y": one_hot[:20],
        "ally": one_hot[:known],
        "ty": one_hot[test_nodes],
        "allx": csr_matrix(dense[:known]),
        "tx": csr_matrix(dense[test_nodes]),
        "graph": graph,
    }
    dense[[540, 541]], labels[[540, 541]] = 0, -1
    return parts, test_nodes, dense, labels


@pytest.fixture
def planetoid_folder(tmp_path, planetoid_parts):
    parts, test_nodes, *_ = planetoid_parts
    for part, value in parts.items():
        write_part(tmp_path, part, value)
    (tmp_path / "ind.cora.test.index").write_text("\n".join(map(str, test_nodes)) + "\n")
    return tmp_path


def write_part(folder, part, value, protocol=4):
    path = folder / f"ind.cora.{part}"
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


def test_planetoid_puts_every_row_on_its_node(planetoid_folder, planetoid_parts):
    _, test_nodes, dense, labels = planetoid_parts
    graph = load_planetoid("cora", planetoid_folder, normalize_features=False)
    np.testing.assert_array_equal(graph.dense_features(), dense)
    np.testing.assert_array_equal(graph.labels, labels)
    np.testing.assert_array_equal(graph.train, np.arange(20))
    np.testing.assert_array_equal(graph.validation, np.arange(20, 520))
    np.testing.assert_array_equal(graph.test, np.sort(test_nodes))
    # Duplicates, the other direction and the loop at node 0 are gone.
    np.testing.assert_array_equal(np.stack([graph.senders, graph.receivers], 1), [(0, 1), (0, 2), (2, 559)])
    full = load_planetoid("cora", planetoid_folder, split="full")
    np.testing.assert_array_equal(full.train, np.concatenate([np.arange(20), np.arange(520, 530)]))


def saved_again(value, form):
    """What people make of a part before they save it again."""
    if isinstance(value, dict) and form == "numpy":
        return {np.int64(node): [np.int32(other) for other in others] for node, others in value.items()}
    if isinstance(value, dict) and form == "default":
        return defaultdict(list, value)
    if isinstance(value, csr_matrix):
        return csr_array(value) if form == "numpy" else value.astype(np.float64)
    if isinstance(value, np.ndarray):
        return np.asfortranarray(value) if form == "numpy" else value.astype(np.int64)
    return value


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("form", ["numpy", "default"])
def test_files_saved_again_by_any_protocol_are_the_same_graph(planetoid_folder, planetoid_parts, protocol, form):
    expected = load_planetoid("cora", planetoid_folder)
    parts = planetoid_parts[0] | {"tx": planetoid_parts[0]["tx"].copy()}
    for part, value in parts.items():
        write_part(planetoid_folder, part, saved_again(value, form), protocol)
    found = load_planetoid("cora", planetoid_folder)
    for name in ("senders", "receivers", "labels", "train", "validation", "test"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    np.testing.assert_array_equal(found.dense_features(), expected.dense_features())


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_matrix_without_entries_is_read_in_every_protocol(planetoid_folder, planetoid_parts, protocol):
    write_part(planetoid_folder, "tx", csr_matrix(planetoid_parts[0]["tx"].shape, dtype=np.float32), protocol)
    assert not load_planetoid("cora", planetoid_folder).dense_features()[-1].any()


class Reduced:
    """Pickles as one call, of a function that is admitted by name, with arguments that are not."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "call",
    [
        Reduced(codecs.encode, "text", "hex"),
        Reduced(codecs.encode, "text", "utf-8"),
        Reduced(copyreg._reconstructor, list, object, None),
        Reduced(copyreg._reconstructor, object, object, None),
        Reduced(np.array(0).__reduce__()[0], list, (0,), b"b"),
        Reduced(np._core.multiarray.scalar, np.dtype("f8"), b"12345678"),
        Reduced(np._core.numeric._frombuffer, b"12345678", np.dtype("f8"), (2,), "C"),
        Reduced(np._core.numeric._frombuffer, b"12345678", np.dtype("f8"), (1,), "K"),
        Reduced(np._core.numeric._frombuffer, b"12345678", np.dtype("O"), (1,), "C"),
        Reduced(np._core.multiarray.scalar, np.dtype("i8"), b"123"),
        Reduced(bytes, 2**40),
        Reduced(object),
    ],
    ids=lambda call: f"{call.call[0].__name__} {call.call[1]}",
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_what_is_admitted_does_nothing_but_what_the_files_need(planetoid_folder, call, protocol):
    for part in ("allx", "ally", "graph"):
        original = (planetoid_folder / f"ind.cora.{part}").read_bytes()
        path = write_part(planetoid_folder, part, call, protocol)
        with pytest.raises(ValueError, match=str(path)):
            load_planetoid("cora", planetoid_folder)
        path.write_bytes(original)


def test_normalized_features_sum_to_one_on_every_node_that_has_some(planetoid_folder):
    sums = load_planetoid("cora", planetoid_folder).dense_features().sum(1)
    raw = load_planetoid("cora", planetoid_folder, normalize_features=False).dense_features()
    some = raw.any(1)
    assert not some[7]
    np.testing.assert_allclose(sums[some], 1, rtol=1e-6)
    assert not sums[~some].any()


class Attack:
    """A pickle that asks for a call on being read."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("part", ["y", "allx", "ally", "tx", "ty", "graph"])
def test_a_malicious_pickle_is_refused_in_every_file_and_runs_nothing(planetoid_folder, tmp_path, part):
    trace = tmp_path / "was_here"
    attacks = [
        Attack(os.system, f"touch {trace}"),
        Attack(eval, f"open({str(trace)!r}, 'w')"),
        Attack(__import__, "this"),
        {0: [1], 1: Attack(open, str(trace), "w")},
        Attack(np.load, str(trace)),
        Attack(np.memmap, str(trace), "u1", "w+", 0, 8),
    ]
    for attack in attacks:
        path = write_part(planetoid_folder, part, attack)
        with pytest.raises(ValueError, match=f"{path} is not a Planetoid file: it asks for .* not admitted"):
            load_planetoid("cora", planetoid_folder)
        assert not trace.exists()


@pytest.mark.parametrize(
    "array", [np.array([[1, None]], object), np.zeros((2, 2), "f4,i4"), np.array([["a"]])],
    ids=["objects", "structured", "text"],
)  # fmt: skip
def test_arrays_of_anything_but_plain_numbers_are_refused(planetoid_folder, array):
    path = write_part(planetoid_folder, "y", array)
    with pytest.raises(ValueError, match=f"{path} .*not admitted"):
        load_planetoid("cora", planetoid_folder)


@given(data=st.data())
def test_a_damaged_pickle_is_refused_by_name_or_still_a_sound_graph(planetoid_once, data):
    folder, originals = planetoid_once
    part = data.draw(st.sampled_from(sorted(originals)))
    content = bytearray(originals[part])
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path = folder / f"ind.cora.{part}"
    path.write_bytes(content)
    try:
        graph = load_planetoid("cora", folder)
    except ValueError as refusal:
        message = str(refusal)
    else:
        message = f"{path} was read"
        assert graph.num_nodes == NODES
        assert (graph.labels[np.concatenate([graph.train, graph.validation, graph.test])] >= 0).all()
        assert max(graph.senders.max(), graph.receivers.max()) < NODES
        assert graph.features.column.max() < graph.num_features
        assert np.isfinite(graph.features.value).all()
    path.write_bytes(originals[part])
    assert "ind.cora." in message or "cora:" in message


@pytest.fixture(scope="module")
def planetoid_once(tmp_path_factory, planetoid_parts):
    parts, test_nodes, *_ = planetoid_parts
    folder = tmp_path_factory.mktemp("planetoid")
    originals = {part: write_part(folder, part, value).read_bytes() for part, value in parts.items()}
    (folder / "ind.cora.test.index").write_text("\n".join(map(str, test_nodes)))
    return folder, originals


def broken_features(*, value=None, column=None, twice=False):
    """allx with one thing wrong in its first row."""
    matrix = csr_matrix(np.ones((NODES - TESTED, FEATURES), np.float32))
    if value is not None:
        matrix.data[0] = value
    if column is not None:
        matrix.indices[0] = column
    if twice:
        matrix.indices[1] = matrix.indices[0]
    return matrix


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("graph", {0: [NODES]}, r"edge \(0, 560\) points outside the 560 nodes"),
        ("graph", {-1: [3]}, r"edge \(-1, 3\) points outside"),
        ("graph", {0: ["1"]}, "integers as nodes"),
        ("graph", {}, "at least one edge"),
        ("graph", [1, 2], "dictionary"),
        ("y", np.zeros((20, 3), np.int32), "training node 0 has no label|one class"),
        ("y", np.ones((20, 3), np.int32), "one class in each row"),
        ("y", np.zeros((0, 3), np.int32), "matrix"),
        ("y", np.eye(3, dtype=np.int32)[np.zeros(100, int)], "fewer rows than ally by 500"),
        ("ally", np.eye(3, dtype=np.int32)[np.zeros(529, int)], "529 rows"),
        ("ty", np.eye(3, dtype=np.int32)[np.zeros(29, int)], "as many rows as test.index"),
        ("tx", csr_matrix(np.ones((28, 3), np.float32)), "as many rows as test.index"),
        ("tx", np.ones((28, 4), np.float32), "a sparse matrix"),
        ("allx", broken_features(value=np.nan), "not finite"),
        ("allx", broken_features(value=np.inf), "not finite"),
        ("allx", broken_features(column=FEATURES), "do not fit together"),
        ("allx", broken_features(column=-1), "do not fit together"),
        ("allx", broken_features(twice=True), "given twice"),
    ],
)
def test_parts_that_do_not_fit_are_refused(planetoid_folder, planetoid_parts, part, value, message):
    if part == "y" and not value.any() and len(value):
        # The rows of y only count the training nodes; their labels are in ally.
        labels = planetoid_parts[0]["ally"].copy()
        labels[0] = 0
        part, value = "ally", labels
    write_part(planetoid_folder, part, value)
    with pytest.raises(ValueError, match=message) as caught:
        load_planetoid("cora", planetoid_folder)
    assert f"{planetoid_folder}/ind.cora." in str(caught.value) or "cora:" in str(caught.value)


@pytest.mark.parametrize(("part", "row", "message"), [("ally", 20, "validation node 20"), ("ty", 0, "test node")])
def test_a_node_in_a_split_must_have_a_label_and_any_other_may_have_none(
    planetoid_folder, planetoid_parts, part, row, message
):
    ally = planetoid_parts[0]["ally"].copy()
    ally[525] = 0  # in no split
    write_part(planetoid_folder, "ally", ally)
    assert load_planetoid("cora", planetoid_folder).labels[525] == -1
    assert 525 not in load_planetoid("cora", planetoid_folder, split="full").train
    labels = (ally if part == "ally" else planetoid_parts[0][part]).copy()
    labels[row] = 0
    write_part(planetoid_folder, part, labels)
    with pytest.raises(ValueError, match=f"cora: {message}.* has no label"):
        load_planetoid("cora", planetoid_folder)


@pytest.mark.parametrize("text", ["", "530 x", "12\n531", "531\n531", "531\n9999999"])
def test_a_bad_test_index_is_refused(planetoid_folder, text):
    path = planetoid_folder / "ind.cora.test.index"
    path.write_text(text)
    with pytest.raises(ValueError, match=str(path)):
        load_planetoid("cora", planetoid_folder)


def test_planetoid_refuses_unknown_names_splits_and_missing_files(planetoid_folder):
    with pytest.raises(ValueError, match=r"'reddit'.*cora, citeseer, pubmed"):
        load_planetoid("reddit", planetoid_folder)
    with pytest.raises(ValueError, match="'geom'"):
        load_planetoid("cora", planetoid_folder, split="geom")
    with pytest.raises(FileNotFoundError, match=r"citeseer.*planetoid/raw.*download_planetoid.*github"):
        load_planetoid("citeseer", planetoid_folder)
    (planetoid_folder / "ind.cora.tx").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks ind\.cora\.tx; get it from.*download_planetoid"):
        load_planetoid("cora", planetoid_folder)


# ---- CamVid ----------------------------------------------------------------------------------------------------


@pytest.fixture
def camvid_folder(tmp_path):
    """Two images a split, 6 x 4 pixels; the label map of image i is i everywhere but for one ignored pixel."""
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for folder in (tmp_path / split, tmp_path / f"{split}annot"):
            folder.mkdir()
        for index in range(2):
            Image.fromarray(rng.integers(0, 256, (4, 6, 3), np.uint8)).save(tmp_path / split / f"{index}.png")
            labels = np.full((4, 6), index, np.uint8)
            labels[3, 5] = 11
            Image.fromarray(labels).save(tmp_path / f"{split}annot" / f"{index}.png")
    return tmp_path


def test_camvid_pairs_images_with_their_label_maps(camvid_folder):
    data = load_camvid(camvid_folder)
    for split in (data.train, data.validation, data.test):
        assert split.images.shape == (2, 4, 6, 3)
        np.testing.assert_array_equal(split.labels[:, 0, 0], [0, 1])
        np.testing.assert_array_equal(split.labels[:, 3, 5], [IGNORED, IGNORED])
    expected = np.asarray(Image.open(camvid_folder / "val" / "1.png"))
    np.testing.assert_array_equal(data.validation.images[1], expected)
    assert (data.num_classes, data.ignored_label) == (11, IGNORED)


def test_camvid_refuses_bad_files_by_name(camvid_folder):
    path = camvid_folder / "trainannot" / "1.png"
    content = path.read_bytes()

    def refused(error, message):
        with pytest.raises(error, match=message):
            load_camvid(camvid_folder)
        path.write_bytes(content)

    Image.fromarray(np.full((4, 6), 12, np.uint8)).save(path)
    refused(ValueError, f"{path} has label 12, outside 0..11")
    Image.fromarray(np.zeros((4, 7), np.uint8)).save(path)
    refused(ValueError, rf"{path} has size \(4, 7\), its image \(4, 6\)")
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(path)
    refused(ValueError, f"{path} has mode RGB, expected L")
    path.write_bytes(content[:40])
    refused(ValueError, f"{path} cannot be decoded")
    path.write_bytes(b"no image")
    refused(ValueError, f"{path} cannot be decoded")
    path.unlink()
    refused(FileNotFoundError, "1 files have no partner in .*, first 1")
    for leftover in (camvid_folder / "val").iterdir():
        leftover.unlink()
    refused(FileNotFoundError, "val has no images")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_camvid(camvid_folder / "nowhere")


def test_camvid_maps_must_have_the_size_of_their_images(camvid_folder):
    for path in (camvid_folder / "testannot").iterdir():
        Image.fromarray(np.zeros((6, 4), np.uint8)).save(path)
    with pytest.raises(ValueError, match=r"testannot/0.png has size \(6, 4\), its image \(4, 6\)"):
        load_camvid(camvid_folder)


def test_missing_pillow_is_explained(camvid_folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(ImportError, match="pip install pillow"):
        load_camvid(camvid_folder)


def test_real_camvid_has_the_published_splits(data_dir):
    data = load_camvid(data_dir)
    assert [len(split.images) for split in (data.train, data.validation, data.test)] == [367, 101, 233]
    assert data.train.images.shape[1:] == (180, 240, 3)
    assert np.unique(data.train.labels).tolist() == list(range(IGNORED, 11))
    sky, road = (data.train.labels == data.classes.index(name) for name in ("sky", "road"))
    heights = np.arange(180)[None, :, None]
    assert (heights * sky).sum() / sky.sum() < 60 < 120 < (heights * road).sum() / road.sum()
