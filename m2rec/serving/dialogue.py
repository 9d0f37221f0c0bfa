"""Interactive recommendation: a person types titles one by one and sees the ranking change."""

from collections.abc import Callable, Iterable
from typing import TextIO

from m2rec.cli import write_escaped
from m2rec.errors import format_count
from m2rec.serving.formatting import format_reasons
from m2rec.serving.ranker import Ranking
from m2rec.serving.recommender import Recommender

HELP = "a title or a part of one, a token, or: why, undo, new, quit"


class Dialogue:
    """The state of one conversation.

    Args:
        recommender: the model.
        k: how many recommendations to show.
        output: the stream to write to.
        exclude_seen: whether to leave out the items of the history; None: as the run says.
    """

    def __init__(
        self, recommender: Recommender, k: int, output: TextIO, exclude_seen: bool | None = None
    ) -> None:
        self.recommender, self.k, self.output, self.exclude_seen = recommender, k, output, exclude_seen
        self.catalogue = recommender.model.title_search
        self.history: list[str] = []
        self.choices: dict[str, str] = {}  # tokens by the number to type
        self.ranking: Ranking = []
        self.commands: dict[str, Callable[[], None]] = {"why": self.why, "undo": self.undo, "new": self.new}
        self.new()

    def run(self, lines: Iterable[str]) -> None:
        """Answer each line until the end or `quit`."""
        self.say(f"{format_count(len(self.catalogue.names), 'item')}. Type {HELP}.")
        self.prompt()
        for line in lines:
            text = line.strip()
            if text in ("quit", "q"):
                break
            if text:
                self.answer(text)
            self.prompt()

    def prompt(self) -> None:
        """Print the prompt, on a terminal only."""
        if self.output.isatty():
            write_escaped("> ", self.output)

    def answer(self, text: str) -> None:
        """Handle one input line."""
        if text in self.choices:
            self.add(self.choices[text])
        elif text in self.commands:
            self.commands[text]()
        else:
            self.search(text)

    def search(self, text: str) -> None:
        """Add the item that a title means, or let the person choose among several by a number."""
        found = self.catalogue.find(text)
        if len(found) == 1:
            self.add(found[0])
            return
        self.choices = {}
        for number, token in enumerate(found, 1):
            self.choices[str(number)] = token
            self.say(f"{number:>3}  {self.catalogue.names[token]}")
        self.say("which number?" if found else f"nothing like {text!r}; type {HELP}")

    def add(self, token: str) -> None:
        """Append an item to the history and show the new ranking."""
        self.history.append(token)
        self.choices = {}
        self.say(f"+ {self.catalogue.names[token]}")
        self.show()

    def show(self) -> None:
        """Show the ranking and the rank changes."""
        before = {item.item: rank for rank, item in enumerate(self.ranking, 1)}
        self.ranking = self.recommender.recommend(self.history, self.k, self.exclude_seen)
        for rank, item in enumerate(self.ranking, 1):
            change = format_rank_change(before.get(item.item), rank)
            name = item.title or item.item
            self.say(f"{rank:>3} {change:>4}  {name}")

    def why(self) -> None:
        """Show the reasons for the ranking, and a learned gate's weights at the last events."""
        if not self.history:
            self.say("nothing to explain yet")
            return
        for rank, item in enumerate(self.recommender.explain_ranking(self.history, self.ranking), 1):
            reasons = format_reasons(item) or "no item of the history stands out"
            self.say(f"{rank:>3}  {item.title or item.item}: {reasons}")
        if self.recommender.model.encoder.has_learned_gate:
            self._show_gate()

    def _show_gate(self) -> None:
        for event in self.recommender.explain(self.history)[-5:]:
            weights = ", ".join(f"{branch} {weight:.0%}" for branch, weight in event.weights.items())
            name = event.title or event.item
            self.say(f"  {name}: {weights}")

    def undo(self) -> None:
        """Remove the last item."""
        self._reset_history(self.history[:-1])
        if self.history:
            self.show()

    def new(self) -> None:
        """Start a new history."""
        self._reset_history([])

    def say(self, text: str) -> None:
        """Print one line."""
        write_escaped(text + "\n", self.output)

    def _reset_history(self, history: list[str]) -> None:
        self.history = history
        self.choices = {}
        self.ranking = []


def format_rank_change(before: int | None, rank: int) -> str:
    """The change of an item's rank; `new` where it was not shown before."""
    if before is None:
        return "new"
    return "" if before == rank else f"{before - rank:+d}"
