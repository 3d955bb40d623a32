"""Every fixture of a folder, through the public functions.

`CLSL_PARITY_DIR` names the folder (default: tests/parity, whose README says what the files hold).
Nothing about a case is written here: sizes, variant and recipe come from its file.
"""

import json
import os
import zlib
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exporting import backbone_name, export_torch

from clsl_jax import losses, metrics, optim, recovery
from clsl_jax.data import partial as partial_labels
from clsl_jax.models import encoder, graph, pretrained
from clsl_jax.models.clsl import CLSL, CLSLHead
from clsl_jax.models.resnet import STAGE_SIZES, ResNet

FOLDER = Path(os.environ.get("CLSL_PARITY_DIR") or Path(__file__).parent / "parity")
FILES = sorted(FOLDER.glob("*.npz"))
MASKS = sorted(FOLDER.glob("*.json"))
TOLERANCE = 2e-4
GRADIENT_TOLERANCE = 2e-3
SWITCHES = {
    "clsl": {},
    "without_recovery": {"global_branch": False},
    "without_srfl": {"srfl": False, "global_branch": False},
    "baseline": {"encoder_layers": 0, "srfl": False, "sgfe": False, "global_branch": False},
}


def rng(*key):
    """The generator of a key, strings by their CRC-32."""
    words = [zlib.crc32(k.encode()) if isinstance(k, str) else k for k in key]
    return np.random.default_rng(words)


def make_weight(seed, name, shape):
    """The made value of a weight, float32."""
    g = rng(seed, name)
    if name.endswith("running_var"):
        value = g.uniform(0.5, 1.5, shape)
    elif name.endswith("running_mean"):
        value = 0.1 * g.standard_normal(shape)
    elif len(shape) == 1 and name.endswith("weight"):
        value = g.uniform(0.5, 1.5, shape)
    elif len(shape) == 1:
        value = 0.1 * g.standard_normal(shape)
    else:
        value = g.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    return value.astype(np.float32)


def make_state(seed, names, shapes):
    """A whole made state dict."""
    return {
        name: np.zeros((), np.int64)
        if name.endswith("num_batches_tracked")
        else make_weight(seed, name, shape)
        for name, shape in zip(names, shapes, strict=True)
    }


def stored_state(data, seed):
    """The made state dict of the names and shapes that a fixture lists."""
    shapes = [tuple(int(n) for n in str(s).split(",") if n) for s in data["state_shapes"]]
    return make_state(seed, [str(n) for n in data["state_names"]], shapes)


def make_labels(seed, b, c, fraction):
    """(labels, known), bool [B, C]."""
    r = rng("labels", seed)
    labels = r.random((b, c)) < 0.25
    return labels, r.random((b, c)) < fraction


def make_images(config):
    """Images [B, size, size, 3] of a case, stored channels first."""
    size = config["image_size"]
    images = rng("images", config["seed"]).standard_normal((config["batch"], 3, size, size))
    return np.ascontiguousarray(images.astype(np.float32).transpose(0, 2, 3, 1))


def make_features(config, *key):
    """Features [B, grid, grid, D] of a case."""
    b, g, d = config["batch"], config["grid"], config["feature_dim"]
    return (
        np.abs(rng("features", *key).standard_normal((b, g * g, d)))
        .astype(np.float32)
        .reshape(b, g, g, d)
    )


def close(actual, expected, tolerance, what):
    """Largest error against the largest magnitude; entries stored as NaN are not compared."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, what
    compared = np.isfinite(expected)
    assert np.isfinite(actual[compared]).all(), f"{what}: not finite"
    if not compared.any():
        return
    scale = np.abs(expected[compared]).max()
    error = np.abs(actual[compared] - expected[compared]).max()
    assert error <= tolerance * scale, f"{what}: off by {error:.3g} at a magnitude of {scale:.3g}"


def build(config, names=(), backbone=None):
    """The model of a case with every dropout at 0, alone or behind a backbone."""
    settings = {
        "num_classes": config["num_classes"],
        "encoder_layers": config["num_layers"],
        "encoder_heads": config["num_heads"],
        "encoder_mlp": config["mlp_dim"],
        "encoder_norm_first": config["norm_first"],
        "encoder_final_norm": any(n.endswith("encoder.norm.weight") for n in names),
        "positions": config["positions"],
        "rank": config["attention_dim"],
        "encoder_dropout": 0.0,
        "head_dropout": 0.0,
    } | SWITCHES[config["variant"]]
    return CLSL(backbone=backbone, **settings) if backbone else CLSLHead(**settings)


def make_embeddings(config):
    """Label embeddings [C, E] of a case."""
    shape = config["num_classes"], config["embedding_dim"]
    return (0.5 * rng("embeddings", config["seed"]).standard_normal(shape)).astype(np.float32)


def template(model, inputs, embeddings):
    """Shapes of a model's variables."""
    return jax.eval_shape(partial(model.init, train=False), jax.random.key(0), inputs, embeddings)


def released_loss(config, model, params, batch_stats, inputs, embeddings, annotations):
    """Training loss of the released recipe, its terms and what the pass left behind."""
    (logits, out), updated = model.apply(
        {"params": params, "batch_stats": batch_stats},
        inputs,
        embeddings,
        train=True,
        mutable=["batch_stats"],
    )
    recovered = recovery.online_targets(logits, annotations, sharpening="released")
    total, terms = losses.clsl_loss(
        logits,
        out["global_logits"],
        annotations,
        recovered,
        jnp.ones_like(recovered),
        elementwise=partial(
            losses.asymmetric_loss,
            gamma_pos=config["gamma_pos"],
            gamma_neg=config["gamma_neg"],
            clip=config["clip"],
        ),
        scale="released",
        recovered_scale=config["recovery_weight"],
    )
    left = {
        "train_probs": jax.nn.sigmoid(logits),
        "train_global_logits": out["global_logits"],
        "train_recovered_targets": recovered,
        "train_loss_known": terms["known"],
        "train_loss_recovered": terms["recovered"],
        "train_loss_total": total,
        "batch_stats": updated.get("batch_stats", {}),
    }
    return total, left


def check_network(data, config):
    """Kinds `head` and `model`: inference, then one training pass with gradients."""
    state = stored_state(data, config["seed"])
    layout = pretrained.find_layout(state)
    if layout.backbone is None:
        model, inputs = build(config, state), make_features(config, config["seed"])
    else:
        model = build(config, state, backbone_name(state))
        inputs = make_images(config)
    embeddings = make_embeddings(config)
    shapes = template(model, inputs, embeddings)
    variables = pretrained.import_torch(state, shapes)

    @jax.jit
    def infer(variables, inputs, embeddings):
        logits, out = model.apply(variables, inputs, embeddings, train=False)
        return {
            "eval_probs": jax.nn.sigmoid(logits),
            "eval_attention_logits": out["position_logits"].swapaxes(1, 2),
            "eval_global_logits": out["global_logits"],
        }

    labels, known = make_labels(
        config["seed"], config["batch"], config["num_classes"], config["known_fraction"]
    )
    np.testing.assert_array_equal(data["labels"], labels)
    np.testing.assert_array_equal(data["known"], known)
    annotations = partial_labels.annotate(labels, known)
    step = jax.jit(jax.grad(partial(released_loss, config, model), has_aux=True))
    gradients, left = step(
        variables["params"], variables.get("batch_stats", {}), inputs, embeddings, annotations
    )
    computed = infer(variables, inputs, embeddings) | left
    after = export_torch({"batch_stats": left["batch_stats"]}, layout=layout)
    computed |= {f"after_{name}": value for name, value in after.items()}
    compared = [n for n in data.files if n.startswith(("eval_", "train_", "after_"))]
    assert compared
    for name in compared:
        if not name.endswith("num_batches_tracked"):
            close(computed[name], data[name], TOLERANCE, name)

    gradients = export_torch({"params": gradients}, layout=layout)
    assert set(map(str, data["grad_names"])) <= set(gradients)
    norms = [np.linalg.norm(gradients[str(n)].astype(np.float64)) for n in data["grad_names"]]
    floor = 1e-3 * np.nanmax(data["grad_norms"])
    for name, norm, expected in zip(data["grad_names"], norms, data["grad_norms"], strict=True):
        if np.isfinite(expected):
            error = abs(norm - expected)
            assert error <= GRADIENT_TOLERANCE * max(expected, floor), f"{name}: {norm}"


def check_backbone(data, config):
    """Kind `backbone`: features in inference mode."""
    state = stored_state(data, config["seed"])
    model = ResNet(config["stage_sizes"], bottleneck=config["block"] == "bottleneck")
    assert model.stage_sizes == list(STAGE_SIZES[backbone_name(state)])
    images = make_images(config)
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)
    variables = pretrained.import_torch(state, shapes)
    features = jax.jit(partial(model.apply, train=False))(variables, images)
    b, h, w, d = features.shape
    close(features.reshape(b, h * w, d), data["features"], TOLERANCE, "features")


def check_trajectory(data, config):
    """Kind `trajectory`: steps of the released recipe, and the EMA beside it."""
    seed, decay = config["seed"], config["ema_decay"]
    assert (config["optimizer"], config["schedule"]) == ("adamw", "onecycle")
    names = map(str, data["state_names"]) if "state_names" in data else ()
    model, embeddings = build(config, list(names)), make_embeddings(config)
    shapes = template(model, make_features(config, seed, 0), embeddings)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    made = export_torch(zeros)
    made = make_state(seed, made, [array.shape for array in made.values()])
    variables = jax.tree.map(jnp.asarray, pretrained.import_torch(made, shapes))
    cycle = optim.one_cycle(
        config["peak_learning_rate"],
        config["total_steps"],
        warmup_fraction=config["warmup_fraction"],
    )
    optimizer = optim.adamw_cycled(
        cycle.learning_rate, cycle.beta1, weight_decay=config["weight_decay"]
    )

    @partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(variables, ema, optimizer_state, features, embeddings, annotations):
        params, batch_stats = variables["params"], variables.get("batch_stats", {})
        gradients, left = jax.grad(partial(released_loss, config, model), has_aux=True)(
            params, batch_stats, features, embeddings, annotations
        )
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        new = dict(variables, params=jax.tree.map(jnp.add, params, updates))
        if batch_stats:
            new["batch_stats"] = left["batch_stats"]
        terms = [left[f"train_loss_{name}"] for name in ("known", "recovered", "total")]
        return new, optim.ema_update(ema, new, decay), optimizer_state, jnp.stack(terms)

    ema = jax.tree.map(jnp.copy, variables)
    optimizer_state = optimizer.init(variables["params"])
    trace = []
    for i in range(config["steps"]):
        labels, known = make_labels(
            seed * 1000 + i, config["batch"], config["num_classes"], config["known_fraction"]
        )
        variables, ema, optimizer_state, terms = step(
            variables,
            ema,
            optimizer_state,
            make_features(config, seed, i),
            embeddings,
            partial_labels.annotate(labels, known),
        )
        trace.append(np.asarray(terms))
    rates = [cycle.learning_rate(i) for i in range(config["steps"])]
    close(rates, data["learning_rates"], TOLERANCE, "learning_rates")
    for column, name in enumerate(("known", "recovered", "total")):
        close(np.array(trace)[:, column], data["losses"][:, column], TOLERANCE, f"{name} losses")

    probe = make_features(config, seed, 999)
    infer = jax.jit(lambda v: jax.nn.sigmoid(model.apply(v, probe, embeddings, train=False)[0]))
    close(infer(variables), data["final_probs"], TOLERANCE, "final_probs")
    close(infer(ema), data["final_ema_probs"], TOLERANCE, "final_ema_probs")


def check_losses(data, config):
    """Kind `losses`: masked sums and soft means, with the norms of their gradients."""
    logits, known = jnp.asarray(data["logits"]), data["known"] > 0
    annotations = partial_labels.annotate(data["labels"].astype(np.int8), known)
    columns = [str(c) for c in data["columns"]]
    rows = np.asarray(data["rows"], np.float64)
    computed = []
    for row in rows:
        case = dict(zip(columns, row, strict=True))
        elementwise = partial(
            losses.asymmetric_loss,
            gamma_neg=case["gamma_neg"],
            gamma_pos=case["gamma_pos"],
            clip=case["clip"],
            eps=config["eps"],
        )

        def masked(z, elementwise=elementwise):
            targets = jnp.maximum(annotations, 0)
            return losses.known_loss(elementwise(z, targets), known, scale="released")

        def soft(z, elementwise=elementwise):
            values = elementwise(z, data["soft_targets"])
            return losses.recovered_loss(values, known, ~known, scale="released")

        masked_loss, masked_gradient = jax.value_and_grad(masked)(logits)
        soft_loss, soft_gradient = jax.value_and_grad(soft)(logits)
        case |= {
            "masked_loss_sum_x1000": masked_loss,
            "masked_grad_norm": jnp.linalg.norm(masked_gradient),
            "soft_loss_mean_x1000": soft_loss,
            "soft_grad_norm": jnp.linalg.norm(soft_gradient),
        }
        computed.append([float(case[c]) for c in columns])
    computed = np.array(computed)
    for i, name in enumerate(columns):
        tolerance = GRADIENT_TOLERANCE if name.endswith("grad_norm") else TOLERANCE
        for row in range(len(rows)):
            close(computed[row, i], rows[row, i], tolerance, f"row {row}, {name}")


def check_metrics(data, config):
    """Kind `metrics`: interpolated AP and the six rates, with and without ignored entries."""
    scores, labels = data["scores"], data["labels"]
    order = ("CP", "CR", "CF1", "OP", "OR", "OF1")
    for prefix, ignore in (("all", None), ("ignore", data["ignore"] > 0)):
        compared = {
            "ap": metrics.average_precision(scores, labels, ignore, convention="interpolated"),
            "map": metrics.mean_average_precision(
                scores, labels, ignore, convention="interpolated"
            ),
        }
        for name, rule in (
            ("threshold", {"threshold": config["threshold"]}),
            (f"top{config['top_k']}", {"top_k": config["top_k"]}),
        ):
            rates = metrics.classification_metrics(scores, labels, ignore, **rule)
            compared[name] = [rates[key] for key in order]
        for name, value in compared.items():
            close(value, data[f"{prefix}_{name}"], 1e-9, f"{prefix}_{name}")


def check_graph(data, config):
    """Kind `graph`: the three stages of the adjacency."""
    settings = {"threshold": config["threshold"], "smoothing": config["smoothing"]}
    pairs, counts = graph.cooccurrence(data["labels"])
    close(pairs, data["cooccurrence"], TOLERANCE, "cooccurrence")
    close(counts, np.broadcast_to(data["counts"][:, None], counts.shape), TOLERANCE, "counts")
    reweighted = graph.reweighted_adjacency(pairs, counts, **settings)
    close(reweighted, data["reweighted"], TOLERANCE, "reweighted")
    normalized = jax.jit(partial(graph.normalized_adjacency, **settings))(pairs, counts)
    close(normalized, data["normalized"], TOLERANCE, "normalized")


def check_position(data, config):
    """Kind `position`: some channels of the sine positions."""
    sine = encoder.sine_positions(config["height"], config["width"], config["dim"])
    chosen = np.moveaxis(np.asarray(sine), -1, 0)[:: config["channel_step"]]
    close(chosen, data["sine"], TOLERANCE, "sine")


CHECKS = {
    "head": check_network,
    "model": check_network,
    "backbone": check_backbone,
    "trajectory": check_trajectory,
    "losses": check_losses,
    "metrics": check_metrics,
    "graph": check_graph,
    "position": check_position,
}


def test_the_folder_holds_fixtures():
    assert FILES, f"no .npz files in {FOLDER}; CLSL_PARITY_DIR names the folder"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_fixture(path):
    with np.load(path) as data, jax.default_matmul_precision("highest"):
        config = json.loads(str(data["config"]))
        CHECKS[config["kind"]](data, config)


@pytest.mark.parametrize("path", MASKS, ids=lambda path: path.stem)
def test_masks(path):
    for case in json.loads(path.read_text()):
        shape = case["images"], case["classes"]
        mask = partial_labels.known_mask(
            case["protocol"], np.zeros(shape, np.int8), case["known_fraction"], case["seed"]
        )
        assert mask.sum() == case["known_entries"], case
        assert partial_labels.matrix_sha256(mask) == case["sha256"], case
