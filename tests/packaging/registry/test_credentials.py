"""Tokens: bound to the origin of a server, whatever a project calls it."""

from __future__ import annotations

import re

import pytest

from composable.errors import RegistryError
from composable.packaging.registry.credentials import find_token, origin_of

HERE = "https://example.org/registry"


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPOSABLE_TOKEN_TEAM", "secret")


@pytest.mark.parametrize(
    "location",
    [HERE, "https://EXAMPLE.org:443/other", "https://example.org"],
)
def test_a_token_goes_to_its_origin(monkeypatch: pytest.MonkeyPatch, location: str) -> None:
    monkeypatch.setenv("COMPOSABLE_ORIGIN_TEAM", "https://example.org")
    assert find_token("team", location) == "secret"


@pytest.mark.parametrize(
    "location",
    [
        "https://example.org.evil.org/registry",
        "https://evil.org/example.org",
        "https://evil.org#https://example.org",
        "https://sub.example.org/registry",
        "https://example.org:8443/registry",
        "http://example.org/registry",
        "https://example.org@evil.org/registry",
        "https://[::1]/registry",
    ],
)
def test_a_token_goes_nowhere_else(monkeypatch: pytest.MonkeyPatch, location: str) -> None:
    """A cloned project may call any server "team"."""
    monkeypatch.setenv("COMPOSABLE_ORIGIN_TEAM", "https://example.org")
    assert find_token("team", location) is None


def test_a_token_that_names_no_server_is_refused_and_the_hint_cures_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(RegistryError, match="not the server") as caught:
        find_token("team", HERE)
    assert "secret" not in str(caught.value)
    (setting,) = re.findall(r"set (\S+=\S+);", str(caught.value))
    monkeypatch.setenv(*setting.split("="))
    assert find_token("team", HERE) == "secret"
    monkeypatch.delenv("COMPOSABLE_TOKEN_TEAM")
    assert find_token("team", HERE) is None


@pytest.mark.parametrize(
    "stated",
    [
        "example.org",
        "https://example.org/registry",
        "https://me:pw@",
        "https://me:pw@example.org",
        "https://x:y",
        "*",
    ],
)
def test_what_is_no_origin_is_refused(monkeypatch: pytest.MonkeyPatch, stated: str) -> None:
    monkeypatch.setenv("COMPOSABLE_ORIGIN_TEAM", stated)
    with pytest.raises(RegistryError, match="not the origin") as caught:
        find_token("team", HERE)
    assert "pw" not in str(caught.value)


def test_a_registry_without_a_name_has_no_token_in_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COMPOSABLE_TOKEN_", "secret")
    assert find_token("", HERE) is None


def test_origins() -> None:
    assert origin_of("http://[::1]:80/x") == "http://[::1]"
    assert origin_of("https://[::1]:8443") == "https://[::1]:8443"
    assert origin_of("https://x:port") is None
    assert origin_of("s3://bucket") is None
