"""What a training step computes, as pure functions of arrays."""
