"""Applies the classifier of a run to images that were not there when it was trained.

python -m clsl_jax.predict --workdir=RUN --out=FILE.csv IMAGE_OR_FOLDER ... [--pictures=FILE.png]

It needs the run's directory alone (configuration, label embeddings, known-label mask,
checkpoints); the images it was trained on may be gone. The table has a row for each image and the
probability of each class, as `probabilities.csv` of the run has for its test images.
Exit status: 0 done; 2 input that cannot be used. An image that cannot be read is that too: it is
named, its row in the table is empty, and all others are there.
"""

import collections
import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh
from PIL import Image

from clsl_jax import (
    atomic,
    command_line,
    evaluate,
    experiment,
    label_tables,
    npz,
    outputs,
    sharding,
    steps,
)
from clsl_jax.checkpoint import Checkpointer
from clsl_jax.data import images as images_lib
from clsl_jax.data import partial, pipeline, sources
from clsl_jax.errors import InputError, listed, printable, writing
from clsl_jax.models.clsl import CLSL
from clsl_jax.step_options import StepOptions
from clsl_jax.train_state import evaluation_weights, weights_alone
from clsl_jax.workdir import EMBEDDINGS_NAME, MASK_NAME, Workdir

WEIGHTS = ("best", "last")
_SHOWN = 10  # images whose classes are printed, and unreadable ones that are named
_NAMED = 5  # classes of an image
# Data, videos and drawings, whose endings Pillow knows; it may read none of them by itself.
_NO_PICTURES = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}


@dataclasses.dataclass(frozen=True)
class Classifier:
    """The trained network of a run.

    Attributes:
      class_names: C names.
      image_size: side S to which images are squashed, in pixels.
      upright: whether images are turned as their EXIF tag says.
      epoch: after which the weights are.
      batch_size: of the run's evaluation.
      mesh: of devices.
      model: the Linen module.
      options: of its steps.
      weights: of `train_state.evaluation_weights`.
    """

    class_names: tuple[str, ...]
    image_size: int
    upright: bool
    epoch: int
    batch_size: int
    mesh: Mesh
    model: CLSL
    options: StepOptions
    weights: Mapping[str, Any]

    def probabilities(
        self, images: images_lib.Images, *, batch_size: int | None = None
    ) -> np.ndarray:
        """Returns the probability of every class in every image, float32 [N, C].

        Args:
          images: random access to {"image": uint8 [S, S, 3], "row": its index}.
          batch_size: images at once; by default that of the run's evaluation.
        """
        # No larger than there are images, and a multiple of the devices.
        size = min(batch_size or self.batch_size, len(images))
        size = -(-size // self.mesh.size) * self.mesh.size
        found = evaluate.predict(
            images, self.weights, self._predict_step, mesh=self.mesh, batch_size=size
        )
        return np.array(outputs.stated_probabilities(found, self.options))

    def explain(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns probabilities [n, C] of uint8 [n, S, S, 3] and where each class was seen.

        That is [n, h, w, C], summing to 1 over positions; None if the model does not tell.
        """
        return evaluate.explain(
            images,
            lambda given: self._explain_step(self.weights, given),
            self.options,
            mesh=self.mesh,
            at_once=max(self.batch_size // self.mesh.size, 1),
        )

    # Compiled once for each number of images, however often they are called.

    @functools.cached_property
    def _predict_step(self) -> Callable[..., Any]:
        step = steps.make_predict_step(self.model, self.options, mesh=self.mesh)
        return jax.jit(step, out_shardings=sharding.by_example(self.mesh))

    @functools.cached_property
    def _explain_step(self) -> Callable[..., Any]:
        step = steps.make_predict_step(self.model, self.options, explain=True)
        return jax.jit(step, out_shardings=sharding.replicated(self.mesh))


def load_classifier(
    workdir: str,
    *,
    weights: str = "best",
    report: Callable[[str], None] = lambda line: None,
) -> Classifier:
    """Returns the classifier of a run.

    Args:
      workdir: of a run of `clsl_jax.main`; nothing is written there.
      weights: 'best' by the run's selection, or 'last'.
      report: takes a line on a checkpoint that is damaged, where another stands in.

    Raises:
      InputError: there is no such run, it has saved nothing yet, or a file of it is damaged.
    """
    config = Workdir.stored_config(workdir)
    config.model.attention_kernel = False  # not every jax has it
    where = Workdir(workdir)
    class_names, count = _classes_and_images(where)
    sharding.divide_cpu(config.cpu_devices)
    mesh = sharding.make_mesh()
    steps_per_epoch = pipeline.steps_per_epoch(count, batch_size=config.batch_size)
    options = experiment.step_options(config, steps_per_epoch)
    network = experiment.build_network(
        config,
        options,
        mesh=mesh,
        class_names=class_names,
        images=count,
        embeddings_file=where.path(EMBEDDINGS_NAME),
    )
    keep = config.checkpoint.keep
    checkpointer = Checkpointer(where.checkpoints(config), keep=keep, read_only=True)
    try:
        wanted = weights_alone(network.abstract_state, ema=options.evaluate_ema)
        state, _, step = checkpointer.restore_last(wanted)
        if weights == "best":
            state, step = checkpointer.restore_best(wanted, at_hand={step: state}, report=report)
    finally:
        checkpointer.close()
    return Classifier(
        class_names=class_names,
        image_size=config.data.image_size,
        upright=sources.is_upright(config.data.name),
        epoch=step // steps_per_epoch,
        batch_size=config.evaluation.batch_size or config.batch_size,
        mesh=mesh,
        model=network.model,
        options=options,
        weights=evaluation_weights(state, ema=options.evaluate_ema),
    )


def _classes_and_images(where: Workdir) -> tuple[tuple[str, ...], int]:
    """Returns the class names of a run and the number of its training images."""
    path = where.path(EMBEDDINGS_NAME)
    names = tuple(npz.read(path, ("class_names",), made_by="a run")["class_names"].tolist())
    path = where.path(MASK_NAME)
    mask, _ = partial.load_mask(path)
    if mask.shape[1] != len(names):
        raise InputError(
            f"{path} is of {mask.shape[1]} classes, {EMBEDDINGS_NAME} beside it of {len(names)}: "
            "they are not of one run."
        )
    return names, len(mask)


def find_images(
    places: Sequence[str], *, report: Callable[[str], None] = lambda line: None
) -> list[str]:
    """Returns the paths of images: files as they are named, and all images below folders.

    In a folder a file is an image by its ending; names that begin with a dot are passed over, and
    so are links to folders. Those of one folder are sorted; what is named twice is there once.

    Args:
      places: files and folders.
      report: takes a line on what else was passed over in a folder.

    Raises:
      InputError: a place does not exist, or there is no image.
    """
    if missing := [place for place in places if not os.path.exists(place)]:
        raise InputError(
            f"{missing[0]}: there is no such file or folder; expected images, or folders of them."
        )
    Image.init()
    kinds = Image.OPEN.keys() - _NO_PICTURES
    endings = tuple(e for e, kind in Image.registered_extensions().items() if kind in kinds)
    found: dict[str, None] = {}
    for place in places:
        if not os.path.isdir(place):
            found[place] = None
            continue
        others, linked = collections.Counter[str](), 0
        closed: list[OSError] = []
        for folder, folders, files in os.walk(place, onerror=closed.append):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            linked += sum(os.path.islink(os.path.join(folder, name)) for name in folders)
            for name in sorted(files):
                if name.startswith("."):
                    continue
                if name.lower().endswith(endings):
                    found[os.path.join(folder, name)] = None
                else:
                    others[os.path.splitext(name)[1].lower() or "without an ending"] += 1
        if others or linked:
            report(_passed_over(place, others, linked))
        for error in closed:
            report(printable(f"Passed over: {error.filename} ({error.strerror})"))
    if not found:
        raise InputError(
            f"There is no image in {', '.join(places)} (looked for names that end in "
            f"{listed(sorted(endings), 5)})."
        )
    return list(found)


def _passed_over(place: str, others: collections.Counter[str], linked: int) -> str:
    """Returns the line on so many other files, by ending, and linked folders in a folder."""
    kinds = [f"{count:,} {ending}" for ending, count in others.most_common()]
    if linked:
        kinds.append(f"{linked:,} linked folder{'s' * (linked > 1)}")
    return printable(
        f"Passed over in {place}: {listed(kinds, _SHOWN)} (an image in a folder is known by its "
        "ending, such as .jpg or .png; convert others, or name them and linked folders themselves)"
    )


class FileImages:
    """Image files by index; one that cannot be read is black, and why is kept.

    Attributes:
      paths: of the files.
      names: the same for people: bytes that are no UTF-8 are replaced.
      unreadable: {index: why}, of those asked for so far.
    """

    def __init__(self, paths: Sequence[str], image_size: int, *, upright: bool) -> None:
        """`image_size` in pixels; `upright` as in `images.decode_image`."""
        self.paths, self._image_size, self._upright = paths, image_size, upright
        self.names = [printable(path) for path in paths]
        self.unreadable: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]:
        name = self.names[index]
        try:
            with open(self.paths[index], "rb") as file:
                encoded = file.read()
            image = images_lib.decode_square(
                encoded, self._image_size, where=name, upright=self._upright
            )
        except (OSError, images_lib.CorruptImage) as error:
            strerror = getattr(error, "strerror", None)
            self.unreadable[index] = f"{name}: {strerror}" if strerror else str(error)
            image = np.zeros((self._image_size, self._image_size, 3), np.uint8)
        return {"image": image, "row": np.int32(index)}


def define_flags() -> None:
    """Defines the command's flags; importing this module defines none."""
    flags.DEFINE_string("workdir", None, "Directory of the run; nothing is written there.")
    flags.DEFINE_string("out", None, "Table of probabilities to write, CSV.")
    flags.DEFINE_enum("weights", "best", WEIGHTS, "Which of the run's weights.")
    flags.DEFINE_integer("batch_size", None, "Images at once.", lower_bound=1)
    flags.DEFINE_string("pictures", None, "Also draw where each class was seen, PNG.")
    flags.DEFINE_integer("pictured", 8, "Images on that sheet: the first so many.", lower_bound=1)


def _work(arguments: Sequence[str]) -> None:
    values = flags.FLAGS
    command_line.require(values, "workdir", "DIR", "the directory of the run")
    command_line.require(values, "out", "FILE.csv", "the table to write")
    if not arguments:
        raise InputError("No images are named: add image files, or folders of them.")
    console = command_line.console(soft_wrap=True)
    paths = find_images(arguments, report=console.print)
    command_line.check_outputs(values, {"out": ".csv", "pictures": ".png"}, inputs=paths)
    classifier = load_classifier(values.workdir, weights=values.weights, report=console.print)
    images = FileImages(paths, classifier.image_size, upright=classifier.upright)
    probabilities = classifier.probabilities(images, batch_size=values.batch_size)
    probabilities[list(images.unreadable)] = np.nan
    names = classifier.class_names
    with writing(values.out, ": name another place"):
        label_tables.write_probabilities(
            atomic.target(values.out),
            probabilities,
            ids=images.names,
            splits=None,
            class_names=names,
        )
    console.print(
        f"{len(paths):,} images, {len(names)} classes, weights of epoch {classifier.epoch}"
    )
    for name, row in zip(images.names[:_SHOWN], probabilities, strict=False):
        console.print(f"  {name}: {_described(row, names)}")
    written = [values.out]
    readable = [i for i in range(len(paths)) if i not in images.unreadable]
    if values.pictures and readable:
        _draw(atomic.target(values.pictures), classifier, images, readable[: values.pictured])
        written.append(values.pictures)
    console.print(f"Written: {', '.join(map(printable, written))}")
    if images.unreadable:
        reasons = [images.unreadable[index] for index in sorted(images.unreadable)]
        more = len(reasons) - _SHOWN
        lines = [f"{len(reasons):,} of {len(paths):,} images cannot be read; their rows are empty:"]
        lines += reasons[:_SHOWN] + ([f"and {more:,} more"] if more > 0 else [])
        raise InputError("\n  ".join(lines))


def _described(probabilities: np.ndarray, class_names: Sequence[str]) -> str:
    """What is likelier than not to be there, else the likeliest; at most `_NAMED` classes."""
    if np.isnan(probabilities).any():
        return "cannot be read"
    order = np.argsort(-probabilities, kind="stable")
    named = [f"{class_names[c]} {probabilities[c]:.2f}" for c in order[:_NAMED]]
    likely = int((probabilities >= 0.5).sum())
    if not likely:
        return f"nothing is likely; likeliest {named[0]}"
    return ", ".join(named[:likely]) + (", …" if likely > _NAMED else "")


def _draw(path: str, classifier: Classifier, images: FileImages, rows: Sequence[int]) -> None:
    from clsl_jax import pictures  # matplotlib is slow to import

    shown = np.stack([images[row]["image"] for row in rows])
    probabilities, heat = classifier.explain(shown)
    with writing(path, ": name another place"):
        pictures.picture_sheet(
            path,
            images=shown,
            labels=np.full(probabilities.shape, partial.UNKNOWN, np.int8),
            probabilities=probabilities,
            heat=heat,
            class_names=classifier.class_names,
            names=[images.names[row] for row in rows],
            title=f"New images, weights of epoch {classifier.epoch}",
        )


def cli() -> None:
    """Entry point of the console script."""
    command_line.run(define_flags, _work)


if __name__ == "__main__":
    cli()
