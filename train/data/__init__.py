"""Images on their way to a training step."""
