"""The pocket model's tokenizer, made from the world's own words.

Byte-level BPE as CLIP has it (Sennrich et al. 2016, arXiv:1508.07909). It is learned here, because training libraries break ties by
hash order, and a model needs the same tokens from every build.
"""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

from tokenizers import pre_tokenizers

from lorabake.base.files import write_atomic, write_json
from lorabake.families.networks.tokenizer import ClipTokenizer
from lorabake.pocket.architecture import END, START, TOKENIZER, VOCABULARY
from lorabake.pocket.world import axes, invented_name, read_tags, vocabulary

_OTHER_WORDS = """
boots gloves cape cloak hood hoodie jacket coat sweater uniform ribbon star heart striped stripes plaid dots gold silver gray grey cyan
teal magenta neon glowing dark light bright soft pastel sketch painting photo anime cartoon style art by artist character monster dog bird
fish dragon fairy witch knight wizard princess prince ninja pirate robot looking viewer running jumping walking lying sleeping eating
drinking cup flower tree mountain river ocean snow rain sunset street city house castle garden field moon sun cloud one two three many
hands hand head face legs arms tail wings horns fang blush tears angry sad happy surprised laughing solo multiple masterpiece best quality
worst low high resolution detailed foreground a an the and with of in on at to is are
"""
"""Words of ordinary prompts that this world has not, so that later characters, styles and things have names of few tokens."""
_WORD_END = "</w>"
_NAMES = 4000
_WORLD_WEIGHT, _OTHER_WEIGHT = 100_000, 10_000
"""How often words count beside an invented name: enough for all their merges to come before any of the names'."""

Pair = tuple[str, str]


def build_tokenizer(folder: Path) -> ClipTokenizer:
    """Write ``vocab.json``, ``merges.txt`` and two files of settings, and read them again. The files are always the same.

    Every word of the world's tags is one token; words that nobody knew fall into pieces.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    singles = [*letters, *(letter + _WORD_END for letter in letters)]
    merges = learn_merges(_corpus(), VOCABULARY - len(singles) - 2)
    tokens = [*singles, *dict.fromkeys(left + right for left, right in merges), START, END]
    assert len(tokens) == VOCABULARY, f"{len(tokens)} tokens instead of {VOCABULARY}"
    write_json(folder / "vocab.json", {token: place for place, token in enumerate(tokens)})
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    write_atomic(folder / "merges.txt", ("\n".join(lines) + "\n").encode())
    write_json(folder / "tokenizer_config.json", TOKENIZER)
    write_json(folder / "special_tokens_map.json", {key: TOKENIZER[key] for key in TOKENIZER if key.endswith("_token")})
    tokenizer = ClipTokenizer.from_folder(folder)
    broken = [word for word in world_words() if tokenizer.count(word) != 1]
    assert not broken, f"these words are not one token: {broken}"
    return tokenizer


def world_words() -> list[str]:
    """Every word of the tags that are sampled, once; digits stand alone, as CLIP cuts them off.

    What is only drawn on request (the garment of a held-out character, say) is unknown here, whatever has been imported.
    """
    sampled = [tag for tag in vocabulary() if all(value in axes[axis] for axis, value in read_tags(tag).items())]
    return sorted({word for tag in sampled for word in re.findall(r"[a-z]+|[0-9]", tag)})


def learn_merges(words: Mapping[str, int], count: int) -> list[Pair]:
    """Merges of byte-pair encoding: always the most frequent pair, and of equally frequent ones the first by spelling.

    Args:
        words: how often each word occurs; plain letters.
        count: different tokens wanted; fewer come out when every word is whole before. Two merges may make one token
            (a + bc, ab + c), so that there can be more merges than tokens.
    """
    pieces = [[*word[:-1], word[-1] + _WORD_END] for word in words]
    weights = list(words.values())
    frequency: Counter[Pair] = Counter()
    places: defaultdict[Pair, set[int]] = defaultdict(set)
    for place, (word, weight) in enumerate(zip(pieces, weights, strict=True)):
        for pair in itertools.pairwise(word):
            frequency[pair] += weight
            places[pair].add(place)
    merges: list[Pair] = []
    made: set[str] = set()
    while frequency and len(made) < count:
        most = max(frequency.values())
        best = min(pair for pair, seen in frequency.items() if seen == most)
        merges.append(best)
        made.add(best[0] + best[1])
        for place in places.pop(best):
            old, new = pieces[place], _merged(pieces[place], best)
            for word, sign in ((old, -1), (new, 1)):
                for pair in itertools.pairwise(word):
                    frequency[pair] += sign * weights[place]
                    places[pair].add(place)
            pieces[place] = new
        gone = [pair for pair, seen in frequency.items() if not seen]
        for pair in gone:
            del frequency[pair]
    return merges


def _merged(word: list[str], pair: Pair) -> list[str]:
    """The word with every occurrence of the pair, from the left, as one piece."""
    new: list[str] = []
    index = 0
    while index < len(word):
        if tuple(word[index : index + 2]) == pair:
            new.append(word[index] + word[index + 1])
            index += 2
        else:
            new.append(word[index])
            index += 1
    return new


def _corpus() -> Counter[str]:
    """The world's words first, then words of other prompts, then the pieces of invented names."""
    rng = random.Random(0)
    corpus = Counter(invented_name(rng) for _ in range(_NAMES))
    corpus.update(dict.fromkeys(_OTHER_WORDS.split(), _OTHER_WEIGHT))
    corpus.update(dict.fromkeys(world_words(), _WORLD_WEIGHT))
    return corpus
