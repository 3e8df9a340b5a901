"""Calibration: data, streamed moments, the closed form, the learned stage, and the block-by-block loop."""
