"""How training changes singular values and singular vectors: the papers' analysis, from a run's folder to a report.

Start reading at `command.analyze`, which uses the other modules in this order:

    request     what is asked for, and whether the output folder belongs to it
    runs        a finished run, with all that is shown of it
    history     a finished run as a sequence of steps, and the merged weight of a layer at each of them
    measures    the figures of one matrix, or of a matrix against the one that training began with (SORSA, eq. 1 to 4)
    compute     all layers and steps of all runs, measured in processes; each result becomes a row of one `table`
    figures     the papers' figures
    report      one HTML file of all of it

The snapshots that it reads are written while training runs (`sorsa_ds.run.recorder`, `sorsa_ds.run.snapshots`).
"""
