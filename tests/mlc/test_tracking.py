"""What the Trainer reports: every entry of ours reaches the tracker that `report_to` names, with the values of the log."""

import pytest
from transformers import TrainerCallback

from trl_mlc.dpo import MLCDPOConfig, MLCDPOTrainer


OURS = {"mlc/loss", "mlc/cross_prompt_cosine"}


class Recorder(TrainerCallback):
    """Any tracker, in its simplest form."""

    def __init__(self):
        self.entries = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.entries.append(dict(logs))


def test_metrics_reach_tensorboard_and_callbacks(tiny, tokenizer, preferences, options, tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    recorder = Recorder()
    config = MLCDPOConfig(**options | {"report_to": "tensorboard"}, mlc_layer=3, mlc_every=1)
    trainer = MLCDPOTrainer(
        tiny, args=config, train_dataset=preferences(n=8), processing_class=tokenizer, callbacks=[recorder]
    )
    trainer.train()
    steps = [entry for entry in recorder.entries if "mlc/loss" in entry]
    assert len(steps) == config.max_steps
    names = {name for entry in steps for name in entry if name.startswith("mlc/")}
    assert OURS <= names
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents*")}
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    for name in names:
        written = {event.step: event.value for event in events.Scalars(f"train/{name}")}
        logged = {i: float(entry[name]) for i, entry in enumerate(steps, start=1) if name in entry}
        assert written == pytest.approx(logged, rel=1e-6), name
