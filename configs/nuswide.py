"""NUS-WIDE, 10 % of the labels known.

    python -m clsl_jax.main --config=configs/nuswide.py --workdir=DIR --config.data.dir=PREPARED
    python -m clsl_jax.main --config=configs/nuswide.py:released ...

The recipe starts from ImageNet weights and from embeddings of the label texts; name the files:

    --config.model.pretrained=resnet101.pth --config.model.embeddings=labels.npz

(`python -m clsl_jax.embed --encoder=bert --labels=FILE --source=BERT --out=labels.npz` makes the
second as the authors do: FILE has the class names in order, one a line, BERT is the folder of
bert-base-uncased). Without them, weights and embeddings are random.

`released` is the authors' recipe, loss scale and recovery included; without it, the same model and
schedule with this project's loss scale and recovery. Hardware: one GPU of 40 GB. Source of the
numbers: the CLSL authors' released program. Published, all at 10 % known: 61.7 mAP (backbone not
stated). The set was not at hand here: the recipe was run on made-up files of its format alone.
"""

import ml_collections

from clsl_jax.recipes import paper_recipe


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the configuration; `arg` is None or `released`."""
    config = paper_recipe(arg, file="configs/nuswide.py")
    config.data.name = "nuswide"
    config.data.without_labels = "drop"  # as the authors do
    config.data.image_size = 224
    config.batch_size = 128
    config.optim.learning_rate = 9e-5
    config.optim.ema_decay = 0.9983
    return config
