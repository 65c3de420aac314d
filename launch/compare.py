"""Compare methods: `python launch/compare.py --methods sorsa,pissa,lora --seeds 1,2,3 --output DIR [key=value ...]`."""

import sys

from sorsa_ds.runtime import exit_codes


def main() -> None:
    """Parse, run everything, write tables and picture."""
    from sorsa_ds.study.compare.command import compare

    compare(sys.argv[1:])


if __name__ == "__main__":
    exit_codes.run(main)
