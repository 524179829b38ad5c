import pytest

from hf_qat.config.targets import (
    TARGETS,
    Target,
    TensorScheme,
    did_you_mean,
    find_target,
    register_target,
    targets,
)
from hf_qat.errors import ConfigError


#: Bits of weights and activations, and whether activations are symmetric, weights per channel, scales powers of two
#: and products of activations symmetric: by hand, from the sources that hf_qat/targets.py names.
EXPECTED = {
    "int8": (8, 8, False, True, False, False),
    "int8-symmetric": (8, 8, True, True, False, False),
    "w4a8": (4, 8, False, True, False, False),
    "w4a4": (4, 4, False, True, False, False),
    "TDA4VM": (8, 8, True, False, True, True),
    "AM62A": (8, 8, False, True, False, True),
    "AM67A": (8, 8, False, True, False, True),
    "AM68A": (8, 8, False, True, False, True),
    "AM69A": (8, 8, False, True, False, True),
}


def test_the_names_are_those_that_users_were_promised():
    assert targets() == list(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_target_has_the_schemes_of_its_data_sheet(name):
    target = find_target(name)
    weights, activations = target.weights, target.activations
    assert (
        weights.bits,
        activations.bits,
        activations.symmetric,
        weights.per_channel,
        activations.power_of_two,
        target.symmetric_matmul,
    ) == EXPECTED[name]
    assert weights.power_of_two == activations.power_of_two


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_every_target_keeps_what_no_quantizer_can_do_without(target):
    assert target.weights.symmetric
    assert not target.activations.per_channel
    for scheme in (target.weights, target.activations):
        assert scheme.learned
        assert scheme.observer == "mse"
    assert target.description


def test_only_targets_with_narrow_weights_have_wider_edges():
    assert {target.name for target in TARGETS if target.edge_bits} == {"w4a8", "w4a4"}
    assert all(target.edge_bits in (None, 8) for target in TARGETS)


def test_onnx_runtime_targets_keep_one_type_where_tensors_meet():
    one_type = {target.name for target in TARGETS if target.one_type_where_tensors_meet}
    assert one_type == {"int8", "int8-symmetric", "w4a8", "w4a4"}


def test_only_the_first_matrix_accelerator_multiplies_no_signed_by_unsigned_activations():
    assert [target.name for target in TARGETS if target.one_sign_in_products] == ["TDA4VM"]


@pytest.mark.parametrize(
    ("alias", "name"), [("J721E", "TDA4VM"), ("J722S", "AM67A"), ("J721S2", "AM68A"), ("J784S4", "AM69A")]
)
def test_a_device_is_found_by_its_part_number(alias, name):
    assert find_target(alias).name == name


@pytest.mark.parametrize(("spelling", "name"), [("tda4vm", "TDA4VM"), ("INT8", "int8"), ("j784s4", "AM69A")])
def test_upper_and_lower_case_are_the_same(spelling, name):
    assert find_target(spelling).name == name


def test_no_two_targets_answer_to_one_spelling():
    spellings = [spelling.lower() for target in TARGETS for spelling in (target.name, *target.aliases)]
    assert len(spellings) == len(set(spellings))


def test_an_unknown_target_is_refused_with_the_nearest_and_all_names():
    with pytest.raises(ConfigError) as caught:
        find_target("TDA4VN")
    message = str(caught.value)
    assert "'TDA4VN'" in message
    assert "Did you mean 'TDA4VM'?" in message
    assert all(name in message for name in [*EXPECTED, "J721E", "J722S", "J721S2", "J784S4"])


@pytest.mark.parametrize("wrong", [None, 8, ["int8"], TensorScheme()], ids=["none", "number", "list", "scheme"])
def test_a_target_that_is_no_name_is_refused(wrong):
    with pytest.raises(ConfigError, match="unknown target"):
        find_target(wrong)


def test_nothing_is_suggested_where_nothing_is_near():
    assert did_you_mean("qqqq", ["bits", "observer"]) == ""
    assert did_you_mean("bit", ["bits", "observer"]) == " Did you mean 'bits'?"


def test_cutoff_zero_always_suggests():
    assert did_you_mean("qqqq", ["bits"], cutoff=0) == " Did you mean 'bits'?"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Target("tda4vm", TensorScheme(), TensorScheme()), "'tda4vm' exists already: TDA4VM"),
        (Target("mine", TensorScheme(), TensorScheme(), aliases=("j721e",)), "'j721e' exists already: TDA4VM"),
        (Target("mine", TensorScheme(symmetric=False), TensorScheme()), "weights must be symmetric"),
        (
            Target("mine", TensorScheme(), TensorScheme(per_channel=True)),
            "activations cannot have a scale per channel",
        ),
    ],
    ids=["name", "alias", "weights", "activations"],
)
def test_a_target_that_is_taken_or_impossible_is_not_registered(target, message):
    with pytest.raises(ConfigError, match=message):
        register_target(target)
    assert targets() == list(EXPECTED)
