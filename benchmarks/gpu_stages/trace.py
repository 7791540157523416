"""From a Chrome trace to what a draft step launches: kernels, their time, and the gaps between."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable
from typing import Any

from gpu_stages.draft_clock import RANGE

Event = dict[str, Any]

DEVICE_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
HOST_CATEGORIES = ("cuda_runtime", "cuda_driver")


def draft_figures(trace: dict[str, Any]) -> dict[str, float]:
    """Medians over the drafts of a trace, in microseconds.

    `launches` are what the device ran, `host_launches` what the host called for it: a replayed
    graph is one call. `span` lies between the first kernel's begin and the last one's end, `gaps`
    are the part of it in which nothing of the draft ran, `period` is the time from draft to draft.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    drafts = sorted((e for e in events if e.get("name") == RANGE and _is_host(e)), key=_begin)
    if not drafts:
        raise ValueError("the trace holds no draft step")
    by_call = _by_correlation(e for e in events if e.get("cat") in DEVICE_CATEGORIES)
    calls = [e for e in events if e.get("cat") in HOST_CATEGORIES and _correlation(e) in by_call]
    found = [_figures(draft, calls, by_call) for draft in drafts]
    begins = [f.pop("begin") for f in found]
    medians = {name: statistics.median(f[name] for f in found) for name in found[0]}
    periods = [later - earlier for earlier, later in itertools.pairwise(begins)]
    period = statistics.median(periods) if periods else 0.0
    share = medians["span"] / period if period else 0.0
    return medians | {"period": period, "share": share, "drafts": len(drafts)}


def _figures(draft: Event, calls: list[Event], by_call: dict[int, list[Event]]) -> dict[str, float]:
    inside = [c for c in calls if _begin(draft) <= _begin(c) <= _end(draft)]
    kernels = [k for call in inside for k in by_call[_correlation(call)]]
    if not kernels:  # no device took part
        return dict.fromkeys(("launches", "host_launches", "busy", "span", "gaps"), 0.0) | {
            "begin": _begin(draft)
        }
    begin, end = min(map(_begin, kernels)), max(map(_end, kernels))
    busy = _covered(kernels)
    return {
        "launches": len(kernels),
        "host_launches": len(inside),
        "busy": busy,
        "span": end - begin,
        "gaps": end - begin - busy,
        "begin": begin,
    }


def _covered(kernels: list[Event]) -> float:
    """Time in which at least one of the kernels runs; on several streams they overlap."""
    covered, reached = 0.0, float("-inf")
    for kernel in sorted(kernels, key=_begin):
        covered += max(0.0, _end(kernel) - max(reached, _begin(kernel)))
        reached = max(reached, _end(kernel))
    return covered


def _by_correlation(events: Iterable[Event]) -> dict[int, list[Event]]:
    found: dict[int, list[Event]] = {}
    for event in events:
        found.setdefault(_correlation(event), []).append(event)
    return found


def _is_host(event: Event) -> bool:
    """The range is shown a second time on the device's own track."""
    return event.get("cat") != "gpu_user_annotation"


def _correlation(event: Event) -> int:
    return int(event.get("args", {}).get("correlation", -1))


def _begin(event: Event) -> float:
    return float(event["ts"])


def _end(event: Event) -> float:
    return float(event["ts"]) + float(event.get("dur", 0))
