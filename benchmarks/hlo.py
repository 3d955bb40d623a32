"""What the text of a compiled program tells: bytes of its arrays, its collectives."""

import math
import re

BYTES = {"f64": 8, "s64": 8, "u64": 8, "bf16": 2, "f16": 2, "s8": 1, "u8": 1, "pred": 1}  # others 4
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def size_of(types: str) -> int:
    """Bytes of all arrays that a type names, as `(f32[64,3]{1,0}, s32[])`."""
    return sum(
        BYTES.get(dtype, 4) * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", types)
    )


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """{kind: (how many, bytes of their results on one device)}; one inside a loop counts once."""
    found: dict[str, tuple[int, int]] = {}
    for match in re.finditer(rf"= (.+?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", text):
        count, size = found.get(match[2], (0, 0))
        found[match[2]] = count + 1, size + size_of(match[1])
    return found
