"""Turns a list of class names into label embeddings.

python -m clsl_jax.embed --labels=classes.txt --out=labels.npz --encoder=ENCODER, where ENCODER is
  glove --source=glove.840B.300d.txt
  bert --source=bert-base-uncased
  sentence
  random --width=300 --seed=0

Nothing is downloaded. `--config.model.embeddings=labels.npz` trains with the result.
Exit status: 0 done; 2 input that cannot be used.
"""

from collections.abc import Sequence

import numpy as np
from absl import flags

from clsl_jax import atomic, command_line, npz
from clsl_jax.errors import InputError, writing
from clsl_jax.text import glove, names, transformer

ENCODERS = ("glove", "bert", "sentence", "random")
_ARRAYS = ("embeddings", "class_names")
_MADE_BY = "`python -m clsl_jax.embed`"
# Options that only some encoders have.
_BELONGS_TO = {
    "source": ("glove", "bert", "sentence"),
    "combine": ("glove",),
    "unknown": ("glove", "bert", "sentence"),
    "pooling": ("bert", "sentence"),
    "width": ("random",),
    "seed": ("random",),
}


def random_embeddings(num_classes: int, *, width: int, seed: int) -> np.ndarray:
    """Returns float32 [C, E]: independent directions, entries of mean 0 and variance 1.

    A class added at the end of the list leaves the others' embeddings as they are.
    """
    draws = np.random.default_rng(seed).standard_normal((num_classes, width))
    return draws.astype(np.float32)


def save_embeddings(
    path: str,
    embeddings: np.ndarray,
    labels: Sequence[names.Label],
    *,
    encoder: str,
    source_sha256: str,
) -> None:
    """Writes label embeddings.

    Args:
      path: of the `.npz`.
      embeddings: float32 [C, E].
      labels: C classes.
      encoder: what made them, in words.
      source_sha256: of the file or files that they come from; empty if there is none.

    Raises:
      InputError: the place cannot be written to.
    """
    arrays = {
        "embeddings": embeddings,
        "class_names": np.asarray([label.name for label in labels], np.str_),
        "texts": np.asarray([label.text for label in labels], np.str_),
        "encoder": np.asarray(encoder, np.str_),
        "source_sha256": np.asarray(source_sha256, np.str_),
    }
    with writing(path, ": name another place"):
        npz.write(path, arrays)


def load_embeddings(path: str, class_names: Sequence[str], *, remedy: str = "") -> np.ndarray:
    """Returns the label embeddings of a file, float32 [C, E].

    Args:
      path: of an `.npz` of `save_embeddings`.
      class_names: the C classes that they must be for, in this order.
      remedy: a sentence on what to do where they are for others; by default, to make it again.

    Raises:
      InputError: no such file, a damaged or foreign one, or a count or name that does not fit.
    """
    found = npz.read(path, _ARRAYS, made_by=_MADE_BY)
    embeddings, stored = found["embeddings"], found["class_names"]
    if embeddings.ndim != 2 or embeddings.dtype.kind != "f" or not embeddings.shape[1]:
        raise InputError(
            f"{path}: embeddings are {embeddings.dtype} {list(embeddings.shape)}, expected float32 "
            "[classes, width]."
        )
    if stored.ndim != 1 or stored.dtype.kind != "U" or len(stored) != len(embeddings):
        raise InputError(
            f"{path}: {stored.size} class names for {len(embeddings)} embeddings, not one each."
        )
    given = stored.tolist()
    remedy = remedy or f"Make it again with {_MADE_BY} from this data set's class names."
    _check_names(path, given, list(class_names), remedy)
    with np.errstate(over="ignore"):  # what is too large is infinite, and named below
        embeddings = embeddings.astype(np.float32)
    rows = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
    if len(rows):
        raise InputError(
            f"{path}: the embedding of {given[rows[0]]!r} holds values that are not finite."
        )
    return embeddings


def _check_names(path: str, given: Sequence[str], wanted: Sequence[str], remedy: str) -> None:
    if len(given) != len(wanted):
        raise InputError(
            f"{path} is for {len(given)} classes, the data set has {len(wanted)}. {remedy}"
        )
    wrong = [i for i, pair in enumerate(zip(given, wanted, strict=True)) if pair[0] != pair[1]]
    if wrong:
        i = wrong[0]
        order = "the same names in another order" if sorted(given) == sorted(wanted) else "others"
        raise InputError(
            f"{path}: {len(wrong)} of {len(wanted)} class names differ from the data set's "
            f"({order}); the first is class {i}: {given[i]!r} there, {wanted[i]!r} here. "
            f"{remedy}"
        )


def define_flags() -> None:
    """Defines the command's flags; importing this module defines none."""
    flags.DEFINE_string(
        "labels", None, "Text file: a class name a line, or name<TAB>text to embed."
    )
    flags.DEFINE_enum("encoder", None, ENCODERS, "What embeds the text.")
    flags.DEFINE_string("out", None, "The .npz to write.")
    flags.DEFINE_string(
        "source",
        None,
        "glove: text file of word vectors; bert, sentence: Hugging Face folder. Without it, glove "
        "and sentence use an installed package.",
    )
    flags.DEFINE_enum("combine", "sum", ("sum", "mean"), "glove: how words become one vector.")
    flags.DEFINE_enum(
        "unknown", "error", ("error", "skip"), "What to do about words the encoder does not know."
    )
    flags.DEFINE_enum(
        "pooling",
        None,
        transformer.POOLINGS,
        "bert: token_or_cls unless stated; sentence: as the folder says unless stated.",
    )
    flags.DEFINE_integer("width", 300, "random: width of the embeddings.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "random: seed.", lower_bound=0)
    flags.DEFINE_bool("unit_variance", False, "Scale all embeddings by one factor to variance 1.")


def _work(arguments: Sequence[str]) -> None:
    values = flags.FLAGS
    command_line.refuse_arguments(arguments)
    command_line.require(values, "labels", "FILE", "text with a class name a line")
    command_line.require(values, "encoder", "NAME", f"one of {', '.join(ENCODERS)}")
    command_line.require(values, "out", "FILE.npz", "the embeddings to write")
    command_line.refuse_foreign(values, "encoder", _BELONGS_TO)
    read = [values.labels, *filter(None, [values.source])]
    command_line.check_outputs(values, {"out": ".npz"}, inputs=read)
    labels = names.read_labels(values.labels)
    embeddings, encoder, digest = _embed(labels, values)
    if values.unit_variance:
        embeddings = embeddings / np.maximum(embeddings.std(), np.finfo(np.float32).tiny)
        encoder += ", scaled to unit variance"
    place = atomic.target(values.out)
    save_embeddings(place, embeddings, labels, encoder=encoder, source_sha256=digest)
    c, e = embeddings.shape
    print(f"{values.out}: {c} classes x {e}, {encoder}")
    for first, second in _twins(embeddings):
        print(f"note: {labels[first].name!r} and {labels[second].name!r} have the same embedding")


def _embed(labels: Sequence[names.Label], values: flags.FlagValues) -> tuple[np.ndarray, str, str]:
    if values.encoder == "random":
        drawn = random_embeddings(len(labels), width=values.width, seed=values.seed)
        return drawn, f"random, {values.width} wide, seed {values.seed}", ""
    skip = values.unknown == "skip"
    if values.encoder == "glove":
        return glove.embed(labels, source=values.source, combine=values.combine, skip_unknown=skip)
    name = None
    if values.encoder == "sentence":
        folder = values.source or transformer.sentence_folder()
        name = None if values.source else transformer.SENTENCE_PACKAGE
        pooling, normalize = transformer.sentence_pooling(folder)
    elif values.source:
        folder, pooling, normalize = values.source, "token_or_cls", False
    else:
        raise InputError(
            "--source=DIR is missing: a Hugging Face folder such as bert-base-uncased, with "
            "config.json, vocab.txt or tokenizer.json, and model.safetensors."
        )
    return transformer.embed(
        labels,
        folder=folder,
        pooling=values.pooling or pooling,
        normalize=normalize,
        keep_unknown=skip,
        name=name,
    )


def _twins(embeddings: np.ndarray) -> list[tuple[int, int]]:
    """Returns pairs of rows that are equal: the model could not tell such classes apart."""
    first: dict[bytes, int] = {}
    pairs = []
    for row, embedding in enumerate(embeddings):
        key = embedding.tobytes()
        if key in first:
            pairs.append((first[key], row))
        first.setdefault(key, row)
    return pairs


def cli() -> None:
    """Entry point of the console script."""
    command_line.run(define_flags, _work)


if __name__ == "__main__":
    cli()
