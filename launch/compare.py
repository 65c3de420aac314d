"""Compare methods: `python launch/compare.py --methods sorsa,pissa,lora --seeds 1,2,3 --output DIR [key=value ...]`."""

from sorsa_ds.cli.compare import main

if __name__ == "__main__":
    main()
