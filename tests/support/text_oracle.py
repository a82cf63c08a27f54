"""Tokens, hashes and rows of texts, one by one."""

import collections
import math
import unicodedata


def is_spaceless(c):
    ranges = ("\u0e00\u0eff", "\u1000\u109f", "\u1780\u17ff")
    ranges += ("\u3040\u30ff", "\u3400\u9fff")
    return any(first <= c <= last for first, last in ranges)


def is_letter(c):
    mark = unicodedata.category(c)[0] == "M" and ord(c) < 1 << 16
    return (c.isalnum() or c == "_" or mark) and not is_spaceless(c)


def tokens(text, split="words", lowercase=True, skip="", end=""):
    text = text.lower() if lowercase else text
    found = [""]
    for c in text:
        if c in " \n\r\t\v\f\0" if split == "fasttext" else c.isspace():
            found.append("")
        elif split == "words" and not is_letter(c):
            found += [c, ""]
        else:
            found[-1] += c
    found = [t for t in found if t and not (skip and t.startswith(skip))]
    if end:
        found = found[: found.index(end)] if end in found else found
        found.append(end)
    return found


def encoded(text, split):
    errors = "surrogateescape" if split == "fasttext" else "surrogatepass"
    try:
        return text.encode(errors=errors)
    except UnicodeEncodeError:
        return text.encode(errors="surrogatepass")


def fnv(data):
    value = 2166136261
    for byte in data:
        signed = byte - 256 if byte > 127 else byte
        value = (value ^ (signed % 2**32)) * 16777619 % 2**32
    return value


def subwords(word, shortest, longest):
    if word == b"</s>":
        return []
    characters = []
    for byte in b"<" + word + b">":
        if byte & 0xC0 == 0x80:
            characters[-1] += bytes([byte])
        else:
            characters.append(bytes([byte]))
    grams = []
    for i in range(len(characters)):
        for n in range(1, longest + 1):
            inside = i + n <= len(characters)
            bracket = n == 1 and i in (0, len(characters) - 1)
            if inside and n >= shortest and not bracket:
                grams.append(fnv(b"".join(characters[i : i + n])))
    return grams


def ngrams(hashes, longest):
    signed = [h - 2**32 if h >= 2**31 else h for h in hashes]
    found = []
    for i, first in enumerate(signed):
        rolling = first % 2**64
        for j in range(i + 1, min(len(signed), i + longest)):
            rolling = (rolling * 116049371 + signed[j]) % 2**64
            found.append(rolling)
    return found


def vocabulary(texts, min_count=1, max_words=None, **how):
    counts = collections.Counter(t for text in texts for t in tokens(text, **how))
    frequent = [(w, n) for w, n in counts.most_common(max_words) if n >= min_count]
    return [w for w, _ in frequent], [n for _, n in frequent]


def rows(
    text, words, ngrams_to=1, buckets=0, characters=(0, 0), split="words",
    bucket_rows=None, **how,
):  # fmt: skip
    own = []
    place = {word: i for i, word in reversed(list(enumerate(words)))}

    def add(hashes):
        for value in hashes:
            bucket = value % buckets
            if bucket_rows is not None:
                bucket = bucket_rows[bucket]
            if bucket >= 0:
                own.append(len(words) + int(bucket))

    found = tokens(text, split=split, **how)
    for token in found:
        own.extend([place[token]] if token in place else [])
        if characters[1]:
            add(subwords(encoded(token, split), *characters))
    add(ngrams([fnv(encoded(token, split)) for token in found], ngrams_to))
    return own


def idf(bags, num_rows):
    """Return log((1 + B) / (1 + holders)) + 1 of each row."""
    holders = [sum(row in bag for bag in bags) for row in range(num_rows)]
    return [math.log((1 + len(bags)) / (1 + n)) + 1 for n in holders]
