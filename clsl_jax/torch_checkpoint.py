"""Evaluates a checkpoint of the CLSL authors' program, `best_ema_model.pth`."""

import os
from typing import Any

import jax
import ml_collections
import numpy as np

from clsl_jax import cluster, evaluate, experiment, results, sharding
from clsl_jax import config as config_lib
from clsl_jax.compiled import compile_steps
from clsl_jax.data import partial
from clsl_jax.errors import InputError, writing_to
from clsl_jax.experiment import Experiment
from clsl_jax.models import pretrained
from clsl_jax.models.weights_file import read_weights
from clsl_jax.train_state import evaluation_weights
from clsl_jax.workdir import CONFIG_NAME, Workdir
from clsl_jax.writer import RunLog


def evaluate_checkpoint(
    config: ml_collections.ConfigDict, workdir: str, path: str
) -> dict[str, Any]:
    """Evaluates torch weights of the whole model; writes what an evaluation writes.

    Args:
      config: of the same model and data; label embeddings are not in the file, so
        `model.embeddings` has to name those that it was trained with.
      workdir: for `evaluation.json`, `predictions.npz` and the picture sheet; made if need be.
      path: a state dict of the whole model, `module.` prefixes and all; read without running
        anything in it.

    Returns:
      What `evaluation.json` holds.

    Raises:
      InputError: the file cannot be read or is of another model, naming the tensors that differ.
    """
    config_lib.validate(config)
    if config.model.embeddings == "random" and (config.model.srfl or config.model.sgfe):
        raise InputError(
            "--weights: model.embeddings=random cannot be what these weights were trained with; "
            "make the embeddings by `python -m clsl_jax.embed` and name the file there."
        )
    if os.path.exists(os.path.join(workdir, CONFIG_NAME)):
        raise InputError(
            f"--workdir={workdir} is of a run, whose results --weights would replace: name another."
        )
    config = ml_collections.ConfigDict(config.to_dict())
    # The file has the whole model, as the authors' program builds it and nothing beside it.
    config.model.update({"pretrained": "", "freeze": "none", "position_residual": False})
    config.evaluation.statistics = config.loss.statistics = False
    config.recovery.source = "scores"
    sharding.divide_cpu(config.cpu_devices)
    state_dict = cluster.agree(lambda: read_weights(path))
    with Workdir(workdir) as where:
        with writing_to(workdir):
            log = RunLog(workdir)
        built = experiment.build_together(config, report=log.console.print, training=False)
        weights = _weights(built, config, state_dict, path)
        compiled = compile_steps(
            built, config, report=log.console.print, training=False, weights_alone=True
        )
        scores = {}
        for name in experiment.scored_splits(config, built.dataset):
            found = evaluate.predict(
                getattr(built.dataset, name).images,
                weights,
                compiled.predict,
                mesh=built.mesh,
                batch_size=built.eval_batch_size,
            )
            scores["last", name] = scores["best", name] = found
        with writing_to(workdir):
            return results.write(
                "evaluation.json",
                config=config,
                built=built,
                workdir=where,
                log=log,
                scores=scores,
                epochs={"last": 0, "best": 0},
                recovery={},
                state=None,
                unreadable=[],
                mask_sha256=partial.matrix_sha256(built.mask),
                explain=lambda images: compiled.explain(weights, images),
                source=os.fspath(path),
            )


def _weights(
    built: Experiment, config: ml_collections.ConfigDict, state_dict: Any, path: str
) -> dict[str, Any]:
    size = config.data.image_size
    adjacency = np.eye(built.label_embeddings.shape[0], dtype=np.float32)
    shapes = jax.eval_shape(
        lambda: built.model.init(
            jax.random.key(0),
            np.zeros((1, size, size, 3), np.float32),
            built.label_embeddings,
            adjacency,
            train=False,
        )
    )
    try:
        variables = pretrained.import_torch(state_dict, shapes)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    weights = {
        "params": variables["params"],
        "batch_stats": variables.get("batch_stats", {}),
        "label_embeddings": built.label_embeddings,
        "adjacency": adjacency,
        "statistics": {},
    }
    # As the compiled steps expect them: wide ones are divided over `model`.
    placed = evaluation_weights(built.abstract_state, ema=built.options.evaluate_ema)
    return jax.tree.map(lambda x, like: sharding.put(x, like.sharding), weights, placed)
