"""What the text of a compiled program tells: bytes of its arrays, its collectives."""

import collections
import functools
import math
import re

BYTES = {"f64": 8, "s64": 8, "u64": 8, "bf16": 2, "f16": 2, "s8": 1, "u8": 1, "pred": 1}  # others 4
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) [^\n]*\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
_COLLECTIVE = re.compile(rf"= (.+?) ({'|'.join(COLLECTIVES)})(-start)?\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(body|condition|calls|to_apply|\w+_computations?)=(?:\{([^}]*)\}|%?([\w.-]+))"
)
_TIMES = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


def size_of(types: str) -> int:
    """Bytes of all arrays that a type names, as `(f32[64,3]{1,0}, s32[])`."""
    return sum(
        BYTES.get(dtype, 4) * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims in _ARRAY.findall(types)
    )


def _result(types: str, kind: str, started: bool) -> str:
    """The type of what a collective gives: one that is started names operands and counters too."""
    if not started or kind not in ("all-gather", "collective-permute"):
        return types
    arrays = [f"{dtype}[{dims}]" for dtype, dims in _ARRAY.findall(types) if dims]
    return ", ".join(arrays[len(arrays) // 2 :])


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """{kind: (how many, bytes of their results on one device)} of one run of the program.

    What a loop repeats counts as often as XLA knows that it does, once where it does not know; all
    branches of a conditional count.
    """
    found = _COMPUTATION.findall(text)
    bodies = {name: body for _, name, body in found}
    (entry,) = (name for start, name, _ in found if start)

    @functools.cache
    def of(name: str) -> tuple[collections.Counter, collections.Counter]:
        counts, sizes = collections.Counter(), collections.Counter()
        for line in bodies.get(name, "").splitlines():
            if match := _COLLECTIVE.search(line):
                types, kind, start = match.groups()
                counts[kind] += 1
                sizes[kind] += size_of(_result(types, kind, bool(start)))
            for kind, several, one in _CALLED.findall(line):
                times = _TIMES.search(line) if kind == "body" else None
                for called in (several or one).replace("%", "").split(", "):
                    for total, part in zip((counts, sizes), of(called), strict=True):
                        for key, number in part.items():
                            total[key] += number * (int(times[1]) if times else 1)
        return counts, sizes

    counts, sizes = of(entry)
    return {kind: (count, sizes[kind]) for kind, count in counts.items()}
