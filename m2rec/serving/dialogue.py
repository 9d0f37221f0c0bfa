"""A person types titles one after the other and sees the ranking change."""

import re
from collections.abc import Callable, Iterable, Mapping
from difflib import SequenceMatcher, get_close_matches
from typing import TextIO

from m2rec.cli import write_escaped
from m2rec.serving.recommender import Recommendation, Recommender

HELP = "a title or a part of one, a token, or: why, undo, new, quit"

_MAX_CHOICES = 8  # titles to choose from, where more than one fits
_MIN_SIMILARITY = 0.6  # likeness from which a misspelt title counts
_CONFIDENT_SIMILARITY = 0.85  # likeness from which titles that are this much less alike are not offered
_SIMILARITY_MARGIN = 0.1


class TitleSearch:
    """Finds items by token or by a part of the title, misspelt too.

    Args:
        tokens: of all items.
        titles: by token, of those that have one.
    """

    def __init__(self, tokens: Iterable[str], titles: Mapping[str, str]) -> None:
        self.names = {token: titles.get(token, token) for token in tokens}
        self._normalized_names = {token: normalize_title(name) for token, name in self.names.items()}

    def find(self, text: str) -> list[str]:
        """Tokens of the items that fit, the best first: the token itself, the title, a part, a likeness."""
        if text in self.names:
            return [text]
        wanted = normalize_title(text)
        if not wanted:
            return []
        if same := [token for token, name in self._normalized_names.items() if name == wanted]:
            return same[:_MAX_CHOICES]
        words = wanted.split()
        parts = [
            token for token, name in self._normalized_names.items() if all(word in name for word in words)
        ]
        if parts:
            return sorted(parts, key=lambda token: self._match_key(token, wanted))[:_MAX_CHOICES]
        return self._find_similar(wanted)

    def _match_key(self, token: str, wanted: str) -> tuple[bool, bool, int, str]:
        name = self._normalized_names[token]
        return (not name.startswith(wanted), wanted not in name, len(name), name)

    def _find_similar(self, wanted: str) -> list[str]:
        by_name: dict[str, list[str]] = {}
        for token, name in self._normalized_names.items():
            by_name.setdefault(name, []).append(token)
            by_name.setdefault(strip_year(name), []).append(token)
        close = get_close_matches(wanted, by_name, _MAX_CHOICES, _MIN_SIMILARITY)
        likeness = [SequenceMatcher(None, name, wanted).ratio() for name in close]
        if likeness and likeness[0] >= _CONFIDENT_SIMILARITY:
            close = [
                name
                for name, own in zip(close, likeness, strict=True)
                if own > likeness[0] - _SIMILARITY_MARGIN
            ]
        return list(dict.fromkeys(token for name in close for token in by_name[name]))[:_MAX_CHOICES]


def normalize_title(text: str) -> str:
    """Lower case, words only."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def strip_year(name: str) -> str:
    """A film's plain title without the year behind it."""
    return re.sub(r" \d{4}$", "", name)


class Dialogue:
    """The state of one conversation.

    Args:
        recommender: the model.
        k: how many recommendations to show.
        output: where to.
    """

    def __init__(self, recommender: Recommender, k: int, output: TextIO) -> None:
        self.recommender, self.k, self.output = recommender, k, output
        self.catalogue = TitleSearch(recommender.tokens[1:], recommender.titles)
        self.history: list[str] = []
        self.choices: list[str] = []
        self.ranking: list[Recommendation] = []
        self.commands: dict[str, Callable[[], None]] = {"why": self.why, "undo": self.undo, "new": self.new}
        self.new()

    def run(self, lines: Iterable[str]) -> None:
        """Answer each line until there is none, or one says quit."""
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
        """A sign to type at, on a terminal."""
        if self.output.isatty():
            write_escaped("> ", self.output)

    def answer(self, text: str) -> None:
        """One line of the person's."""
        numbered = {str(number): token for number, token in enumerate(self.choices, 1)}
        if text in numbered:
            self.add(numbered[text])
        elif text in self.commands:
            self.commands[text]()
        else:
            found = self.catalogue.find(text)
            if len(found) == 1:
                self.add(found[0])
            else:
                self.offer(text, found)

    def add(self, token: str) -> None:
        """The person's next item."""
        self.history.append(token)
        self.choices = []
        self.say(f"+ {self.catalogue.names[token]}")
        self.show()

    def offer(self, text: str, found: list[str]) -> None:
        """Let the person choose by a number."""
        self.choices = found
        if not found:
            self.say(f"nothing like {text!r}; type {HELP}")
        for number, token in enumerate(found, 1):
            self.say(f"{number:>3}  {self.catalogue.names[token]}")
        if found:
            self.say("which number?")

    def show(self) -> None:
        """The ranking, and how each place has changed."""
        found = self.recommender.recommend(self.history, self.k)
        before = {item.item: place for place, item in enumerate(self.ranking, 1)}
        for place, item in enumerate(found, 1):
            self.say(
                f"{place:>3} {format_rank_change(before.get(item.item), place):>4}  {item.title or item.item}"
            )
        self.ranking = found

    def why(self) -> None:
        """How far each branch was trusted at the last events."""
        if not self.history:
            self.say("nothing to explain yet")
            return
        for event in self.recommender.explain(self.history)[-5:]:
            weights = ", ".join(f"{name} {weight:.0%}" for name, weight in event.weights.items())
            self.say(f"  {event.title or event.item}: {weights}")

    def undo(self) -> None:
        """As if the last item had not been there."""
        self._reset_history(self.history[:-1])
        if self.history:
            self.show()

    def new(self) -> None:
        """Start again from nothing."""
        self._reset_history([])

    def say(self, text: str) -> None:
        """One line to the person."""
        write_escaped(text + "\n", self.output)

    def _reset_history(self, history: list[str]) -> None:
        self.history, self.choices, self.ranking = history, [], []


def format_rank_change(before: int | None, place: int) -> str:
    """How an item's place has changed; `new` where it was not shown."""
    if before is None:
        return "new"
    return "" if before == place else f"{before - place:+d}"
