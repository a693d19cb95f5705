"""Every exception that composable raises deliberately.

    ComposableError
    ├── InterfaceError            a router interface that is malformed or not satisfied
    ├── PackagingError
    │   ├── VersionError          not a semantic version
    │   ├── ConstraintError       not a version range
    │   ├── ManifestError         a bad expert.toml, backbone.toml or composable.toml
    │   ├── MissingProjectError   no composable.toml here or above
    │   ├── LockError             a bad or stale composable.lock
    │   ├── RegistryError         a registry that fails, or rejects a request
    │   │   ├── MissingFileError  a file that a registry lacks
    │   │   └── UnreachableError  an unreachable registry, or a truncated response; retry
    │   ├── UnknownExpertError    no such package in any registry
    │   ├── ResolutionError       no set of versions satisfies the requirements
    │   ├── IntegrityError        bytes whose size or digest does not match
    │   │   ├── MissingBlobError  a file that is missing from the store
    │   │   └── DeltaError        a delta that is malformed, or whose base is missing
    │   ├── ProposalError         a proposal that was changed, or a verdict that no longer holds
    │   ├── SignatureError        a registry whose signatures or signed versions are wrong
    │   ├── KeyFileError          a signing key that is missing, locked or malformed
    │   ├── IdentityError         an identity that cannot be signed with
    │   ├── DiskError             a disk that is full, read-only or failing
    │   └── TensorFileError       a safetensors file that failed its check
    │       └── StatisticsError   statistics that are damaged, or do not fit the tensors
    ├── ModelError                arrays or settings that the model does not accept
    ├── InteropError              a foreign file that cannot be imported exactly
    ├── TextError                 text that cannot be trained on, scored or continued
    ├── TrainingError             training that cannot start, resume or continue
    │   ├── PreemptedError        a command that was asked to stop, and did; run again to go on
    │   └── PeerError             another process of the run failed or is gone; run again
    ├── MergeError                experts that cannot be merged
    │   └── MergeConflictError    no method gives an expert that is good enough
    └── VettingError              an expert that failed vetting

Warnings descend from `ComposableWarning`. `ContributionWarning` reports contributions that a
running model counted as zero, `StrayWarning` a file that was ignored.

A message says what was wrong (the value), where (a dotted path or a file) and what was expected,
and ends with a hint if a remedy is known. Data that a caller may act on is an attribute. Attributes
are exact; as text (`str`), an error is safe to print whoever wrote what it quotes, and short.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Final

from composable.printable import printable

# Characters of each part that are printed: a foreign file may hold a name of any length.
_MAX_WHERE: Final = 500
_MAX_MESSAGE: Final = 3000
_MAX_HINT: Final = 1000
# What a signed registry may be refused for.
SIGNATURE_RULES: Final = {
    "rollback": "an older state than this machine has seen",
    "freeze": "a state that nobody has confirmed lately",
    "mix-and-match": "parts of different states",
    "wrong-signer": "signed by other keys than those in charge",
    "wrong-publisher": "a package of somebody who may not publish it",
    "revoked": "a publisher whose keys were revoked",
    "expired": "a signature that is no longer valid",
    "unsigned": "no signature where one is required",
    "incomplete": "a registry that is only partly signed",
    "wrong-content": "bytes that differ from what was signed",
    "clock": "a clock that is wrong",
    "unproven": "a signature of an identity that no log proves",
    "unverifiable": "a signature that needs a library which is not installed",
}


class ComposableError(Exception):
    """Base of all deliberate errors.

    Args:
        message: What was wrong, with the offending value and what was expected.
        where: Dotted path or file that contains the offending value, if any.
        hint: How to fix it, if known.
    """

    # Lines that a message may have, printed as they are; any other newline is quoted from outside.
    has_lines: ClassVar[bool] = False
    # Of a command that fails with it. After 75 (EX_TEMPFAIL) and 76 the same command again goes on.
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        if self.has_lines:
            text = printable(self.message, keep="\n")
        else:
            text = _shorten(printable(self.message), _MAX_MESSAGE)
        if self.where:
            text = f"{_shorten(printable(self.where), _MAX_WHERE)}: {text}"
        return f"{text}\n  hint: {_shorten(printable(self.hint), _MAX_HINT)}" if self.hint else text

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what copies of it are made of, in other processes too, whatever it was made of."""
        return _restore, (type(self), self.args, vars(self))

    def within(self, prefix: str) -> ComposableError:
        """Return this error with `prefix` prepended to its location, on the way out of a table."""
        self.where = f"{prefix}.{self.where}" if self.where else prefix
        return self


def _restore(
    kind: type[ComposableError], args: tuple[Any, ...], state: dict[str, Any]
) -> ComposableError:
    """Return an error of a kind and state, without calling its initialiser."""
    error = kind.__new__(kind, *args)
    vars(error).update(state)
    return error


def _shorten(text: str, size: int) -> str:
    """Return a text without its middle if it has more characters than `size`."""
    end = size // 4
    return text if len(text) <= size else f"{text[: size - end]} … {text[-end:]}"


class InterfaceError(ComposableError):
    """A router interface that is malformed, or that an expert does not fit."""


class PackagingError(ComposableError):
    """Base of all errors about packages."""


class VersionError(PackagingError):
    """A string that is not a semantic version."""


class ConstraintError(PackagingError):
    """A string that is not a version range."""


class ManifestError(PackagingError):
    """A manifest with a missing, unknown or invalid field; `where` is its dotted path."""


class MissingProjectError(PackagingError):
    """No project in a folder, nor above it."""


class LockError(PackagingError):
    """A lock file that is malformed, or that no longer fits its project.

    Args:
        message: What was wrong.
        where: Where.
        hint: How to fix it.
        is_newer: Whether a newer version of composable wrote it.
    """

    def __init__(
        self,
        message: str,
        *,
        where: str | None = None,
        hint: str | None = None,
        is_newer: bool = False,
    ) -> None:
        super().__init__(message, where=where, hint=hint)
        self.is_newer = is_newer


class RegistryError(PackagingError):
    """A registry that fails, or that rejects a request."""


class MissingFileError(RegistryError):
    """A file that a registry lacks."""


class UnreachableError(RegistryError):
    """A registry that is unreachable, or whose response was truncated; a retry may succeed.

    Args:
        message: What was wrong.
        where: What was asked for.
        hint: How to fix it, if known.
        retry_after: Seconds that the server asks to wait, if it does; may be infinite.
    """

    def __init__(
        self,
        message: str,
        *,
        where: str | None = None,
        hint: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message, where=where, hint=hint)
        self.retry_after = retry_after


class UnknownExpertError(PackagingError):
    """A name that no registry of the project has."""


class ResolutionError(PackagingError):
    """No set of versions satisfies the requirements; the message explains why."""

    has_lines = True


class IntegrityError(PackagingError):
    """Bytes whose size or digest does not match the expected one."""


class MissingBlobError(IntegrityError):
    """A file that should be in the store and is missing."""


class DeltaError(IntegrityError):
    """A delta that is malformed, does not fit its base, or whose base is missing."""


class ProposalError(PackagingError):
    """A proposal that is damaged or was changed, or a verdict that does not hold for it."""


class SignatureError(PackagingError):
    """A signed registry that is not as its keys signed it; nothing of it was used.

    Args:
        message: What was wrong.
        kind: Which rule it breaks, one of `SIGNATURE_RULES`.
        where: Where.
        hint: What to do.
    """

    def __init__(
        self, message: str, *, kind: str, where: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message, where=where, hint=hint)
        assert kind in SIGNATURE_RULES
        self.kind = kind


class KeyFileError(PackagingError):
    """A signing key that is missing, locked or malformed."""


class IdentityError(PackagingError):
    """An identity that cannot be signed with: no credential, or sigstore refuses or is down."""


class DiskError(PackagingError):
    """A file system that cannot be written or read: full, read-only, no permission or failing."""


class TensorFileError(PackagingError):
    """A safetensors file that failed the check before loading."""


class StatisticsError(TensorFileError):
    """Statistics of an expert are damaged, or were computed from other tensors."""


class ModelError(ComposableError):
    """Arrays or settings that the model does not accept."""


class InteropError(ComposableError):
    """A foreign checkpoint that cannot be imported exactly; `where` locates the cause."""


class TextError(ComposableError):
    """Text that is empty, too long for the context, or not readable by the tokenizer."""


class TrainingError(ComposableError):
    """Training that cannot start, cannot resume, or has diverged."""


class PreemptedError(TrainingError):
    """A command that was asked to stop and has kept what it had; run again to go on.

    Args:
        message: When it stopped.
        where: As of every error.
        hint: As of every error.
        is_shared: Whether all processes of the run agreed to stop.
    """

    exit_code = 75

    def __init__(
        self,
        message: str,
        *,
        where: str | None = None,
        hint: str | None = None,
        is_shared: bool = False,
    ) -> None:
        super().__init__(message, where=where, hint=hint)
        self.is_shared = is_shared


class PeerError(TrainingError):
    """Another process of the run failed, died or never came, so this one ends; run again."""

    exit_code = 76


class VettingError(ComposableError):
    """An expert that failed vetting and must not be published."""


class MergeError(ComposableError):
    """Experts cannot be merged."""


class MergeConflictError(MergeError):
    """No method merges the experts into one that is good enough.

    Args:
        message: What the best one loses.
        report: The `MergeReport`: what was tried, and what conflicts.
        where: As of every error.
        hint: What else can be done.
    """

    def __init__(
        self, message: str, *, report: Any, where: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message, where=where, hint=hint)
        self.report = report


class ComposableWarning(UserWarning):
    """Base of all warnings, which the command line prints as one line each.

    Args:
        message: What is unusual, and what was done about it.
        topic: What it is about; a command warns once of each. By default, the message.
    """

    def __init__(self, message: str, topic: str | None = None) -> None:
        super().__init__(message)
        self.topic = message if topic is None else topic

    def __str__(self) -> str:
        return printable(str(self.args[0]))


class StrayWarning(ComposableWarning):
    """A file in a shared folder that does not belong there and was ignored.

    Args:
        name: Its name.
        where: The folder.
        expected: What belongs in the folder.
    """

    def __init__(self, name: str, where: str, expected: str) -> None:
        super().__init__(f"{where}: ignored {name[:200]!r}, which is not {expected}; remove it")
        self.name = name
        self.where = where


class ContributionWarning(ComposableWarning):
    """An expert some of whose contributions were counted as zero while the model kept running.

    Args:
        expert: Name of the expert.
        zeroed: Number of contributions that were not finite or out of bounds.
        made: Total number of contributions.
    """

    def __init__(self, expert: str, zeroed: int, made: int) -> None:
        super().__init__(
            f"expert {expert}: {zeroed:,} of {made:,} contributions were not finite or out of "
            "bounds and were counted as zero",
            topic=expert,
        )
        self.expert = expert
        self.zeroed = zeroed
        self.made = made


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """Return a hint that names the closest of the others in `known`; None when nothing is close."""
    import difflib  # late: only errors need it

    close = difflib.get_close_matches(name, sorted({*known} - {name}), n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else None
