"""The quantizer that transformers finds for `quant_method: "hf_qat"`; loaded by `import hf_qat`, so it imports little.

`from_pretrained` builds the model on the meta device, calls the hook before loading, which rebuilds graphs and
quantizers there, reads the weights, and calls the hook after loading.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging

from hf_qat.config.checks import QUANT_METHOD
from hf_qat.config.qat_config import QATConfig
from hf_qat.errors import ConfigError


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_qat.checkpoints.rebuild import PendingRestore

logger = logging.get_logger(__name__)


@register_quantizer(QUANT_METHOD)
class QATHfQuantizer(HfQuantizer):
    """Loads both kinds of checkpoint, and prepares a float one if `quantization_config=QATConfig(…)` is passed."""

    quantization_config: QATConfig
    _pending: PendingRestore | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse to spread a model over devices: a graph reads weights without calling the layers they belong to."""
        devices = {str(device) for device in device_map.values()} if isinstance(device_map, dict) else set()
        if len(devices) > 1 or "disk" in devices:
            raise ConfigError(
                f"device_map spreads the model over {', '.join(sorted(devices))}, and hf_qat runs one on one device: "
                'pass device_map={"": 0} for the first GPU, or leave it out and call model.to(device).'
            )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """float32, always: scales and codes mean nothing in less; autocast is the way to train in bfloat16."""
        if dtype != torch.float32:
            logger.warning(
                f"hf_qat loads in float32, not in {dtype}: rounding to codes needs exact scales. To train faster, "
                "pass bf16=True in the TrainingArguments."
            )
        return torch.float32

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether the stored shape may differ from that of the module: integer codes are stored flat."""
        return self._pending is not None and param_name in self._pending.codes

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if self.pre_quantized:
            from hf_qat.checkpoints.rebuild import rebuild_before_loading

            self._pending = rebuild_before_loading(model, self.quantization_config, checkpoint_files)
            self.quantization_config = model.config.quantization_config
        else:
            from hf_qat.checkpoints.validation import require_no_quantizers

            require_no_quantizers(checkpoint_files)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        from hf_qat.checkpoints.rebuild import detach_quantizer, restore_after_loading
        from hf_qat.model.prepare import prepare_qat

        if self._pending is not None:
            restore_after_loading(model, self._pending)
            self._pending = None
        else:
            detach_quantizer(model)
            prepare_qat(model, self.quantization_config)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save_pretrained` writes of a converted model."""
        from hf_qat.checkpoints.stored_format import stored_state

        return stored_state(model), {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        from hf_qat.checkpoints.dequantization import dequantize_

        return dequantize_(model, dtype)

    def is_serializable(self) -> bool:
        """Both kinds are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """A Trainer must take a converted model too, to evaluate it; training it fails for lack of parameters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """See `is_trainable`."""
        return True


register_quantization_config(QUANT_METHOD)(QATConfig)
