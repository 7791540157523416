"""Entry point of vLLM's plugin system (group `vllm.general_plugins`).

vLLM calls `register` in each of its processes, also for users who never ask for SpecFormer, and an
exception raised there ends the process. So nothing is checked here: a vLLM that is not supported is
refused when a speculative config asks for SpecFormer.
"""

from __future__ import annotations


def register() -> None:
    """Make the changes that `engine/patches/` declares; safe to call again.

    On a vLLM outside the tested range only those that act where SpecFormer is asked for, which then
    raise IncompatibleVLLMError; with SPECFORMER_ALLOW_UNTESTED_VLLM=1 all of them, as far as this
    vLLM has what they change.
    """
    from vllm.version import __version__

    from vllm_specformer.engine.compat.versions import is_allowed
    from vllm_specformer.engine.patches.ledger import ON_ANY_VERSION, SUBJECTS, apply

    apply(SUBJECTS if is_allowed(__version__) else ON_ANY_VERSION)
