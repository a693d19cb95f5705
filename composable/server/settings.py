"""The settings of a server. Defaults suit a lab; `for_the_world` suits the public."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self

from composable.errors import RegistryError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a server allows, and its limits.

    Args:
        title: Name of the registry, shown on its pages.
        url: Public URL without a slash at its end; empty for the one that a request was sent to.
        is_open: Whether anybody may create an account; otherwise an administrator does.
        is_quarantined: Whether releases stay hidden until an account with scope `vet` passes them.
        issuers: OpenID Connect issuers whose tokens can be exchanged for tokens to publish.
        audience: What such a token must be made for.
        max_file_bytes: Maximum size of a file.
        max_release_bytes: Maximum size of all files of a release.
        max_open_publications: How many unfinished publications an account may have.
        publication_hours: How long an unfinished publication or proposal is kept.
        max_open_proposals: How many undecided proposals an account may have.
        max_proposal_bytes: Maximum size of all that is sent with a proposal.
        reads_per_minute: Requests of one address or token, except changes.
        writes_per_minute: Requests of one address or token that change something.

    Raises:
        RegistryError: For a limit that is not positive.
    """

    title: str = "composable registry"
    url: str = ""
    is_open: bool = False
    is_quarantined: bool = False
    issuers: tuple[str, ...] = ()
    audience: str = "composable"
    max_file_bytes: int = 20 << 30
    max_release_bytes: int = 40 << 30
    max_open_publications: int = 20
    publication_hours: float = 24.0
    max_open_proposals: int = 20
    max_proposal_bytes: int = 8 << 30
    reads_per_minute: int = 6000
    writes_per_minute: int = 1200

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not isinstance(value, bool) and value <= 0:
                raise RegistryError(f"{value} is not positive", where=f"settings.{field.name}")

    @classmethod
    def for_the_world(cls, *, url: str, issuers: tuple[str, ...] = ()) -> Self:
        """Return the settings of a public registry: anybody may join, nothing shows unvetted."""
        return cls(
            url=url,
            is_open=True,
            is_quarantined=True,
            issuers=issuers,
            max_file_bytes=5 << 30,
            max_release_bytes=10 << 30,
            max_open_publications=3,
            max_open_proposals=3,
            max_proposal_bytes=1 << 30,
            reads_per_minute=600,
            writes_per_minute=120,
        )
