"""Real data in, arrays out."""
