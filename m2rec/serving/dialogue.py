"""Interactive recommendation: a person types titles one by one and sees the ranking change."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TextIO

from rapidfuzz import fuzz, process

from m2rec.cli import write_escaped
from m2rec.serving.ranker import Ranking
from m2rec.serving.recommender import Recommender

HELP = "a title or a part of one, a token, or: why, undo, new, quit"

_MAX_CHOICES = 8  # titles to choose from, where more than one fits
# similarities from 0 to 100
_MIN_SIMILARITY = 60  # of a misspelt title
_MIN_PART_SIMILARITY = 75  # of a part of a title
_CONFIDENT_SIMILARITY = 85  # from here on, only titles within the margin of the best are offered
_SIMILARITY_MARGIN = 10


class TitleSearch:
    """Finds items by token or by a part of the title, misspelt too.

    Args:
        tokens: of all items.
        titles: by token, of the items that have one.
    """

    def __init__(self, tokens: Iterable[str], titles: Mapping[str, str]) -> None:
        self.names: dict[str, str] = {}
        self._normalized_names: dict[str, str] = {}
        # by token and kind, with and without the year
        self._spellings: dict[tuple[str, str], str] = {}
        for token in tokens:
            name = titles.get(token, token)
            normalized = normalize_title(name)
            self.names[token] = name
            self._normalized_names[token] = normalized
            self._spellings[token, "full"] = normalized
            self._spellings[token, "plain"] = strip_year(normalized)

    def find(self, text: str) -> list[str]:
        """Tokens of the items that fit, best first: the token, the whole title, a part, or a similar one.

        If there is none, titles with a part that is similar.
        """
        if text in self.names:
            return [text]
        wanted = normalize_title(text)
        if not wanted:
            return []
        found = self._find_parts(wanted) or self._find_similar(wanted) or self._find_misspelt_parts(wanted)
        return found[:_MAX_CHOICES]

    def _find_parts(self, wanted: str) -> list[str]:
        """Items of exactly this name, or else those whose name has all the words."""
        words = wanted.split()
        exact: list[str] = []
        parts: dict[str, tuple[bool, int]] = {}
        for token, name in self._normalized_names.items():
            if name == wanted:
                exact.append(token)
            elif all(word in name for word in words):
                parts[token] = (not name.startswith(wanted), len(name))
        return exact or sorted(parts, key=parts.__getitem__)

    def _find_similar(self, wanted: str) -> list[str]:
        """Items whose name, with or without its year, is close to the wanted one."""
        found = process.extract(
            wanted,
            self._spellings,
            scorer=fuzz.ratio,
            score_cutoff=_MIN_SIMILARITY,
            limit=2 * _MAX_CHOICES,  # an item has two spellings
        )
        best = found[0][1] if found else 0
        lowest = best - _SIMILARITY_MARGIN if best >= _CONFIDENT_SIMILARITY else 0
        similar: list[str] = []
        for _, similarity, (token, _) in found:
            if similarity > lowest and token not in similar:
                similar.append(token)
        return similar

    def _find_misspelt_parts(self, wanted: str) -> list[str]:
        """Items a part of whose name is close to the wanted one; of equally close ones the shortest first."""
        found = process.extract(
            wanted,
            self._normalized_names,
            scorer=fuzz.partial_ratio,
            score_cutoff=_MIN_PART_SIMILARITY,
            limit=None,
        )
        # rapidfuzz would also find a name within the wanted text
        longer = [entry for entry in found if len(entry[0]) >= len(wanted)]
        longer.sort(key=lambda entry: (-entry[1], len(entry[0])))
        return [token for _, _, token in longer]


def normalize_title(text: str) -> str:
    """Lower case, words only."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def strip_year(name: str) -> str:
    """A normalized film title without the year at its end."""
    return re.sub(r" \d{4}$", "", name)


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
        self.catalogue = TitleSearch(recommender.tokens[1:], recommender.titles)
        self.history: list[str] = []
        self.choices: dict[str, str] = {}  # tokens by the number to type
        self.ranking: Ranking = []
        self.commands: dict[str, Callable[[], None]] = {"why": self.why, "undo": self.undo, "new": self.new}
        self.new()

    def run(self, lines: Iterable[str]) -> None:
        """Answer each line until the end or `quit`."""
        self.say(f"{len(self.catalogue.names):,} items. Type {HELP}.")
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
        """Show the gate weight of each branch at the last events."""
        if not self.history:
            self.say("nothing to explain yet")
            return
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
