"""How a user's history is treated when items are ranked for a target."""

from enum import Enum


class Protocol(Enum):
    """An evaluation protocol; its value follows the part's name wherever its metrics are named."""

    ALL = ""
    """The history stays in the ranking, as in RecBole."""
    UNSEEN = "_unseen"
    """The history is removed from the ranking; a target that is in it is a miss."""
    NEW = "_new"
    """As UNSEEN, over the users whose target is not in their history."""

    def get_name(self, part: str) -> str:
        """Name of this protocol's metrics on a part, such as `test_unseen`."""
        return part + self.value
