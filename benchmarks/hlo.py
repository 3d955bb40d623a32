"""What the text of a compiled program tells: bytes of its arrays, its collectives."""

import collections
import functools
import math
import re

BYTES = {"f64": 8, "s64": 8, "u64": 8, "bf16": 2, "f16": 2, "s8": 1, "u8": 1, "pred": 1}  # others 4
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) [^\n]*\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
_COLLECTIVE = re.compile(rf"= (.+?) ({'|'.join(COLLECTIVES)})(?:-start)?\(")
_CALLED = re.compile(r"(body|calls|to_apply|branch_computations)=\{?(%?[\w.-]+(?:, %?[\w.-]+)*)")
_TIMES = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


def size_of(types: str) -> int:
    """Bytes of all arrays that a type names, as `(f32[64,3]{1,0}, s32[])`."""
    return sum(
        BYTES.get(dtype, 4) * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", types)
    )


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """{kind: (how many, bytes of their results on one device)} of one run of the program.

    What a loop repeats counts as often as XLA knows that it does, once where it does not know.
    """
    computations = {name: body for _, name, body in _COMPUTATION.findall(text)}
    (entry,) = (name for start, name, _ in _COMPUTATION.findall(text) if start)

    @functools.cache
    def of(name: str) -> collections.Counter:
        found: collections.Counter = collections.Counter()
        for line in computations.get(name, "").splitlines():
            if match := _COLLECTIVE.search(line):
                found[match[2], "count"] += 1
                found[match[2], "bytes"] += size_of(match[1])
            for kind, names in _CALLED.findall(line):
                times = _TIMES.search(line) if kind == "body" else None
                for called in names.replace("%", "").split(", "):
                    for key, number in of(called).items():
                        found[key] += number * (int(times[1]) if times else 1)
        return found

    total = of(entry)
    return {
        kind: (total[kind, "count"], total[kind, "bytes"])
        for kind, what in total
        if what == "count"
    }
