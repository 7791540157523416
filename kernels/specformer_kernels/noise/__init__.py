"""Random numbers that are a function of (seed, position, token) and of nothing else.

Whatever the batch, the draft or the number of candidates, a request's token `v` at a position meets
the same noise. That is what makes coupled verification independent of the draft, and what makes
every other rule reproducible. There is no state: nothing is advanced, nothing must be synchronised.
"""

from __future__ import annotations

from specformer_kernels.noise.reference import Stream, gumbel, uniform

__all__ = ["Stream", "gumbel", "uniform"]
