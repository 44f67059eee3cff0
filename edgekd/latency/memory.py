"""Memory of artifacts, each loaded and run once in a process of its own.

In a process that has loaded others before, memory that these gave back hides what the next takes.
One child imports the runtime and is forked for each artifact: all of them start from the same.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from edgekd.latency.measuring import PeakMemory

# MiB held once loaded, and at most until the first run has ended; None where the system is silent
Memory = tuple[float | None, float | None]


def memory_of(runtime: str, paths: Sequence[Path], *, threads: int) -> list[Memory]:
    """Of each artifact, in MiB above what the process held before it."""
    command = [sys.executable, "-W", "ignore", "-m", __name__, runtime, str(threads)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ran = subprocess.run(
        [*command, *(str(path.resolve()) for path in paths)],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    found: list[Memory] = [(None, None)] * len(paths)
    for line in ran.stdout.splitlines():
        if line.startswith("memory "):
            index, held, peak = json.loads(line.removeprefix("memory "))
            found[index] = held, peak
    return found


def _main(runtime_name: str, threads: int, paths: list[Path]) -> None:
    from edgekd.runtimes.base import get_runtime
    from edgekd.stages.profile import one_run

    runtime = get_runtime(runtime_name)
    runtime.version()  # imports it
    for index, path in enumerate(paths):
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            continue
        try:
            with PeakMemory() as memory:
                session = runtime.load(path, threads=threads)
                memory.hold()
                one_run(session)()
            said = json.dumps([index, memory.held_mib, memory.mib])
            os.write(1, f"memory {said}\n".encode())
        finally:
            os._exit(0)


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), [Path(path) for path in sys.argv[3:]])
