"""What requests and answers look like, and how large a request may be."""

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

MAX_BODY_BYTES = 4 * 2**20
MAX_K = 1_000
MAX_HISTORY = 10_000
"""Items of one history, of one list in a request, and events that are kept of a user."""
MAX_NEW_ITEMS = 100
"""Items in one request."""
MAX_TEXT = 10_000
"""Characters of one item's text."""
MAX_KEYS = 20
"""Keys of one object."""

Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]
"""An item token or a user."""
# fail_fast: a list of mistakes is one mistake, or their description would take minutes
Tokens = Annotated[list[Name], Field(max_length=MAX_HISTORY, fail_fast=True)]
K = Annotated[int, Field(ge=1, le=MAX_K, description="How many items.")]


class Body(BaseModel):
    """A request's JSON; an unknown key is a mistake."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _check_size(cls, values: Any) -> Any:
        if isinstance(values, dict) and len(values) > MAX_KEYS:
            raise ValueError(f"{len(values)} keys; give at most {MAX_KEYS}")
        return values


class RecommendRequest(Body):
    """Rank items after a history, or for a user who is followed."""

    history: Tokens | None = Field(None, description="Item tokens, oldest first.", examples=[["50", "181"]])
    user: Name | None = Field(None, description="In place of history: a user of POST /events.")
    k: K = 10
    exclude_seen: bool | None = Field(
        None, description="Leave out the items of the history; by default as the run says."
    )
    candidates: Tokens | None = Field(None, description="Choose from these items only.")
    exclude: Tokens | None = Field(None, description="Leave out these items; unknown ones are ignored.")
    skip_unknown: bool = Field(False, description="Skip unknown items of history and candidates.")
    explain: bool = Field(False, description="Give the reasons beside each item; takes many times as long.")

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if (self.history is None) == (self.user is None):
            raise ValueError("give either history or user")
        return self


class EventRequest(Body):
    """What a user did next."""

    user: Name = Field(examples=["anna"])
    item: Name = Field(examples=["50"])
    k: Annotated[int, Field(ge=0, le=MAX_K)] = Field(10, description="How many items to rank; 0 for none.")
    exclude_seen: bool | None = None


class NewItem(Body):
    """An item that training did not see, by its text or by the vector of its text."""

    item: Name = Field(description="Its token.", examples=["new-tea"])
    title: str = Field("", max_length=1_000)
    text: str | None = Field(None, min_length=1, max_length=MAX_TEXT)
    vector: list[Annotated[float, Field(allow_inf_nan=False)]] | None = Field(
        None, max_length=16_384, fail_fast=True
    )

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if (self.text is None) == (self.vector is None):
            raise ValueError("give either text or vector")
        return self


class ItemsRequest(Body):
    """New items, all of them or none."""

    items: list[NewItem] = Field(min_length=1, max_length=MAX_NEW_ITEMS, fail_fast=True)


class Influence(BaseModel):
    """An item of the history, and by how much it raises or lowers the log-probability of an item."""

    item: str
    title: str
    effect: float


class TextNeighbor(BaseModel):
    """An item of the history, and the cosine of its text with that of an item."""

    item: str
    title: str
    cosine: float


class RankedItem(BaseModel):
    """An item of a ranking; scores are comparable within one ranking only."""

    item: str
    score: float
    title: str


class ExplainedItem(RankedItem):
    """An item of a ranking, with its reasons if they were asked for."""

    influences: list[Influence] = Field([], description="With explain only; the strongest first.")
    nearest_by_text: list[TextNeighbor] = Field([], description="With explain only; the nearest first.")


class RankingAnswer(BaseModel):
    """The best items, the best first."""

    items: list[RankedItem]


class ExplainedAnswer(BaseModel):
    """The best items, the best first, and why."""

    items: list[ExplainedItem]


class EventAnswer(RankingAnswer):
    """The event is stored; the best items after it."""

    warning: str = Field(description="Why there is no ranking; empty if there is one, or k is 0.")


class FoundItem(BaseModel):
    """An item of the catalogue."""

    item: str
    title: str


class FoundAnswer(BaseModel):
    """Items whose title or token fits."""

    items: list[FoundItem]


class ExplainedEvent(BaseModel):
    """The gate's weight of each branch at one event."""

    item: str
    title: str
    weights: dict[str, float]
    by_layer: list[dict[str, float]]


class Reasons(BaseModel):
    """Why an item has its rank."""

    item: str
    title: str
    influences: list[Influence]
    nearest_by_text: list[TextNeighbor]


class ExplainAnswer(BaseModel):
    """The gate's weights at the events that the model sees, and reasons for the items that were asked for."""

    events: list[ExplainedEvent]
    reasons: list[Reasons]


class AddedAnswer(BaseModel):
    """The tokens that were added."""

    added: list[str]


class DeletedAnswer(BaseModel):
    """How many events were deleted."""

    deleted: int


class ModelAnswer(BaseModel):
    """What is served."""

    run: str
    model: str
    dataset: str
    items: int
    added_items: int
    titles: int
    branches: list[str]
    learned_gate: bool
    """Whether training has chosen the branches' weights; they are equal otherwise."""
    loaded: str = Field(description="When, in UTC.")
    text_encoder: str = Field(description="The language model that POST /items takes texts with, or empty.")
    text_form: str = Field(description="How the run's texts were made of columns; empty without text.")
    no_vectors: str = Field(description="Why POST /items takes no items at all; empty if it does.")
    no_texts: str = Field(description="Why POST /items takes no texts; empty if it does.")


class HealthAnswer(BaseModel):
    """The server answers."""

    status: str


class ErrorAnswer(BaseModel):
    """What was wrong: key, value, cure."""

    error: str
