"""Ask a model: `python launch/chat.py --model RUN|ADAPTER|FOLDER [--compare]`."""

from sorsa_ds.cli.chat import main

if __name__ == "__main__":
    main()
