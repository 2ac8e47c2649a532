"""Losses of a whole window, for the policies that do not look at its intervals one by one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mixwright.data_mixing.online import Window, loss_array

Floats = NDArray[np.float64]


def mean_train_loss(window: Window) -> Floats:
    """Mean training loss of each arm's tokens [K]; NaN for an arm that was not read."""
    loss_NK = np.array([loss_array(interval.train_loss) for interval in window.intervals])
    tokens_NK = np.array([interval.train_tokens for interval in window.intervals], dtype=np.float64)
    tokens_NK = np.where(np.isfinite(loss_NK), tokens_NK, 0.0)
    tokens_K = tokens_NK.sum(axis=0)
    loss_K = (np.where(tokens_NK > 0, loss_NK, 0.0) * tokens_NK).sum(axis=0) / np.where(tokens_K > 0, tokens_K, 1.0)
    return np.where(tokens_K > 0, loss_K, np.nan)


def last_validation_loss(window: Window) -> Floats:
    """The newest validation loss of each arm in the window [K]; NaN where there is none."""
    newest_K = np.full(len(window.arms), np.nan)
    for interval in window.intervals:
        for losses in (interval.before, interval.after):
            loss_K = loss_array(losses)
            newest_K = np.where(np.isfinite(loss_K), loss_K, newest_K)
    return newest_K


def target_weights(window: Window) -> Floats:
    """How much each validation loss counts [K], relative to the mean arm; ones when the window has no target."""
    if window.target is None:
        return np.ones(len(window.arms))
    return np.array(window.target) * len(window.arms)
