"""Whether a mathematical answer is right: find it in a text, read its quantities, compare it with the reference.

Start reading at `equality.grade_answer`, the rules of what counts as equal. `grader` runs them in a child process that
can be ended; `answers` finds the final answer of a text, which `markdown` may dress; `quantities` reads numbers with
units behind them, `prose` those that words, brackets and remarks surround, `compounds` those of several units.
"""
