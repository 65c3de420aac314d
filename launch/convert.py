"""Another trainer's file as settings: `python launch/convert.py axolotl.yaml [--output run.yaml] [--gpus N]`."""

from sorsa_ds.cli.convert import main

if __name__ == "__main__":
    main()
