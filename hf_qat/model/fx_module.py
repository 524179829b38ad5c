"""`QATFxModule`: the wrapper that users of TI's edgeai-modeloptimization know, over the calls of this package.

Its training loop has no call for calibration and none for a schedule: the first batch and `train()` stand in for them.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from hf_qat.config.checkpoint_info import Stage
from hf_qat.config.checks import count
from hf_qat.config.qat_config import QATConfig
from hf_qat.errors import StageError
from hf_qat.graph.capture.inputs import Inputs
from hf_qat.model.calibration import calibrate
from hf_qat.model.conversion import convert
from hf_qat.model.prepare import prepare_qat
from hf_qat.model.schedule import QATSchedule
from hf_qat.model.state import require_stage
from hf_qat.model.switches import freeze_ranges
from hf_qat.quantization.quantizer import fake_quantizers


class QATFxModule(nn.Module):
    """A prepared model in the manner of TI's wrapper of that name.

    Args:
        model: any `nn.Module`; prepared in place.
        total_epochs: how often `train()` will be called: once at the beginning of every epoch.
        qat_config, example_inputs: as `config` and `example_inputs` of `prepare_qat`.

    Attributes:
        module: the prepared model, after `convert()` the converted one; the other functions of the package take it.
        schedule: a `QATSchedule` whose steps are epochs.

    Raises:
        ConfigError: `total_epochs` is no whole number from 1.
        StageError, CaptureError: as `prepare_qat`.

    Examples:
        model = QATFxModule(model, total_epochs=epochs)
        model.module.load_state_dict(float_state)
        for epoch in range(epochs):
            model.train()
            for images, labels in loader:
                optimizer.zero_grad()
                loss_function(model(images), labels).backward()
                optimizer.step()
            model.eval()
            evaluate(model)
        torch.save(model.module.state_dict(), "qat.pth")
        model = model.convert()
        torch.onnx.export(model.module, example, "model.onnx", opset_version=18)
    """

    def __init__(
        self,
        model: nn.Module,
        total_epochs: int,
        qat_config: QATConfig | None = None,
        example_inputs: Inputs | None = None,
    ) -> None:
        super().__init__()
        count("total_epochs", total_epochs)
        self.module = prepare_qat(model, qat_config, example_inputs)
        self.schedule = QATSchedule(self.module, total_epochs)
        self._first_epoch_begun = False
        self._ranges_known = False

    def train(self, mode: bool = True) -> QATFxModule:
        """Begin the next epoch: every call but the first advances the schedule by one; `train(False)` never does.

        To resume, call it once for each epoch that is done already.

        Raises:
            StageError: the model is converted.
        """
        if mode:
            require_stage(self.module, Stage.PREPARED, "train")
            if self._first_epoch_begun:
                self.schedule.step()
            self._first_epoch_begun = True
        self._ranges_known = False  # float weights may have been loaded since
        return super().train(mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model itself computes; the first training batch gives the ranges where there are none yet.

        Raises:
            StageError: no ranges yet, and not in training mode.
        """
        if not self._ranges_known:
            self._look_for_ranges(args, kwargs)
        return self.module(*args, **kwargs)

    def convert(self) -> QATFxModule:
        """Convert `module`, in place, and return the wrapper.

        Raises:
            StageError: converted already, or neither calibrated nor trained.
        """
        convert(self.module)
        return self.eval()

    def _look_for_ranges(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        unknown = {path: q for path, q in fake_quantizers(self.module).items() if int(q.observed) == 0}
        if not unknown:
            self._ranges_known = True
        elif self.module.training:
            names = inspect.signature(self.module.forward).parameters
            batch = {**dict(zip(names, args, strict=False)), **kwargs} if kwargs else args
            freeze_ranges(self.module, False)
            calibrate(self.module, [batch], bias_correction=False, effort="fast")
            freeze_ranges(self.module, self.schedule.phase == "ranges frozen")
            self._ranges_known = True
        elif any(quantizer.enabled for quantizer in unknown.values()):
            raise StageError(
                f"cannot evaluate: {len(unknown)} quantizers have no range yet, for instance {next(iter(unknown))}. "
                "Train on a batch, load a trained state dict, or call calibrate(wrapper.module, batches) first."
            )
