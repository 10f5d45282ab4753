"""Every error that a user can see. One family, split by what the user has to change.

A message is *subject, fact, place*; a hint is the next command or edit. How an error looks on the terminal is the
business of `cli`. Anything that is not a `VoidpruneError` is a bug of ours and keeps its traceback.
"""

from __future__ import annotations


class VoidpruneError(Exception):
    """An error whose cause is outside this program.

    `message` says what is wrong and where, in one line; `hint` says what to do next, by default what usually helps with this
    class of errors. The exit code of the command line is `exit_code`.
    """

    exit_code = 1
    usual_hint: str | None = None

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or self.usual_hint


class ModelError(VoidpruneError):
    """The model is missing, unreadable, or of a kind that is not supported."""

    usual_hint = "give the folder or Hub id of a supported model: voidprune families"


class CheckpointError(ModelError):
    """A weight file or its index is broken: truncated, overlapping, out of its folder, of an unknown dtype."""

    usual_hint = "fetch or write the checkpoint again"


class ArtifactError(VoidpruneError):
    """A file of ours (profile, schedule, bundle description) cannot be read as what it should be."""

    usual_hint = "make the file again with this version of voidprune"


class ScheduleError(VoidpruneError):
    """A schedule breaks one of its rules, or belongs to another model."""


class BudgetError(VoidpruneError):
    """The budget that was asked for cannot be met."""


class DatasetError(VoidpruneError):
    """A calibration or evaluation file is empty or malformed; the message names the line."""

    usual_hint = "give JSONL, an object a line with prompt, messages, instruction or text, or plain text"


class RecipeError(VoidpruneError):
    """A recipe is malformed, or asks for what its kind does not know."""

    usual_hint = "compare with the recipes that come with voidprune, in recipes/"


class OutputError(VoidpruneError):
    """The output exists already, or cannot be written."""


class HealingError(VoidpruneError):
    """What was asked for cannot be healed, or not with these samples."""


class RuntimeProviderError(VoidpruneError):
    """onnxruntime cannot run what it was asked to run on the provider that was asked for."""


class MissingExtraError(VoidpruneError):
    """What was asked for needs a package that comes with an extra of voidprune. The hint is the command to install it."""


class ContextLengthError(VoidpruneError):
    """A request needs more positions than the K/V buffers or the model have."""


class NoiseError(VoidpruneError):
    """What was measured moves more from round to round than would let it mean anything."""

    usual_hint = (
        "let nothing else run on the machine, or raise --rounds; a higher --max-spread shows the figures all the same"
    )


class QualityGateError(VoidpruneError):
    """A measured quality is below what was asked for. The message says gate, measured and asked."""

    exit_code = 3
    usual_hint = "keep more layers, choose them by another criterion, or ask for less"


class ParityError(VoidpruneError):
    """An export does not equal its reference. Nothing was published."""

    usual_hint = "nothing was published; please report it with the config.json of the model"
