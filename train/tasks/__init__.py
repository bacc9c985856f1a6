"""From an experiment to its results: one task for each kind of experiment."""
