"""Methods side by side: the same training for each, one run after the other, in one table and one picture.

Start reading at `command.compare`, which goes this way:

    request (the command line) -> trials (what is to be run) -> runner (one run, through launch/train.py), score
        (launch/evaluate.py) -> results (read from the runs' folders), frontier (loss against drift) -> tables, figure
"""
