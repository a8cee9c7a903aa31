"""A run whose every service dies at its start ends as one that never had any: byte for byte the same model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import esper
from esper.cli import digits
from tests.chaos.conftest import TwoLayers, Victims, training

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(400)]

EPOCHS = 20
SEED = 3


def test_without_services_the_model_is_that_of_plain_training(tmp_path: Path) -> None:
    with esper.Mesh.local(tmp_path) as mesh, training(mesh, seed=SEED) as loop:
        Victims(tmp_path).kill_for_good()
        loop.epochs(EPOCHS)
        loop.session.close()
        left_alone = {name: tensor.clone() for name, tensor in loop.model.state_dict().items()}
    torch.manual_seed(SEED)
    plain = TwoLayers()
    digits.train_plain(plain, digits.load_digits(), epochs=EPOCHS, seed=SEED)
    assert loop.session.report().phase == "finished"
    assert loop.session.report().adaptations == ()
    assert max(loop.step_s + loop.epoch_end_s) < 2.0
    expected = plain.state_dict()
    assert expected.keys() <= left_alone.keys()
    for name, tensor in expected.items():
        assert left_alone[name].numpy().tobytes() == tensor.numpy().tobytes(), name
