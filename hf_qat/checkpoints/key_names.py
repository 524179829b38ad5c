"""The names of weights: prefixes that wrappers add, and the older names under which `save_pretrained` writes.

transformers 5 renamed many modules; it saves under the old names and renames at loading, by the table in its
`conversion_mapping`. Loading by `load_state_dict` needs the same renaming.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from copy import deepcopy

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)


#: What DataParallel, DistributedDataParallel and `QATFxModule` put before every key, and what `torch.compile` does.
WRAPPER_PREFIXES = ("module.", "_orig_mod.")


def without_wrapper(state: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """`state` with the prefixes of the wrappers that the model of these `names` is in, and of no others.

    What every key has counts as a wrapper's, unless the model has one of the keys as it is.
    """
    if any(key in names for key in state):
        return dict(state)
    theirs, own = _wrappers(state), _wrappers(names)
    return {own + key.removeprefix(theirs): value for key, value in state.items()}


def _wrappers(keys: Collection[str]) -> str:
    """The prefixes of wrappers that every one of the keys begins with, one after the other."""
    found = ""
    while keys:
        prefix = next((p for p in WRAPPER_PREFIXES if all(key.startswith(found + p) for key in keys)), None)
        if prefix is None:
            break
        found += prefix
    return found


def without_attribute(state: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """`state` of an object that has the model of these `names` as an attribute, as Lightning's modules do, as its own.

    Only where no key is the model's as it is. Of two attributes that fit alike, as a student and a teacher, it is
    neither. What the object has besides keeps its name.
    """
    if any(key in names for key in state):
        return dict(state)
    fits = Counter(key[: at + 1] for key in state for at, c in enumerate(key) if c == "." and key[at + 1 :] in names)
    best = fits.most_common(2)
    prefix = best[0][0] if best and (len(best) == 1 or best[0][1] > best[1][1]) else ""
    return {key.removeprefix(prefix): value for key, value in state.items()}


def native_names(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` under the names that `model` has for it, as `from_pretrained` would find them.

    A tensor that an old version kept in one piece may become several, and the other way round. Keys for which the
    model has no name keep their own.
    """
    own = model.state_dict()
    if state.keys() <= own.keys() or own.keys() <= state.keys():
        return dict(state)
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    conversions: dict[str, WeightConverter] = {}
    renamed: dict[str, Tensor] = {}
    for key in sorted(state, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, own)
        if name not in own or pattern is None:
            renamed[name if name in own else key] = state[key]
            continue
        conversion = conversions.setdefault(name, deepcopy(converter_of[pattern]))
        conversion.add_tensor(name, key, pattern, state[key])  # type: ignore[arg-type]  # takes tensors, too
    for name, conversion in conversions.items():
        for target, value in conversion.convert(name, model=model, config=model.config).items():
            renamed[target] = value[0] if isinstance(value, list) else value
    return renamed
