"""Find the inputs that a base model uses least: `python launch/calibrate.py --model MODEL --output FILE`."""

from sorsa_ds.cli.calibrate import main

if __name__ == "__main__":
    main()
