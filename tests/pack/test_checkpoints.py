"""Checkpoints of every family, packed: what comes out is what transformers saved."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import pytest

from moepack.checkpoint import Checkpoint
from moepack.formats import PackedModel
from moepack.pack import pack
from moepack.verify import verify
from tests.conftest import TinyFolder
from tests.pack.fake_models import make_plan
from tests.pack.test_pack import assert_pack_is_source
from tests.support.tiny_models import TINY_MODELS, TinyModel


@pytest.mark.parametrize("tiny", TINY_MODELS, ids=lambda tiny: tiny.key)
def test_a_packed_checkpoint_holds_its_bits(
    tiny_folder: TinyFolder, tmp_path: Path, tiny: TinyModel
) -> None:
    checkpoint = Checkpoint.open(tiny_folder(tiny.family, tiny.variant))
    splits = [
        min(split, checkpoint.spec.moe(layer).intermediate_size)
        for layer, split in zip(checkpoint.spec.moe_layers, cycle((32, 96, 0)), strict=False)
    ]
    pack(checkpoint, make_plan(checkpoint.spec, splits), tmp_path / "pack")
    assert_pack_is_source(tmp_path / "pack", checkpoint)
    verify(tmp_path / "pack").raise_if_damaged()
    model = PackedModel.open(tmp_path / "pack")
    assert model.spec.digest == checkpoint.spec.digest
    for path in checkpoint.auxiliary_files:
        assert (model.folder / path.name).read_bytes() == path.read_bytes()
