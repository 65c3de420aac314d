"""Methods side by side: the same training for each, one run after the other, in one table and one picture.

request (the command line) -> trials (what is to be run) -> runner (one run, through launch/train.py), score (through
launch/evaluate.py) -> results (what the runs' folders tell) -> tables, figure. `command` leads the way.
"""
