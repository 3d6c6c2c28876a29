"""Many trials as one report: each figure's median, 99th percentile and maximum over all samples of all seeds."""

import dataclasses
from collections import Counter
from collections.abc import Sequence

from tests.simulator.trials.setup import Result, Setup, Wrongs, spread


def pooled(results: Sequence[Result], figure: str) -> list[float]:
    """All samples of this figure, of all seeds."""
    return [sample for result in results for sample in result.figures.get(figure, ())]


def wrongs(results: Sequence[Result]) -> Wrongs:
    """Over all seeds: sums, and the worst of what is a maximum or a minimum."""
    each = [result.wrongs for result in results]
    believed = [one for one in each if one.deaths_believed]
    return Wrongs(
        suspicions=sum(one.suspicions for one in each),
        suspicions_harmed=sum(one.suspicions_harmed for one in each),
        deaths=sum(one.deaths for one in each),
        deaths_healthy=sum(one.deaths_healthy for one in each),
        deaths_believed=sum(one.deaths_believed for one in each),
        views_max=max((one.views_max for one in believed), default=0),
        words_min=min((one.words_min for one in believed), default=0),
    )


def lines(results: Sequence[Result]) -> list[str]:
    """The report on trials that differ in their seeds only."""
    hours, real = sum(each.peer_hours for each in results), sum(each.real_seconds for each in results)
    shown = [f"{describe(results[0].setup)}: {len(results)} seeds, {hours:.1f} peer-hours measured, {real:.0f} s of computing"]
    for name in dict.fromkeys(name for result in results for name in result.figures):
        of_all = spread(pooled(results, name))
        values = " ".join(f"{value:>10,.3f}" for value in (of_all.median, of_all.p99, of_all.max))
        shown.append(f"  {name:<58} {values}   n={of_all.samples}")
    found = wrongs(results)
    shown.append(f"  suspicions of healthy peers: {found.suspicions} ({found.suspicions / max(hours, 1e-9):.1f} a peer-hour)")
    if found.suspicions_harmed:
        shown.append(f"  suspicions of or by harmed peers: {found.suspicions_harmed}")
    shown.append(
        f"  false deaths: {found.deaths}; of healthy peers {found.deaths_healthy}; of these believed by healthy peers "
        f"{found.deaths_believed}, by at most {found.views_max} each, on the word of at least {found.words_min}"
    )
    for title, counters in (("effects", [each.counts for each in results]), ("happened", [each.happened for each in results])):
        total: Counter[str] = Counter()
        for counter in counters:
            total.update(counter)
        shown.append(f"  {title}: " + ", ".join(f"{name} {count}" for name, count in sorted(total.items()) if count))
    return shown


def describe(setup: Setup) -> str:
    """The setup in words, without its seed."""
    parts = [str(setup.scenario), f"{setup.peers} peers", setup.profile, f"loss {setup.loss:.0%}"]
    parts += [f"{setup.record_bytes} bytes of telemetry"] if setup.record_bytes else ["no telemetry"]
    parts += [f"{name}={value:g}" for name, value in setup.config]
    parts += [f"{setup.seconds:g} s"] if setup.seconds else []
    parts += [f"struck {setup.share:.1%}"] if setup.share else []
    return ", ".join(parts)


def as_json(results: Sequence[Result]) -> list[dict[str, object]]:
    """All that was measured, of each trial."""
    return [dataclasses.asdict(result) for result in results]
