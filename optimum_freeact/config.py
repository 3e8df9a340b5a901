"""`FreeActConfig`: what to quantize and how; plain JSON, written into `config.json`."""

from __future__ import annotations

import copy
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from optimum_freeact.config_checks import check_combinations, check_types, check_values
from optimum_freeact.config_fields import DEFAULTS, FORMAT_VERSION, LOADING, RECORDED, RUNTIME
from optimum_freeact.presets import PRESETS
from optimum_freeact.type_rules import AUTO, SINK, TEXT


LOUDNESS_LIMIT = 2.0


class FreeActConfig(QuantizationConfigMixin):
    """Quantization settings of `optimum_freeact`, for `from_pretrained(..., quantization_config=FreeActConfig(...))`.

    Every argument that is left out takes the preset's value, then the default named here.

    Args:
        preset (`str`, *optional*, defaults to `"freeact"`):
            `"rtn"`, `"smoothquant"`, `"quarot"`, `"flatquant"`, `"freeact-paper"`, `"freeact-fastest"`, `"freeact-fast"` or
            `"freeact"`.
        weight_bits, activation_bits (`int`, *optional*, defaults to 4): 4, 8 or 16 (16: not rounded).
        kv_bits (`int`, *optional*, defaults to 16): 4, 8 or 16, for the KV cache of every forward that uses one.
        kv_rotation (`bool`, *optional*): Rotate keys and values, less their means, before the cache rounds them. Left out, the cache
            rotates where `transform` does; which it is, is recorded. (Checkpoints without a record, from before means and rotation
            went together, are rotated where they have no means.)
        weight_group_size (`int`, *optional*): Columns of a (transformed) weight that share a scale: one float per row times
            one byte per group; `None` for one scale per row. A size given here must divide every linear's input size; a
            preset's is replaced by the largest of 32 and 16 that does, or `None`, and recorded.
        activation_group_size (`int`, *optional*): Entries of a (transformed) activation that share a grid, made at run time;
            `None` for one grid per token. Divides as `weight_group_size` does.
        activation_symmetric (`bool`, *optional*): Symmetric or asymmetric grid per token.
        transform (`str`, *optional*): `"none"`, `"hadamard"`, `"kronecker"` (closed form or learned) or `"orthogonal"`
            (dense random; for comparison, d^2 numbers per input).
        channel_scale (`str`, *optional*): `"none"`, `"smoothquant"` or `"closed_form"`.
        smooth_alpha (`float`, *optional*, defaults to 0.5): Migration strength of `"smoothquant"` scales.
        centring (`str`, *optional*): Subtract the mean activation, exactly compensated by an output bias: `"none"`,
            `"shared"` by all tokens or `"per_type"`.
        low_rank (`int`, *optional*): Rank of a branch, stored in one byte a number, that carries each input's strongest
            directions around the rounding; 0 for none.
        low_rank_budget (`float`, *optional*): Cut each input's rank (not below 8) to what fits into this share of the bfloat16
            bytes of its linears, with all else that is stored but the codes; the default is not to.
        loudness_limit (`float` or `"auto"`, *optional*): Beyond so many times what is usual in its type, a calibration token's
            energy counts for no more: a few far louder tokens, which act as attention sinks somewhere inside a sequence, decide
            neither the type's mean nor how weights are rounded. `"auto"`, the default of our presets, is 2 for models that have
            types beyond text and sink (whether they are used or not), and no limit for others; `None` is no limit.
        embedding_bits (`int`, *optional*, defaults to 16): 8 stores embeddings and output head in one byte a number and one
            scale a row, tied ones once; 16 leaves them as they are. Refused for embeddings that compute something of their own.
        type_rank (`int`, *optional*, defaults to 0): So many further directions of that branch for each token type alone, its
            own strongest: columns that the weight has once more and other types do not use. Exact for every type.
        rounding (`str`, *optional*): `"rtn"` or `"gptq"` for the weights.
        rounding_passes (`int`, *optional*): Passes of coordinate descent after `"gptq"`, each with a second choice for
            every code; 0 is GPTQ itself.
        activation_clip (`float` or `"search"`, *optional*): Share of each token's range that the grid covers.
        weight_clip (`float` or `"search"`, *optional*): The same for each weight row.
        token_types (`list[str]`, *optional*): The types of tokens, `"text"` first. `"sink"` is the first token of each
            sequence; `"mask"`, `"image"`, `"video"`, `"audio"` are placeholders that the model's config names, `"auto"`
            stands for all that it names, and others need a rule.
        type_rules (`dict`, *optional*): How tokens of a type are known: a list of token ids, or `{"column": argument,
            "values": [1]}` for an argument of the model's forward of shape `(batch, sequence)`.
        typer (*optional*): A callable instead of rules: it gets a forward's arguments as a dictionary and returns the
            position of each token's type in `token_types`, of shape `(batch, sequence)`. Not saved: to be given again
            when the model is loaded.
        discovered_types (`int`, *optional*, defaults to 0): Split text into so many types, clusters of token ids that
            calibration finds; 0 for none. Costs a mean and a bias each at every layer.
        exclusive (`str`, *optional*, defaults to `"none"`): Coordinates that only one type uses and that are zero for
            the others: `"fixed"` as in the paper, or `"closed_form"` where the measured error falls.
        exclusive_share (`float` or `dict[str, float]`, *optional*, defaults to 0.03125): Share of each input's
            coordinates per type; a dictionary gives it by the name of a linear that reads the input (others: 0).
        calibration (`str`, *optional*): `"closed_form"` (seconds) or `"learned"` (gradient steps on block outputs).
        learned_start (`str`, *optional*, defaults to `"closed_form"`): Where learning starts: `"closed_form"` or
            `"random"`. From the closed form it is kept only where the held-out block error falls.
        learned_part (`str`, *optional*): What is learned: the transforms, channel scales and clips, after
            which weights are rounded again (`"maps"`), or the rows' scales, branches and biases behind the rounded weights
            (`"outputs"`).
        learning_rate (`float`, *optional*, defaults to 2e-3): Of AdamW on transforms and scales; clips use ten times it.
        epochs (`int`, *optional*, defaults to 15): Passes over the calibration samples per block when learning.
        error_correction (`bool`, *optional*): Move each weight half the way to the one whose output on the quantized
            model's inputs is nearest to the full-precision model's; what a linear reads is then measured behind those of its own
            block that are quantized already. With tokens only a few times as many as an input is wide, it does harm.
        propagate_error (`bool`, *optional*, defaults to `True`): Calibrate each block on the outputs of the quantized
            blocks before it instead of the full-precision ones.
        sequential (`bool`, *optional*, defaults to `False`): Round all weights first, as GPTQ and QuaRot do: what reaches a
            linear in calibration has passed the quantized weights of all linears before it, those of its own block
            included, and no rounding of activations.
        rounding_order (`str`, *optional*, defaults to `"energy"`): In which order GPTQ rounds the columns: those whose
            inputs have most energy first, or as they come (`"columns"`).
        rounding_noise (`bool`, *optional*, defaults to `True`): Whether GPTQ's moments hold the rounding noise of the
            activations.
        rounding_shrinkage (`bool`, *optional*): Round, in the place of the weight, the one that predicts its outputs best from
            inputs with the activations' rounding noise: shrunk where the noise is louder than the input. Only where calibration has
            six tokens or more for each entry of the input: with fewer it fits what it has seen.
        rounding_refit (`bool`, *optional*, defaults to `False`): Fit the scales of groups to the codes that GPTQ found, and choose
            every code once more.
        attention_compensation (`bool`, *optional*, defaults to `False`): Give the attention's output the moments that it has
            in full precision, by the weight of the linear that reads it (STaR-Quant; closed form, no cost when running).
        dataset (`str`, `list` or `torch.Tensor`, *optional*): Calibration data: a dataset name (needs `datasets` and a
            reachable hub), the path of a text or JSON-lines file (`text` or `messages`, with `images` for a vision-language
            model), a list of strings or of chat messages, token ids of shape `(n, length)`, or a processor's outputs.
            Needed to quantize, not to load. Not saved.
        tokenizer (`str` or tokenizer object, *optional*): Defaults to that of the model's folder. Not saved.
        n_samples (`int`, *optional*, defaults to 32), seq_len (`int`, *optional*, defaults to 512):
            Calibration samples and their length in tokens.
        batch_size (`int`, *optional*, defaults to 4): Samples per calibration forward.
        seed (`int`, *optional*, defaults to 0): Of sample choice, rotations and learning.
        damping (`float`, *optional*, defaults to 0.01): Share of the mean diagonal added in GPTQ.
        modules_to_not_convert (`list[str]`, *optional*): Names (or endings of names) of linears left as they are. Only
            linears inside the decoder blocks are quantized in any case: embeddings and the output head stay.
        calibration_device (`str`, *optional*): Where blocks are calibrated; the default is `cuda` if there is one.
        resume_dir (`str`, *optional*): Folder for finished blocks, so that an interrupted calibration resumes.
        progress (`bool`, *optional*, defaults to `True`): Show progress bars.
        across_processes (`bool`, *optional*, defaults to `False`): Share the calibration among all processes of an
            `accelerate launch` or `torchrun`, each on its own GPU; every one must quantize the same model on the same data
            and ends with the same result. Not saved.

    Raises:
        `TypeError`: for an argument that is not known.
        `ValueError`: for a value outside the list; the message names what is allowed.
    """

    def __init__(self, preset: str = "freeact", **kwargs: Any):
        kwargs.pop("quant_method", None)
        version = kwargs.pop("format_version", FORMAT_VERSION)
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise ValueError(f"format_version must be a positive integer, got {version!r}: the config is damaged.")
        if version > FORMAT_VERSION:
            raise ValueError(
                f"This checkpoint has format version {version}; this release reads versions up to {FORMAT_VERSION}. "
                "Install a newer hf-concord to load it."
            )
        if not isinstance(preset, str) or preset not in PRESETS:
            raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {preset!r}.")
        known = {**DEFAULTS, **PRESETS[preset]}
        unknown = sorted(set(kwargs) - set(known) - set(RUNTIME) - set(RECORDED))
        if unknown:
            raise TypeError(
                f"FreeActConfig does not know {unknown}; known arguments: {sorted({*known, *RUNTIME, 'preset'})}."
            )
        self._given = sorted(kwargs) + (["preset"] if preset != "freeact" else [])
        self.quant_method = "freeact"
        self.format_version = version
        self.preset = preset
        for name, default in known.items():
            setattr(self, name, kwargs.get(name, copy.deepcopy(default)))
        for name in RECORDED:
            setattr(self, name, kwargs.get(name))
        for name in RUNTIME:
            setattr(self, name, kwargs.get(name, {"progress": True, "across_processes": False}.get(name)))
        self.post_init()

    def post_init(self) -> None:
        """Check every value once, and combinations that contradict each other; type rules and names are completed."""
        check_values(self)
        check_types(self)
        check_combinations(self)

    @property
    def n_types(self) -> int:
        """Number of token types; known once `"auto"` is replaced by what the model has.

        Raises:
            `ValueError`: before that.
        """
        if AUTO in self.token_types:
            raise ValueError(f"token_types={self.token_types} is not resolved yet: the model's config decides.")
        return len(self.token_types)

    @property
    def given(self) -> tuple[str, ...]:
        """Arguments that the caller named; the others are the preset's, or defaults."""
        return tuple(self.__dict__.get("_given", ()))

    @property
    def pooled_types(self) -> list[int]:
        """For each type the one whose clip it shares: itself, or text for a cluster of text."""
        return [
            0 if "cluster" in (self.type_rules or {}).get(name, {}) else k for k, name in enumerate(self.token_types)
        ]

    @property
    def loudest(self) -> float | None:
        """The `loudness_limit` for the model's types; known once `"auto"` types are replaced by what the model has."""
        if self.loudness_limit != "auto":
            return self.loudness_limit
        rules = self.type_rules or {}
        told = [name for name in self.token_types if name not in (TEXT, SINK) and "cluster" not in rules.get(name, {})]
        return LOUDNESS_LIMIT if told else None

    @property
    def scheme(self) -> str:
        """Bits in the field's short form, e.g. `"W4A4KV4"`."""
        return f"W{self.weight_bits}A{self.activation_bits}" + (f"KV{self.kv_bits}" if self.kv_bits < 16 else "")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON without what is known only while calibrating."""
        return {k: copy.deepcopy(v) for k, v in self.__dict__.items() if k not in RUNTIME and k != "_given"}

    def get_loading_attributes(self) -> dict[str, Any]:
        """What may be chosen anew when a saved model is loaded: the bits of the KV cache, and its rotation.

        Raises:
            `ValueError`: if this config was meant for quantizing; a quantized checkpoint is not quantized again.
        """
        if self.input_groups is not None:  # it comes from a quantized model itself
            return {name: getattr(self, name) for name in LOADING}
        other = [name for name in self._given if name not in LOADING]
        if other:
            raise ValueError(
                f"The checkpoint is quantized already: {other} cannot be changed. Load it without quantization_config "
                f"(or with {list(LOADING)} only), or quantize the full-precision model again."
            )
        return {name: getattr(self, name) for name in LOADING if name in self._given}

    def __iter__(self):
        yield from self.to_dict().items()

    def __deepcopy__(self, memo: dict) -> FreeActConfig:
        clone = self.__class__.__new__(self.__class__)
        memo[id(self)] = clone
        for key, value in self.__dict__.items():  # data and tokenizer are shared, not copied
            clone.__dict__[key] = value if key in RUNTIME else copy.deepcopy(value, memo)
        return clone
