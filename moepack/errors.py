"""Every error that moepack raises on purpose.

The command line prints one line, ``Name: message``, and exits 1 for any of these. A message says
what is wrong, what was found, what was expected, and what to do.

::

    MoepackError
    |-- CheckpointError                 the source model
    |   |-- ModelNotFoundError          no such folder, no such repository
    |   |-- HubUnreachableError         the hub did not answer
    |   |-- NotMixtureOfExpertsError    a dense model
    |   |-- UnknownArchitectureError    no family reads it
    |   |-- UnsupportedModelError       a known family with a feature that is not implemented
    |   |-- UnsupportedEncodingError    a dtype or a quantisation that cannot be read
    |   |-- MissingTensorError          the checkpoint lacks a tensor that the config implies
    |   |-- LeftoverTensorError         the checkpoint has a tensor that nothing uses
    |   |-- TensorMismatchError         a tensor of another shape or dtype than the config implies
    |   |-- NonFiniteWeightError        NaN or infinity where a weight is to be rounded
    |   `-- DamagedCheckpointError      config, index or shard that cannot be parsed
    |-- ProfileError                    a hardware, compute or routing profile that is not one
    |   `-- PresetNotFoundError         no preset of that name
    |-- TextError                       a text that cannot be read, run or scored
    |-- PlanError                       a plan that cannot be read, or cannot be carried out
    |   |-- BudgetTooSmallError         the budget lacks a stated number of bytes
    |   |-- PlanMismatchError           plan, pack and model do not belong together
    |   |-- EncodingError               experts cannot be stored so
    |   |   |-- UnknownEncodingError    no encoding of that name
    |   |   `-- GroupMismatchError      the encoding's group does not divide the model's sizes
    |   `-- CapabilityError             the plan asks for what the engine cannot do
    |-- PackError                       a packed folder
    |   |-- PackFormatError             the folder breaks a rule of the format
    |   |   |-- PackVersionError        made by a newer format
    |   |   |-- TruncatedShardError     shorter than its index says
    |   |   |-- SegmentBoundsError      a segment outside its shard, or off the alignment
    |   |   |-- SegmentOverlapError     two segments share bytes
    |   |   |-- UnsafePathError         a path that leaves the folder
    |   |   `-- DeclaredSizeError       a size that no real model has
    |   |-- DamagedSegmentError         bytes that do not match their digest
    |   `-- OutputError                 the folder cannot be written
    |       |-- DiskFullError           bytes needed and bytes free
    |       |-- OutputInUseError        another process is writing it
    |       `-- ReadOnlyError           no permission to write
    |-- RunError                        while executing
    |   |-- ContextLengthError          prompt (and new tokens) longer than the planned context
    |   |-- TransferError               a segment did not arrive
    |   |-- OutOfMemoryError            the machine does not give the memory that was planned
    |   |-- DeviceError                 the device that was asked for is not there
    |   `-- DriftError                  the forecast and the measurement disagree (bench --strict)
    `-- WorkspaceError                  a step that has not been taken, or a damaged workspace
"""

from __future__ import annotations


class MoepackError(Exception):
    """Base of every error that moepack raises on purpose."""


class CheckpointError(MoepackError):
    """The source model cannot be used."""


class ModelNotFoundError(CheckpointError):
    """No local folder and no hub repository has this name."""


class HubUnreachableError(CheckpointError):
    """The hub did not answer, or refused."""


class NotMixtureOfExpertsError(CheckpointError):
    """The model has no routed experts, so there is nothing to split or to stream."""


class UnknownArchitectureError(CheckpointError):
    """No family reads this architecture."""


class UnsupportedModelError(CheckpointError):
    """A known family with a configuration that is not implemented."""


class UnsupportedEncodingError(CheckpointError):
    """The weights are stored in a dtype or quantisation that cannot be read."""


class MissingTensorError(CheckpointError):
    """The configuration implies a tensor that the checkpoint lacks."""


class LeftoverTensorError(CheckpointError):
    """The checkpoint holds a tensor that nothing uses."""


class TensorMismatchError(CheckpointError):
    """A tensor has another shape or dtype than the configuration implies."""


class NonFiniteWeightError(CheckpointError):
    """A weight that is to be rounded is NaN or infinite."""


class DamagedCheckpointError(CheckpointError):
    """A configuration, index or shard of the checkpoint cannot be parsed."""


class ProfileError(MoepackError):
    """A hardware, compute or routing profile is not one."""


class PresetNotFoundError(ProfileError):
    """No preset has this name."""


class TextError(MoepackError):
    """A text cannot be read, or holds nothing to run or to score."""


class PlanError(MoepackError):
    """A plan cannot be read or cannot be carried out."""


class BudgetTooSmallError(PlanError):
    """The budget lacks bytes.

    Attributes
    ----------
    missing_bytes : int
        What the smallest possible plan needs beyond the budget.
    """

    def __init__(self, message: str, *, missing_bytes: int) -> None:
        super().__init__(message)
        self.missing_bytes = missing_bytes


class PlanMismatchError(PlanError):
    """Plan, pack and model do not belong together."""


class EncodingError(PlanError):
    """Experts cannot be stored in the encoding that was asked for."""


class UnknownEncodingError(EncodingError):
    """No encoding has this name."""


class GroupMismatchError(EncodingError):
    """A model's sizes are not multiples of the encoding's group."""


class CapabilityError(PlanError):
    """The plan asks for something that the engine does not do."""


class PackError(MoepackError):
    """A packed folder cannot be used."""


class PackFormatError(PackError):
    """A packed folder breaks a rule of the format."""


class PackVersionError(PackFormatError):
    """The folder was written in a newer format."""


class TruncatedShardError(PackFormatError):
    """A shard is shorter (or longer) than its index says."""


class SegmentBoundsError(PackFormatError):
    """A segment lies outside its shard, or not on the alignment."""


class SegmentOverlapError(PackFormatError):
    """Two segments share bytes."""


class UnsafePathError(PackFormatError):
    """A path in the manifest leaves the folder."""


class DeclaredSizeError(PackFormatError):
    """A declared size is larger than any real model's."""


class DamagedSegmentError(PackError):
    """Bytes do not match their digest."""


class OutputError(PackError):
    """A folder or file cannot be written."""


class DiskFullError(OutputError):
    """The disk has too little room."""


class OutputInUseError(OutputError):
    """Another process is writing the same folder."""


class ReadOnlyError(OutputError):
    """The place is not writable."""


class RunError(MoepackError):
    """Something failed while executing a model."""


class ContextLengthError(RunError):
    """Prompt and new tokens exceed the planned context."""


class TransferError(RunError):
    """A segment did not arrive whole."""


class OutOfMemoryError(RunError):
    """The machine does not give the memory that was asked for."""


class DeviceError(RunError):
    """The device that was asked for is not available."""


class DriftError(RunError):
    """The forecast and the measurement disagree beyond the stated band."""


class WorkspaceError(MoepackError):
    """A step that has not been taken yet, or a workspace that cannot be read."""
