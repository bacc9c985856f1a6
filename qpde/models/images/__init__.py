"""Image networks: `blocks` holds the formulas of the steps, `network` the Flax modules around them."""
