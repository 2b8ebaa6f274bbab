"""Other people's code beside ours, beyond the timed step of `bench.peer`: whole conversations."""
