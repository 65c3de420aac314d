"""Show what runs there are: `python launch/runs.py [FOLDER] [--json]`."""

from sorsa_ds.cli.runs import main

if __name__ == "__main__":
    main()
