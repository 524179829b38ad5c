"""A call with its tensors taken out: against `inspect`, and put together again as Python itself would call."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_qat.graph.call_signature import CallSignature, flatten_call


def forward(pixels: Any, /, mask: Any = None, *more: Any, scale: Any = 1.0, **options: Any) -> None:
    """Each kind of parameter that Python has."""


def as_named(pixels: Any, mask: Any = None, labels: Any = None) -> None:
    """What most models have."""


def flips_by_default(pixels: Any, flip: bool = True, *, scale: float = 2.0, **options: Any) -> None:
    """Defaults that are not off."""


def of(function: Callable[..., None], *args: Any, **kwargs: Any) -> tuple[CallSignature, list[torch.Tensor]]:
    return flatten_call(inspect.signature(function), args, kwargs)


LEAVES = st.one_of(st.none(), st.booleans(), st.integers(0, 3), st.builds(lambda: torch.rand(2)))
VALUES = st.recursive(
    LEAVES, lambda inner: st.one_of(st.lists(inner, max_size=3), st.tuples(inner, inner)), max_leaves=5
)


def tensors_of(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [leaf for item in value for leaf in tensors_of(item)] if isinstance(value, list | tuple) else []


def equal(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, torch.Tensor):
        return mine is theirs
    if isinstance(mine, list | tuple):
        return type(mine) is type(theirs) and len(mine) == len(theirs) and all(map(equal, mine, theirs))
    return type(mine) is type(theirs) and mine == theirs


@settings(max_examples=100, deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=4), st.dictionaries(st.sampled_from(["scale", "size", "other"]), VALUES))
def test_a_call_put_together_again_binds_every_parameter_as_before(args, kwargs):
    call, tensors = of(forward, *args, **kwargs)
    assert Counter(map(id, tensors)) == Counter(
        id(t) for value in (*args, *kwargs.values()) for t in tensors_of(value)
    )
    again = inspect.signature(forward).bind(*call.rebuild(tensors)[0], **call.rebuild(tensors)[1]).arguments
    before = inspect.signature(forward).bind(*args, **kwargs).arguments
    assert again.keys() == before.keys()
    for name, value in before.items():
        pairs = [(again[name][key], value[key]) for key in value] if name == "options" else [(again[name], value)]
        assert all(equal(*pair) for pair in pairs)


def test_how_an_argument_is_passed_does_not_matter_and_what_only_the_loss_takes_is_left_out():
    image = torch.zeros(1)
    by_position, by_name = of(as_named, image, image)[0], of(as_named, mask=image, pixels=image)[0]
    assert by_position.same_constants(by_name) and by_name.same_constants(by_position)
    assert of(forward, image, num_items_in_batch=3)[0].same_constants(of(forward, image)[0])


@pytest.mark.parametrize(
    ("mask", "labels", "different"),
    [
        (None, None, []),
        (False, None, []),  # a flag that is off is as one that is not there
        (True, None, ["mask"]),
        (torch.zeros(1), None, ["mask"]),
        ([None, 3], (2,), ["labels", "mask"]),
    ],
    ids=["the defaults", "off", "on", "a tensor", "lists"],
)
def test_it_says_which_arguments_differ(mask, labels, different):
    image = torch.zeros(1)
    assert of(as_named, image)[0].differences(of(as_named, image, mask, labels)[0]) == different
    assert of(as_named, image, mask, labels)[0].differences(of(as_named, image)[0]) == different


@pytest.mark.parametrize(
    ("passed", "different"),
    [
        ({"flip": True, "scale": 2.0}, []),
        ({"flip": False}, ["flip"]),
        ({"scale": 0}, ["scale"]),
        ({"other": None}, []),
        ({"other": False}, ["other"]),  # its default stands in a function that is called further down
        ({"other": 0}, ["other"]),
        ({"output_attentions": False}, []),  # off in every configuration that does not say otherwise
        ({"output_attentions": True}, ["output_attentions"]),
    ],
    ids=str,
)
def test_an_argument_that_is_absent_has_its_default(passed, different):
    image = torch.zeros(1)
    plain, other = of(flips_by_default, image)[0], of(flips_by_default, image, **passed)[0]
    assert plain.differences(other) == other.differences(plain) == different


def test_options_are_what_differs_where_the_same_arguments_hold_as_many_tensors():
    image = torch.zeros(1)
    plain, flag = of(as_named, image)[0], of(as_named, image, True)[0]
    assert plain.same_tensors(flag) and not plain.same_constants(flag)
    assert not plain.same_tensors(of(as_named, image, image)[0])


def test_each_tensor_has_the_name_of_its_argument_with_an_ordinal_where_there_are_several():
    image = torch.zeros(1)
    assert of(as_named, image, [image, {"a": image}, 2])[0].tensor_names() == ["pixels", "mask_0", "mask_1"]
