"""What a model can do: its answers are graded, multiple choice is scored, loss and drift of a text are measured.

Start reading at `command.evaluate`, which takes these steps:

    models (find the model), tasks (data and prompts) -> records (samples that are done already) -> models (load)
        -> sharing (ranks take batches) -> backends (generation or likelihood) -> the task's grader -> records, report

This file and those of the sub-rooms import nothing, because the graders' child processes must start without torch.
"""
