"""The documents of the agent, laid out for people. Pure: documents in, lines out, at 60 columns and more."""

from collections.abc import Mapping, Sequence
from datetime import datetime

from meshq.cli import figures
from meshq.cli.figures import UNKNOWN, plural
from meshq.cli.table import Cell, Column, Paint, table
from meshq.documents import (
    AttemptDocument,
    CheckDocument,
    ConnectivityDocument,
    DoctorDocument,
    GpuDocument,
    NeedsDocument,
    PeerDocument,
    QueueDocument,
    SpecDocument,
    StatusDocument,
    TaskDocument,
    TaskSummaryDocument,
)
from meshq.terminal import harmless

ID_CHARS = 8  # 40 bits: a prefix of this length names one of a million tasks with a doubt of 10^-6
ACTIVE_SHOWN = 20
REFRESH_SECONDS = 10.0  # between what a machine tells of itself; with many peers N / 50 s (design section 4)
REFRESHES_LATE = 3  # more than so many of them: what is shown is old

Row = list[Cell | str]
GONE = ("dead", "left")
PEER_COLUMNS_MIN = 7  # of `peers`, on the narrowest terminal
NO_LIMIT = 100_000
FOLDED_MIN = 30  # characters beside the indent that a folded line keeps, however narrow the terminal
INDENT_MAX = 20
ABSENT: ConnectivityDocument = {  # an agent that says nothing of it
    "transport": None, "udp": None, "tcp": None, "rtt_ms": None, "last_heard_seconds": None,
}  # fmt: skip

_STYLES: Mapping[str, str] = {
    "alive": "green", "suspect": "yellow", "dead": "red", "left": "dim",
    "running": "cyan", "preparing": "cyan", "claimed": "cyan",
    "succeeded": "green", "failed": "red", "lost": "red", "cancelled": "yellow", "superseded": "dim",
}  # fmt: skip


def line(text: str) -> str:
    """The text, harmless and on one line."""
    return harmless(text).replace("\n", " ")


def styled(word: str) -> Cell:
    """A liveness or a status in its colour."""
    return Cell(word, _STYLES.get(word, ""))


def status_lines(
    status: StatusDocument, active: Sequence[TaskSummaryDocument], now: datetime, width: int, paint: Paint
) -> list[str]:
    """Every machine, then the queues, then what runs."""
    mesh = status["mesh"]
    names = {task["id"]: task["name"] for task in active}
    headline = f"Mesh {line(mesh['name'])}: {mesh['peers_alive']} of {plural(mesh['peers_known'], 'machine')} alive"
    lines = [paint(headline, "bold"), ""]
    lines += machine_lines(status["peers"], names, width, paint)
    lines += ["", *queue_lines(status["queues"], width, paint)]
    lines += ["", *(active_lines(active, now, width, paint) if active else [paint("No task is running", "dim")])]
    return lines


def machine_lines(peers: Sequence[PeerDocument], names: Mapping[str, str], width: int, paint: Paint) -> list[str]:
    columns = (
        Column("MACHINE", gives_way=True), Column("STATE"), Column("CPU", right=True, goes=1),
        Column("MEMORY", right=True, goes=2), Column("FREE GPUS", right=True), Column("GPU USE", right=True, goes=3),
        Column("FREE SLOTS", right=True),
        Column("RUNNING", gives_way=True),
    )  # fmt: skip
    lines = table(columns, [_machine_row(peer, names) for peer in peers], width, paint)
    refresh = max(REFRESH_SECONDS, len(peers) / 50)
    for peer in peers:
        if peer["liveness"] not in GONE:
            lines += [paint(part, "yellow") for text in _troubles(peer, refresh) for part in folded(text, width)]
            lines += [paint(part, "dim") for text in _people(peer) for part in folded(text, width)]
    return lines


def _troubles(peer: PeerDocument, refresh: float) -> list[str]:
    """What keeps tasks away from this machine or its GPUs, and whether all that is shown of it is old."""
    name, age, driver = peer["name"], peer["telemetry_age_seconds"], peer.get("gpu_problem")
    troubles = []
    if problem := peer.get("problem"):
        troubles.append(f"{name} takes no tasks: {problem}")
    if age is not None and age > REFRESHES_LATE * refresh:
        troubles.append(f"{name} last told of itself {figures.duration(age)} ago: its figures are old")
    if driver:
        troubles.append(f"{name}: {driver}")
    gpus: dict[str, list[int]] = {}
    for gpu in peer["gpus"]:
        if (problem := gpu.get("problem")) and problem != driver:
            gpus.setdefault(problem, []).append(gpu["index"])
    return troubles + [f"{name}, {_gpu_names(indices)}: {problem}" for problem, indices in gpus.items()]


def _people(peer: PeerDocument) -> list[str]:
    """Who uses the GPUs of this machine beside the mesh."""
    used: dict[str, list[int]] = {}
    for gpu in peer["gpus"]:
        foreign = [each for each in gpu.get("processes", ()) if each["task"] is None and not each["graphics"]]
        if foreign:
            who = ", ".join(sorted({each["user"] or "somebody" for each in foreign}))
            used.setdefault(who, []).append(gpu["index"])
    return [f"{peer['name']}, {_gpu_names(indices)}: used by {who}" for who, indices in used.items()]


def _gpu_names(indices: Sequence[int]) -> str:
    """`GPU 3`, `GPUs 0, 1`."""
    return f"GPU{'s' if len(indices) > 1 else ''} {', '.join(map(str, indices))}"


def _machine_row(peer: PeerDocument, names: Mapping[str, str]) -> Row:
    name, state = peer["name"], styled(peer["liveness"])
    if peer["liveness"] in GONE:
        age = peer["telemetry_age_seconds"]
        since = "" if age is None else f" {figures.duration(age).split()[0]}"
        return [name, Cell(state.text + since, state.style), *[Cell(UNKNOWN, "dim")] * 6]
    if peer["draining"] and peer["liveness"] == "alive":
        state = Cell("draining", "yellow")
    gpus, slots, blocked = peer["gpus"], peer["slots"], bool(peer.get("problem"))
    running = ", ".join(names.get(task, task[:ID_CHARS]) for task in peer["running"])
    return [
        name,
        state,
        figures.percent(peer["usage"]["cpu_percent"]),
        figures.share(peer["usage"]["memory_used_bytes"], peer["memory_bytes"]),
        _free(sum(map(_is_free, gpus)), len(gpus), blocked) if gpus else Cell(UNKNOWN),
        figures.percent(_mean([gpu["utilization_percent"] for gpu in gpus])),
        Cell(UNKNOWN) if slots["total"] is None else _free(slots["free"], slots["total"], blocked),
        running or UNKNOWN,
    ]


def _free(count: int | None, total: int, blocked: bool) -> Cell:
    """`1/2`; of a machine that takes no tasks nothing is free, whoever uses it."""
    return Cell(f"0/{total}", "yellow") if blocked else Cell(f"{count}/{total}")


def _is_free(gpu: GpuDocument) -> bool:
    return gpu["task"] is None and not gpu["foreign_pids"] and not gpu.get("problem")


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def queue_lines(queues: Sequence[QueueDocument], width: int, paint: Paint) -> list[str]:
    columns = (
        Column("QUEUE", gives_way=True), Column("QUEUED", right=True),
        Column("RUNNING", right=True), Column("SUCCEEDED", right=True, goes=2), Column("FAILED", right=True),
        Column("CANCELLED", right=True, only_if_used=True, goes=3), Column("MACHINES", right=True, goes=1),
        Column("WAITING", right=True), Column("EXPECTED", right=True, only_if_used=True),
    )  # fmt: skip
    lines = table(columns, [_queue_row(queue) for queue in queues], width, paint)
    for queue in queues:
        if queue["queued"] and not queue["peers"]:
            text = f"No machine that is alive serves the queue {queue['name']}: its tasks wait for one"
            lines += [paint(part, "yellow") for part in folded(text, width)]
        if queue["paused"] and (by := queue.get("paused_by")):
            text = f"{queue['name']} is paused by {by}: `meshq queue resume {queue['name']}` lets it go on"
            lines += [paint(part, "yellow") for part in folded(text, width)]
    return lines


def _queue_row(queue: QueueDocument) -> Row:
    counts = [str(queue[field]) for field in ("queued", "running", "succeeded", "failed", "cancelled", "peers")]
    waits = [figures.duration(queue["oldest_wait_seconds"]), figures.duration(queue["expected_wait_seconds"])]
    return [Cell(f"{queue['name']} (paused)", "yellow") if queue["paused"] else queue["name"], *counts, *waits]


def active_lines(active: Sequence[TaskSummaryDocument], now: datetime, width: int, paint: Paint) -> list[str]:
    columns = (
        Column("TASK"), Column("NAME", gives_way=True), Column("STATUS"), Column("QUEUE", gives_way=True),
        Column("MACHINE", gives_way=True), Column("BY", gives_way=True, goes=1), Column("TIME", right=True),
    )  # fmt: skip
    ids = short_ids(active)
    rows: list[Row] = [
        [ids[task["id"]], task["name"], _task_state(task), task["queue"], machine(task), task["submitted_by"],
         figures.between(task["started_at"], task["ended_at"], now)]
        for task in active[:ACTIVE_SHOWN]
    ]  # fmt: skip
    lines = table(columns, rows, width, paint)
    if len(active) > ACTIVE_SHOWN:
        lines.append(f"and {len(active) - ACTIVE_SHOWN} more: `meshq tasks --status running` lists them")
    return lines


def task_lines(tasks: Sequence[TaskSummaryDocument], now: datetime, width: int, paint: Paint) -> list[str]:
    """The table of `tasks`."""
    if not tasks:
        return ["No tasks"]
    columns = (
        Column("TASK"), Column("NAME", gives_way=True), Column("STATUS"), Column("QUEUE", gives_way=True, goes=1),
        Column("MACHINE", gives_way=True), Column("SUBMITTED", right=True, goes=2), Column("TIME", right=True),
        Column("EXIT", right=True),
    )  # fmt: skip
    ids = short_ids(tasks)
    rows: list[Row] = [
        [ids[task["id"]], task["name"], _task_state(task), task["queue"], machine(task),
         figures.ago(task["submitted_at"], now), figures.between(task["started_at"], task["ended_at"], now),
         UNKNOWN if task["exit_code"] is None else str(task["exit_code"])]
        for task in tasks
    ]  # fmt: skip
    return table(columns, rows, width, paint)


def _task_state(task: TaskSummaryDocument) -> Cell:
    if task["status"] == "queued" and task["position"] is not None:
        return Cell(f"queued #{task['position']}")
    if task["status"] == "running" and (task["reason"] or "").startswith("cancelling"):
        return Cell("cancelling", "yellow")
    return styled(task["status"])


def short_ids(tasks: Sequence[TaskSummaryDocument]) -> dict[str, str]:
    """For each id the prefix that tells it from the others shown, all of one length."""
    ids = {task["id"] for task in tasks}
    longest = max(map(len, ids), default=0)
    chars = next((n for n in range(ID_CHARS, longest) if len({each[:n] for each in ids}) == len(ids)), longest)
    return {each: each[:chars] for each in sorted(ids)}


def machine(task: TaskSummaryDocument) -> str:
    """Where the attempt is or was that the task's status is of: two of one number take turns nowhere but in this list."""
    if not task["attempts"] or task["status"] in ("queued", "waiting"):
        return UNKNOWN
    same = [attempt["peer"] for attempt in task["attempts"] if attempt["status"] == task["status"]]
    return (same[-1] if task["status"] == "failed" else same[0]) if same else task["attempts"][-1]["peer"]


def show_lines(task: TaskDocument, now: datetime, width: int, paint: Paint) -> list[str]:
    """One task with all its attempts and outputs."""
    lines = [f"{paint(line(task['name']), 'bold')} {task['id']}", ""]
    fields = _show_fields(task, now, paint)
    longest = max(len(title) for title, _ in fields)
    lines += [f"{title:<{longest}}  {line(text) if title != 'status' else text}" for title, text in fields]
    if task["attempts"]:
        lines += ["", *_attempt_lines(task["attempts"], now, width, paint)]
    if outputs := task["outputs"]:
        columns = (Column("SIZE", right=True), Column("OUTPUT", gives_way=True, keeps_end=True))
        lines += ["", *table(columns, [[figures.size(each["bytes"]), each["path"]] for each in outputs], width, paint)]
        if (hidden := task.get("outputs_total", 0) - len(outputs)) > 0:
            lines.append(f"and {hidden} more: `meshq fetch` copies them all")
    return lines


def _show_fields(task: TaskDocument, now: datetime, paint: Paint) -> list[tuple[str, str]]:
    state = _task_state(task)
    spec = task["spec"]
    where = f" on {line(at)}" if (at := machine(task)) != UNKNOWN else ""
    fields = [
        ("status", paint(state.text, state.style) + where),
        ("reason", task["reason"] or ""),
        ("exit code", "" if task["exit_code"] is None else str(task["exit_code"])),
        ("queue", task["queue"] + (f", priority {task['priority']}" if task["priority"] else "")),
        ("submitted", f"{figures.clock(task['submitted_at'], now)} by {task['submitted_by']}"),
        ("started", figures.clock(task["started_at"], now) if task["started_at"] else ""),
        ("ended", _ended(task, now)),
        ("command", command(spec)),
        ("needs", needs(spec.get("needs", {}))),
        ("limits", limits(spec)),
        ("retry of", task["retry_of"] or ""),
    ]
    return [(title, text) for title, text in fields if text]


def _ended(task: TaskSummaryDocument, now: datetime) -> str:
    if not task["ended_at"]:
        return ""
    took = f", took {figures.between(task['started_at'], task['ended_at'], now)}" if task["started_at"] else ""
    return figures.clock(task["ended_at"], now) + took


def _attempt_lines(attempts: Sequence[AttemptDocument], now: datetime, width: int, paint: Paint) -> list[str]:
    columns = (
        Column("ATTEMPT", right=True), Column("MACHINE", gives_way=True), Column("STATUS"),
        Column("STARTED", right=True, goes=1),
        Column("TIME", right=True), Column("EXIT", right=True), Column("REASON", gives_way=True, only_if_used=True),
    )  # fmt: skip
    rows: list[Row] = [
        [str(each["number"]), each["peer"], styled(each["status"]), figures.ago(each["started_at"], now),
         figures.between(each["started_at"], each["ended_at"], now),
         UNKNOWN if each["exit_code"] is None else str(each["exit_code"]), each["reason"] or ""]
        for each in attempts
    ]  # fmt: skip
    return table(columns, rows, width, paint)


def command(spec: SpecDocument) -> str:
    """What runs, as one would type it."""
    import shlex

    python = ["python"] if spec.get("environment", {}).get("needs_python") else []
    return shlex.join([*python, *spec.get("argv", [])])


def needs(wanted: NeedsDocument) -> str:
    """`1 GPU, 4 cores, 16G memory, room=b12`."""
    gpus, cpus = wanted.get("gpus", 0), wanted.get("cpus", 0)
    parts = [plural(gpus, "GPU") if gpus else "", plural(cpus, "core") if cpus else ""]
    parts += [f"{figures.size(wanted['memory_bytes'])} memory" if wanted.get("memory_bytes") else ""]
    parts += [f"{figures.size(wanted['gpu_memory_bytes'])} GPU memory" if wanted.get("gpu_memory_bytes") else ""]
    parts += [f"{key}={value}" for key, value in sorted(wanted.get("labels", {}).items())]
    return ", ".join(part for part in parts if part)


def voters(names: Sequence[str]) -> str:
    """What `--on-isolation stop` means for a task with these voters."""
    if len(names) == 1:
        return f"it runs only while {names[0]} agrees, the only machine there is now: without it the task stops for good"
    if len(names) == 2:
        return f"it runs only while {names[0]} and {names[1]} agree: losing either of them stops it"
    return (
        f"it runs only while {len(names) // 2 + 1} of {len(names)} machines agree ({', '.join(names)}): "
        "one that is cut off from them stops it before another starts it"
    )


def limits(spec: SpecDocument) -> str:
    """What was asked for beside the defaults."""
    parts = []
    if spec.get("retries"):
        parts.append(plural(spec["retries"], "retry").replace("retrys", "retries"))
    if (seconds := spec.get("time_limit")) is not None:
        parts.append(f"{figures.duration(seconds)} of running")
    if (seconds := spec.get("lease")) is not None:
        parts.append(f"lease {figures.duration(seconds)}")
    if spec.get("isolation") == "stop":
        parts.append("stops when its machine is cut off")
    return ", ".join(parts)


def peer_lines(peers: Sequence[PeerDocument], width: int, paint: Paint) -> list[str]:
    """The table of `peers`: who they are and how they are reached, where `status` says what they do.

    The last columns are shown only as far as there is room for them: `--json` has them all.
    """
    columns = (
        Column("MACHINE", gives_way=True), Column("STATE"), Column("VIA"), Column("RTT", right=True),
        Column("HEARD", right=True), Column("ADDRESS", gives_way=True, keeps_end=True), Column("VERSION", gives_way=True),
        Column("QUEUES", gives_way=True), Column("LABELS", gives_way=True, only_if_used=True), Column("CORES", right=True),
        Column("GPUS", right=True), Column("EPOCH", right=True),
    )  # fmt: skip
    rows = [_peer_row(peer) for peer in peers]
    lines = _roomy_table(columns, rows, PEER_COLUMNS_MIN, width, paint)
    ways = [(peer["name"], _via(peer).text) for peer in peers]
    lost = {kind: [name for name, way in ways if way == via] for kind, via in (("UDP", "TCP only"), ("TCP", "UDP only"))}
    texts = [
        f"{kind} does not get to {several(names)} and back: `meshq doctor` says what to do"
        for kind, names in lost.items()
        if names
    ]
    remarks = [paint(part, "yellow") for text in texts for part in folded(text, width)]
    return [*lines, "", *remarks] if remarks else lines


def _roomy_table(columns: Sequence[Column], rows: Sequence[Row], least: int, width: int, paint: Paint) -> list[str]:
    """The table with as many columns as fit without being shortened, but the first `least` in any case."""
    for shown in range(len(columns), least, -1):
        cut = [row[:shown] for row in rows]
        if max(map(len, table(columns[:shown], cut, NO_LIMIT, _unpainted))) <= width:
            return table(columns[:shown], cut, width, paint)
    return table(columns[:least], [row[:least] for row in rows], width, paint)


def _unpainted(text: str, style: str) -> str:
    return text


def _peer_row(peer: PeerDocument) -> Row:
    link = peer.get("connectivity")
    state, heard = styled(peer["liveness"]), link["last_heard_seconds"] if link else None
    if heard is None and link:
        heard = peer["telemetry_age_seconds"]  # as others tell
    if peer["liveness"] in GONE and heard is not None:
        state = Cell(f"{state.text} {figures.duration(heard).split()[0]}", state.style)
    return [
        peer["name"],
        state,
        _via(peer),
        _rtt(link["rtt_ms"]) if link and link["transport"] else UNKNOWN,
        figures.duration(heard).split()[0],
        peer["address"] or UNKNOWN,
        peer["version"] or UNKNOWN,
        ",".join(peer["queues"]) or UNKNOWN,
        ",".join(f"{key}={value}" for key, value in sorted(peer["labels"].items())) or UNKNOWN,
        UNKNOWN if peer["cpus"] is None else str(peer["cpus"]),
        str(len(peer["gpus"])),
        str(peer["epoch"]),
    ]


def _via(peer: PeerDocument) -> Cell:
    """How the peer that answers reaches this one."""
    link = peer.get("connectivity", ABSENT)
    if link is None:
        return Cell("here", "bold")
    if link.get("silent"):
        return Cell("silent", "yellow")
    if link["transport"] == "udp":
        return Cell("UDP only", "yellow") if link["tcp"] is False else Cell("UDP")
    if link["transport"] == "tcp":
        return Cell("TCP only", "yellow")
    lost = link["udp"] is False and link["tcp"] is False and peer["liveness"] not in GONE
    return Cell("nothing", "red") if lost else Cell(UNKNOWN)


def _rtt(milliseconds: float | None) -> str:
    """`0.3ms`, `12ms`, `1.4s`."""
    if milliseconds is None:
        return UNKNOWN
    if milliseconds >= 999.5:
        return f"{milliseconds / 1000:.1f}s"
    return f"{milliseconds:.1f}ms" if milliseconds < 9.95 else f"{milliseconds:.0f}ms"


def several(names: Sequence[str], most: int = 5) -> str:
    """`ada, bob and 7 more`."""
    rest = len(names) - most
    return ", ".join(map(line, names[:most])) + (f" and {rest} more" if rest > 0 else "")


def folded(text: str, width: int, indent: int = 0) -> list[str]:
    """The text on lines of at most `width`, the second and later ones indented; words are never cut."""
    import textwrap

    room = max(width, indent + FOLDED_MIN)
    return textwrap.wrap(
        line(text), room, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )  # fmt: skip


def _finding(head: str, check: CheckDocument, width: int) -> list[str]:
    """On one line; where that is too long, what to do begins a line of its own."""
    detail, fix = line(check["detail"]), line(check.get("fix") or "")
    whole = f"{head}{detail}; {fix}" if fix else f"{head}{detail}".rstrip()
    if len(whole) <= width:
        return [whole]
    indent = min(len(head), INDENT_MAX)
    return [*folded(f"{head}{detail}", width, indent), *folded(" " * indent + fix, width, indent)]


def doctor_lines(report: DoctorDocument, width: int, paint: Paint) -> list[str]:
    """Checks, then the counters of what was refused, then how many checks failed. A finding is one line where there is room."""
    longest = max((len(check["name"]) for check in report["checks"]), default=0)
    lines = []
    for check in report["checks"]:
        verdict, style = ("ok", "green") if check["ok"] else ("FAIL", "red")
        first, *more = _finding(f"{verdict:<4}  {line(check['name']):<{longest}}  ", check, width)
        lines += [f"{paint(verdict, style)}{first[len(verdict) :]}", *more]
    counted = {name: count for name, count in sorted(report["counters"].items()) if count}
    if counted:
        rows = [[name, str(count)] for name, count in counted.items()]
        lines += ["", *table((Column("COUNTER"), Column("COUNT", right=True)), rows, width, paint)]
    failed = [check["name"] for check in report["checks"] if not check["ok"]]
    if failed:
        text = f"{len(failed)} of {plural(len(report['checks']), 'check')} failed: {', '.join(failed)}"
        lines += ["", *(paint(each, "red") for each in folded(text, width))]
    return lines
