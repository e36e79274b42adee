"""Rates and shapes of frames that a robot must match."""

import json
from dataclasses import replace

import pytest

from rynnvla_jax.config import ConfigError, from_dict, to_dict
from rynnvla_jax.deploy import export_format
from rynnvla_jax.recording import Recording, hertz
from tests import exports


@pytest.mark.parametrize("rate", [30.0, 29.97, 30.9, 10, 10.4])
def test_rates_that_are_those_of_a_recording(rate):
    assert Recording(rates=(10.0, 30.0)).rate_fault(rate) == Recording().rate_fault(rate) == ""


@pytest.mark.parametrize(
    "rate, words", [(30, "recorded at 10 Hz but is controlled at 30 Hz, so that it would move at 3 times"), (5, "0.5")]
)
def test_another_rate_is_a_fault_and_the_remedy_is_none(rate, words):
    recording = Recording(rates=(10.0,))
    fault = recording.rate_fault(rate)
    assert words in fault and fault.endswith("control it at 10 Hz")
    assert recording.rate_fault(10) == ""


def test_the_nearest_of_several_rates_is_the_remedy():
    fault = Recording(rates=(5.0, 50.0)).rate_fault(30)
    assert "recorded at 5 and 50 Hz" in fault and fault.endswith("control it at 50 Hz")
    assert Recording(rates=(5.0, 50.0)).mixed
    assert not Recording(rates=(29.97, 30.0)).mixed and not Recording().mixed
    assert hertz((12.5,)) == "12.5 Hz"


@pytest.mark.parametrize(
    "frames, shape, crop",
    [
        (((480, 480),), (1080, 1920), (1080, 1080)),
        (((480, 640),), (1080, 1920), (1080, 1440)),
        (((720, 1280),), (480, 640), (360, 640)),
        (((256, 256), (480, 640)), (1280, 720), (720, 720)),
    ],
)
def test_frames_of_another_shape_are_a_fault_and_the_crop_is_none(frames, shape, crop):
    recording = Recording(frames=frames)
    fault = recording.frame_fault("wrist", *shape)
    assert fault.startswith(f"wrist image has {shape[0]} x {shape[1]} pixels (height x width)")
    assert fault.endswith(f"or crop its frames to {crop[0]} x {crop[1]}")
    assert recording.frame_fault("wrist", *crop) == Recording().frame_fault("wrist", *shape) == ""
    for height, width in frames:  # another resolution is no fault
        assert recording.frame_fault("front", 2 * height, 2 * width + 5) == ""


@pytest.mark.parametrize(
    "values",
    [{"rates": [0]}, {"rates": [float("nan")]}, {"frames": [[0, 4]]}, {"frames": [[4]]}, {"rates": "x"}, {"rate": [3]}],
)
def test_values_of_a_foreign_file_are_checked(values):
    with pytest.raises(ConfigError):
        from_dict(Recording, values)


def test_it_travels_in_the_export_and_older_exports_have_none():
    recording = Recording((10.0, 30.0), ((480, 640), (256, 256)))
    assert from_dict(Recording, json.loads(json.dumps(to_dict(recording)))) == recording
    values = json.loads(json.dumps(export_format.config_to_json(replace(exports.TINY, recording=recording))))
    assert values["rynnvla"]["recording"] == {"rates": [10.0, 30.0], "frames": [[480, 640], [256, 256]]}
    assert export_format.config_from_json(values).recording == recording
    del values["rynnvla"]["recording"]
    assert export_format.config_from_json(values).recording == Recording()
