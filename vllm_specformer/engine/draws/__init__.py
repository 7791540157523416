"""Which drafts a request gets: the head's best tokens, or tokens drawn from its distribution."""
