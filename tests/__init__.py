"""A package of its own, so that none that is installed under this name takes its place."""
