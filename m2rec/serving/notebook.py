"""Tables in HTML: how a model and its answers show themselves in a notebook."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from m2rec.run_folder import RunFolder
from m2rec.serving.explanation import Explanation
from m2rec.serving.formatting import format_reasons
from m2rec.serving.ranker import Recommendation
from m2rec.serving.reasons import ExplainedItem, Reasons

if TYPE_CHECKING:
    from m2rec.serving.recommender import Recommender


class RankedItems(list[Recommendation]):
    """A ranking, best first; a table in a notebook."""

    def _repr_html_(self) -> str:
        rows = [(rank, entry.item, entry.title, f"{entry.score:.3f}") for rank, entry in enumerate(self, 1)]
        return format_html_table("Ranked items", ("rank", "item", "title", "score"), rows)


class ExplainedItems(list[ExplainedItem]):
    """A ranking with its reasons, best first; a table in a notebook."""

    def _repr_html_(self) -> str:
        rows = []
        for rank, entry in enumerate(self, 1):
            rows.append((rank, entry.item, entry.title, f"{entry.score:.3f}", format_reasons(entry)))
        return format_html_table("Ranked items", ("rank", "item", "title", "score", "reasons"), rows)


class ExplainedEvents(list[Explanation]):
    """The events of a history with the gate's weights; a table in a notebook."""

    def _repr_html_(self) -> str:
        branches = list(self[0].weights) if self else []
        rows = []
        for event in self:
            weights = [f"{event.weights[branch]:.0%}" for branch in branches]
            rows.append((event.item, event.title, *weights))
        return format_html_table("Weights of the branches", ("item", "title", *branches), rows)


class ItemReasons(list[Reasons]):
    """Items with the reasons for their ranks; a table in a notebook."""

    def _repr_html_(self) -> str:
        columns = ("item", "title", "reason", "because of", "its title", "value")
        rows: list[Sequence[object]] = []
        for one in self:
            names = (one.item, one.title)
            rows += [(*names, "raises it", x.item, x.title, f"{x.effect:+.3f}") for x in one.influences]
            rows += [
                (*names, "similar text", x.item, x.title, f"{x.cosine:.3f}") for x in one.nearest_by_text
            ]
        return format_html_table("Reasons", columns, rows)


def format_html_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table with a title, all texts escaped; a column without any text is left out."""
    shown = [n for n in range(len(columns)) if not rows or any(str(row[n]) for row in rows)]
    head = "".join(f"<th>{escape(columns[n])}</th>" for n in shown)
    lines = [f"<tr>{''.join(f'<td>{escape(str(row[n]))}</td>' for n in shown)}</tr>" for row in rows]
    return (
        f"<table><caption>{escape(title)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table>"
    )


def format_html_summary(title: str, facts: Mapping[str, object]) -> str:
    """A table of names and values, with a title."""
    return format_html_table(title, ("", "value"), list(facts.items()))


def list_facts(recommender: "Recommender") -> dict[str, object]:
    """What a notebook says of a model: its size, and its metrics if a run trained it."""
    model = recommender.model
    facts: dict[str, object] = {
        "items": f"{len(model.tokens) - 1:,}",
        "items with a title": f"{len(model.titles):,}",
        "items of a history that count": "all" if recommender.whole_history else model.max_length,
        "branches": ", ".join(model.encoder.branches),
    }
    if recommender.histories:
        facts["users with a known history"] = f"{len(recommender.histories):,}"
    if recommender.folder is not None:
        facts["folder"] = recommender.folder
        if (files := RunFolder(recommender.folder)).is_finished:
            measured = files.read_metrics()["test_unseen"]
            facts |= {f"{metric} on test_unseen": f"{value:.4f}" for metric, value in measured.items()}
    return facts
