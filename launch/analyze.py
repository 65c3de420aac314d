"""Analyse finished runs: `python launch/analyze.py --run runs/A [--run runs/B ...] --output DIR`."""

from sorsa_ds.cli.analyze import main

if __name__ == "__main__":
    main()
