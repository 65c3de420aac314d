"""Write a run as a page of HTML, also while it trains: `python launch/report.py --run runs/NAME [--output FILE]`."""

from sorsa_ds.cli.report import main

if __name__ == "__main__":
    main()
