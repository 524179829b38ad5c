import copy
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import ResNetConfig

from hf_qat.config.qat_config import QATConfig
from hf_qat.config.targets import TensorScheme, targets
from hf_qat.errors import ConfigError
from hf_qat.quantization.observers import OBSERVERS


PATHS = ["", "resnet", "resnet.embedder", "resnet.embedder.conv", "resnet.encoder", "classifier", "classifier.1"]


def refused(*args, **kwargs) -> str:
    """The message with which the arguments are refused."""
    with pytest.raises(ConfigError) as caught:
        QATConfig(*args, **kwargs)
    return str(caught.value)


# Defaults and presets


def test_the_defaults_are_the_recipe_of_the_design():
    config = QATConfig()
    assert config.target == "int8"
    assert config.weight_scheme == TensorScheme(bits=8, symmetric=True, per_channel=True, learned=True, observer="mse")
    assert config.activation_scheme == TensorScheme(bits=8, symmetric=False, learned=True, observer="mse")
    assert (config.freeze_bn_at, config.freeze_ranges_at) == (0.0, 0.9)
    assert (config.calibration_batches, config.bias_correction) == (32, True)
    assert config.calibration_effort == "fast"
    assert (config.distillation_weight, config.distillation_temperature) == (0.5, 2.0)
    assert config.scale_lr_multiplier == 10.0
    assert config.sync_batch_norm is False and config.save_memory is False
    assert config.exclude == []
    assert config.overrides == {}


def test_a_config_is_a_value_error_when_it_cannot_be_honoured():
    with pytest.raises(ValueError, match="int9"):
        QATConfig("int9")


@pytest.mark.parametrize("name", targets())
def test_every_target_makes_a_config(name):
    config = QATConfig(name)
    assert config.target == config.target_spec.name == name
    assert config.schemes_for("any.path") == (config.target_spec.weights, config.target_spec.activations)


def test_an_alias_in_lower_case_is_stored_under_the_proper_name():
    assert QATConfig("j721e") == QATConfig("TDA4VM")


# Schemes


def test_changes_are_applied_on_top_of_the_target():
    config = QATConfig("TDA4VM", weights={"bits": 4}, activations={"learned": False, "observer": "moving_average"})
    assert config.weight_scheme == TensorScheme(bits=4, power_of_two=True)
    assert config.activation_scheme == TensorScheme(power_of_two=True, learned=False, observer="moving_average")


def test_a_whole_scheme_replaces_that_of_the_target():
    scheme = TensorScheme(bits=16, symmetric=True, observer="minmax")
    assert QATConfig("w4a8", activations=scheme).activation_scheme == scheme


def test_the_observers_that_can_be_named_are_those_that_exist():
    assert set(OBSERVERS) == {"mse", "minmax", "percentile", "moving_average"}
    for name in OBSERVERS:
        assert QATConfig(weights={"observer": name, "learned": False}).weight_scheme.observer == name


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8, 16])
def test_possible_widths_are_taken(bits):
    config = QATConfig("TDA4VM", weights={"bits": bits}, activations={"bits": bits})
    assert (config.weight_scheme.bits, config.activation_scheme.bits) == (bits, bits)


@pytest.mark.parametrize("bits", [-8, 0, 1, 9, 15, 17, 32, True, 8.0, "8", None])
def test_impossible_widths_are_refused(bits):
    message = refused(weights={"bits": bits})
    assert "weights['bits']" in message
    assert repr(bits) in message


def test_affine_power_of_two_activations_are_possible():
    scheme = QATConfig("TDA4VM", activations={"symmetric": False}).activation_scheme
    assert scheme.power_of_two
    assert not scheme.symmetric


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"weights": {"symmetric": False}}, ["weights must be symmetric"]),
        ({"activations": {"per_channel": True}}, ["activations cannot have a scale per channel"]),
        (
            {"activations": {"observer": "moving_average"}},
            ["activations", "learned scales take over after calibration"],
        ),
        ({"weights": {"observer": "moving_average"}}, ["weights", "learned scales take over after calibration"]),
        ({"overrides": {"a.*": {"activations": {"per_channel": True}}}}, ["overrides['a.*']", "scale per channel"]),
        ({"overrides": {"a": {"weights": {"symmetric": False}}}}, ["overrides['a']", "must be symmetric"]),
    ],
    ids=["affine weights", "channels", "followed activations", "followed weights", "override", "override weights"],
)
def test_impossible_mixes_are_refused_with_the_place(arguments, words):
    message = refused(**arguments)
    assert all(word in message for word in words), message


# Misspelled keys and values


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"weigths": {"bits": 4}}, ["QATConfig", "'weigths'", "'weights'"]),
        ({"freeze_bn": 0.5}, ["'freeze_bn'", "'freeze_bn_at'"]),
        ({"weights": {"bit": 4}}, ["weights:", "'bit'", "'bits'"]),
        ({"activations": {"simetric": True}}, ["activations:", "'simetric'", "'symmetric'"]),
        ({"overrides": {"a": {"weight": {"bits": 4}}}}, ["overrides['a']:", "'weight'", "'weights'"]),
        ({"overrides": {"a": {"weights": {"bist": 4}}}}, ["overrides['a']['weights']:", "'bist'", "'bits'"]),
        ({"weights": {"observer": "min_max"}}, ["weights['observer']", "'min_max'", "'minmax'"]),
        ({"target": "TDA4V"}, ["'TDA4V'", "'TDA4VM'"]),
    ],
    ids=["argument", "schedule", "weights", "activations", "override", "nested", "observer", "target"],
)
def test_a_typo_is_refused_with_the_nearest_valid_name(arguments, words):
    message = refused(**arguments)
    assert "Did you mean" in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"target": None}, "target"),
        ({"weights": 4}, "weights"),
        ({"weights": [("bits", 4)]}, "weights"),
        ({"weights": {"per_channel": 1}}, "weights['per_channel']"),
        ({"activations": {"observer": None}}, "activations['observer']"),
        ({"activations": {"observer": ["mse"]}}, "activations['observer']"),
        ({"exclude": 3}, "exclude"),
        ({"exclude": ["a", None]}, "exclude"),
        ({"exclude": ""}, "exclude"),
        ({"overrides": "classifier"}, "overrides"),
        ({"overrides": 0}, "overrides"),
        ({"overrides": {"a": None}}, "overrides['a']"),
        ({"overrides": {"a": {"weights": 4}}}, "overrides['a']['weights']"),
        ({"overrides": {3: {}}}, "overrides"),
        ({"quant_method": "gptq"}, "quant_method"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_value_of_the_wrong_kind_is_refused_with_its_place(arguments, word):
    assert word in refused(**arguments)


@pytest.mark.parametrize("name", ["freeze_bn_at", "freeze_ranges_at", "distillation_weight"])
@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, True, "0.5"])
def test_a_fraction_is_a_number_from_0_to_1(name, value):
    assert name in refused(**{name: value})


@pytest.mark.parametrize("name", ["distillation_temperature", "scale_lr_multiplier"])
@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, True, "2", None])
def test_temperature_and_multiplier_are_positive_numbers(name, value):
    assert name in refused(**{name: value})


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "32", None])
def test_calibration_batches_are_counted_from_one(value):
    assert "calibration_batches" in refused(calibration_batches=value)


@pytest.mark.parametrize("value", ["Best", "", None, 1, True])
def test_calibration_effort_is_fast_or_best(value):
    assert "calibration_effort must be 'fast' or 'best'" in refused(calibration_effort=value)


@pytest.mark.parametrize("value", [0, 1, None, "yes"])
def test_bias_correction_is_true_or_false(value):
    assert "bias_correction" in refused(bias_correction=value)


@pytest.mark.parametrize("value", [0, 1, None, "yes"])
def test_sync_batch_norm_is_true_or_false(value):
    assert "sync_batch_norm" in refused(sync_batch_norm=value)


# The schedule


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, 0.0),
        ({"activations": {"learned": False}}, 0.5),
        ({"weights": {"learned": False}}, 0.0),
        ({"activations": {"learned": False}, "freeze_ranges_at": 0.25}, 0.25),
        ({"freeze_bn_at": 0.75}, 0.75),
        ({"freeze_bn_at": 1, "freeze_ranges_at": 1}, 1.0),
    ],
    ids=["learned", "observed", "learned activations only", "observed, short", "given", "never"],
)
def test_batch_norm_freezes_at_once_only_if_activation_scales_are_learned(arguments, expected):
    assert QATConfig(**arguments).freeze_bn_at == expected


def test_ranges_cannot_freeze_before_batch_norm():
    message = refused(freeze_bn_at=0.8, freeze_ranges_at=0.5)
    assert "freeze_bn_at=0.8" in message
    assert "freeze_ranges_at=0.5" in message


# Globs


def test_a_later_override_wins_and_leaves_what_it_does_not_name():
    overrides = {
        "resnet.*": {"weights": {"bits": 4, "observer": "minmax"}, "activations": {"bits": 16}},
        "*.conv": {"weights": {"bits": 2}},
    }
    config = QATConfig(overrides=overrides)
    weights, activations = config.schemes_for("resnet.embedder.conv")
    assert (weights.bits, weights.observer, activations.bits) == (2, "minmax", 16)
    assert config.schemes_for("resnet.encoder")[0].bits == 4
    assert config.schemes_for("classifier")[0].bits == 8
    turned = QATConfig(overrides=dict(reversed(overrides.items())))
    assert turned.schemes_for("resnet.embedder.conv")[0].bits == 4


def test_an_override_of_a_parent_reaches_its_children():
    config = QATConfig(overrides={"classifier": {"weights": {"bits": 4}}})
    assert config.schemes_for("classifier.1")[0].bits == 4
    assert config.schemes_for("classifier_head")[0].bits == 8


@pytest.mark.parametrize(
    ("exclude", "path", "expected"),
    [
        ("classifier", "classifier", True),
        ("classifier", "classifier.1", True),
        ("classifier", "classifier2", False),
        ("classifier", "head.classifier", False),
        (["x", "*.conv"], "resnet.embedder.conv", True),
        (["x", "*.conv"], "resnet.embedder.conv.inner", True),
        ("*.conv?", "resnet.conv", False),
        ("Classifier", "classifier", False),
        ((), "classifier", False),
        ("*", "", True),
    ],
)
def test_exclude_matches_a_path_or_one_of_its_parents(exclude, path, expected):
    assert QATConfig(exclude=exclude).excludes(path) is expected


def test_globs_that_all_match_pass():
    config = QATConfig(exclude=["classifier", "*.conv"], overrides={"resnet.*": {"weights": {"bits": 4}}})
    config.check_globs(iter(PATHS))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"exclude": ["classifier", "clasifier"]}, ["exclude", "'clasifier'", "'classifier'"]),
        ({"exclude": "*.covn"}, ["exclude", "'*.covn'"]),
        ({"overrides": {"resnet.encodr.*": {}}}, ["overrides", "'resnet.encodr.*'", "'resnet.encoder'"]),
    ],
    ids=["name", "glob", "override"],
)
def test_a_glob_that_matches_nothing_is_refused_with_the_nearest_path(arguments, words):
    with pytest.raises(ConfigError) as caught:
        QATConfig(**arguments).check_globs(PATHS)
    assert all(word in str(caught.value) for word in [*words, "Did you mean"]), str(caught.value)


def test_overrides_that_contradict_each_other_are_refused_before_time_is_spent():
    overrides = {
        "resnet.*": {"activations": {"learned": False, "observer": "moving_average"}},
        "*.conv": {"activations": {"learned": True}},
    }
    with pytest.raises(ConfigError, match=r"'resnet\.embedder\.conv'.*learned scales take over"):
        QATConfig(overrides=overrides).check_globs(PATHS)


# JSON both ways

widths = st.sampled_from([2, 3, 4, 5, 6, 7, 8, 16])
observers = st.sampled_from(["mse", "minmax", "percentile"])
weight_changes = st.fixed_dictionaries(
    {},
    optional={
        "bits": widths,
        "per_channel": st.booleans(),
        "power_of_two": st.booleans(),
        "learned": st.booleans(),
        "observer": observers,
    },
)
activation_changes = st.fixed_dictionaries(
    {},
    optional={
        "bits": widths,
        "symmetric": st.booleans(),
        "power_of_two": st.booleans(),
        "learned": st.booleans(),
        "observer": observers,
    },
)
globs = st.text("abc.*?1", min_size=1, max_size=8)
configs = st.builds(
    QATConfig,
    st.sampled_from([*targets(), "J721E", "am62a"]),
    weights=weight_changes,
    activations=st.none() | activation_changes | st.builds(TensorScheme, bits=widths, symmetric=st.booleans()),
    exclude=globs | st.lists(globs).map(tuple),
    overrides=st.dictionaries(
        globs, st.fixed_dictionaries({}, optional={"weights": weight_changes, "activations": activation_changes})
    ),
    freeze_bn_at=st.none() | st.floats(0, 0.5),
    freeze_ranges_at=st.floats(0.5, 1),
    calibration_batches=st.integers(1, 1000),
    calibration_effort=st.sampled_from(["fast", "best"]),
    bias_correction=st.booleans(),
    distillation_weight=st.floats(0, 1),
    distillation_temperature=st.floats(0.1, 10),
    scale_lr_multiplier=st.floats(0.01, 100),
    sync_batch_norm=st.booleans(),
    save_memory=st.booleans(),
)


@given(configs)
def test_a_config_survives_json_with_sorted_keys(config):
    again = QATConfig.from_dict(json.loads(config.to_json_string()))
    assert again == config
    assert again.to_dict() == config.to_dict()
    assert again.schemes_for("a.b.c") == config.schemes_for("a.b.c")
    assert list(again.overrides) == list(config.overrides)


def test_the_dict_is_plain_json_and_complete():
    config = QATConfig(
        "AM68A", weights={"bits": 4}, exclude=("classifier",), overrides={"a": {"weights": {"bits": 2}}}
    )
    assert config.to_dict() == {
        "quant_method": "hf_qat",
        "hf_qat_version": "0.1.0",
        "target": "AM68A",
        "weights": {"bits": 4},
        "activations": {},
        "exclude": ["classifier"],
        "overrides": [["a", {"weights": {"bits": 2}}]],
        "layer_restrictions": True,
        "freeze_bn_at": 0.0,
        "freeze_ranges_at": 0.9,
        "calibration_batches": 32,
        "bias_correction": True,
        "distillation_weight": 0.5,
        "distillation_temperature": 2.0,
        "scale_lr_multiplier": 10.0,
        "sync_batch_norm": False,
    }
    assert dict(config) == config.to_diff_dict() == config.to_dict()


def test_changing_the_dict_does_not_change_the_config():
    config = QATConfig(weights={"bits": 4}, overrides={"a": {"weights": {"bits": 2}}})
    data = config.to_dict()
    data["weights"]["bits"] = 8
    data["overrides"][0][1]["weights"]["bits"] = 8
    assert config.weight_scheme.bits == 4
    assert config.schemes_for("a")[0].bits == 2


def test_changing_what_was_passed_does_not_change_the_config():
    weights, inner = {"bits": 4}, {"weights": {"bits": 2}}
    config = QATConfig(weights=weights, overrides={"a": inner})
    weights["bits"] = inner["weights"]["bits"] = 8
    assert config.weight_scheme.bits == 4
    assert config.schemes_for("a")[0].bits == 2


def test_configs_that_differ_are_not_equal():
    config = QATConfig(overrides={"a": {"weights": {"bits": 2}}, "*": {"weights": {"bits": 4}}})
    assert copy.deepcopy(config) == config
    assert QATConfig(overrides=dict(reversed(config.overrides.items()))) != config
    assert QATConfig(target="int8") != QATConfig(target="w4a8")
    assert QATConfig() != QATConfig().to_dict()


def test_the_representation_shows_every_argument():
    text = repr(QATConfig("TDA4VM"))
    assert text.startswith("QATConfig {")
    assert all(f'"{key}"' in text for key in QATConfig().to_dict())


def test_from_dict_takes_changes_and_gives_back_what_is_no_argument():
    config, unused = QATConfig.from_dict(
        QATConfig("w4a8").to_dict(), return_unused_kwargs=True, calibration_batches=4, device_map="cpu"
    )
    assert (config.target, config.calibration_batches, unused) == ("w4a8", 4, {"device_map": "cpu"})


@pytest.mark.parametrize("data", [None, ["int8"], "int8", {1: 2}, {"self": 1}, {"cls": 1}], ids=repr)
def test_from_dict_refuses_what_is_no_config(data):
    with pytest.raises(ConfigError, match="QATConfig"):
        QATConfig.from_dict(data)


def test_from_dict_refuses_what_nobody_would_use():
    with pytest.raises(ConfigError, match="'calibration_batch'.*'calibration_batches'"):
        QATConfig.from_dict({}, calibration_batch=4)


def test_update_changes_known_arguments_with_all_checks():
    config = QATConfig()
    assert config.update(weights={"bits": 4}, to_dict=1) == {"to_dict": 1}
    assert config.weight_scheme.bits == 4
    with pytest.raises(ConfigError, match="freeze_ranges_at"):
        config.update(freeze_ranges_at=2)
    assert config.freeze_ranges_at == 0.9


def test_a_config_of_a_target_without_restrictions_has_them_when_it_gets_one_with():
    assert QATConfig.from_dict({"target": "int8"}, target="TDA4VM") == QATConfig("TDA4VM")


# Versions


def test_a_config_of_a_newer_major_version_is_refused_with_both_versions():
    with pytest.raises(ConfigError, match=r"7\.2\.0.*0\.1\.0"):
        QATConfig.from_dict({**QATConfig().to_dict(), "hf_qat_version": "7.2.0"})


def test_a_config_of_a_newer_minor_version_is_read_unless_it_says_more():
    data = {**QATConfig("w4a8").to_dict(), "hf_qat_version": "0.9.0"}
    assert QATConfig.from_dict(data) == QATConfig("w4a8")
    with pytest.raises(ConfigError, match=r"'new_key'.*written by hf_qat 0\.9\.0"):
        QATConfig.from_dict({**data, "new_key": 1})


@pytest.mark.parametrize("version", ["", "x.1", 7])
def test_a_version_that_cannot_be_read_or_is_too_new_is_refused(version):
    with pytest.raises(ConfigError, match="hf_qat"):
        QATConfig(hf_qat_version=version)


# Files

CONFIG = QATConfig(
    "TDA4VM",
    exclude=["classifier"],
    overrides={"z.*": {"weights": {"bits": 4}}, "a.*": {"weights": {"bits": 2}}},
    calibration_batches=3,
)


def saved_model_config(directory) -> None:
    """A `config.json` as transformers writes it, with sorted keys."""
    model_config = ResNetConfig()
    model_config.quantization_config = CONFIG
    model_config.save_pretrained(directory)


def test_it_is_read_back_from_a_model_directory(tmp_path):
    saved_model_config(tmp_path)
    config = QATConfig.from_pretrained(tmp_path)
    assert config == QATConfig.from_pretrained(str(tmp_path / "config.json")) == CONFIG
    assert list(config.overrides) == ["z.*", "a.*"]


def test_it_is_read_back_from_its_own_file(tmp_path):
    CONFIG.to_json_file(tmp_path / "recipe.json")
    assert QATConfig.from_pretrained(tmp_path / "recipe.json") == CONFIG


def test_it_is_read_from_the_cache_of_a_hub_repository(tmp_path):
    repository = tmp_path / "models--someone--some-model"
    saved_model_config(repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert QATConfig.from_pretrained("someone/some-model", cache_dir=tmp_path) == CONFIG


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"quantization_config": 3}', '{"model_type": "resnet"}'])
def test_a_file_without_a_config_is_refused_with_its_name(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        QATConfig.from_pretrained(tmp_path)


def test_the_config_of_another_library_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq", "bits": 4}}')
    with pytest.raises(ConfigError, match="'gptq'"):
        QATConfig.from_pretrained(tmp_path)


def test_a_place_without_a_file_is_an_os_error_that_names_it(tmp_path):
    with pytest.raises(OSError, match=r"config\.json"):
        QATConfig.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="nobody/nothing"):
        QATConfig.from_pretrained("nobody/nothing", cache_dir=tmp_path)
