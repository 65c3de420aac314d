"""Everything that a run can be told: its settings, where they come from, and the DeepSpeed JSON beside them.

Nothing here does what a setting asks for, and no process or device is touched; this room imports `runtime` only. Start
reading with `schema` (all settings, with their help), then `command_line` (from words to settings) and
`deepspeed_json` (the JSON resolved against the settings and the machine).
"""
