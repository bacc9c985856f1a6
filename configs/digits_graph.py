"""python -m train run configs/digits_graph.py

PDE-GCN on the graph of scikit-learn's digits, each joined with its eight nearest neighbours, 20 labels a class: the
embedded example, 55 s on two cores.

Test accuracy over three seeds: symmetric 90.5% in full precision, 89.4% with 4-bit weights and activations, agreement
97.2%; plain 90.7%, 89.6%, 97.7%.
"""

from train.config.graphs import GraphData, GraphExperiment, GraphModel, GraphVariant
from train.config.images import Adam, Rule

recipes = {
    "fast": GraphExperiment(
        name="digits_graph",
        variants=(GraphVariant("symmetric"), GraphVariant("plain", {"symmetric": False})),
        data=GraphData("digits"),
        model=GraphModel("pde_gcn", layers=9, width=24),
        optimizer=Adam(
            learning_rate=0.02,
            rules=(
                Rule("layers/.*clips", learning_rate=0.0),
                Rule("layers", learning_rate=0.05),
                Rule("", weight_decay=5e-4),
            ),
        ),
        bits=((4, 4), (3, 3)),
        epochs=80,
        tune_epochs=10,
        seeds=3,
        report_every=80,
    ),
}
