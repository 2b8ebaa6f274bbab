"""How a measurement is taken and kept: timing, machine, processes, result files."""
