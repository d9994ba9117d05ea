"""How long a call takes on a GPU, by events, with the host's launches never between them.

As `graft bench op` measures: a call is captured in a CUDA graph as often as fills two milliseconds, the graph runs until
the clocks have settled under it, and a sample is one replay.  What cannot be captured is queued behind a spinning
kernel; a sample counts only where the device had not begun when the host had queued all of it.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from .base import CannotRun, torch

# Shortest piece of work that is measured, in milliseconds, and most calls of one.
MEASURED, REPEATED = 2.0, 64
# Seconds of the same load before samples count.
SETTLE = 0.3
# Clocks of the first spin, half a millisecond, and of the longest before a host counts as too slow.
SHORTEST_SPIN, LONGEST_SPIN = 1 << 20, 1 << 31


@dataclass
class Times:
    """Milliseconds of one call, sorted, and how they were taken."""

    ms: list[float]
    how: str
    clocks: dict[str, float] = field(default_factory=dict)

    def at(self, share: float) -> float:
        """The sample below which `share` of them lie."""
        return self.ms[round((len(self.ms) - 1) * share)]


class Timer:
    """Takes times on one device."""

    def __init__(self, device: str, samples: int) -> None:
        self.samples, self.cuda = samples, device != "cpu"
        self.monitor = Monitor() if self.cuda else None
        if self.cuda:
            self.stream = torch.cuda.Stream()
            self.l2 = torch.cuda.get_device_properties(0).L2_cache_size
            # Twice the cache: what lay in it is gone.
            self.flush = torch.empty(2 * self.l2, dtype=torch.uint8, device=device)

    def time(self, call: Callable, cold: bool = False) -> Times:
        """Times of `call`; `cold`: every call begins with an L2 cache that holds none of its data."""
        if not self.cuda:
            return self._host(call)
        self.spin = SHORTEST_SPIN
        # What was prepared on another stream is done.
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            call()
            once = self._span(call)
            calls = 1 if cold else int(min(max(-(-MEASURED // max(once, 1e-3)), 1), REPEATED))
            try:
                run, how = self._capture(call, calls), "graph"
            except Exception:  # Whatever a library refuses to capture, it can still be queued.
                torch.cuda.synchronize()
                run, how = lambda: [call() for _ in range(calls)], "queue"
            until = time.monotonic() + SETTLE
            while time.monotonic() < until:
                run()
                torch.cuda.synchronize()
            spins = how == "queue" or cold
            taken = [(self._behind_a_spin(run, cold) if spins else self._span(run)) / calls for _ in range(self.samples)]
            run()
            clocks = self.monitor.read()
            torch.cuda.synchronize()
        return Times(sorted(taken), how, clocks)

    def _host(self, call: Callable) -> Times:
        call()
        taken = []
        for _ in range(self.samples):
            start = time.perf_counter()
            call()
            taken.append((time.perf_counter() - start) * 1e3)
        return Times(sorted(taken), "host clock")

    def _span(self, work: Callable) -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        work()
        last.record()
        last.synchronize()
        return first.elapsed_time(last)

    def _capture(self, call: Callable, calls: int) -> Callable:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=self.stream):
            for _ in range(calls):
                call()
        return graph.replay

    def _behind_a_spin(self, work: Callable, cold: bool) -> float:
        while self.spin <= LONGEST_SPIN:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if cold:
                self.flush.zero_()
            torch.cuda._sleep(self.spin)
            first.record()
            work()
            last.record()
            # Begun already: the host was still launching while the clock ran.
            hidden = not first.query()
            last.synchronize()
            if hidden:
                return first.elapsed_time(last)
            self.spin *= 2
        raise CannotRun("the host's launches cannot be hidden")


class Monitor:
    """Clock and power of the GPU, by NVIDIA's management library; nothing where it cannot be loaded."""

    SM_CLOCK = 1

    def __init__(self) -> None:
        self.library = self.device = None
        try:
            library = ctypes.CDLL("libnvidia-ml.so.1")
            device = ctypes.c_void_p()
            name = f"GPU-{torch.cuda.get_device_properties(0).uuid}".encode()
            if library.nvmlInit_v2() == 0 and library.nvmlDeviceGetHandleByUUID(name, ctypes.byref(device)) == 0:
                self.library, self.device = library, device
        except (OSError, AttributeError):
            return

    def read(self) -> dict[str, float]:
        """`sm_mhz` and `watts` at this moment, those that can be read."""
        if self.library is None:
            return {}
        found, value = {}, ctypes.c_uint()
        if self.library.nvmlDeviceGetClockInfo(self.device, self.SM_CLOCK, ctypes.byref(value)) == 0:
            found["sm_mhz"] = float(value.value)
        if self.library.nvmlDeviceGetPowerUsage(self.device, ctypes.byref(value)) == 0:
            found["watts"] = value.value / 1e3
        return found
