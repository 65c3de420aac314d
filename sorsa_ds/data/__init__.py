"""From rows on a disk or the hub to padded micro-batches for each rank: source, formats, tokenize, order, batches.

The room knows tokenizers, and nothing of models or of training: what it hands on is token ids, labels and masks. Start
reading in `examples.py`, which makes the examples of a run, and go on with `batches.py`, which deals them out to steps
and ranks.
"""
