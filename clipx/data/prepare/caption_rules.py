"""Which captions a shard takes: by length and by language."""

from collections.abc import Sequence
from importlib.util import find_spec

from clipx.data.captions import check_captions
from clipx.data.sample import BadSample
from clipx.errors import UserError

TIMES = 4  # as likely as each wanted language must another one be, for a caption to be in it
SHORT = 3  # words; the language of fewer, in ASCII, cannot be told: banana, pizza


class CaptionRules:
    """The captions that a shard takes.

    Args:
        min_words: fewest words.
        max_words: most words.
        languages: codes of ISO 639-1, such as en; a caption in another language is left out, one that is too short to
            tell stays.

    Raises:
        UserError: a code is wrong, or lingua is not installed.
    """

    def __init__(self, min_words: int, max_words: int | None, languages: Sequence[str]):
        self.min_words, self.max_words, self.languages = min_words, max_words, {*languages}
        if not languages:
            return
        if find_spec("lingua") is None:
            raise UserError("languages needs lingua, which is not installed; pip install 'clipx[languages]'")
        from lingua import Language, LanguageDetectorBuilder

        known = {language.iso_code_639_1.name.lower() for language in Language.all()}
        if wrong := sorted(self.languages - known):
            codes = ", ".join(sorted(known))
            raise UserError(f"languages={[*languages]}: lingua does not know {wrong[0]}; its codes are {codes}")
        self.detector = LanguageDetectorBuilder.from_all_languages().build()

    def choose(self, captions: Sequence[str]) -> list[str]:
        """The stripped captions that the rules leave.

        Raises:
            BadSample: there are none, or one is too large.
        """
        stripped = [caption.strip() for caption in captions if caption.strip()]
        if not stripped:
            raise BadSample("has no caption")
        faults = {caption: self.fault(caption) for caption in check_captions(stripped)}
        kept = [caption for caption in stripped if faults[caption] is None]
        if not kept:
            raise BadSample(f"its caption {faults[stripped[0]]}")
        return kept

    def fault(self, caption: str) -> str | None:
        """What is wrong with a caption; None if nothing is."""
        words = len(caption.split())
        if words < self.min_words:
            return f"is too short: {caption}"
        if self.max_words is not None and words > self.max_words:
            return f"is too long: {words} words"
        if self.languages and (code := self.other_language(caption, words)):
            return f"is in another language: {code}"
        return None

    def other_language(self, caption: str, words: int) -> str | None:
        """The code of a caption's language, if that is clearly none of the wanted ones."""
        if words < SHORT and caption.isascii():
            return None
        found = self.detector.compute_language_confidence_values(caption)
        likely = {one.language.iso_code_639_1.name.lower(): one.value for one in found}  # in falling order
        first = next(iter(likely))
        return first if likely[first] > TIMES * max(likely[code] for code in self.languages) else None
