"""Does the student keep to its budget? Ten budgets a target, from the teacher's own latency.

    python tools/bench_choosing.py                # what is missing; about a minute a budget
    python tools/bench_choosing.py --targets intel-cpu --minutes 20
    python tools/bench_choosing.py --table        # the table of what there is

The recipe is `fashion-mnist-quick` with one epoch for the student: what is asked is whether
latency comes out as wanted, not accuracy. Budgets are 5 to 60 % of the FP32 teacher's latency on
the target. The student is chosen among its family, trained and exported, and the artifact that
ships is measured again in a fresh process: inside the budget, and 85 % of it at least (or the
largest member is reached)? A budget that no member keeps has to be refused within a minute.
Results are kept in docs/bench/choosing.json, one record a budget.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from edgekd.files import write_atomically
from edgekd.latency.measuring import host_name, today

KEPT = Path(__file__).parents[1] / "docs" / "bench" / "choosing.json"
RECIPE = "fashion-mnist-quick"
TARGETS = ("host-onnxruntime", "intel-cpu")
SHARES = (0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.36, 0.42, 0.50, 0.60)
LEAST = 0.85  # of the budget
REFUSAL_SECONDS = 60.0
COMMAND = [sys.executable, "-W", "ignore", "-m", "edgekd"]


def edgekd(*arguments: str) -> subprocess.CompletedProcess[str]:
    """One command line of ours, in a process of its own."""
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False)


def latency(target: str, path: str) -> float:
    """p50 in ms, in a fresh process."""
    ran = edgekd("profile", path, "--target", target, "--json")
    found: float = json.loads(ran.stdout)[0]["p50_ms"]
    return found


def run(target: str, out: Path, budget_ms: float | None) -> tuple[dict[str, Any] | None, str]:
    """The report, or None and the error."""
    changes = ["distill.epochs=1", "quantize.epochs=1", "teacher.epochs=1"]
    ran = edgekd(
        "run", RECIPE, "--target", target, "--out", str(out),
        *(x for change in changes for x in ("--set", change)),
        *(("--latency", f"{1000 * budget_ms:.6g}us") if budget_ms else ()),
    )  # fmt: skip
    if ran.returncode == 2:
        return None, ran.stderr.strip().splitlines()[-1]
    report: dict[str, Any] = json.loads((out / RECIPE / "report" / "report.json").read_text())
    return report, ""


def record(target: str, share: float, teacher_ms: float, out: Path) -> dict[str, Any]:
    """One budget: what was chosen, and whether it keeps to it."""
    budget_ms, began = share * teacher_ms, time.monotonic()
    report, error = run(target, out, budget_ms)
    seconds = time.monotonic() - began
    found: dict[str, Any] = {
        "target": target, "share": share, "teacher_ms": teacher_ms, "budget_ms": budget_ms,
        "seconds": round(seconds, 1), "host": host_name(), "date": today(),
    }  # fmt: skip
    if report is None:
        return found | {"refused": error, "good": seconds < REFUSAL_SECONDS}
    (ships,) = (row for row in report["artifacts"] if row["ships"])
    choice = report["choice"]
    chosen, (price,) = choice["chosen"]["member"], choice["chosen"]["prices"]
    largest = all(size(row["member"]) <= size(chosen) for row in choice["left_out"])
    took = latency(target, ships["path"])
    inside = took <= budget_ms
    return found | {
        "member": chosen["name"], "rounds": len(choice["rounds"]),
        "precision": ships["precision"], "estimated_ms": price["estimate"]["p50_ms"],
        "tried_ms": price["measured_ms"], "shipped_ms": ships["latency_p50_ms"],
        "fresh_ms": took, "inside": inside, "largest": largest,
        "good": inside and (took >= LEAST * budget_ms or largest),
    }  # fmt: skip


def size(member: dict[str, Any]) -> int:
    """What members are ranked by."""
    product: int = member["params"] * member["macs"]
    return product


def table(records: list[dict[str, Any]]) -> str:
    """Markdown."""
    rows = [
        "| target | budget, ms (of the teacher) | chosen | rounds | ships | fresh, ms (share) "
        "| s | as wanted |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        budget = f"{r['budget_ms']:.4f} ({r['share']:.0%})"
        good = "yes" if r["good"] else "**no**"
        if "refused" in r:
            cells = ["refused", "", "", "", r["seconds"], good]
        else:
            fresh = f"{r['fresh_ms']:.4f} ({r['fresh_ms'] / r['budget_ms']:.0%})"
            cells = [r["member"], r["rounds"], r["precision"], fresh, r["seconds"], good]
        rows.append(f"| {r['target']} | {budget} | {' | '.join(map(str, cells))} |")
    good = sum(r["good"] for r in records)
    return "\n".join([*rows, "", f"{good} of {len(records)} as wanted."])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--targets", nargs="+", default=TARGETS, choices=TARGETS)
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-choosing"))
    parser.add_argument("--again", action="store_true", help="forget what there is")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    records: list[dict[str, Any]] = []
    if KEPT.is_file() and not options.again:
        records = json.loads(KEPT.read_text())
    began = time.monotonic()
    for target in () if options.table else options.targets:
        done = {r["share"] for r in records if r["target"] == target}
        if set(SHARES) <= done:
            continue
        report, error = run(target, options.out, None)
        if report is None:
            sys.exit(error)
        teacher_ms = report["teacher"]["latency"][0]["latency_p50_ms"]
        for share in sorted(set(SHARES) - done, reverse=True):
            if time.monotonic() - began > 60 * options.minutes:
                break
            records.append(record(target, share, teacher_ms, options.out))
            print(json.dumps(records[-1]), flush=True)
            records.sort(key=lambda r: (r["target"], r["share"]))
            write_atomically(KEPT, json.dumps(records, indent=1))
    print(table(records))


if __name__ == "__main__":
    main()
