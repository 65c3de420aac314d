"""How training changes singular values and singular vectors: the papers' analysis, from a run's folder to a report.

    snapshots   of which linears, and where they lie; `recorder` takes them while training
    history     a finished run as a row of steps, and the merged weight of a layer at each
    measures    the figures of one matrix, or of a matrix against the one that training began with (SORSA, eq. 1 to 4)
    compute     all layers and steps of all runs, in processes, row by row into one table
    figures     the papers' figures
    report      one HTML file of all of it

`command` leads the way.
"""
