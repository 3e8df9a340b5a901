"""The mixin for TRL's older trainers, which tokenize in `__init__` and score in `get_batch_loss_metrics`."""

from __future__ import annotations

from transformers import AutoTokenizer

from trl_mlc.collator import KEY
from trl_mlc.mixin import MLCMixin


class MLCBatchLossMixin(MLCMixin):
    """[`MLCMixin`] for CPO and ORPO of `trl.experimental`.

    Delta: the datasets are given their prompts before the host sees them, the term is added where the host computes
    the loss in training *and* evaluation, and metrics go to `store_metrics`.
    """

    def _mlc_check_config(self, arguments: dict) -> None:
        super()._mlc_check_config(arguments)
        args = arguments["args"]
        if args.mlc_weight == 0:
            return
        if arguments.get("processing_class") is None:
            model = arguments["model"]
            source = model if isinstance(model, str) else model.config.name_or_path
            arguments["processing_class"] = AutoTokenizer.from_pretrained(source)
        tokenizer = arguments["processing_class"]
        if arguments.get("train_dataset") is not None:
            arguments["train_dataset"] = self._mlc_encode(arguments["train_dataset"], tokenizer, args, "train")
        held_out = arguments.get("eval_dataset")
        if isinstance(held_out, dict):
            arguments["eval_dataset"] = {k: self._mlc_encode(d, tokenizer, args, k) for k, d in held_out.items()}
        elif held_out is not None:
            arguments["eval_dataset"] = self._mlc_encode(held_out, tokenizer, args, "eval")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The host's, whose loss comes from `get_batch_loss_metrics` below."""
        return super(MLCMixin, self).compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def get_batch_loss_metrics(self, model, batch, train_eval="train"):
        """The host's loss and metrics, plus the term."""
        prompts = batch.pop(KEY, None)
        self._mlc_request(prompts)
        loss, metrics = super().get_batch_loss_metrics(model, batch, train_eval)
        return self._mlc_add(loss, prompts, 1), metrics

    def _mlc_record(self, mode: str, metrics: dict[str, float]) -> None:
        prefix = "eval_" if mode == "eval" else ""
        self.store_metrics({f"{prefix}{name}": value for name, value in metrics.items()}, train_eval=mode)
