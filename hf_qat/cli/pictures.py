"""One picture of a data set: read, in colour, and beside the picture that is its label. Errors name the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from PIL import Image, UnidentifiedImageError

from hf_qat.errors import ConfigError
from hf_qat.tidl.templates.infer import eight_bits


#: What Pillow raises for a file that it cannot read: damaged, cut off, of no kind that it knows, or a huge one.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def read(value: Mapping[str, Any]) -> Image.Image:
    """A picture, upright.

    Args:
        value: as `datasets.Image(decode=False)` gives it.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        content = Path(value["path"]).read_bytes() if _is_file(value) else value["bytes"]  # so that no file stays open
        image: Image.Image = datasets.Image().decode_example({**value, "bytes": content})
    except UNREADABLE as error:
        raise _unreadable(value, error) from error
    return image


def require_readable(dataset: datasets.Dataset, column: str) -> None:
    """Raise `ConfigError` for the first file of a column that is missing or no picture, before time is spent.

    The first bytes of each file are read. Pictures that lie in the data set itself are not looked at.
    """
    for value in dataset[column]:
        if value is None:
            raise ConfigError(f"a row has no {column!r}: give a picture in each.")
        if value["bytes"] is not None:
            return
        if _is_file(value):
            try:
                Image.open(value["path"]).close()
            except UNREADABLE as error:
                raise _unreadable(value, error) from error


def _is_file(value: Mapping[str, Any]) -> bool:
    """Whether the picture is a file of this machine: of another one, `datasets` keeps the address."""
    return value["bytes"] is None and value["path"] is not None and "://" not in value["path"]


def _unreadable(value: Mapping[str, Any], error: Exception) -> ConfigError:
    if isinstance(error, FileNotFoundError):
        return ConfigError(f"there is no file {name_of(value)}.")
    reason = "no kind of picture that is known" if isinstance(error, UnidentifiedImageError) else str(error)
    return ConfigError(f"{name_of(value)} cannot be read as a picture ({reason}): repair it, or take it out.")


def name_of(value: Mapping[str, Any]) -> str:
    """The path of a picture, as far as the data set knows it."""
    return str(value.get("path") or "a picture of the data set")


@contextmanager
def naming(value: Mapping[str, Any]) -> Iterator[None]:
    """What goes wrong inside names the picture."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{name_of(value)}: {error}") from error


def in_colour(image: Image.Image) -> Image.Image:
    """A picture as models take it: RGB, 8 bits each. Of 16 bits the upper 8 are taken.

    Raises:
        ConfigError: its values are floating-point numbers, of which nobody knows what is white.
    """
    if image.mode == "F":
        raise ConfigError("an image holds floating-point numbers: save it with 8 or 16 bits.")
    rgb: Image.Image = eight_bits(image).convert("RGB")
    return rgb


def require_same_shape(image: Image.Image, label: Image.Image) -> None:
    """Raise `ConfigError` for a label whose pixels cannot be those of the image: of another ratio of its edges."""
    (width, height), (wide, high) = image.size, label.size
    if abs(wide * height - high * width) > max(width, height):  # a pixel more or less, where one was made smaller
        raise ConfigError(
            f"the picture that is its label has {wide}x{high} pixels, and it has {width}x{height}: give labels of the "
            "same size, or of one that is smaller by the same factor in both directions."
        )
