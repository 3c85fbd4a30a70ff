"""Damage files of safetensors, by their structure and by their bytes, reproducibly."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

MUTATIONS = int(os.environ.get("SPARSEKERNELS_MUTATIONS", "100"))  # files for each loader
DTYPES = ["F32", "F64", "F16", "BF16", "I64", "I32", "I16", "U8", "U64", "BOOL", "C64", "F8_E4M3", "F4", "X"]
SIZES = [-1, 0, 1, 2, 3, 15, 16, 17, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**30]
ODD = [*SIZES, -(2**63), True, False, None, 0.5, 1.0, -0.0, 1e308, float("nan"), float("inf"), "", "x", "up.weight"]
ODD += ["a" * 32, "*", "[", "\x00", "ä", "rows", "row", "column", [], [[]], [1], [-1, -1], [2**40, 2**40], [1, "x"]]


class Pairs(list[tuple[str, Any]]):
    """A JSON object, in which a name may occur twice."""


class Text:
    """A JSON string that holds JSON, as those of the metadata do."""

    def __init__(self, content: Any) -> None:
        self.content = content


class Raw(str):
    """JSON text as it stands."""


def write(node: Any) -> str:
    if isinstance(node, Raw):
        return str(node)
    if isinstance(node, Text):
        return json.dumps(write(node.content))
    if isinstance(node, Pairs):
        return "{" + ", ".join(f"{json.dumps(name)}: {write(value)}" for name, value in node) + "}"
    if isinstance(node, list):
        return "[" + ", ".join(map(write, node)) + "]"
    return json.dumps(node)


def read(text: str) -> Any:
    def with_texts(node: Any) -> Any:
        if isinstance(node, Pairs):
            return Pairs((name, with_texts(value)) for name, value in node)
        if isinstance(node, list):
            return [with_texts(value) for value in node]
        return Text(read(node)) if isinstance(node, str) and node[:1] in ("[", "{") else node

    return with_texts(json.loads(text, object_pairs_hook=Pairs))


Place = tuple[Any, Callable[[Any], None]]


def places(node: Any, put: Callable[[Any], None]) -> Iterator[Place]:
    """Every value inside a tree, with a function that puts another there."""
    yield node, put
    if isinstance(node, Text):
        yield from places(node.content, lambda new: setattr(node, "content", new))
    elif isinstance(node, list):
        for i, entry in enumerate(list(node)):
            if isinstance(node, Pairs):
                yield from places(entry[1], lambda new, i=i: node.__setitem__(i, (node[i][0], new)))
            else:
                yield from places(entry, lambda new, i=i: node.__setitem__(i, new))


def nested(rng: random.Random) -> Raw:
    depth = rng.choice([2, 100, 990, 5_000, 100_000, 100_000])
    opening, closing = rng.choice([("[", "]"), ('{"a":', "}")])
    return Raw(opening * depth + "1" + closing * depth)


def mutate_tree(tree: Any, rng: random.Random) -> Any:
    """One value of a tree replaced, dropped, doubled, renamed, or exchanged with another."""
    root = [tree]
    found = list(places(tree, lambda new: root.__setitem__(0, new)))
    holders = [node for node, _ in found if isinstance(node, list) and node]
    named = [pairs for pairs in holders if isinstance(pairs, Pairs)]
    sizes = [put for node, put in found if type(node) is int]
    dtypes = [put for node, put in found if isinstance(node, str) and node in DTYPES]
    _, put = rng.choice(found)
    how = rng.choice(["odd", "odd", "nested", "copy", "drop", "double", "rename", "size", "dtype"])
    if how == "nested":
        put(nested(rng))
    elif how == "copy":
        put(Raw(write(rng.choice(found)[0])))
    elif how == "size" and sizes:
        rng.choice(sizes)(rng.choice(SIZES))
    elif how == "dtype" and dtypes:
        rng.choice(dtypes)(rng.choice(DTYPES))
    elif how == "rename" and named:
        pairs = rng.choice(named)
        i, names = rng.randrange(len(pairs)), [name for h in named for name, _ in h]
        pairs[i] = (rng.choice([*names, "", "x", pairs[i][0] + "x"]), pairs[i][1])
    elif how in ("drop", "double") and holders:
        holder = rng.choice(holders)
        i = rng.randrange(len(holder))
        if how == "drop":
            del holder[i]
        else:
            holder.insert(rng.randrange(len(holder) + 1), holder[i])
    else:
        put(rng.choice(ODD))
    return root[0]


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bits flipped, bytes cut off, added, left out, or copied to another place."""
    at, other = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    how = rng.choice(["flip", "flip", "truncate", "extend", "leave out", "splice"])
    if how == "flip":
        out = bytearray(data)
        for _ in range(rng.choice([1, 1, 4, 64])):
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
        return bytes(out)
    if how == "truncate":
        return data[:at]
    if how == "extend":
        return data + rng.randbytes(rng.choice([1, 8, 1000]))
    if how == "leave out":
        return data[:at] + data[other:]
    length = rng.choice([1, 4, 8, 32])
    return data[:at] + data[other : other + length] + data[at + length :]


def mutate(whole: bytes, seed: str) -> bytes:
    """A damaged version of a safetensors file, always the same for a seed."""
    rng = random.Random(seed)
    length = struct.unpack("<Q", whole[:8])[0]
    header, data = whole[8 : 8 + length], whole[8 + length :]
    how = rng.choice(["header", "header", "description", "description", "data", "all"])
    if how == "all":
        return mutate_bytes(whole, rng)
    if how == "data":
        return whole[: 8 + length] + mutate_bytes(data, rng)
    tree = read(header.decode())
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        texts = [node for node, _ in places(tree, lambda _: None) if isinstance(node, Text)]
        if how == "description" and texts:
            text = rng.choice(texts)
            text.content = mutate_tree(text.content, rng)
        else:
            tree = mutate_tree(tree, rng)
        tree = read_again(tree)
    damaged = write(tree).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(damaged)) + damaged + data


def read_again(tree: Any) -> Any:
    """So that the next mutation may meet what the last put there; what cannot be read back stays as it is."""
    try:
        return read(write(tree))
    except (ValueError, RecursionError):
        return tree
