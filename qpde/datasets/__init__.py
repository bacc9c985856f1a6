"""Real data in, plain NumPy arrays out: images with labels, label maps, and graphs with labelled nodes.

Every loader checks what it reads and refuses, by name, what it cannot trust. Splits are deterministic: the same
arguments give the same images in the same order. Nothing is downloaded and nothing is written, except by
`download_planetoid`.
"""

from qpde.batches import IGNORED
from qpde.datasets.arrays import load_npz
from qpde.datasets.camvid import load_camvid
from qpde.datasets.cifar10 import load_cifar10
from qpde.datasets.cityscapes import load_cityscapes
from qpde.datasets.containers import Images, NodeGraph, SparseRows, Split, random_split
from qpde.datasets.digits import load_digits, load_digits_graph
from qpde.datasets.download import download_planetoid
from qpde.datasets.folders import load_folder
from qpde.datasets.label_maps import load_label_maps
from qpde.datasets.node_graphs import load_node_graph
from qpde.datasets.planetoid import load_planetoid

__all__ = [
    "IGNORED",
    "Images",
    "NodeGraph",
    "SparseRows",
    "Split",
    "download_planetoid",
    "load_camvid",
    "load_cifar10",
    "load_cityscapes",
    "load_digits",
    "load_digits_graph",
    "load_folder",
    "load_label_maps",
    "load_node_graph",
    "load_npz",
    "load_planetoid",
    "random_split",
]
