"""Show what a run will learn from: `python launch/preview.py --config FILE [--examples N] [--plot FILE] [--json]`."""

from sorsa_ds.cli.preview import main

if __name__ == "__main__":
    main()
