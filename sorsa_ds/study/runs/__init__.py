"""What runs a folder holds, side by side. Start reading at `command.list_runs`."""
