"""What a head is worth: offline, served, and against the target at hand."""
