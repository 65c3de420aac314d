"""Train: `deepspeed launch/train.py --ds_config ds_configs/zero3.json [--config run.yaml] [adapter.rank=64 ...]`."""

from sorsa_ds.cli.train import main

if __name__ == "__main__":
    main()
