"""One file per family of methods. The registry reads every file here."""
