"""What a model can do: generated answers, graded; multiple choice; the loss of a text.

    command -> models (find), tasks (prompts and data) -> records (what is done already) -> models (load)
            -> sharing (the ranks take batches) -> generation or likelihood -> the task's grader -> records -> report

Nothing here is imported when the package is: the graders' child processes must start without torch.
"""
