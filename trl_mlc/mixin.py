"""The consistency term inside a TRL trainer: the only file that touches TRL's inner methods.

Overridden: `__init__` (which also gives a sharded reference model its weights, see `reference.py`), `_prepare_dataset`, `_set_signature_columns_if_needed`, `compute_loss`, `create_optimizer`,
`_save` and the three loading methods. With `mlc_weight=0` each of them is the stock one.
"""

from __future__ import annotations

import inspect
import logging
import random
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model

from trl_mlc.arguments import MLCArguments
from trl_mlc.collator import KEY, PromptCollator, select_prompts
from trl_mlc.data import COLUMNS, IDS, LanguageTable, encode_prompts_of
from trl_mlc.early_exit import check_layer, decoder_of
from trl_mlc.embedding import set_embedding_lr, untie_head
from trl_mlc.extractor import Extractor, LanguageMeans
from trl_mlc.first_states import choose_layer, language_means
from trl_mlc.packing import keeps_apart
from trl_mlc.prompt_pass import MODULE, PromptPass
from trl_mlc.reference import whole_reference
from trl_mlc.state import load_state, save_state
from trl_mlc.term import MLCTerm, mlc_term


if TYPE_CHECKING:
    from transformers import Trainer as Host  # a type checker sees the class that the mixin is put before
else:
    Host = object

logger = logging.getLogger(__name__)

DIVIDED = 6  # forwards by length, of a model that does not keep prompts apart that lie end to end


class MLCMixin(Host):
    """Add the Multi-Lingual Consistency term to a TRL trainer; put it before the trainer among the bases.

    A subclass sets `_mlc_config_class`. Everything else of the host trainer is untouched: its batches, its reference
    model, its losses and its logs keep their values.
    """

    _mlc_config_class: type[MLCArguments]
    _signature_columns: list[str] | None  # the host's, like the next
    data_collator: Any

    def __init__(self, *args, **kwargs):
        self._mlc_pass: PromptPass | None = None
        self._mlc_means: LanguageMeans | None = None
        self._mlc_asked: dict | None = None
        bound = inspect.signature(super().__init__).bind(*args, **kwargs)
        self._mlc_check_config(bound.arguments)
        with whole_reference(type(self)):
            super().__init__(*bound.args, **bound.kwargs)
        if self.args.mlc_weight > 0:
            self._mlc_set_up()

    def _mlc_check_config(self, arguments: dict) -> None:
        wanted: Any = self._mlc_config_class  # a config of the host, too
        if arguments.get("args") is None:
            arguments["args"] = wanted(output_dir=f"{wanted.__name__.removesuffix('Config')}-output")
        if not isinstance(arguments["args"], MLCArguments):
            raise TypeError(
                f"{type(self).__name__} needs args of type {wanted.__name__}, got {type(arguments['args']).__name__}; "
                "it takes the same arguments and the mlc_ ones."
            )
        self._mlc_languages = LanguageTable(arguments["args"].mlc_anchor)
        model = arguments.get("model")
        if arguments["args"].mlc_weight > 0 and hasattr(model, "config") and not is_peft_model(model):
            decoder = decoder_of(model)
            layer = arguments["args"].mlc_layer
            if isinstance(layer, int):
                check_layer(layer, decoder)

    def _mlc_set_up(self) -> None:
        base = self.model.get_base_model() if is_peft_model(self.model) else self.model
        if is_peft_model(self.model) and self.model.active_peft_config.is_prompt_learning:
            raise ValueError(
                f"{self.model.active_peft_config.peft_type} prepends virtual tokens that MLC's prompt pass would not "
                "see. Use LoRA or another adapter inside the layers, or mlc_weight=0."
            )
        if IDS not in (self.train_dataset.column_names or next(iter(self.train_dataset))):
            raise ValueError(
                "The training data was not prepared by the trainer (images, or skip_prepare_dataset), so its parallel "
                "prompts were not tokenized. Use text data, or mlc_weight=0."
            )
        args, decoder = self.args, decoder_of(base)
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        layer = choose_layer(decoder, self.train_dataset, args, self.accelerator.is_main_process)
        width = base.config.get_text_config().hidden_size
        extractor = Extractor(
            width, args.mlc_extractor_dim, args.mlc_extractor_bias, not args.mlc_extractor_frozen, args.seed
        )
        # One flat dtype is needed where parameters are sharded together; else the extractor stays in float32
        extractor.to(device=next(base.parameters()).device, dtype=base.dtype if sharded else torch.float32)
        if args.mlc_center != "none":
            self._mlc_means = language_means(
                decoder, layer, self.train_dataset, args, len(self._mlc_languages), self.accelerator.device
            )
        buckets = 1 if sharded else args.mlc_buckets
        if buckets == 0 and not keeps_apart(decoder, layer):
            buckets = DIVIDED
        if args.mlc_embedding_lr is not None:
            self._mlc_set_words_free(base, sharded)
        self._mlc_pass = PromptPass(base, extractor, layer, args.mlc_pooling, buckets)
        tokenizer: Any = getattr(self.processing_class, "tokenizer", self.processing_class)
        self.data_collator = PromptCollator(self.data_collator, tokenizer.pad_token_id)

    def _mlc_set_words_free(self, base, sharded: bool) -> None:
        if sharded:
            raise ValueError(
                "mlc_embedding_lr gives the embedding a group of its own, which a sharded optimizer does not keep. Leave it "
                "away, or train with replicated parameters."
            )
        if not base.get_input_embeddings().weight.requires_grad:
            raise ValueError(
                "mlc_embedding_lr trains the input embedding, which is frozen here (an adapter freezes it). Train all "
                "weights, or leave mlc_embedding_lr away."
            )
        untie_head(base)

    def _prepare_dataset(self, dataset, processing_class, args, *rest, **kwargs):
        if args.mlc_weight > 0:
            name = kwargs.get("dataset_name", rest[-1] if rest else "train")
            dataset = self._mlc_encode(dataset, processing_class, args, name)
        return super()._prepare_dataset(dataset, processing_class, args, *rest, **kwargs)

    def _mlc_encode(self, dataset, processing_class, args, name: str):
        with args.main_process_first(local=True, desc="tokenizing parallel prompts"):
            dataset = encode_prompts_of(dataset, processing_class, args, self._mlc_languages, name)
        if self._mlc_means is not None:
            self._mlc_means.grow_(len(self._mlc_languages))
        return dataset

    def _set_signature_columns_if_needed(self):
        fresh = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if fresh and self.args.mlc_weight > 0:
            self._signature_columns = [*(self._signature_columns or ()), *COLUMNS]

    def compute_ref_log_probs(self, model, inputs):
        """As the host's, for batches that carry prompts: a reference model never sees them."""
        return super().compute_ref_log_probs(model, {k: v for k, v in inputs.items() if k != KEY})

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The host's loss plus `mlc_weight` times the term, in training (and in evaluation if asked for)."""
        prompts = inputs.pop(KEY, None)
        self._mlc_request(prompts)
        result = super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        loss, *outputs = result if return_outputs else (result,)
        # Where the host divides by the tokens of all accumulated batches, `Trainer` does not divide by their number
        shared = num_items_in_batch is not None and self.loss_is_scaled_for_ga is not False
        loss = self._mlc_add(loss, prompts, self.current_gradient_accumulation_steps if shared else 1)
        return (loss, *outputs) if return_outputs else loss

    def _mlc_request(self, prompts: dict | None) -> None:
        if self._mlc_pass is None or (prompts is None and not self.model.training):
            return
        if prompts is None or (self.model.training and self.state.global_step % self.args.mlc_every != 0):
            self._mlc_asked = None
            self._mlc_pass.request(None)
            return
        if self.model.training and self.args.mlc_languages_per_step is not None:
            prompts = select_prompts(prompts, self._mlc_of_this_step())
        self._mlc_asked = prompts
        self._mlc_pass.request(prompts, self._mlc_means.of(prompts["language"]) if self._mlc_means else None)

    def _mlc_of_this_step(self) -> set[int]:
        """The languages of this step; the same on every process, and after a resume."""
        others = range(1, len(self._mlc_languages))
        count = min(self.args.mlc_languages_per_step - 1, len(others))
        return {0, *random.Random(f"{self.args.seed}-{self.state.global_step}").sample(others, count)}

    def _mlc_add(self, loss: torch.Tensor, prompts: dict | None, accumulated: int) -> torch.Tensor:
        training = self.model.training
        if self._mlc_pass is None or (prompts is None and not training):
            return loss
        states = self._mlc_pass.take()
        if states is None or (training and not _has_graph(states, self._mlc_pass)):
            raise RuntimeError(
                f"{type(self).__name__}'s forward did not run the parallel prompts with gradients. Either no parameter "
                f"up to layer {self._mlc_pass.layer} is trained (choose a deeper mlc_layer, or adapt earlier layers), or "
                "this version of TRL calls the model in a way that MLC does not know: please report it."
            )
        if self._mlc_asked is None:
            return loss + 0.0 * states.representations.sum().to(loss.device)
        asked, self._mlc_asked = self._mlc_asked, None
        term = mlc_term(states.representations, asked, self.args)
        self._mlc_record("train" if training else "eval", self._mlc_gather(term))
        if training and self._mlc_means is not None:
            self._mlc_move(self._mlc_means, states.hidden_states, asked)
        if training or self.args.mlc_in_eval_loss:
            loss = loss + self.args.mlc_weight * term.loss.to(loss.device, loss.dtype) / accumulated
        return loss

    def _mlc_move(self, means: LanguageMeans, hidden_states: torch.Tensor, asked: dict) -> None:
        real = asked["row"] >= 0
        total, count = means.sums(hidden_states[real], asked["language"][real])
        means.update_(self.accelerator.reduce(total, "sum"), self.accelerator.reduce(count, "sum"))

    def _mlc_gather(self, term: MLCTerm) -> dict[str, float]:
        sums, counts = self.accelerator.gather(torch.stack([term.sums, term.counts]).unsqueeze(0)).sum(0).tolist()
        return {f"mlc/{name}": s / c for name, s, c in zip(term.names, sums, counts, strict=True) if c > 0}

    def _mlc_record(self, mode: str, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)

    def create_optimizer(self, *args, **kwargs):
        """As the host's; what has a learning rate of its own (extractor, embedding) moves to a group of its own."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        rate = self.args.mlc_extractor_lr
        if fresh and self._mlc_pass is not None and rate is not None:
            model = args[0] if args else kwargs.get("model") or self.model
            own = {id(p) for n, p in model.named_parameters() if f"{MODULE}." in n}
            moved = []
            for group in optimizer.param_groups:
                moved += [p for p in group["params"] if id(p) in own]
                group["params"] = [p for p in group["params"] if id(p) not in own]
            optimizer.add_param_group({"params": moved, "lr": rate, "weight_decay": self.args.weight_decay})
        if fresh and self._mlc_pass is not None and self.args.mlc_embedding_lr is not None:
            set_embedding_lr(optimizer, self.accelerator.unwrap_model(self.model), self.args.mlc_embedding_lr)
        return optimizer

    def _save(self, output_dir=None, state_dict=None):
        # Whole tensors, where the engine gathered them; saving the model takes them out of the dict
        gathered = {k.split(f"{MODULE}.")[1]: v for k, v in (state_dict or {}).items() if f"{MODULE}." in k}
        super()._save(output_dir, state_dict=state_dict)
        if self._mlc_pass is None or not self.args.should_save:
            return
        extractor = gathered or self._mlc_pass.extractor.state_dict()
        config = {
            "layer": self._mlc_pass.layer,
            "pooling": self._mlc_pass.pooling,
            "languages": self._mlc_languages.names,
            "extractor_dim": self.args.mlc_extractor_dim,
        }
        save_state(output_dir or self.args.output_dir, extractor, self._mlc_means, config)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._mlc_load(resume_from_checkpoint)

    def _load_best_model(self):
        super()._load_best_model()
        self._mlc_load(self.state.best_model_checkpoint)

    def _mlc_load(self, folder) -> None:
        """Take the extractor, the means and the layer of a checkpoint; engines restore a sharded extractor."""
        if self._mlc_pass is None:
            return
        saved = load_state(folder)
        dim, layer = saved.config["extractor_dim"], saved.config["layer"]
        if dim != self.args.mlc_extractor_dim:
            raise ValueError(
                f"{folder} was trained with mlc_extractor_dim={dim}, this run has {self.args.mlc_extractor_dim}; go on "
                f"with {dim}, or start from its weights as a model."
            )
        if self.args.mlc_layer != "auto" and layer != self._mlc_pass.layer:
            logger.warning(
                "%s was trained at mlc_layer=%d and goes on at %d, for which its extractor was not made.",
                folder,
                layer,
                self._mlc_pass.layer,
            )
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            self._mlc_pass.extractor.load_state_dict(saved.extractor)
        if self.args.mlc_layer == "auto":
            self._mlc_pass.layer = saved.config["layer"]
        if self._mlc_means is not None and saved.means is not None and saved.seen is not None:
            numbers = self._mlc_languages.add(saved.config["languages"])
            self._mlc_means.grow_(len(numbers))
            rows = torch.tensor([numbers[name] for name in saved.config["languages"]])[: len(saved.means)]
            self._mlc_means.means[rows] = saved.means.to(self._mlc_means.means)
            self._mlc_means.seen[rows] = saved.seen.to(self._mlc_means.seen)


def _has_graph(states, prompt_pass: PromptPass) -> bool:
    frozen = not any(p.requires_grad for p in prompt_pass.extractor.parameters())
    return states.representations.requires_grad or (states.hidden_states is None and frozen)
