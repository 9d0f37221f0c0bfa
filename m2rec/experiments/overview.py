"""The overview: a line per data set, of all sweeps, for the head of README."""

from collections.abc import Mapping, Sequence

from m2rec.errors import UserError
from m2rec.experiments.ledger import (
    HEADLINE_METRIC,
    TABLE_METRICS,
    FinishedRuns,
    ResultRow,
    read_headline_tests,
    summarize_seeds,
)
from m2rec.experiments.sweep_plan import Sweep
from m2rec.experiments.table_parts import (
    P_VALUE_TITLE,
    format_markdown_table,
    format_mean_std,
    format_measured_metrics,
    format_p_value,
    format_relative_change,
    format_seed_count,
    make_versus_title,
    strip_model_details,
)


def make_overview_table(
    sweeps: Sequence[Sweep], answers: Mapping[str, FinishedRuns], reported: Sequence[ResultRow]
) -> str:
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
        raise UserError(f"an overview needs sweeps with the same reference, got {found}")
    heads = ["data set", "n", "HR@10", "NDCG@10", "NDCG@10 without text", "published HR@10"]
    heads += ["published NDCG@10", "NDCG@10 of the strongest baseline here"]
    lines = [[*heads, make_versus_title(sweeps[0]), P_VALUE_TITLE]]
    for sweep in sweeps:
        paired = read_headline_tests(sweep, answers[sweep.name])
        for dataset in sweep.datasets:
            lines.append(_make_overview_line(sweep, dataset, answers[sweep.name], paired, reported))
    return f"{format_markdown_table(lines)}\n\n{_OVERVIEW_NOTE.format(versus=make_versus_title(sweeps[0]))}"


_OVERVIEW_NOTE = (
    "test_unseen, full ranking. n: seeds; ±: their standard deviation. Published: the highest in "
    "`results/reported.csv`, of whichever model. Strongest baseline: the highest here of those that were "
    "run; {versus}: over the seeds that both have. p: paired bootstrap over users, these runs held fixed; "
    "blank: not tested."
)


def _make_overview_line(
    sweep: Sweep,
    dataset: str,
    answers: FinishedRuns,
    paired: Mapping[tuple[str, str], ResultRow],
    reported: Sequence[ResultRow],
) -> list[str]:
    assert sweep.reference is not None
    rows = answers[dataset, sweep.reference]
    by_time = sweep.keys(dataset, sweep.reference).get("split") == "global_time"
    line = [
        f"{dataset}, split by time" if by_time else dataset,
        format_seed_count(len(rows), len(sweep.seeds)),
    ]
    line += format_measured_metrics(answers, dataset, sweep.reference, "test_unseen")
    line.append(
        _format_headline_with_seeds(answers[dataset, sweep.without_text]) if sweep.without_text else ""
    )
    alike = [row for row in reported if (row["dataset"], row["protocol"]) == (dataset, "test_unseen")]
    line += [_find_best_published([] if by_time else alike, metric) for metric in TABLE_METRICS]
    found = {
        b: one for b in sweep.baselines if (one := summarize_seeds(answers[dataset, b], HEADLINE_METRIC))
    }
    if found:
        best = max(found, key=lambda baseline: found[baseline].mean)
        line += [
            f"{_format_headline_with_seeds(answers[dataset, best])}: {best}",
            format_relative_change(sweep, dataset, answers, best),
        ]
        line.append(format_p_value(sweep, dataset, answers, paired.get((dataset, best))))
    return line


def _format_headline_with_seeds(rows: Sequence[ResultRow]) -> str:
    """test_unseen NDCG@10 with the number of seeds."""
    found = summarize_seeds(rows, HEADLINE_METRIC)
    return f"{format_mean_std(found)} (n {len(rows)})" if found else ""


def _find_best_published(published: Sequence[ResultRow], metric: str) -> str:
    """The highest published number and its model."""
    rows = [row for row in published if row[metric]]
    if not rows:
        return ""
    best = max(rows, key=lambda row: float(row[metric]))
    return f"{best[metric]} ({strip_model_details(best['model'])})"
