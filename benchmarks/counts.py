"""What decides how busy a GPU is, counted exactly on a CPU: kernels, syncs, bytes of masks and logits.

    python benchmarks/counts.py

Counted are operators as PyTorch dispatches them, in mixed precision, in the second micro-batch of a step: gradients are
added to what is there, and what is made once a step is made. The last line is one JSON object.
"""
