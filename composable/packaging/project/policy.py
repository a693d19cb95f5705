"""The policy of a project, `[policy]` in `composable.toml`: which releases it accepts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

from composable.errors import ManifestError
from composable.packaging.manifests.licenses import list_alternatives, parse_allowed_license
from composable.packaging.manifests.toml import Table


class Refusal(NamedTuple):
    """Why a policy refuses a release.

    Args:
        reason: The end of a sentence whose subject is the release.
        remedy: The change of the policy that would accept it, as a command; None if none does.
    """

    reason: str
    remedy: str | None = None


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Which releases a project accepts.

    Args:
        licenses: The allowed licences; None allows all, and releases without one.
        must_be_signed: Whether registries without signatures are refused.

    Example:
        >>> policy = Policy(licenses=frozenset({"Apache-2.0", "MIT"}))
        >>> policy.find_refusal("GPL-3.0-only OR MIT") is None
        True
        >>> policy.find_refusal("GPL-3.0-only").remedy
        'allow GPL-3.0-only under [policy] in composable.toml'
    """

    licenses: frozenset[str] | None = None
    must_be_signed: bool = False

    @classmethod
    def from_table(cls, table: Table) -> Self:
        """Read the table `[policy]`.

        Raises:
            ManifestError: For a licence that is not an SPDX identifier, or a list without any.
        """
        licenses = None
        if "licenses" in table:
            texts = table.texts("licenses")
            if not texts:
                raise ManifestError(
                    "no licence is allowed, expected at least one",
                    where=table.where("licenses"),
                    hint="remove the field to allow every licence",
                )
            licenses = frozenset(
                _parse_at(text, table.where(f"licenses[{index}]"))
                for index, text in enumerate(texts)
            )
        must_be_signed = table.boolean("signed", False)
        table.finish(also=("licenses",))
        return cls(licenses=licenses, must_be_signed=must_be_signed)

    def find_refusal(self, license_: str | None) -> Refusal | None:
        """Return why a release is refused for its licence; None if it is accepted.

        A licence that is missing, or no SPDX expression, is refused whenever licences matter.

        Args:
            license_: The licence as its manifest states it; None or empty if it states none.
        """
        if self.licenses is None:
            return None
        if not license_:
            return Refusal("states no licence, which [policy] in composable.toml requires")
        try:
            alternatives = list_alternatives(license_)
        except ManifestError:
            return Refusal(
                f"has the licence {license_[:80]!r}, which is not an SPDX expression as [policy] "
                "in composable.toml requires"
            )
        missing = [sorted(licenses - self.licenses) for licenses in alternatives]
        if not all(missing):
            return None
        fewest = min(missing, key=lambda licenses: (len(licenses), licenses))
        return Refusal(
            f"has the licence {license_}, which [policy] in composable.toml does not allow",
            f"allow {' and '.join(fewest)} under [policy] in composable.toml",
        )


def _parse_at(text: str, where: str) -> str:
    try:
        return parse_allowed_license(text)
    except ManifestError as error:
        raise ManifestError(error.message, where=where, hint=error.hint) from error
