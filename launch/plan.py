"""Plan a run: `python launch/plan.py --config RECIPE --ds_config JSON --gpus N --nodes M [--json]`."""

from sorsa_ds.cli.plan import main

if __name__ == "__main__":
    main()
