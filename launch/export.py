"""Export a finished run: `python launch/export.py --run runs/NAME --format FORMAT --output FOLDER`."""

from sorsa_ds.cli.export import main

if __name__ == "__main__":
    main()
