"""Launches, and the gaps between kernels, of something that runs on a device, by torch's profiler."""

from __future__ import annotations

import gzip
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

#: Categories of the trace: what runs on the GPU, what hands it over.
ON_GPU, COPIES, RUNTIME = ("kernel", "gpu_memcpy", "gpu_memset"), ("gpu_memcpy", "gpu_memset"), "cuda_runtime"
LAUNCH = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx")
#: Gaps longer than this are counted, in microseconds: shorter ones lie between any two kernels.
GAP = 5.0
TOP = 12


def profiled(
    run: Callable[[], Any], device: str, trace: Path | None = None, before: Callable[[], Any] = lambda: None
) -> dict[str, Any]:
    """What one call launches and how busy it keeps the device; a call before it starts the profiler up.

    Args:
        before: what each call needs, which is not profiled.
        device: "cuda", or "cpu", whose operators that call no others take the place of kernels.
        trace: where the trace goes, for chrome://tracing or Perfetto (.json.gz).
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    for _ in range(2):
        before()
        with profile(activities=activities) as found:
            begin = time.perf_counter()
            run()
            host = time.perf_counter() - begin
            if device == "cuda":
                torch.cuda.synchronize()
            wall = time.perf_counter() - begin
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        found.export_chrome_trace(str(file))
        text = file.read_text()
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        trace.write_bytes(gzip.compress(text.encode()))
    events = [event for event in json.loads(text)["traceEvents"] if event.get("ph") == "X"]
    return {"host ms": round(1e3 * host, 3), "wall ms": round(1e3 * wall, 3)} | summarized(events, device)


def summarized(events: Sequence[dict[str, Any]], device: str) -> dict[str, Any]:
    """Out of the complete events of a trace, whose times are in microseconds."""
    if device == "cuda":
        kernels = [event for event in events if event.get("cat") in ON_GPU]
    else:
        kernels = leaves([event for event in events if event.get("cat") == "cpu_op"])
    kernels.sort(key=lambda event: event["ts"])
    by_name: dict[str, list[float]] = defaultdict(list)
    busy, end, gaps = 0.0, kernels[0]["ts"] if kernels else 0.0, []
    for event in kernels:
        by_name[event["name"]].append(event["dur"])
        if event["ts"] - end > GAP:
            gaps.append(event["ts"] - end)
        last = event["ts"] + event["dur"]
        busy += max(0.0, last - max(end, event["ts"]))  # where several streams run, time counts once
        end = max(end, last)
    span = end - kernels[0]["ts"] if kernels else 0.0
    runtime = [event["name"] for event in events if event.get("cat") == RUNTIME]
    top = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:TOP]
    return {
        "kernels": sum(event.get("cat") not in COPIES for event in kernels),
        "copies": sum(event.get("cat") in COPIES for event in kernels),
        "launches": sum(name in LAUNCH for name in runtime),
        "synchronizations": sum("Synchronize" in name for name in runtime),
        "busy ms": round(busy / 1e3, 3),
        "span ms": round(span / 1e3, 3),
        f"gaps over {GAP:g} us": len(gaps),
        "gaps ms": round(sum(gaps) / 1e3, 3),
        "longest gap ms": round(max(gaps, default=0.0) / 1e3, 3),
        "by kernel": [[name[:120], len(times), round(sum(times) / 1e3, 3)] for name, times in top],
    }


def leaves(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those in which no other event of the same thread lies."""
    found = []
    by_thread: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        by_thread[event.get("tid")].append(event)
    for same in by_thread.values():
        same.sort(key=lambda event: (event["ts"], -event["dur"]))
        for event, after in zip(same, [*same[1:], None]):
            if after is None or after["ts"] >= event["ts"] + event["dur"]:
                found.append(event)
    return found
