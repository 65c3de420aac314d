"""From data on a disk or the hub to padded micro-batches: source -> formats -> tokenize -> order -> batches."""
