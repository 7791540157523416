"""How sure the head is of its drafts, and which are left out by it: a cut per runner."""
