"""Check a command without starting it: `python launch/check.py train RANKS RANKS_OF_EACH_NODE [settings]`."""

from sorsa_ds.cli.check import main

if __name__ == "__main__":
    main()
