"""The call of a step of training, noted while somebody wants to look at it again."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_qat.quantization.ddp_calls import refuse_join


#: The arguments of a call of a model's forward.
Call = tuple[tuple[Any, ...], dict[str, Any]]


class CallInTraining:
    """The arguments of the latest call of a model in training, while it is listened to."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._latest: list[Call] = []
        self._handle: Any = None

    def listen(self) -> None:
        """Note what the model is called with from now on."""
        if self._handle is None:
            note = _Note(self._latest)  # not `self`, which a copy of the model would copy along
            self._handle = self._model.register_forward_pre_hook(note, with_kwargs=True)

    def take(self) -> Call | None:
        """The latest call; stops listening. `None` if there was none."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        return self._latest.pop() if self._latest else None


class _Note:
    """The hook that notes a call. Copied or pickled with its model, it notes nothing: nobody asks it there."""

    def __init__(self, latest: list[Call] | None = None) -> None:
        self._latest = latest

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training and self._latest is not None:
            refuse_join()  # who looks at the call will agree with the other processes
            self._latest[:] = [(args, kwargs)]

    def __reduce__(self) -> tuple[type[_Note], tuple[()]]:
        return _Note, ()
