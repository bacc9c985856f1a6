"""python -m train run configs/cora_pdegcn.py --data-dir FOLDER

PDE-GCN on citation graphs with the published split, ten seeds, in full precision and quantized from it.

Cora, 32 symmetric layers: 83.9% in full precision, 83.5% with 4-bit weights and activations, agreement 96.7%.
The tables are in docs/results/graphs.md.
"""

from dataclasses import replace

from train.config.graphs import GraphData, GraphExperiment, GraphModel, GraphVariant
from train.config.images import Adam, Rule


def both_forms(step_sizes: dict[int, float]) -> tuple[GraphVariant, ...]:
    """Symmetric and plain networks, by number of layers."""
    return tuple(
        GraphVariant(f"{form}-{layers}", {"symmetric": form == "symmetric", "layers": layers, "step_size": h})
        for layers, h in step_sizes.items()
        for form in ("symmetric", "plain")
    )


def adam(learning_rate: float, *, kernels: float) -> Adam:
    """Adam with weight decay for the dense layers only, and a learning rate of their own for the kernels K.

    The kernels start at the identity, as published, and learn slowly. Their clips are read off the trained kernels.
    """
    return Adam(
        learning_rate,
        rules=(
            Rule("clips", learning_rate=0.0),
            Rule("layers/kernel", learning_rate=kernels / learning_rate),
            Rule("stem|head", weight_decay=5e-4),
        ),
    )


def baseline(*, kernels: float) -> Adam:
    """Adam as published for the baselines, with weight decay of its own for the hidden layers' kernels."""
    rules = (
        Rule("clips", learning_rate=0.0),
        Rule("layers/kernel", weight_decay=kernels),
        Rule("", weight_decay=5e-4),
    )
    return Adam(0.01, rules=rules)


def tuned(*, layers: int, lambda_: float, dropout: float, kernels: float) -> tuple[GraphVariant, ...]:
    """gcn with a graph convolution as its head, gcnii as published but for its width, and gat of two layers.

    The arguments are gcnii's.
    """
    alike = baseline(kernels=5e-4)
    gcn = {"name": "gcn", "layers": 1, "head": "graph", "dropout": 0.8}
    gcnii = {"name": "gcnii", "layers": layers, "lambda_": lambda_, "dropout": dropout}
    return (
        GraphVariant("gcn", gcn, optimizer=alike),
        GraphVariant("gcnii", gcnii, optimizer=baseline(kernels=kernels)),
        GraphVariant("gat", {"name": "gat", "layers": 2, "dropout": 0.6}, optimizer=alike),
    )


cora = GraphExperiment(
    name="cora_pdegcn",
    variants=both_forms({2: 0.7, 8: 0.7, 32: 0.2}),
    data=GraphData("cora"),
    model=GraphModel("pde_gcn", width=64, dropout=0.7),
    optimizer=adam(0.03, kernels=2e-4),
    epochs=150,
)
citeseer = replace(
    cora,
    name="citeseer_pdegcn",
    data=GraphData("citeseer"),
    optimizer=adam(0.04, kernels=1e-4),
    epochs=100,
    tune_epochs=10,
)
pubmed = replace(
    cora,
    name="pubmed_pdegcn",
    data=GraphData("pubmed"),
    model=replace(cora.model, dropout=0.5),
    optimizer=adam(0.01, kernels=1e-4),
    epochs=100,
    tune_epochs=10,
)
_two_layers = tuple(
    GraphVariant(name, {"name": name, "layers": 2, "dropout": dropout}, optimizer=baseline(kernels=5e-4))
    for name, dropout in (("gcn", 0.5), ("gcnii", 0.6), ("gat", 0.6))
)
_by_depth = {
    "symmetric": {"symmetric": True},
    "plain": {"symmetric": False},
    "gcn": {"name": "gcn", "dropout": 0.5},
    "gcnii": {"name": "gcnii", "dropout": 0.6},
}

recipes = {
    "cora": cora,
    "citeseer": citeseer,
    "pubmed": pubmed,
    "cora_baselines": replace(
        cora,
        name="cora_baselines",
        variants=tuned(layers=64, lambda_=0.5, dropout=0.6, kernels=0.01),
        epochs=400,
    ),
    "citeseer_baselines": replace(citeseer, name="citeseer_baselines", variants=_two_layers),
    "pubmed_baselines": replace(pubmed, name="pubmed_baselines", variants=_two_layers),
    "citeseer_tuned": replace(
        citeseer,
        name="citeseer_tuned",
        variants=tuned(layers=32, lambda_=0.6, dropout=0.7, kernels=0.01),
        epochs=400,
    ),
    "pubmed_tuned": replace(
        pubmed,
        name="pubmed_tuned",
        variants=tuned(layers=16, lambda_=0.4, dropout=0.5, kernels=5e-4),
        epochs=400,
    ),
    "cora_large_kernels": replace(
        cora,
        name="cora_large_kernels",
        variants=both_forms({8: 0.7, 32: 0.7}),
        model=replace(cora.model, rounding="state"),
        optimizer=adam(0.03, kernels=3e-3),
        bits=((4, 4), (3, 3)),
        epochs=100,
    ),
    "cora_depth": replace(
        cora,
        name="cora_depth",
        variants=tuple(
            GraphVariant(
                f"{kind}-{layers}",
                changes | {"layers": layers, "step_size": min(0.7, 6.4 / layers)},
                optimizer=baseline(kernels=5e-4) if "name" in changes else None,
            )
            for kind, changes in _by_depth.items()
            for layers in (2, 4, 8, 16, 32, 64)
        ),
        bits=(),
        epochs=100,
        seeds=3,
    ),
}
