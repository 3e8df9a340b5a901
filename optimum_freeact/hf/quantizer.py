"""`FreeActHfQuantizer`: quantize while loading, save, load, dequantize.

Quantizing loads the full-precision model as usual and calibrates in the hook that runs after loading. Loading a saved
model puts empty quantized modules into the model on the meta device before its weights are read; transformers then
fills them by name, and full-precision weights never exist.
"""

from __future__ import annotations

import copy
import logging
import os
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer

from optimum_freeact.config import FreeActConfig


logger = logging.getLogger(__name__)


class FreeActHfQuantizer(HfQuantizer):
    """Quantizer of `quant_method` "freeact"; see [`FreeActConfig`] for the settings."""

    requires_calibration = False  # True would forbid quantizing in from_pretrained

    pre_quantized: bool  # the host's

    def __init__(self, quantization_config: FreeActConfig, **kwargs: Any):
        # a copy: what calibration records belongs to this model, and the caller may quantize another with the same config
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        self._user_device_map: Any = None
        self._data: Any = None
        self._shapes: dict[str, tuple[int, ...]] = {}

    # ---------------------------------------------------------------- before loading
    def validate_environment(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Refuse before a model is loaded what cannot work: no or unusable data, devices that are not there."""
        if self.pre_quantized:
            return
        config = self.quantization_config
        check_places(config, kwargs.get("device_map"))
        if self._data is None:  # transformers asks twice
            from optimum_freeact.calibration.data import read_data

            self._data = read_data(config.dataset, config.n_samples, config.seq_len)

    def update_device_map(self, device_map: Any) -> Any:
        """While quantizing the model waits on the CPU; the user's map is used for the (smaller) quantized model."""
        if self.pre_quantized:
            return device_map
        self._user_device_map = device_map
        return None if device_map is None else {"": "cpu"}

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self.pre_quantized:
            from optimum_freeact.hf.serialization import check_checkpoint, check_names, shapes_of
            from optimum_freeact.modules.surgery import build_empty
            from optimum_freeact.type_state import attach_state

            names = check_checkpoint(kwargs.get("checkpoint_files"))
            build_empty(model, self.quantization_config, attach_state(model))
            check_names(model, names)
            self._shapes = shapes_of(model)
        return model

    # ---------------------------------------------------------------- after loading
    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:  # noqa: ARG002
        from optimum_freeact.hf.serialization import check_loaded
        from optimum_freeact.modules.runtime import activate

        if self.pre_quantized:
            check_loaded(model, self._shapes)
        else:
            from optimum_freeact.calibration.run import run_calibration

            run_calibration(model, self.quantization_config, self._data)
            self._data = None
            self.pre_quantized = True
        activate(model, self.quantization_config)
        if self._user_device_map is not None:
            _dispatch(model, self._user_device_map)
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        from optimum_freeact.modules.runtime import dequantize_

        if isinstance(dtype, str):  # save_pretrained leaves config.dtype as a string
            dtype = getattr(torch, dtype)
        return dequantize_(model, dtype)

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[None, dict]:
        """Asked when saving: packed experts keep the names they have in the model, whatever the original format had."""
        from optimum_freeact.hf.names import keep_packed_experts

        keep_packed_experts(model)
        return None, {}

    # ---------------------------------------------------------------- what it can do
    def is_serializable(self) -> bool:
        """Always: plain tensors in safetensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters (LoRA) train on top; the quantized weights themselves do not."""
        return True

    @property
    def is_compileable(self) -> bool:
        """`torch.compile` traces the modules without graph breaks."""
        return True


def check_places(config: FreeActConfig, device_map: Any) -> None:
    """Refuse a disk in the device map, a calibration device that is not there, and a `resume_dir` that is a file."""
    if isinstance(device_map, dict) and "disk" in device_map.values():
        raise ValueError(
            "device_map places modules on disk, which works for saved FreeAct checkpoints but not while quantizing: "
            "quantize on 'cpu' (blocks are moved to the GPU one by one), save, and load with that device_map."
        )
    name = config.calibration_device
    try:
        kind = None if name is None else torch.device(name).type
    except RuntimeError:
        kind = "?"
    if kind == "?" or (kind == "cuda" and not torch.cuda.is_available()):
        raise ValueError(
            f"calibration_device={name!r} is not available here; leave it out to take cuda where there is one, else cpu."
        )
    if config.resume_dir is not None and os.path.isfile(config.resume_dir):
        raise ValueError(f"resume_dir={config.resume_dir!r} is a file; name a folder.")


def _dispatch(model: nn.Module, device_map: Any) -> None:
    """Place the quantized model as the user asked, planned with its packed sizes."""
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    if isinstance(device_map, (int, torch.device)) or (isinstance(device_map, str) and device_map not in AUTO_MAPS):
        device_map = {"": device_map}
    if isinstance(device_map, str):
        split = list(getattr(model, "_no_split_modules", None) or [])
        memory = get_balanced_memory(model, no_split_module_classes=split, low_zero=device_map == "balanced_low_0")
        device_map = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=split)
    if set(map(str, device_map.values())) == {"cpu"}:
        return
    if len(set(device_map.values())) == 1:
        model.to(next(iter(device_map.values())))
        return
    dispatch_model(model, device_map=device_map)


AUTO_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
