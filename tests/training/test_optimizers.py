"""The optimizers, compared with Keras's own."""

import keras
import numpy as np
import pytest
from support.training import CONFIG

from dgmd_pipeline.training import optimizers


@pytest.mark.parametrize("name", ["adam", "adamw"])
@pytest.mark.parametrize("decay", [0.0, 0.02])
def test_adam_has_the_weights_and_the_state_of_that_of_keras(name, decay):
    random = np.random.default_rng(0)
    start = random.normal(size=(5, 3)).astype(np.float32)
    ours, theirs = (
        (optimizer, keras.Variable(start))
        for optimizer in (
            optimizers.build(CONFIG._replace(optimizer=name, weight_decay=decay)),
            keras.optimizers.AdamW(CONFIG.learning_rate, weight_decay=decay),
        )
    )
    for step in range(4):
        gradient = random.normal(size=start.shape).astype(np.float32)
        for optimizer, variable in (ours, theirs):
            optimizer.learning_rate = 0.1 / (1 + step)
            optimizer.apply([keras.ops.convert_to_tensor(gradient)], [variable])
    assert np.abs(ours[1].numpy() - start).max() > 0.1
    for one, other in zip([ours[1], *ours[0].variables], [theirs[1], *theirs[0].variables], strict=True):
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-5, atol=1e-6, err_msg=other.path)
