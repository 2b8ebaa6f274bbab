"""Comparisons that can be repeated on any machine: `python -m bench.<name>`."""

import sys

from nanovlm_fast.command import end_on_interrupt

# Only for the process of `python -m bench.<command>`, not for one that merely imports the package.
end_on_interrupt(sys.argv[:1] == ["-m"])
