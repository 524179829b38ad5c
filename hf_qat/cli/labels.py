"""Which label of a model stands for which class of the images: by name where both have names, else by number."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

from hf_qat.cli.tasks.classes import Classes
from hf_qat.errors import ConfigError, listed, printable


logger = logging.getLogger(__name__)

#: What transformers calls a label that nobody has named.
UNNAMED = re.compile(r"LABEL_\d+")


@dataclass(frozen=True)
class Labels:
    """The labels of a model for the classes of a data set.

    Attributes:
        numbers: of each class, the number of its label.
        names: those that the model is to get; `None` leaves it its own.
        new_head: whether the model has another number of labels, so that the layer that tells them starts anew.
    """

    numbers: Sequence[int]
    names: Sequence[str] | None = None
    new_head: bool = False


def labels_for(classes: Classes, own: Sequence[str], trains: bool) -> Labels:
    """Find the labels of a model for the classes of a data set.

    Args:
        classes: of the data set.
        own: the model's names of its labels, in their order.
        trains: whether the model learns the classes; if so, labels that do not fit are exchanged.

    Raises:
        ConfigError: the model does not know the classes, and is not to learn them.
    """
    in_order = range(len(classes.names))
    if not classes.names:
        return Labels(in_order)
    if not classes.named and len(in_order) <= len(own):
        if trains and len(in_order) < len(own):
            _say(
                f"The images number their classes up to {len(in_order) - 1}, and the model keeps its {len(own)} "
                f"labels. If it is to have {len(in_order)}, load it with num_labels={len(in_order)} and "
                "ignore_mismatched_sizes=True, and save it."
            )
        return Labels(in_order)
    by_name = _found_by_name(classes.names, own)
    if by_name is not None and (len(by_name) == len(own) or not trains):
        return Labels(by_name)
    if len(in_order) == len(own) and all(map(UNNAMED.fullmatch, own)):
        return Labels(in_order, classes.names)
    if trains:
        return _learned(classes, own)
    if len(in_order) == len(own) and not set(map(_plain, own)) & set(map(_plain, classes.names)):
        _say(f"{_difference(classes, own)} They are taken for the same, in their order.")
        return Labels(in_order)
    raise ConfigError(
        f"{_difference(classes, own)} Give images of the model's classes, named as its config.json names them "
        "(id2label), or a model that was trained on these."
    )


def _learned(classes: Classes, own: Sequence[str]) -> Labels:
    """The model takes over the classes of the images; with a new head where their number is another one."""
    new_head = len(classes.names) != len(own)
    change = "The layer that tells them apart starts from random weights." if new_head else "It learns the new names."
    _say(f"{_difference(classes, own)} {change}")
    return Labels(range(len(classes.names)), classes.names, new_head)


def _found_by_name(names: Sequence[str], own: Sequence[str]) -> list[int] | None:
    """The label of each name, however it is spelled; `None` if one has none, or several."""
    if list(names) == list(own):
        return list(range(len(own)))
    places: dict[str, list[int]] = {}
    for number, name in enumerate(own):
        places.setdefault(_plain(name), []).append(number)
    found = [places.get(_plain(name), []) for name in names]
    numbers = [place[0] for place in found if len(place) == 1]
    return numbers if len(set(numbers)) == len(names) else None


def _plain(name: str) -> str:
    """`Golden_Retriever` → `golden retriever`: names of folders have no spaces, and no common case."""
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _difference(classes: Classes, own: Sequence[str]) -> str:
    theirs, ours = (listed([printable(name) for name in names]) for names in (classes.names, own))
    return f"The images have {len(classes.names)} classes ({theirs}), the model has {len(own)} labels ({ours})."


def _say(what: str) -> None:
    logger.warning("%s", what)
