"""Environment of the engine tests on vLLM's V1 runner; set before anything imports vLLM.

In-process, because the tests look into the proposer. One thread, because a toy model gains nothing
from more and loses a lot when another process shares the cores.
"""

from __future__ import annotations

import os

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
