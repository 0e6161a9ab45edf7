"""Draw the captions that a view of a picture is trained on."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NamedTuple

from clipx.data.plan import digest

Choice = Literal["random", "first", "weighted", "join"]
SEPARATOR = ", "  # between joined captions
UNUSED = "weights are used by caption=weighted alone; add that, or leave them out"


class Drawn(NamedTuple):
    """A text of a picture."""

    text: str
    whole: str  # tells which captions are equal: all words, and joined captions in their own order
    number: int | None  # among the picture's captions; None if it is none of them


@dataclass(frozen=True)
class CaptionDraw:
    """Draws captions; what is drawn depends only on the words that name a view.

    Args:
        choice: ``random`` draws evenly, ``weighted`` by ``weights``; ``first`` takes the first ones; ``join`` makes one
            text of all, in a drawn order.
        weights: of the first caption, the second and so on; further captions have the last weight.
        word_dropout: probability of leaving out each word, though never all words of a text.
        count: K, captions of a picture; they are distinct as far as it has that many, and are then repeated in turn.

    Raises:
        ValueError: an argument has no effect, is missing, or is out of range.
    """

    choice: Choice = "random"
    weights: Sequence[float] | None = None
    word_dropout: float = 0.0
    count: int = 1

    def __post_init__(self) -> None:
        if (self.weights is not None) != (self.choice == "weighted"):
            given = "null" if self.weights is None else f"[{','.join(map(str, self.weights))}]"
            fix = "give one for each caption, as caption_weights=[2,1,1]" if self.weights is None else UNUSED
            raise ValueError(f"caption_weights={given} with caption={self.choice}: {fix}")
        if self.weights is not None and (not self.weights or min(self.weights) <= 0):
            raise ValueError(f"caption_weights={list(self.weights)}: expected numbers above 0, as [2,1,1]")
        if self.choice == "join" and self.count > 1:
            raise ValueError(
                f"captions_per_picture={self.count} with caption=join, which makes one text of all captions; leave out "
                "one of the two"
            )

    def __call__(self, captions: Sequence[str], *view: int | str) -> list[Drawn]:
        """Draw K texts of a picture's captions, one or more, in a view named by ``view``."""
        if self.choice == "join" and len(captions) > 1:
            order = sorted(range(len(captions)), key=lambda number: digest(*view, "join", number))
            joined = SEPARATOR.join(captions[number] for number in order)
            drawn = [Drawn(joined, SEPARATOR.join(captions), None)]
        else:
            drawn = [Drawn(captions[number], captions[number], number) for number in self.numbers(len(captions), *view)]
        if self.word_dropout:
            return [drop_words(one, self.word_dropout, *view, "words", place) for place, one in enumerate(drawn)]
        return drawn

    def numbers(self, captions: int, *view: int | str) -> list[int]:
        """Draw which of a picture's captions are used, K of them."""
        left = list(range(captions))
        chosen: list[int] = []
        for place in range(min(self.count, captions)):
            chosen.append(left.pop(self.draw(left, *view, *([place] if place else []))))
        return [chosen[place % len(chosen)] for place in range(self.count)]

    def draw(self, left: Sequence[int], *words: int | str) -> int:
        """Draw the place of one of the captions that are left."""
        if self.choice in ("first", "join"):
            return 0
        if self.weights is None:
            return digest(*words) % len(left)
        ends = list(accumulate(self.weights[min(number, len(self.weights) - 1)] for number in left))
        target = digest(*words) / 2**64 * ends[-1]
        return next((place for place, end in enumerate(ends) if target < end), len(ends) - 1)


def drop_words(drawn: Drawn, probability: float, *words: int | str) -> Drawn:
    """Leave out each word with a probability; if that would be all, one of them stays."""
    generator = random.Random(digest(*words))
    every = drawn.text.split()
    kept = [word for word in every if generator.random() >= probability]
    if len(kept) == len(every):
        return drawn
    text = " ".join(kept) or every[int(generator.random() * len(every))]
    return Drawn(text, drawn.whole, None)
