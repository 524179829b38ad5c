from __future__ import annotations

import json

import pytest

from hf_qat.config.checkpoint_info import CheckpointInfo, Stage
from hf_qat.errors import ConfigError


SAVED = {
    "stage": "converted",
    "model_class": "ResNetForImageClassification",
    "num_labels": 5,
    "inputs": [[], {}],
    "operations": {"resnet": ["embedder: conv2d relu"]},
    "fingerprint": "00",
    "transformers_version": "5.17.0",
    "torch_version": "2.11.0",
}


def test_what_was_saved_comes_back_as_plain_data():
    info = CheckpointInfo.from_dict(SAVED)
    assert info.stage is Stage.CONVERTED
    assert info.to_dict() == SAVED and type(info.to_dict()["stage"]) is str
    assert json.loads(json.dumps(info.to_dict())) == SAVED


def test_calls_that_labels_make_are_written_where_there_are_any():
    calls = {"decoder": [[True, []]]}
    info = CheckpointInfo.from_dict({**SAVED, "labelled_calls": calls})
    assert info.labelled_calls == calls and info.to_dict() == {**SAVED, "labelled_calls": calls}


def test_a_stage_is_the_word_that_files_and_messages_have():
    assert (f"{Stage.PREPARED}", str(Stage.CONVERTED), json.dumps(Stage.PREPARED)) == (
        "prepared",
        "converted",
        '"prepared"',
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "trained"}, r"\['stage'\] must be one of prepared, converted, not 'trained'"),
        ({"stage": None}, r"\['stage'\] must be a string, not None"),
        ({"num_labels": True}, r"\['num_labels'\] must be a whole number, not True"),
        ({"operations": {"resnet": "conv2d"}}, r"\['operations'\]\['resnet'\] must be a list of strings"),
        ({"graph": []}, "unknown key 'graph'"),
        ({"labelled_calls": []}, r"\['labelled_calls'\] must be an object, not \[\]"),
    ],
)
def test_an_entry_of_the_wrong_kind_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        CheckpointInfo.from_dict({**SAVED, **changes})
