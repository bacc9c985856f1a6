"""Graph networks in PyTorch, as a good PyTorch user would write them: what graphs.py races against.

GCN and GCNII are PyTorch Geometric's own layers, PDE-GCN is written here, all in the frame of qpde.models: opening
dense layer and ReLU, hidden layers, closing dense layer. Two forms of each are to choose from, the faster one races:

    "edges"     messages along a list of edges; PyTorch Geometric's edge_index, for PDE-GCN index_select and index_add
    "matrices"  products with sparse matrices; PyTorch Geometric's EdgeIndex, which keeps both orders of the edges, for
                PDE-GCN G and its transpose

PDE-GCN without a nonlinearity has a third, "regrouped": G^T (G x K) K^T, as it is published, as (G^T G x) (K K^T), with
one sparse matrix and half the dense products. qpde.models regroups, too.

Features are a dense matrix, or a sparse one whose transpose is kept for the backward pass.
"""

import warnings
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch_geometric import EdgeIndex
from torch_geometric.nn import GCN2Conv, GCNConv
from torch_geometric.nn.conv.gcn_conv import gcn_norm
from torch_nets import Round

warnings.filterwarnings("ignore", "Sparse CSR tensor support")


def create(name: str, layers: int, options: dict, *, graph, width: int, dropout: float) -> "Network":
    """The network by its name in qpde.models: gcn, gcnii or pde_gcn. `graph` tells the numbers of features, classes."""
    layer = {"gcn": Convolution, "gcnii": InitialResidual, "pde_gcn": Diffusion}[name]
    if name == "pde_gcn":
        layer = partial(layer, nonlinearity=options["nonlinearity"], bits=options.get("weight_bits"), step_size=0.7)
    return Network(layer, layers, graph.num_features, graph.num_classes, width=width, dropout=dropout)


class _Product(torch.autograd.Function):
    """A x for a sparse A without gradient; autograd would transpose A at every call."""

    @staticmethod
    def forward(ctx, x: Tensor, matrix: Tensor, transpose: Tensor):
        ctx.transpose = transpose
        return torch.sparse.mm(matrix, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        return torch.sparse.mm(ctx.transpose, g), None, None


class Sparse:
    """A sparse matrix by rows together with its transpose."""

    def __init__(self, rows: np.ndarray, columns: np.ndarray, values: np.ndarray, shape: tuple[int, int]):
        by_row = np.lexsort((columns, rows))
        rows, columns, values = rows[by_row], columns[by_row], values[by_row]
        self.order = torch.from_numpy(np.lexsort((rows, columns)))
        self.matrix = _by_rows(rows, columns, torch.from_numpy(values), shape)
        order = self.order.numpy()
        self.transpose = _by_rows(columns[order], rows[order], torch.from_numpy(values[order]), shape[::-1])

    def __matmul__(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.matrix, self.transpose)

    def to(self, device: str) -> "Sparse":
        """The same on that device."""
        return _moved(self, device)

    def dropout(self, rate: float) -> "Sparse":
        """Some of the entries, scaled."""
        values = F.dropout(self.matrix.values(), rate)
        dropped = object.__new__(Sparse)
        dropped.matrix = _with_values(self.matrix, values)
        dropped.transpose = _with_values(self.transpose, values[self.order])
        return dropped


class Convolution(nn.Module):
    """relu(GCNConv(x)) (Kipf and Welling, 2017)."""

    drops_inputs = True

    def __init__(self, width: int, index: int):
        super().__init__()
        self.conv = GCNConv(width, width, normalize=False)

    def forward(self, x: Tensor, start: Tensor, graph: "Graph") -> Tensor:
        return F.relu(self.conv(x, graph.adjacency, graph.weights))

    def load(self, params: dict[str, Tensor]) -> None:
        self.conv.lin.weight.copy_(params["kernel"].T)
        self.conv.bias.copy_(params["bias"])


class InitialResidual(nn.Module):
    """relu(GCN2Conv(x, x_0)) (Chen et al., 2020)."""

    drops_inputs = True

    def __init__(self, width: int, index: int):
        super().__init__()
        self.conv = GCN2Conv(width, alpha=0.1, theta=0.5, layer=index + 1, normalize=False)

    def forward(self, x: Tensor, start: Tensor, graph: "Graph") -> Tensor:
        return F.relu(self.conv(x, start, graph.adjacency, graph.weights))

    def load(self, params: dict[str, Tensor]) -> None:
        self.conv.weight1.copy_(params["kernel"])


class Diffusion(nn.Module):
    """x - h G^T Q(s(G Q(x) K)) K^T, or without the quantizers."""

    drops_inputs = False

    def __init__(self, width: int, index: int, *, nonlinearity: str, bits: int | None, step_size: float):
        super().__init__()
        self.nonlinearity = {"identity": nn.Identity(), "tanh": nn.Tanh()}[nonlinearity]
        self.bits, self.step_size = bits, step_size
        self.kernel = nn.Parameter(torch.eye(width))
        self.weight_clip = nn.Parameter(torch.ones(()))
        self.act_clips = nn.Parameter(torch.full((2,), 6.0))

    def forward(self, x: Tensor, start: Tensor, graph: "Graph") -> Tensor:
        if graph.form == "regrouped":
            return torch.sub(x, graph.laplacian(x) @ (self.kernel @ self.kernel.T), alpha=self.step_size)
        kernel = self._rounded(self.kernel, self.weight_clip)
        z = graph.gradient(self._rounded(x, self.act_clips[0]) @ kernel)
        z = self._rounded(self.nonlinearity(z), self.act_clips[1])
        return torch.sub(x, graph.gradient_adjoint(z) @ kernel.T, alpha=self.step_size)

    def _rounded(self, t: Tensor, clip: Tensor) -> Tensor:
        return t if self.bits is None else Round.apply(t, clip, -1.0, 2 ** (self.bits - 1) - 1)

    def load(self, params: dict[str, Tensor]) -> None:
        self.kernel.copy_(params["kernel"])
        self.weight_clip.copy_(params["weight_clips"][0])
        self.act_clips.copy_(params["act_clips"])


class Graph:
    """The undirected edges, each listed once, in one of the forms, and everything that can be computed ahead."""

    def __init__(self, senders: np.ndarray, receivers: np.ndarray, nodes: int, form: str):
        self.nodes, self.form = nodes, form
        self.senders, self.receivers = torch.from_numpy(senders).long(), torch.from_numpy(receivers).long()
        ends = torch.stack([torch.cat([self.senders, self.receivers]), torch.cat([self.receivers, self.senders])])
        self.adjacency, self.weights = gcn_norm(ends, num_nodes=nodes)
        degree = 1 + torch.bincount(ends[0], minlength=nodes)
        self.scale = degree.float().rsqrt()
        if form == "regrouped":
            to, source = self.adjacency.numpy()
            self._laplacian = Sparse(to, source, (to == source) - self.weights.numpy(), (nodes, nodes))
        if form == "matrices":
            order = np.lexsort((self.adjacency[0].numpy(), self.adjacency[1].numpy()))
            self.adjacency = EdgeIndex(
                self.adjacency[:, order], sparse_size=(nodes, nodes), sort_order="col", is_undirected=True
            ).fill_cache_()
            self.weights = self.weights[order]
            edge = np.arange(len(senders))
            scale = self.scale.numpy()
            self._gradient = Sparse(
                np.concatenate([edge, edge]),
                np.concatenate([senders, receivers]),
                np.concatenate([scale[senders], -scale[receivers]]),
                (len(senders), nodes),
            )
            self._adjoint = object.__new__(Sparse)
            self._adjoint.matrix, self._adjoint.transpose = self._gradient.transpose, self._gradient.matrix

    def to(self, device: str) -> "Graph":
        """The same on that device."""
        return _moved(self, device)

    def gradient(self, x: Tensor) -> Tensor:
        """x_i / sqrt(d_i) - x_j / sqrt(d_j) on the edges."""
        if self.form == "matrices":
            return self._gradient @ x
        x = x * self.scale[:, None]
        return x.index_select(0, self.senders) - x.index_select(0, self.receivers)

    def laplacian(self, x: Tensor) -> Tensor:
        """G^T G x, in the form "regrouped"."""
        return self._laplacian @ x

    def gradient_adjoint(self, p: Tensor) -> Tensor:
        """Its adjoint."""
        if self.form == "matrices":
            return self._adjoint @ p
        total = p.new_zeros(self.nodes, p.shape[1]).index_add(0, self.senders, p)
        return total.index_add_(0, self.receivers, p, alpha=-1) * self.scale[:, None]


class Network(nn.Module):
    """Opening dense layer, hidden layers, closing dense layer, with dropout as in qpde.models."""

    def __init__(self, layer, depth: int, features: int, classes: int, *, width: int, dropout: float):
        super().__init__()
        self.opening = nn.Parameter(torch.empty(features, width))
        self.stem_bias = nn.Parameter(torch.zeros(width))
        self.layers = nn.ModuleList(layer(width, index) for index in range(depth))
        self.closing = nn.Linear(width, classes)
        self.dropout = dropout

    def forward(self, features: Tensor | Sparse, graph: Graph) -> Tensor:
        if self.training:
            is_sparse = isinstance(features, Sparse)
            features = features.dropout(self.dropout) if is_sparse else F.dropout(features, self.dropout)
        x = start = F.relu(features @ self.opening + self.stem_bias)
        for index, layer in enumerate(self.layers):
            if layer.drops_inputs or index == 0:
                x = F.dropout(x, self.dropout, self.training)
            x = layer(x, start, graph)
        return self.closing(F.dropout(x, self.dropout, self.training))

    @torch.no_grad()
    def load(self, params: dict) -> "Network":
        """Takes the parameters of the network that qpde.models made."""
        self.opening.copy_(_tensor(params["stem_kernel"]))
        self.stem_bias.copy_(_tensor(params["stem_bias"]))
        self.closing.weight.copy_(_tensor(params["head_kernel"]).T)
        self.closing.bias.copy_(_tensor(params["head_bias"]))
        for index, layer in enumerate(self.layers):
            layer.load({name: _tensor(value[index]) for name, value in params["layers"].items()})
        return self


def train_epoch(model: Network, optimizer, features, graph: Graph, nodes: Tensor, labels: Tensor) -> Tensor:
    """One step on the whole graph; returns the loss of the labelled nodes."""
    optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(features, graph)[nodes], labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


def _moved(it, device: str):
    moved = object.__new__(type(it))
    for name, value in vars(it).items():
        setattr(moved, name, value.to(device) if isinstance(value, Tensor | Sparse) else value)
    return moved


def _tensor(array) -> Tensor:
    return torch.from_numpy(np.array(array))


def _by_rows(rows, columns, values, shape) -> Tensor:
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=shape[0]))])
    return torch.sparse_csr_tensor(torch.from_numpy(starts), torch.from_numpy(columns).long(), values, shape)


def _with_values(matrix: Tensor, values: Tensor) -> Tensor:
    return torch.sparse_csr_tensor(matrix.crow_indices(), matrix.col_indices(), values, matrix.shape)
