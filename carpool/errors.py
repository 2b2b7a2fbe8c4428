"""Every error that carpool raises on purpose.

CarpoolError                     what the command line prints in one line and exits with 2
├── BundleError                  a bundle's file is missing, changed, truncated or of another schema
├── ThetaError                   a theta of another layout, bundle or length
├── FolderError                  a path where a folder was to be made, and cannot be
├── CorpusError                  documents or examples that cannot be used; names file and line
├── ConfigError                  a setting that is unknown, out of range or changed on resume
├── ExportError                  a model that is refused before any work, or cannot be lowered
│   └── ParityError              the finished program differs from eager PyTorch: nothing is written
├── DeviceError                  a device cannot run a bundle or train on its examples
├── MalformedMessage             bytes that are not a message of this protocol version
├── ContributionRejected         an aggregator's contribution; ``sender`` names it
├── UpdateRejected               a device's update; ``device_id`` names it
├── CheckpointError              a run's directory cannot be resumed as asked
├── PrivacyError                 a guarantee that cannot be given, or a budget that is spent
├── RoundFailed                  a round that stayed below its quorum; nothing was released
└── RunStopped                   a run that was asked to stop; what it released is safe

Messages read "expected, got, what to do" and carry the value.
"""

from __future__ import annotations

from typing import Any, Literal

Refusal = Literal[
    "no-examples",
    "unknown-document",
    "recipe-not-supported",
    "diverged",
    "not-finite",
    "wrong-length",
    "not-asked",
    "repeated",
    "device-failed",
    "not-spoken-for",
    "privacy-budget-spent",
]
"""Why a device's update is not in a contribution: all that the coordinator is told. An error's
message stays in the log of the side that raised it, because it may quote private data."""


class CarpoolError(Exception):
    """Base of all errors that carpool raises on purpose. They survive pickling."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Exception's own would call ``__init__`` with the finished message alone."""
        return _restored, (type(self), self.args, self.__dict__)


def _restored(
    kind: type[CarpoolError], args: tuple[Any, ...], state: dict[str, Any]
) -> CarpoolError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class BundleError(CarpoolError):
    """A bundle that must not be used: a file is missing, changed, truncated or unknown."""


class ThetaError(CarpoolError):
    """A theta that does not belong to the layout or bundle it was offered to."""


class FolderError(CarpoolError):
    """A folder that cannot be made."""


class CorpusError(CarpoolError):
    """Documents or examples that cannot be used; names file and line where there is one."""


class ConfigError(CarpoolError):
    """A setting that is unknown, out of range, or differs from the run that is resumed."""


class ExportError(CarpoolError):
    """A model that cannot be exported; the message names the feature."""


class ParityError(ExportError):
    """The finished program differs from eager PyTorch by more than the stated tolerance."""


class DeviceError(CarpoolError):
    """A device that cannot run a bundle, or cannot train on its examples.

    ``reason`` is what may leave the device.
    """

    def __init__(self, message: str, *, reason: Refusal = "device-failed") -> None:
        super().__init__(message)
        self.reason = reason


class MalformedMessage(CarpoolError):  # noqa: N818  the field's word; every error here has the same base
    """Bytes that are not a message of this protocol version; the receiver names the sender."""


class ContributionRejected(CarpoolError):  # noqa: N818  the field's word; every error here has the same base
    """A contribution that the coordinator refuses to add. ``sender`` names the aggregator."""

    def __init__(self, message: str, *, sender: str) -> None:
        super().__init__(f"aggregator {sender}: {message}")
        self.sender = sender


class UpdateRejected(CarpoolError):  # noqa: N818  the field's word; every error here has the same base
    """An update that an aggregator refuses to add. ``device_id`` names the device."""

    def __init__(self, message: str, *, device_id: str, reason: Refusal = "not-finite") -> None:
        super().__init__(f"device {device_id}: {message}")
        self.device_id = device_id
        self.reason = reason


class CheckpointError(CarpoolError):
    """A run's directory that cannot be resumed as asked."""


class PrivacyError(CarpoolError):
    """A guarantee that cannot be given with these settings, or a budget that is spent."""


class RoundFailed(CarpoolError):  # noqa: N818  the field's word; every error here has the same base
    """A round that stayed below its quorum to the end; nothing was released."""


class RunStopped(CarpoolError):  # noqa: N818  the field's word; every error here has the same base
    """A run that was asked to stop; everything up to its last checkpoint is safe."""
