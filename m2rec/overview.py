"""The overview: a line per data set, of all sweeps, for the head of README."""

from collections.abc import Mapping, Sequence

from m2rec.results import HEADLINE, METRICS, Answers, Row, read_paired, spread
from m2rec.sweeps import Sweep
from m2rec.table_parts import (
    P,
    four_pm,
    markdown,
    measured,
    p_value,
    plain_name,
    relative,
    seeds_done,
    versus,
)


def overview_table(sweeps: Sequence[Sweep], answers: Mapping[str, Answers], reported: Sequence[Row]) -> str:
    """Each data set's reference beside the best published numbers and the best of the sweep's baselines.

    Args:
        sweeps: in the order of the lines.
        answers: their finished runs, by the sweeps' names.
        reported: rows of reported.csv.

    Raises:
        ValueError: the sweeps have no reference, or not the same, or paired tests can't be used.
    """
    if len({sweep.reference for sweep in sweeps}) > 1 or sweeps[0].reference is None:
        found = ", ".join(f"{sweep.name}: {sweep.reference}" for sweep in sweeps)
        raise ValueError(f"an overview needs sweeps with the same reference, got {found}")
    heads = ["data set", "n", "HR@10", "NDCG@10", "NDCG@10 without text", "published HR@10"]
    heads += ["published NDCG@10", "NDCG@10 of the strongest baseline here"]
    lines = [[*heads, versus(sweeps[0]), P]]
    for sweep in sweeps:
        paired = read_paired(sweep, answers[sweep.name])
        for dataset in sweep.datasets:
            lines.append(_overview_line(sweep, dataset, answers[sweep.name], paired, reported))
    return f"{markdown(lines)}\n\n{_WORDS.format(versus=versus(sweeps[0]))}"


_WORDS = (
    "test_unseen, full ranking. n: seeds; ±: their standard deviation. Published: the highest in "
    "`results/reported.csv`, of whichever model. Strongest baseline: the highest here of those that were "
    "run; {versus}: over the seeds that both have. p: paired bootstrap over users, these runs held fixed; "
    "blank: not tested."
)


def _overview_line(
    sweep: Sweep,
    dataset: str,
    answers: Answers,
    paired: Mapping[tuple[str, str], Row],
    reported: Sequence[Row],
) -> list[str]:
    assert sweep.reference is not None
    rows = answers[dataset, sweep.reference]
    by_time = sweep.keys(dataset, sweep.reference).get("split") == "global_time"
    line = [f"{dataset}, split by time" if by_time else dataset, seeds_done(len(rows), len(sweep.seeds))]
    line += measured(answers, dataset, sweep.reference, "test_unseen")
    line.append(_with_n(answers[dataset, sweep.without_text]) if sweep.without_text else "")
    alike = [row for row in reported if (row["dataset"], row["protocol"]) == (dataset, "test_unseen")]
    line += [_highest([] if by_time else alike, metric) for metric in METRICS]
    found = {b: one for b in sweep.baselines if (one := spread(answers[dataset, b], HEADLINE))}
    if found:
        best = max(found, key=lambda baseline: found[baseline].mean)
        line += [f"{_with_n(answers[dataset, best])}: {best}", relative(sweep, dataset, answers, best)]
        line.append(p_value(sweep, dataset, answers, paired.get((dataset, best))))
    return line


def _with_n(rows: Sequence[Row]) -> str:
    """test_unseen NDCG@10 with the number of seeds."""
    found = spread(rows, HEADLINE)
    return f"{four_pm(found)} (n {len(rows)})" if found else ""


def _highest(published: Sequence[Row], metric: str) -> str:
    """The highest published number and its model."""
    rows = [row for row in published if row[metric]]
    if not rows:
        return ""
    best = max(rows, key=lambda row: float(row[metric]))
    return f"{best[metric]} ({plain_name(best['model'])})"
