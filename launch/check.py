"""Check a training command without starting it: `python launch/check.py [the arguments of launch/train.py]`.

Prints the run's name (output.name), an empty line where it has none. What is wrong goes to stderr, with exit code 2.
"""

import sys


def main() -> None:
    """Parse, which imports no torch and takes half a second."""
    from sorsa_ds.cli import parse

    try:
        print(parse(sys.argv[1:]).config.output.name or "")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
