"""The folder of a run and the states in it."""
