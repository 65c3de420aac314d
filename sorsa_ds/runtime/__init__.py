"""The ground that every other room stands on: processes, collectives, number formats, files, locks, signals, console.

Nothing here knows what SORSA is, what a run is, or any setting by name; this room imports no other. Start reading with
`process` (how a rank starts), `collectives` (how ranks agree) and `exit_codes` (how a command ends).
"""
