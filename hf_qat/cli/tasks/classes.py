"""The classes of a data set: by name, or by number alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hf_qat.errors import ConfigError


@dataclass(frozen=True)
class Classes:
    """The classes of a data set, in the order of their numbers.

    Attributes:
        names: of each; empty where there are no classes, as for distances.
        named: whether the data set says them; else they are its numbers, written out.
    """

    names: tuple[str, ...] = ()
    named: bool = False

    @classmethod
    def numbered(cls, count: int) -> Classes:
        """So many classes that have no names."""
        return cls(tuple(str(number) for number in range(count)))

    def number_of(self, value: object) -> int:
        """The number of the class that a row names, or numbers.

        Raises:
            ConfigError: there is no such class; data sets number what is not labelled -1.
        """
        number = self.names.index(value) if isinstance(value, str) else value
        if not isinstance(number, int) or not 0 <= number < len(self.names):
            raise ConfigError(f"a label is {value!r}, which is none of the {len(self.names)} classes.")
        return number


def classes_of(feature: Any, values: Iterable[object]) -> Classes:
    """The classes that the type of a column says, or else its values.

    Args:
        feature: the column's type in `datasets`.
        values: what is in it; read only where the type has no names.

    Raises:
        ConfigError: a value is neither a text nor a number from 0 on, or both occur.
    """
    if hasattr(feature, "names"):
        return Classes(tuple(feature.names), named=True)
    found = {tuple(value) if isinstance(value, list) else value for value in values}
    if all(isinstance(value, str) for value in found):
        return Classes(tuple(sorted(map(str, found))), named=True)
    wrong = [value for value in found if not isinstance(value, int) or value < 0]
    if wrong:
        raise ConfigError(f"a label is {wrong[0]!r}: each is to be the name of a class, or its number from 0 on.")
    return Classes.numbered(1 + max(value for value in found if isinstance(value, int)))
