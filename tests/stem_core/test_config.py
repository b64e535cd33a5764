"""StemConfig: validation with messages that help, presets, round trips."""

import pytest

from stem_core import StemConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 100}, "block_size must be one of"),
        ({"stride": 24}, "stride must be a divisor of block_size=128, got 24"),
        ({"sample_rows": 0}, "sample_rows must be a divisor"),
        ({"decay": 0.0}, "decay must be above 0 and at most 1, got 0.0"),
        ({"decay": "0.7"}, "decay must be a number, got '0.7'"),
        ({"schedule": "relaese"}, "schedule must be one of"),
        ({"density": 0.25}, "schedule 'density' needs one"),
        ({"schedule": "density"}, "schedule 'density' needs one"),
        ({"schedule": "density", "density": -0.25}, "density must be above 0 and at most 1"),
        ({"sink_blocks": -1}, "sink_blocks must be in 0..1,073,741,824"),
        ({"sink_blocks": True}, "sink_blocks must be a whole number, got True"),
        ({"local_blocks": 0}, "local_blocks must be in 1.."),
        ({"decay": float("nan")}, "decay must be a number of at most"),
        ({"block_size": 1280}, "one of 16, 32, 64, 128, 256, got 1280; did you mean '128'"),
        ({"estimator": "ooam"}, "estimator must be one of .*; did you mean 'oam'"),
        ({"dense_bellow": 1}, "did you mean 'dense_below'"),
    ],
)
def test_bad_fields_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        StemConfig.from_dict(changes)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'release'"):
        StemConfig.preset("releas")


def test_a_preset_that_is_no_more_names_another():
    with pytest.raises(ValueError, match=r"preset 'robust' is no more: .*; use 'sampled', the default"):
        StemConfig.preset("robust")


@pytest.mark.parametrize("preset", ["sampled", "paper", "release"])
def test_round_trip_and_fingerprint(preset):
    config = StemConfig.preset(preset)
    assert StemConfig.from_dict(config.to_dict()) == config
    assert StemConfig.from_dict(config.to_dict()).fingerprint() == config.fingerprint()
    assert config.replace(sink_blocks=2).fingerprint() != config.fingerprint()
    assert len({config, StemConfig.preset(preset)}) == 1


def test_presets_of_stem_are_faithful():
    for preset in ("paper", "release"):
        config = StemConfig.preset(preset)
        assert (config.block_size, config.stride, config.decay, config.value_weight) == (128, 16, 0.7, 0.2)
        assert (config.sink_blocks, config.local_blocks, config.dense_layers, config.dense_tail) == (4, 4, 2, 0)
        assert config.estimator == "oam"
