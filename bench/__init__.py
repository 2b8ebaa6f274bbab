"""Comparisons that can be repeated on any machine: `python -m bench.<name>`."""

import sys

from nanovlm_fast.command import begin

# Only for the process of `python -m bench.<command>`, not for one that merely imports the package.
begin(sys.argv[:1] == ["-m"])
