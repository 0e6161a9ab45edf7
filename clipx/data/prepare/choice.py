"""Which training pictures a curated set keeps, by the features of a model."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """Rules on features, applied in this order; see conf/prepare.yaml."""

    by: str | None
    exclude: Sequence[str]
    exclude_similarity: float
    max_similarity: float | None
    min_score: float | None
    keep: float | None

    @property
    def rules(self) -> dict[str, object]:
        """The rules that are set, by key."""
        every = {
            "exclude": [*self.exclude] or None,
            "max_similarity": self.max_similarity,
            "min_score": self.min_score,
            "keep": self.keep,
        }
        return {key: value for key, value in every.items() if value is not None}
