"""A finished run in a notebook: its metrics as DataFrames, its plots where the cell ends."""

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from m2rec.reports.baselines import list_compared_models
from m2rec.reports.run_page import RunRecord, draw_charts, select_protocols

if TYPE_CHECKING:
    import pandas as pd


class Report:
    """What report.html shows of a finished run; as the value of a cell it shows the plots.

    Args:
        folder: of the run, such as `recommender.folder`.

    Raises:
        ValueError: it is not a finished run, or one of its files is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self._run = RunRecord.read(Path(folder))

    @property
    def metrics(self) -> "pd.DataFrame":
        """A row for each metric, a column for each protocol."""
        import pandas as pd

        measured = {protocol: self._run.metrics[protocol] for protocol in select_protocols([self._run])}
        return pd.DataFrame(measured).rename_axis("metric")

    @property
    def baselines(self) -> "pd.DataFrame":
        """The metric that the weights were chosen by, a row for the run and each baseline, by protocol."""
        import pandas as pd

        run = self._run
        protocols = select_protocols([run])
        models = list_compared_models(run.metrics) or {run.metrics["model"]: run.metrics}
        rows = {
            name: {protocol: measured[protocol][run.metric] for protocol in protocols}
            for name, measured in models.items()
        }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis(run.metric)

    def __repr__(self) -> str:
        return f"<Report of {self._run.folder}>"

    def _repr_html_(self) -> str:
        """The plots; each is a picture of its own."""
        figures = [
            f'<figure style="display: inline-block; margin: 0 1em 1em 0">'
            f'<img alt="{escape(chart.alt_text)}" src="data:image/svg+xml;base64,{chart.base64}">'
            f"<figcaption>{escape(chart.caption)}</figcaption></figure>"
            for chart in draw_charts(self._run)
        ]
        return "\n".join(figures)
