"""Prompts of a given number of tokens, no two alike. Knows a tokenizer, and nothing of models or servers."""

from __future__ import annotations

import random

from tokenizers import Tokenizer

# Their words, in any order, are the prompts.
SENTENCES = (
    "once upon a time there was a poor king and his daughter who lived in the old castle by the forest",
    "the wolf came to the door at night and said let me in my child for the wind is cold",
    "the youngest brother took his horse and rode over the hills to find the golden bird",
    "but the witch had turned him into stone and nobody knew where he had gone",
)


def make_prompts(tokenizer: Tokenizer, tokens: int, count: int, seed: str) -> list[str]:
    """`count` different texts that are each `tokens` tokens long; the same ones for the same seed, and of fewer the
    first."""
    chance, words = random.Random(seed), " ".join(SENTENCES).split()
    prompts: dict[str, None] = {}  # in the order in which they were made
    while len(prompts) < count:
        drawn = " ".join(chance.choices(words, k=2 * tokens))  # a word is a token at least
        # The text of the first tokens of a BPE is split into just these again.
        prompts[tokenizer.decode(tokenizer.encode(drawn).ids[:tokens])] = None
    return list(prompts)
