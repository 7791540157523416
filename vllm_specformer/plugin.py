"""Entry point of vLLM's plugin system (group `vllm.general_plugins`).

vLLM swallows an exception raised while this module is imported and reports one raised by
`register`, so the module imports nothing that can fail and everything is checked inside.
"""

from __future__ import annotations


def register() -> None:
    """Check vLLM's version, then apply the ledger of `engine/patches/ledger.py`.

    Runs in every vLLM process, possibly more than once.

    Raises:
        IncompatibleVLLMError: this vLLM is outside the tested range.
    """
    from vllm.version import __version__

    from vllm_specformer.engine.compat.versions import check_version
    from vllm_specformer.engine.patches.ledger import apply_all

    check_version(__version__)
    apply_all()
