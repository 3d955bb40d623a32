"""What is written for people says the probabilities that the network's outputs stand for."""

import types

import numpy as np
import pytest

from clsl_jax import results, sharding
from clsl_jax.step_options import StepOptions


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # q (1 - p) = (1 - q) p^3 is where a loss of gammas 0 and 2 pulls nowhere: 1 / 5 at 1 / 2.
        ({"loss_name": "asl"}, 0.2),
        ({"loss_name": "bce"}, 0.5),
        ({"loss_name": "asl", "evaluate_statistics": True}, 0.5),
    ],
)
def test_pictures_show_probabilities_as_the_tables_do(options, expected):
    images = np.zeros((3, 4, 4, 3), np.uint8)
    test = types.SimpleNamespace(images=[{"image": image} for image in images])
    built = types.SimpleNamespace(
        dataset=types.SimpleNamespace(test=test),
        mesh=sharding.make_mesh(model=1),
        eval_batch_size=16,
        options=StepOptions(steps_per_epoch=1, **options),
    )
    heat = np.ones((2, 1, 1, 5), np.float32)
    shown = results._explain(built, lambda given: (np.full((len(given), 5), 0.5), heat), 2)
    assert shown[0].shape == (2, 4, 4, 3)
    np.testing.assert_allclose(shown[1], expected, rtol=1e-5)
