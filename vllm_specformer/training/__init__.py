"""Training of draft heads: objective, optimisers, checkpoints."""
