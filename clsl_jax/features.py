"""Features of a frozen backbone, computed once an image and kept on disk for every later run.

A file holds one split: float16 [N, h, w, D]. Its name is a digest of all that the features depend
on (the images, their size, the weights, the compute type), so that a file is never out of date.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from clsl_jax import atomic, cluster, evaluate
from clsl_jax.data import cache, images, sources
from clsl_jax.errors import InputError
from clsl_jax.models.clsl import CLSL, backbone_of
from clsl_jax.steps import normalize

Result = TypeVar("Result")
DTYPE = np.float16
# To be raised whenever the same image comes out as other features.
_VERSION = 1
_LARGEST = float(np.finfo(DTYPE).max)


def size_in_bytes(shape: Sequence[int], count: int) -> int:
    """Returns the room that features of `shape` [h, w, D] take for `count` images."""
    return count * math.prod(shape) * np.dtype(DTYPE).itemsize


def cached_features(
    dataset: sources.Dataset,
    model: CLSL,
    frozen: Mapping[str, Any],
    *,
    mesh: Mesh,
    image_size: int,
    batch_size: int,
    directory: str | os.PathLike,
    splits: Sequence[str] = sources.SPLITS,
    report: Callable[[str], None] = lambda line: None,
    poll: Callable[[], None] = lambda: None,
) -> sources.Dataset:
    """Returns a data set whose images are features, from disk or computed now.

    Args:
      dataset: of images.
      model: with a frozen backbone.
      frozen: the backbone's `params` and `batch_stats`, on the devices of `mesh`.
      mesh: of devices; every process must call this.
      image_size: side of the images.
      batch_size: over all devices.
      directory: of the files; made if it does not exist.
      splits: that are read; the others keep their images.
      report: takes a line where something is computed, or waited for.
      poll: called before each batch, and while another run is waited for; may raise to stop, and
        the split is computed again next time.

    Returns:
      The same splits; `images[i]` is {"image": float16 [h, w, D], "row": i}. A training image that
      cannot be read is replaced as it would be without this.

    Raises:
      InputError: an image of another split cannot be read, or a process cannot write the directory.
    """
    weights = _digest(jax.device_get(frozen))
    network = backbone_of(model)

    @jax.jit
    def compute(frozen: Mapping[str, Any], batch: jax.Array) -> jax.Array:
        found = network.apply(frozen, normalize(batch), train=False)
        return jnp.clip(found, -_LARGEST, _LARGEST).astype(DTYPE)

    def features_of(split: sources.Split) -> sources.Split:
        facts = {
            "data": dataset.fingerprint,
            "ids": hashlib.sha256(json.dumps(split.ids).encode()).hexdigest(),
            "image_size": image_size,
            "backbone": model.backbone,
            "widths": list(model.backbone_widths or ()),
            "weights": weights,
            "dtype": str(np.dtype(model.dtype)),
            "decoding": images.decoding(),
            "upright": dataset.upright,
            "version": _VERSION,
            "jax": f"{jax.__version__} {jax.default_backend()}",
        }
        name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
        path = pathlib.Path(directory) / f"{dataset.name}-{split.name}-{name}.npy"
        if not _everywhere(path.is_file()):
            report(f"{split.name}: computing the features of {len(split.labels):,} images once")
            write = functools.partial(
                _write, path, split, lambda batch: compute(frozen, batch), mesh, batch_size, poll
            )
            _provide(path, write, poll, lambda line: report(f"{split.name}: {line}"))
        source = split.images.images if split.name == "train" else split.images
        found: images.Images = FeatureFile(path, source)
        if split.name == "train":
            found = images.Tolerant(found)
        return dataclasses.replace(split, images=found)

    return dataclasses.replace(
        dataset, **{name: features_of(getattr(dataset, name)) for name in splits}
    )


class FeatureFile:
    """The features of a split, mapped into memory; opened anew in every process."""

    def __init__(self, path: str | os.PathLike, source: images.Images):
        """`path` is a file of `cached_features`, `source` the N images that it is of."""
        self._path, self._source = os.fspath(path), source
        self._rows: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None}

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]:
        if self._rows is None:
            self._rows = _open(self._path, len(self))
        features = np.array(self._rows[index])
        if np.isnan(features.flat[0]):
            self._source[index]  # raises, and says why
            raise images.CorruptImage(
                f"row {index} could not be read when its features were computed, and can be now: "
                f"delete {self._path}, it is made again."
            )
        return {"image": features, "row": np.int32(index)}


def _open(path: str, count: int) -> np.ndarray:
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: features that cannot be read ({error}); delete the file, it is made again."
        ) from None
    if rows.dtype != DTYPE or rows.ndim != 4 or len(rows) != count:
        raise InputError(
            f"{path}: expected float16 features of {count} images, found {rows.dtype} "
            f"{list(rows.shape)}; delete the file, it is made again."
        )
    return rows


def _provide(
    path: pathlib.Path,
    write: Callable[[bool], None],
    poll: Callable[[], None],
    report: Callable[[str], None],
) -> None:
    """Has the file written where a process lacks it, by one of those that share its directory.

    Another run may be the writer of some or all of them. It is waited for while this run holds no
    lock, or two runs could wait for each other.
    """

    def begin() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.sweep(atomic.leftovers(path.parent))

    _agreed(path, begin)
    waited = False
    while not _everywhere(path.is_file()):
        with cache.writer(path, wait=False) as mine:
            writes = mine and not path.is_file()
            if not _everywhere(not writes):  # one writes, and all compute
                write(writes)
                continue
        if not waited:
            report("another run is computing them; waiting for it")
        waited = True
        poll()
        time.sleep(1)


def _write(
    path: pathlib.Path,
    split: sources.Split,
    compute: Callable[[jax.Array], jax.Array],
    mesh: Mesh,
    batch_size: int,
    poll: Callable[[], None],
    writes: bool,
) -> None:
    """Computes a split's features, and `writes` them or not; all processes take part.

    The file appears in one step, when it is whole.
    """
    rows: np.ndarray | None = None
    written = np.zeros(len(split.labels), bool)
    with contextlib.ExitStack() as stack:
        partial = stack.enter_context(atomic.replacing(path)) if writes else None
        for number, batch in enumerate(
            evaluate.batches(split.images, mesh=mesh, batch_size=batch_size)
        ):
            poll()
            found, place, valid = evaluate.gather(
                (compute(batch["image"]), batch["row"], batch["valid"])
            )
            if number == 0:
                shape = (len(split.labels), *found.shape[1:])
                rows = _agreed(path, functools.partial(_new_file, partial, shape))
            if rows is not None:
                rows[place[valid]] = found[valid]
                written[place[valid]] = True

        def finish() -> None:
            if rows is not None:
                # A training image that cannot be read was replaced by another, whose row it has.
                rows[~written] = np.nan
                rows.flush()
            stack.close()

        _agreed(path, finish)


def _new_file(path: str | None, shape: tuple[int, ...]) -> np.ndarray | None:
    """Returns the rows of a new file, mapped into memory; None without a path."""
    if path is None:
        return None
    rows = np.lib.format.open_memmap(path, "w+", DTYPE, shape)
    # On a full disk a store through the map would kill the process: take the room now.
    with open(path, "r+b") as file:
        cache.reserve(file.fileno(), os.fstat(file.fileno()).st_size)
    return rows


def _agreed(path: pathlib.Path, work: Callable[[], Result]) -> Result:
    """Returns `work()`, which writes; if one process cannot, it fails on all of them."""

    def told() -> Result:
        try:
            return work()
        except OSError as error:
            raise InputError(
                f"{path}: features cannot be written here ({error.strerror}); make room, name "
                "another place by the environment variable CLSL_CACHE_DIR, or set "
                "model.feature_cache_gb=0 in a new --workdir."
            ) from None

    return cluster.agree(told)


def _everywhere(condition: bool) -> bool:
    """Returns whether it holds on every process, so that all of them compute, or none."""
    if jax.process_count() == 1:
        return condition
    return bool(np.all(multihost_utils.process_allgather(np.asarray(condition))))


def _digest(tree: Any) -> str:
    """SHA-256 over the names and values of a tree of arrays."""
    digest = hashlib.sha256()
    for name, leaf in sorted(jax.tree_util.tree_leaves_with_path(tree), key=lambda x: str(x[0])):
        digest.update(f"{jax.tree_util.keystr(name)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()
