"""Numbers and times as people read them. Pure: whoever needs the present passes it in."""

from datetime import UTC, datetime

UNKNOWN = "-"


def size(count: int | None) -> str:
    """`512K`, `3.1G`: at most three digits and a unit, powers of 1024."""
    if count is None:
        return UNKNOWN
    amount, units = float(count), iter("BKMGTP")
    unit = next(units)
    while round(amount) >= 1000:
        amount, unit = amount / 1024, next(units, unit)
    text = f"{amount:.1f}" if unit != "B" and round(amount, 1) < 10 else f"{amount:.0f}"
    return f"{text}{unit}"


def share(used: int | None, total: int | None) -> str:
    """`3.1/15.6G`: both in the unit of the total."""
    if not total:
        return UNKNOWN
    exponent = max(0, min(4, (total.bit_length() - 1) // 10))
    scale, unit = 1024**exponent, "BKMGT"[exponent]
    return f"{UNKNOWN if used is None else f'{used / scale:.1f}'}/{total / scale:.1f}{unit}"


def percent(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.0f}%"


def duration(seconds: float | None) -> str:
    """The two greatest units: `0.4s`, `12s`, `3m 5s`, `2h 10m`, `4d 3h`."""
    if seconds is None:
        return UNKNOWN
    seconds = max(0.0, seconds)
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    for unit, length, small, part in (("d", 86_400, "h", 3_600), ("h", 3_600, "m", 60), ("m", 60, "s", 1)):
        if whole >= length:
            rest = whole % length // part
            return f"{whole // length}{unit} {rest}{small}" if rest else f"{whole // length}{unit}"
    return f"{whole}s"


def moment(text: str | None) -> datetime | None:
    """The time that an ISO 8601 text names; None if there is none."""
    if not text:
        return None
    parsed = datetime.fromisoformat(text)
    return parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)


def between(start: str | None, end: str | None, now: datetime) -> str:
    """How long it took, or has been taking."""
    began = moment(start)
    return UNKNOWN if began is None else duration(((moment(end) or now) - began).total_seconds())


def ago(text: str | None, now: datetime) -> str:
    then = moment(text)
    return UNKNOWN if then is None else f"{duration((now - then).total_seconds())} ago"


def clock(text: str | None, now: datetime) -> str:
    """The local time, with the distance from `now`."""
    then = moment(text)
    if then is None:
        return UNKNOWN
    return f"{then.astimezone(now.tzinfo):%Y-%m-%d %H:%M:%S} ({ago(text, now)})"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
