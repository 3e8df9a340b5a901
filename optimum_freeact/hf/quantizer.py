"""`FreeActHfQuantizer`: quantize while loading, save, load, dequantize.

Quantizing loads the full-precision model as usual and calibrates in the hook that runs after loading. Loading a saved
model puts empty quantized modules into the model on the meta device before its weights are read; transformers then
fills them by name, and full-precision weights never exist.
"""

from __future__ import annotations

import copy
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer

from optimum_freeact.calibration.prepared import is_prepared
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
        self._loading_map: dict | None = None
        self._data: Any = None
        self._shapes: dict[str, tuple[int, ...]] = {}

    # ---------------------------------------------------------------- before loading
    def validate_environment(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Refuse before a model is loaded what cannot work: no or unusable data, devices that are not there."""
        if self.pre_quantized:
            return
        config = self.quantization_config
        check_places(config, kwargs.get("device_map"))
        check_held_out(config)
        if self._data is None:  # transformers asks twice
            from optimum_freeact.calibration.data import read_data

            self._data = read_data(config.dataset, config.n_samples, config.seq_len)

    def update_device_map(self, device_map: Any) -> Any:
        """While quantizing the model waits on the CPU; the user's map is used for the (smaller) quantized model."""
        if self.pre_quantized:
            self._loading_map = dict(device_map) if isinstance(device_map, dict) else None
            return device_map if self._loading_map is None else self._loading_map
        self._user_device_map = device_map
        return None if device_map is None else {"": "cpu"}

    def update_attn_implementation(self, config: Any) -> Any:
        """The last that the host asks before it reads the index of a checkpoint in several files, and the only time that it
        tells the folder: a damaged one is refused by name here, where the host's own error would be the JSON parser's.
        """
        folder = getattr(config, "name_or_path", None)
        if folder and os.path.isdir(folder) and not os.path.isfile(os.path.join(folder, "model.safetensors")):
            from optimum_freeact.hf.serialization import check_index

            check_index(Path(folder) / "model.safetensors.index.json")
        return super().update_attn_implementation(config)

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self.pre_quantized:
            from optimum_freeact.hf.serialization import check_checkpoint, check_names, shapes_of
            from optimum_freeact.modules.surgery import build_empty
            from optimum_freeact.type_state import attach_state

            names = check_checkpoint(kwargs.get("checkpoint_files"))
            build_empty(model, self.quantization_config, attach_state(model))
            check_names(model, names)
            if self._loading_map is not None:  # the dictionary that transformers goes on with
                self._loading_map.update(with_our_modules(model, self._loading_map))
            self._shapes = shapes_of(model)
        else:
            check_covers(model, self._user_device_map)
        return model

    # ---------------------------------------------------------------- after loading
    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:  # noqa: ARG002
        from optimum_freeact.hf.saving import install
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
        install(model)
        if self._user_device_map is not None:
            _dispatch(model, self._user_device_map)
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        from optimum_freeact.hf.saving import remove
        from optimum_freeact.modules.runtime import dequantize_

        if isinstance(dtype, str):  # save_pretrained leaves config.dtype as a string
            found = getattr(torch, dtype.removeprefix("torch."), None)
            if not (isinstance(found, torch.dtype) and found.is_floating_point):
                raise ValueError(
                    f"dtype must be a floating-point type such as 'float32', 'bfloat16' or 'float16', got {dtype!r}."
                )
            dtype = found
        dequantize_(model, dtype)
        remove(model)
        return model

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
    """Refuse devices that are not there, a disk in the device map, and a `resume_dir` that is a file.

    The device map is needed only when all is quantized, which is the wrong time to learn that it cannot be.
    """
    places = list(device_map.values()) if isinstance(device_map, dict) else [device_map]
    if "disk" in places:
        raise ValueError(
            "device_map places modules on disk, which works for saved FreeAct checkpoints but not while quantizing: "
            "quantize on 'cpu' (blocks are moved to the GPU one by one), save, and load with that device_map."
        )
    for place in places:
        if place is not None and place not in AUTO_MAPS and not is_there(place):
            raise ValueError(
                f"device_map places modules on {str(place)!r}, which is not available here; use 'cpu', a device of this "
                f"machine, or one of {list(AUTO_MAPS)}."
            )
    name = config.calibration_device
    if name is not None and not is_there(name):
        raise ValueError(
            f"calibration_device={name!r} is not available here; leave it out to take cuda where there is one, else cpu."
        )
    if config.resume_dir is not None and os.path.isfile(config.resume_dir):
        raise ValueError(f"resume_dir={config.resume_dir!r} is a file; name a folder.")


def check_held_out(config: FreeActConfig) -> None:
    """Refuse to learn from the closed form without a batch to judge by: what was learned on it says nothing."""
    prepared = isinstance(config.dataset, (list, tuple)) and is_prepared(config.dataset)  # each a batch of its own
    one = config.n_samples <= (1 if prepared else config.batch_size)
    if config.calibration == "learned" and config.learned_start == "closed_form" and one:
        raise ValueError(
            "calibration='learned' holds out the last batch and keeps what it learns only where that batch's error falls: "
            f"n_samples={config.n_samples} with batch_size={config.batch_size} is one batch. Take more samples, or smaller "
            "batches."
        )


def is_there(device: Any) -> bool:
    """Whether tensors with values can be made on a device of this name, number or kind."""
    try:
        return torch.empty(0, device=device).device.type != "meta"
    except (RuntimeError, AssertionError, NotImplementedError, TypeError):
        return False


def check_covers(model: nn.Module, device_map: Any) -> None:
    """Refuse a device map that leaves out a part of the model.

    Raises:
        `ValueError`: naming the first such tensors.
    """
    if not isinstance(device_map, dict) or "" in device_map or len(set(map(str, device_map.values()))) == 1:
        return
    left = [name for name in model.state_dict() if _key_of(name, device_map) is None]
    if left:
        raise ValueError(
            f"device_map has no device for {len(left)} tensors of {type(model).__name__}, the first are {left[:3]}: add "
            "their modules, or '' for all that is not named."
        )


def with_our_modules(model: nn.Module, device_map: dict) -> dict:
    """A device map made for the full-precision model, with places for the modules that quantizing added."""
    from optimum_freeact.modules.activation import FreeActInput
    from optimum_freeact.modules.kv_buffers import CacheMeanBuffers

    found = dict(device_map)
    working = next((place for place in device_map.values() if place not in ("cpu", "disk")), "cpu")
    for name, module in model.named_modules():
        if isinstance(module, (FreeActInput, CacheMeanBuffers)) and _key_of(name, device_map) is None:
            served = _key_of(name.removesuffix("_input"), device_map)  # the linear beside it
            found[name] = working if served is None else device_map[served]
    return found


def _key_of(name: str, device_map: dict) -> str | None:
    """The entry of a device map that holds a module or tensor."""
    return max((key for key in device_map if f"{name}.".startswith(f"{key}.")), key=len, default=None)


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
    dispatch_model(model, device_map=with_our_modules(model, device_map))


AUTO_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
