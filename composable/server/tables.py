"""The tables of the database.

Times are RFC 3339 in UTC, as in the index, so that they compare as text. `migrations` creates the
tables; a test compares both.
"""

from __future__ import annotations

from typing import Any, ClassVar

from sqlalchemy import ForeignKey, Index, LargeBinary, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from sqlalchemy.types import JSON, BigInteger


class Base(DeclarativeBase):
    """The base of all tables."""

    type_annotation_map: ClassVar = {dict[str, Any]: JSON, str: Text, bytes: LargeBinary}


class Head(Base):
    """The end of the audit log, in one row. Every change locks it, so changes have one order."""

    __tablename__ = "head"
    id: Mapped[int] = mapped_column(primary_key=True)
    entries: Mapped[int]
    hash: Mapped[str]


class Audit(Base):
    """An entry of the audit log. Triggers refuse to change or remove one."""

    __tablename__ = "audit"
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    time: Mapped[str]
    account: Mapped[str]
    action: Mapped[str]
    subject: Mapped[str] = mapped_column(Text, index=True)
    detail: Mapped[dict[str, Any]]
    previous: Mapped[str]
    hash: Mapped[str]


class Account(Base):
    """Somebody who publishes."""

    __tablename__ = "accounts"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    key: Mapped[str] = mapped_column(String(64), unique=True)
    is_admin: Mapped[bool]
    created: Mapped[str]


class Token(Base):
    """A token, of which only the SHA-256 is kept."""

    __tablename__ = "tokens"
    id: Mapped[int] = mapped_column(primary_key=True)
    account_id: Mapped[int] = mapped_column(ForeignKey("accounts.id"), index=True)
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    label: Mapped[str]
    scopes: Mapped[str]
    packages: Mapped[str]
    created: Mapped[str]
    expires: Mapped[str | None]
    revoked: Mapped[str | None]
    account: Mapped[Account] = relationship(lazy="joined")


class Package(Base):
    """A package name, and what is derived from its releases.

    `index` is the document under `/index`; `summary` has what search and the catalogue need of
    its newest release. `revision` is the number of the audit entry that last changed it.
    """

    __tablename__ = "packages"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    key: Mapped[str] = mapped_column(String(64), unique=True)
    is_private: Mapped[bool]
    created: Mapped[str]
    removal: Mapped[str | None]
    revision: Mapped[int] = mapped_column(index=True)
    index: Mapped[bytes] = mapped_column(LargeBinary, deferred=True)
    index_digest: Mapped[str]
    summary: Mapped[dict[str, Any]]
    releases: Mapped[list[Release]] = relationship(back_populates="package")
    owners: Mapped[list[Owner]] = relationship(back_populates="package")


class Owner(Base):
    """An account that may publish a package."""

    __tablename__ = "owners"
    package_id: Mapped[int] = mapped_column(ForeignKey("packages.id"), primary_key=True)
    account_id: Mapped[int] = mapped_column(ForeignKey("accounts.id"), primary_key=True)
    added: Mapped[str]
    package: Mapped[Package] = relationship(back_populates="owners")
    account: Mapped[Account] = relationship(lazy="joined")


class Release(Base):
    """A release. `stem` is its version without build metadata, which does not distinguish two.

    `state` is `quarantined` until vetting passed, then `published`; or `removed`. `signer` is the
    publisher whose statement on it is stored, with `signer_key`; both are empty without one.
    """

    __tablename__ = "releases"
    __table_args__ = (UniqueConstraint("package_id", "stem", name="one_release_of_a_version"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    package_id: Mapped[int] = mapped_column(ForeignKey("packages.id"), index=True)
    version: Mapped[str]
    stem: Mapped[str] = mapped_column(String(255))
    state: Mapped[str]
    is_yanked: Mapped[bool]
    reason: Mapped[str]
    published: Mapped[str]
    publisher: Mapped[str]
    signer: Mapped[str] = mapped_column(Text, default="", server_default="")
    signer_key: Mapped[str] = mapped_column(Text, default="", server_default="")
    row: Mapped[dict[str, Any]]
    manifest: Mapped[str] = mapped_column(Text, deferred=True)
    card: Mapped[str] = mapped_column(Text, deferred=True)
    readme: Mapped[str] = mapped_column(Text, deferred=True)
    package: Mapped[Package] = relationship(back_populates="releases")
    files: Mapped[list[File]] = relationship(back_populates="release")


class File(Base):
    """A file of a release, with its manifest."""

    __tablename__ = "files"
    __table_args__ = (Index("files_by_digest", "digest"),)
    release_id: Mapped[int] = mapped_column(ForeignKey("releases.id"), primary_key=True)
    name: Mapped[str] = mapped_column(String(100), primary_key=True)
    size: Mapped[int] = mapped_column(BigInteger)
    digest: Mapped[str] = mapped_column(String(71))
    release: Mapped[Release] = relationship(back_populates="files")


class SignedFile(Base):
    """A file of a signed registry: metadata, a signed document, or a statement on a release.

    `path` is that of the static layout.
    """

    __tablename__ = "signed_files"
    path: Mapped[str] = mapped_column(String(400), primary_key=True)
    data: Mapped[bytes]


class Publication(Base):
    """A publication that is not committed yet. Its chunks are in the storage, under `uploads/`."""

    __tablename__ = "publications"
    __table_args__ = (
        UniqueConstraint("account_id", "manifest_digest", name="one_publication_of_a_manifest"),
    )
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    account_id: Mapped[int] = mapped_column(ForeignKey("accounts.id"))
    manifest_digest: Mapped[str] = mapped_column(String(71))
    manifest: Mapped[str]
    is_private: Mapped[bool]
    created: Mapped[str]


class Proposal(Base):
    """A proposal to change a package. Its files are in the storage, under `inbox/`.

    `state` is `arriving` until all files are there, then `open`, and in the end that of `outcome`.
    """

    __tablename__ = "proposals"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    account_id: Mapped[int] = mapped_column(ForeignKey("accounts.id"), index=True)
    package_id: Mapped[int] = mapped_column(ForeignKey("packages.id"), index=True)
    state: Mapped[str]
    created: Mapped[str]
    envelope: Mapped[str]
    manifest: Mapped[str]
    outcome: Mapped[dict[str, Any]]
    account: Mapped[Account] = relationship(lazy="joined")
    package: Mapped[Package] = relationship(lazy="joined")


class Publisher(Base):
    """A trusted publisher: a CI identity that may publish a package."""

    __tablename__ = "publishers"
    id: Mapped[int] = mapped_column(primary_key=True)
    package_id: Mapped[int] = mapped_column(ForeignKey("packages.id"), index=True)
    account_id: Mapped[int] = mapped_column(ForeignKey("accounts.id"))
    issuer: Mapped[str]
    subject: Mapped[str]
    claims: Mapped[dict[str, Any]]
    package: Mapped[Package] = relationship()
    account: Mapped[Account] = relationship()


class SpentIdentity(Base):
    """An identity token that was exchanged: none is accepted twice."""

    __tablename__ = "spent_identities"
    issuer: Mapped[str] = mapped_column(String(255), primary_key=True)
    jti: Mapped[str] = mapped_column(String(255), primary_key=True)
    expires: Mapped[str]


class Backbone(Base):
    """A version of a backbone, for compatibility: its router interface."""

    __tablename__ = "backbones"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    version: Mapped[str] = mapped_column(String(255), primary_key=True)
    interface: Mapped[str]
    description: Mapped[str]
    license: Mapped[str]
    added: Mapped[str]
