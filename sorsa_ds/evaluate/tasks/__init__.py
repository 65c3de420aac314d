"""The tasks that a model can be evaluated in: each knows its data, its prompts, and how an answer is graded.

Start reading at `task`, the interface between a task and the command. `gsm8k`, `math` and `humaneval` have answers that
the model writes (`generated`; the first two share `math_answers`); `mmlu` compares the likelihoods of four letters;
`mt_bench` has conversations, which another model judges (`judge`); `loss` measures a text.
"""
