"""python -m train run configs/digits_graph.py

PDE-GCN on the graph of scikit-learn's digits, each joined with its eight nearest neighbours, 20 labels a class.
"""

from train.config import Adam, Rule
from train.nodes.config import GraphData, GraphExperiment, GraphModel, GraphVariant

recipes = {
    "fast": GraphExperiment(
        name="digits_graph",
        variants=(GraphVariant("symmetric"), GraphVariant("plain", {"symmetric": False})),
        data=GraphData("digits"),
        model=GraphModel("pde_gcn", layers=8, width=32),
        optimizer=Adam(
            learning_rate=0.02,
            rules=(
                Rule("layers/.*clips", learning_rate=0.0),
                Rule("layers", learning_rate=0.05),
                Rule("", weight_decay=5e-4),
            ),
        ),
        epochs=100,
        seeds=3,
    ),
}
