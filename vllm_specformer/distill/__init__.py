"""Self-distillation: prompts in, the target's own answers out."""
