"""Data sets, one file each; `registry.py` finds the one that `--data` names."""
