"""Evaluate: `deepspeed launch/evaluate.py --model runs/NAME --task gsm8k`; torchrun or python alone start it too."""

from sorsa_ds.cli.evaluate import main

if __name__ == "__main__":
    main()
