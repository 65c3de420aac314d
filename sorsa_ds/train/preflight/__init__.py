"""Before anything is spent: do all nodes of a job agree, reach each other, and have what it needs?

rank_facts.py   what each rank tells of itself
faults.py       what is wrong with the facts of all ranks, by node
check.py        the exchange: facts, the run folder, one all-reduce
"""
