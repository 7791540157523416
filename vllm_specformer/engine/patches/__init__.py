"""Every change the package makes to vLLM, one file per subject, and the ledger that lists them."""
