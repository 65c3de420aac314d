"""The ground that every other room stands on: processes, collectives, number formats, files, locks, signals, console.

Nothing here knows what SORSA or a run is, and this room imports no other. Messages about precision and time-outs name
the setting that mends them (`train.precision`, `train.timeout_minutes`); no setting is read here. Start reading with
`process` (how a rank starts), `collectives` (how ranks agree) and `exit_codes` (how a command ends).
"""
