"""Data sets, one file each. `registry.SOURCES` is the table that `--data` selects from."""
