"""Comparisons that anybody can rerun: `python -m bench.<name>`."""
