import pickle
import random

import open_clip
import torch

from clipx.tokenizer import SimpleTokenizer

ODD = [
    "",
    " ",
    "a cat",
    "A CAT",
    "naïve café",
    "🦮 guide dog",
    "导盲犬",
    "&lt;b&gt; &amp;amp; &eacute;",
    "x" * 10_000,
    "word " * 10_000,
    "tab\tnew\nline",
    "<start_of_text>",
    "a <end_of_text> b",
    "!!!",
    "don't can't we'll",
    "ﬁ ligature",
    "âœ” mojibake",
    "\u200b\ufeff",
    "٣٤٥",
    "👨‍👩‍👧‍👦",
    "e\u0301",
]


def test_ids_equal_those_of_open_clip_on_a_thousand_odd_strings() -> None:
    draw = random.Random(0)
    alphabet = "".join(ODD[:8]) + "&;<>#0123456789'\"\\/абвгд中文字🦮🎈éü"
    plain = ["".join(draw.choices([chr(code) for code in range(32, 127)], k=60)) for _ in range(200)]
    strings = ODD + plain + ["".join(draw.choices(alphabet, k=draw.randrange(1, 120))) for _ in range(1000)]
    assert torch.equal(SimpleTokenizer()(strings), open_clip.SimpleTokenizer()(strings))


def test_a_long_caption_is_cut_and_still_ends() -> None:
    tokens = SimpleTokenizer(context=8)("one two three four five six seven eight nine")
    assert tokens.shape == (1, 8) and tokens[0, 0] == 49406 and tokens[0, -1] == 49407


def test_flat_tokens_are_the_padded_ones_without_padding() -> None:
    captions = ["a cat", "a very large cat", "", "word " * 100]
    ids, lengths = SimpleTokenizer().flat(captions)
    padded = SimpleTokenizer()(captions)
    assert lengths.tolist() == [4, 6, 2, 77]
    assert torch.equal(ids, torch.cat([row[:length] for row, length in zip(padded, lengths, strict=True)]))
    assert [part.tolist() for part in SimpleTokenizer().flat([])] == [[], []]


def test_a_tokenizer_goes_to_another_process_without_its_vocabulary() -> None:
    tokenizer = SimpleTokenizer(context=12)
    before = tokenizer("a cat")
    packed = pickle.dumps(tokenizer)
    assert len(packed) < 200
    assert torch.equal(pickle.loads(packed)("a cat"), before)
