"""Networks on graphs: `layers` holds the formulas of the steps, `networks` the Flax modules around them."""
