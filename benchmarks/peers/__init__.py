"""Heads of other methods beside ours, trained for the same target in the same time."""
