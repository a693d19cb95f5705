"""Every exception that composable raises on purpose.

    ComposableError
    ├── InterfaceError            the contract: a bad or unmet router interface
    ├── PackagingError
    │   ├── VersionError          not a semantic version
    │   ├── ConstraintError       not a version range
    │   ├── ManifestError         a bad expert.toml, backbone.toml or composable.toml
    │   ├── LockError             a bad or stale composable.lock
    │   ├── RegistryError         a registry that cannot answer, or refuses
    │   │   └── UnreachableError  one that cannot be reached, or broke off: trying again may help
    │   ├── UnknownExpertError    no such package in any registry
    │   ├── ResolutionError       no set of versions satisfies the requirements
    │   ├── IntegrityError        bytes that are not what was promised
    │   │   └── MissingBlobError  a file that the store should hold and does not
    │   ├── DiskError             a disk that is full, read only or failing
    │   └── TensorFileError       a safetensors file that must not be loaded
    ├── ModelError                arrays that the model cannot take
    ├── InteropError              other people's files that cannot be taken over as they are
    ├── TextError                 text that cannot be trained on, scored or continued
    ├── TrainingError             training that cannot start, resume or go on
    └── VettingError              an expert that must not be published

And one warning, `ContributionWarning`: what a running model counted as zero.

A message says what was wrong (the value), where (a dotted path or a file), what was expected, and
ends with a hint where the cure is known. What a caller may want to act on is an attribute.
"""

from __future__ import annotations

from collections.abc import Iterable


class ComposableError(Exception):
    """Base of all deliberate errors.

    Args:
        message: What was wrong, with the offending value and what was expected.
        where: Dotted path or file that holds the offending value, if there is one.
        hint: What to do about it, if that is known.
    """

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text}\n  hint: {self.hint}" if self.hint else text

    def within(self, prefix: str) -> ComposableError:
        """Return this error with `prefix` put before its location, as it climbs out of a table."""
        self.where = f"{prefix}.{self.where}" if self.where else prefix
        return self


class InterfaceError(ComposableError):
    """A router interface that is malformed, or that an expert does not fit."""


class PackagingError(ComposableError):
    """Anything about experts as packages."""


class VersionError(PackagingError):
    """A string that is not a semantic version."""


class ConstraintError(PackagingError):
    """A string that is not a version range."""


class ManifestError(PackagingError):
    """A manifest with a missing, unknown or invalid field; `where` is its dotted path."""


class LockError(PackagingError):
    """A lock file that is malformed, or that no longer fits its project."""


class RegistryError(PackagingError):
    """A registry that cannot answer, or that refuses what it was sent."""


class UnreachableError(RegistryError):
    """A registry that cannot be reached, or whose answer broke off; trying again may help."""


class UnknownExpertError(PackagingError):
    """A name that no registry of the project knows."""


class ResolutionError(PackagingError):
    """No set of versions satisfies the requirements; the message tells the story."""


class IntegrityError(PackagingError):
    """Bytes whose size or digest is not the one promised."""


class MissingBlobError(IntegrityError):
    """A file that the store should hold and does not, or no longer."""


class DiskError(PackagingError):
    """A file system that does not take what is written: full, read only, forbidden or failing."""


class TensorFileError(PackagingError):
    """A safetensors file that failed the check that comes before loading."""


class ModelError(ComposableError):
    """Arrays or settings that the model cannot take."""


class InteropError(ComposableError):
    """Another project's checkpoint that cannot be taken over exactly; `where` names the place."""


class TextError(ComposableError):
    """Text that is empty, too long for the context, or not what the tokenizer reads."""


class TrainingError(ComposableError):
    """Training that cannot start, cannot resume, or has diverged."""


class VettingError(ComposableError):
    """An expert that failed vetting and must not be published."""


class ContributionWarning(UserWarning):
    """An expert whose contributions a running model counted as zero; no error, for it went on.

    Args:
        expert: Its name.
        zeroed: Contributions that were not finite or out of bounds.
        made: Contributions in all.
    """

    def __init__(self, expert: str, zeroed: int, made: int) -> None:
        super().__init__(
            f"expert {expert}: {zeroed:,} of {made:,} contributions were not finite or out of "
            "bounds, and counted as zero"
        )
        self.expert = expert
        self.zeroed = zeroed
        self.made = made


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """Return a hint that names the closest of `known`, or None when nothing is close."""
    import difflib  # here: only errors need it

    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else None
