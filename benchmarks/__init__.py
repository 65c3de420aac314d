"""Measurements against peers and alternatives: README.md lists the entry scripts, which lie beside this file."""
