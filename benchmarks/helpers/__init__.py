"""What entry scripts and workers are made of: models, sides of a comparison, turns, counters of bytes and flops."""
