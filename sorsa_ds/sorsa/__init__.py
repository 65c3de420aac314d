"""The maths of SORSA: one adapted linear layer, its decomposition, its residual's storage, its regulariser.

Nothing here knows about processes, files, models or runs; besides number formats and settings it needs torch only.
Start reading with `layer` (the forward and backward pass), then `decompose` (where U, s, V and W_r come from) and
`regularizer` (L_reg and its gradient).
"""
