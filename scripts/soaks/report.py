"""What came of a soak: one line for people, and a page with what the line stands for."""

import statistics
from collections import Counter

from soaks.evidence import read_history
from soaks.kills import killed
from soaks.place import Place
from tests import history
from tests.history import History, Overlap, Violation

LINES_MAX = 40


def report(place: Place) -> tuple[str, list[Violation]]:
    """Judge what the soak left; the page stands in its folder. The line, and what is wrong."""
    found = read_history(place)
    violations = history.check(found)
    overlaps = history.overlaps(found)
    line = f"{_done(place)}; {_tasks(found)}; {_twice(overlaps)}; {_verdict(violations)}"
    page = [f"# Soak of seed {place.options.seed}: {place.options.kind}", "", line, ""]
    page += _kill_lines(place) if place.options.kind == "kills" else _cut_lines(found, overlaps)
    page += _failures(found)
    page += ["", "## Violations", "", *(f"- {each}" for each in violations[:LINES_MAX])] if violations else []
    (place.folder / "report.md").write_text("\n".join(page) + "\n")
    return line, violations


def _done(place: Place) -> str:
    if place.options.kind == "kills":
        return f"{killed(place).total()} SIGKILLs at {place.options.peers} peers"
    cuts = [entry for entry in place.record() if entry["event"] == "healed"]
    return f"{len(cuts)} cuts of {place.options.peers} peers"


def _tasks(found: History) -> str:
    lost = [task for task in found.acked if task not in found.final]
    stuck = [task for task, final in found.final.items() if final.status not in history.FINAL]
    statuses = Counter(final.status for final in found.final.values())
    shown = ", ".join(f"{count} {status}" for status, count in sorted(statuses.items()))
    stopping = sum(final.isolation == "stop" for final in found.final.values())
    shown += f"; {stopping} under stop" if stopping else ""
    return f"{len(found.acked)} tasks acknowledged, {len(lost)} lost, {len(stuck)} stuck ({shown})"


def _twice(overlaps: list[Overlap]) -> str:
    by_fault = Counter(each.fault.kind if each.fault is not None else "no fault" for each in overlaps)
    shown = ", ".join(f"{count} by {kind}" for kind, count in sorted(by_fault.items()))
    return f"{len(overlaps)} times two attempts of a task lived at once" + (f" ({shown})" if shown else "")


def _verdict(violations: list[Violation]) -> str:
    if not violations:
        return "P1 to P5 hold"
    by_promise = Counter(each.promise for each in violations)
    return "VIOLATED: " + ", ".join(f"{promise} {count} times" for promise, count in sorted(by_promise.items()))


def _failures(found: History) -> list[str]:
    """Why tasks failed: a soak's own tasks do so only when they are killed too often."""
    reasons = [f"- {task}: {final.reason}" for task, final in sorted(found.final.items()) if final.status == "failed"]
    return ["", "## Failed", "", *reasons] if reasons else []


def _kill_lines(place: Place) -> list[str]:
    return ["| killed | times |", "|---|---|", *(f"| {what} | {count} |" for what, count in sorted(killed(place).items()))]


def _cut_lines(found: History, overlaps: list[Overlap]) -> list[str]:
    lines = ["| cut | from | s | equal after, s | attempts at once |", "|---|---|---|---|---|"]
    for fault in (each for each in found.faults if each.kind == "cut"):
        at_once = sum(each.fault == fault for each in overlaps)
        equal = "-" if fault.equal_after is None else f"{fault.equal_after:.1f}"
        sides = f"{' '.join(sorted(fault.one))} | {' '.join(sorted(fault.other))}"
        lines.append(f"| {sides} | {fault.until - fault.since:.1f} | {equal} | {at_once} |")
    seconds = [fault.equal_after for fault in found.faults if fault.equal_after is not None]
    if seconds:
        lines += [
            "",
            f"Ledgers were equal after {statistics.median(seconds):.1f} s in the median, {max(seconds):.1f} s at most.",
        ]
    return lines
