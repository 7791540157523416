"""Choosing how many tokens to draft: what a step costs, what a draft brings, which K pays."""
