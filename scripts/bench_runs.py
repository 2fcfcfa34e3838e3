"""Runs benchmark methods as child processes, in turns, and watches their memory from outside.

Anonymous memory (RssAnon) is what a process holds for itself: pages of mapped files, which the system can take back
at any time, do not count. It is read every few milliseconds from the parent, so that watching costs the child
nothing; a peak shorter than that can be missed, which VmHWM (all resident memory, files included) bounds.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from bench_outcome import Outcome

_HERE = Path(__file__).resolve().parent
_INTERVAL = 0.004  # seconds between two looks at a child's memory


class Request(Protocol):
    """What a method is asked for: its output, how many cores it gets, and all of it as JSON for its process."""

    @property
    def out(self) -> str: ...

    @property
    def threads(self) -> int: ...

    def to_json(self) -> str: ...


@dataclass
class Series:
    """All runs of one method."""

    method: str
    outcomes: list[Outcome] = field(default_factory=list)
    anonymous: list[int] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        return [outcome.seconds for outcome in self.outcomes]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def peak_anonymous(self) -> int | None:
        return max(self.anonymous, default=0) or None

    @property
    def peak_resident(self) -> int | None:
        return max((outcome.peak_resident or 0 for outcome in self.outcomes), default=0) or None

    @property
    def peak_device(self) -> int | None:
        return max((outcome.peak_device or 0 for outcome in self.outcomes), default=0) or None

    def to_json(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "median_s": self.median,
            "peak_anonymous_bytes": self.peak_anonymous,
            "peak_resident_bytes": self.peak_resident,
            "peak_device_bytes": self.peak_device,
        }


def run_in_turns(
    requests: Mapping[str, Request], runs: int, say: Callable[[str], None], script: str = "bench_methods.py"
) -> dict[str, Series]:
    """`runs` rounds of all methods, one after the other, so that a busy moment of the machine hits all alike.

    The output of each method's last run stays; those before it are deleted.

    Args:
        script: beside this file; `python script METHOD REQUEST` prints an `Outcome` as JSON.

    Raises:
        ChildProcessError: a run failed; its error text is in the message.
    """
    series = {method: Series(method) for method in requests}
    for turn in range(runs):
        for method, request in requests.items():
            _remove(Path(request.out))
            outcome, anonymous = _run(script, method, request)
            series[method].outcomes.append(outcome)
            series[method].anonymous.append(anonymous)
            say(f"run {turn + 1} of {runs}: {method} {outcome.seconds:.2f} s")
    return series


def ratios(slow: Series, fast: Series) -> tuple[float, float, float]:
    """How many times faster `fast` is: by medians, and the smallest and largest ratio within one round."""
    rounds = [a / b for a, b in zip(slow.seconds, fast.seconds, strict=True)]
    return slow.median / fast.median, min(rounds), max(rounds)


def _remove(output: Path) -> None:
    if output.is_dir():
        shutil.rmtree(output)
    output.unlink(missing_ok=True)


def _run(script: str, method: str, request: Request) -> tuple[Outcome, int]:
    command = [sys.executable, str(_HERE / script), method, request.to_json()]
    with subprocess.Popen(
        command, env=_environment(request.threads), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        if hasattr(os, "sched_setaffinity"):
            available = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(child.pid, available[: request.threads])
        watch = _Watch(child.pid)
        watch.start()
        output, errors = child.communicate()
        watch.done.set()
        watch.join()
    if child.returncode != 0:
        raise ChildProcessError(f"{method} ended with status {child.returncode}: {errors.strip()[-2000:]}")
    return Outcome(**json.loads(output.splitlines()[-1])), watch.peak


def _environment(threads: int) -> dict[str, str]:
    paths = [str(_HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    own = {"PYTHONPATH": os.pathsep.join(paths), "GOMP_SPINCOUNT": "10000"}  # as our command line sets it, for all
    return {**os.environ, **own, **dict.fromkeys(names, str(threads))}


class _Watch(threading.Thread):
    """The largest RssAnon of a process, in bytes; 0 where the system does not tell."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.done = threading.Event()
        self._status = Path(f"/proc/{pid}/status")

    def run(self) -> None:
        while not self.done.is_set():
            try:
                text = self._status.read_text(encoding="ascii")
            except OSError:
                return
            _, found, rest = text.partition("RssAnon:")
            if found:
                self.peak = max(self.peak, int(rest.split(maxsplit=1)[0]) << 10)
            time.sleep(_INTERVAL)


@dataclass(frozen=True)
class Machine:
    """What a figure means nothing without."""

    processor: str
    cores: int
    system: str
    versions: dict[str, str]
    load: float | None

    @classmethod
    def here(cls, packages: Sequence[str]) -> Machine:
        import platform
        from importlib.metadata import PackageNotFoundError, version

        versions = {"Python": platform.python_version()}
        for package in packages:
            try:
                versions[package] = version(package)
            except PackageNotFoundError:
                versions[package] = "source tree"
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        return cls(_processor(), os.cpu_count() or 1, platform.platform(), versions, load)

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def _processor() -> str:
    import platform

    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
