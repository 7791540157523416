"""Speculation measured under load: real servers, vLLM's own client, and a target worth waiting for.

`specformer bench` lives in `run.py`; `enlarge.py` makes a heavy target of a light one.
"""
