"""Errors of the training stages; the same exit codes as the mixing service's."""

from __future__ import annotations

from mixwright.data_mixing.errors import MixingError


class TrainingError(MixingError):
    """Training cannot start or go on; the message is one clear line."""


class NonFiniteLoss(TrainingError):
    """A loss or gradient became NaN or infinite; training stops and the last checkpoint stays as it is."""

    exit_code = 1


class RanksApart(TrainingError):
    """The ranks do not find each other, or lose each other: the same command later may go on."""

    exit_code = 70


class CheckpointMismatch(TrainingError):
    """A checkpoint is damaged, or belongs to another run."""


class RunInUse(TrainingError):
    """Another trainer is working on this run."""


class EnsembleError(MixingError):
    """Members that do not go together, are missing, or cannot be combined as asked."""

    exit_code = 2
