"""SPDX licence expressions: their one spelling, and the sets of licences that satisfy them.

`packaging.licenses` knows the identifiers and the grammar. What licences mean for each
other, such as that one is stricter, is not known here: identifiers are compared as text.
"""

from __future__ import annotations

import re
from typing import Final

from composable.errors import ManifestError

MAX_LICENSE_LENGTH: Final = 200
_TOKEN: Final = re.compile(r"[()]|[^\s()]+")


def parse_license(text: str, where: str | None = None) -> str:
    """Return an SPDX expression in its one spelling.

    Args:
        text: The expression. `LicenseRef-NAME` stands for a licence that SPDX does not list.
        where: Where it comes from, for errors.

    Raises:
        ManifestError: When it is not an SPDX expression.

    Example:
        >>> parse_license("mit or (apache-2.0)")
        'MIT OR (Apache-2.0)'
    """
    from packaging.licenses import (  # here: most commands parse no licence
        InvalidLicenseExpression,
        canonicalize_license_expression,
    )

    if len(text) > MAX_LICENSE_LENGTH:
        raise ManifestError(
            f"{len(text):,} characters, expected at most {MAX_LICENSE_LENGTH} of a licence",
            where=where,
        )
    try:
        return str(canonicalize_license_expression(text))
    except (InvalidLicenseExpression, RecursionError, MemoryError) as error:
        raise ManifestError(
            f"{text!r} is not an SPDX licence expression: {error}",
            where=where,
            hint="expected for example Apache-2.0, or 'MIT OR Apache-2.0'; see "
            "https://spdx.org/licenses. A licence that is not listed there is LicenseRef-NAME",
        ) from error


def list_alternatives(text: str) -> list[frozenset[str]]:
    """Return the sets of licences that satisfy an expression, each without any of the others.

    A licence with an exception is one licence, `GPL-2.0-only WITH Classpath-exception-2.0`.

    Raises:
        ManifestError: When it is not an SPDX expression.

    Example:
        >>> [sorted(licenses) for licenses in list_alternatives("MIT OR Zlib AND BSL-1.0")]
        [['MIT'], ['BSL-1.0', 'Zlib']]
    """
    tokens = _TOKEN.findall(parse_license(text))[::-1]

    def next_is(operator: str) -> bool:
        if not tokens or tokens[-1] != operator:
            return False
        tokens.pop()
        return True

    # Of alternatives the order is kept, and the number is bounded by the length of the text.
    def read_either() -> dict[frozenset[str], None]:
        found = read_both()
        while next_is("OR"):
            found |= read_both()
        return found

    def read_both() -> dict[frozenset[str], None]:
        found = read_one()
        while next_is("AND"):
            others = read_one()
            found = dict.fromkeys(one | other for one in found for other in others)
        return found

    def read_one() -> dict[frozenset[str], None]:
        if next_is("("):
            found = read_either()
            tokens.pop()
            return found
        license_ = tokens.pop()
        if next_is("WITH"):
            license_ = f"{license_} WITH {tokens.pop()}"
        return {frozenset([license_]): None}

    return list(read_either())


def covers_license(old: str, new: str) -> bool:
    """Return whether all who may use something under a licence may use it under another one.

    Identifiers are compared as text: for each set of licences that satisfies the old expression,
    one that satisfies the new one has no further licence in it.

    Args:
        old: The expression until now; empty for none.
        new: The expression from now on; empty for none.

    Raises:
        ManifestError: When one of them is not an SPDX expression.

    Example:
        >>> covers_license("MIT", "MIT OR Apache-2.0"), covers_license("MIT OR Apache-2.0", "MIT")
        (True, False)
    """
    if not old or not new:
        return not old
    offered = list_alternatives(new)
    return all(any(one <= accepted for one in offered) for accepted in list_alternatives(old))


def parse_allowed_license(text: str) -> str:
    """Return one licence in its one spelling, with its exception if it has one.

    Raises:
        ManifestError: When it is not an SPDX expression, or one of several licences.

    Example:
        >>> parse_allowed_license("apache-2.0")
        'Apache-2.0'
    """
    alternatives = list_alternatives(text)
    if len(alternatives) != 1 or len(alternatives[0]) != 1:
        raise ManifestError(
            f"{text!r} has several licences, expected one", hint="list each of them by itself"
        )
    (license_,) = alternatives[0]
    return license_
