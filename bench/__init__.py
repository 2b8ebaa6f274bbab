"""Comparisons that anybody can rerun: `python -m bench.<name>`."""

import sys

from nanovlm_fast.command import end_on_interrupt

end_on_interrupt(sys.argv[:1] == ["-m"])  # of `python -m bench.<command>`, and of nobody else
