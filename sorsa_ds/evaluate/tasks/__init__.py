"""The tasks: each knows its data, its prompts, and how an answer is graded.

generated (answers that a model writes)  <- gsm8k, math, humaneval
choice (four letters)                    <- mmlu
text (the loss)                          <- loss
"""
