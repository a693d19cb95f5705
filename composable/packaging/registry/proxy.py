"""The proxy that the environment names for a URL: `http_proxy`, `https_proxy`, `all_proxy`.

Lower case or upper case, with or without a scheme, with or without a name and a password;
`no_proxy` lists hosts that are asked directly.
"""

from __future__ import annotations

import base64
import importlib.util
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from composable.errors import RegistryError

if TYPE_CHECKING:
    from urllib3 import PoolManager

_SOCKS: Final = ("socks4", "socks4a", "socks5", "socks5h")


@dataclass(frozen=True, kw_only=True)
class Proxy:
    """A proxy.

    Args:
        url: Where it is, without a name or a password.
        variable: The environment variable that names it.
        user: Name that it is given, if any.
        password: Password that it is given.
    """

    url: str
    variable: str
    user: str | None = None
    password: str = ""

    def make_pool(self, **settings: Any) -> PoolManager:
        """Return connections through this proxy.

        Raises:
            RegistryError: For a SOCKS proxy, where the package for those is not installed.
        """
        import urllib3

        if self.url.partition("://")[0] not in _SOCKS:
            headers = {}
            if self.user is not None:
                secret = base64.b64encode(f"{self.user}:{self.password}".encode())
                headers["Proxy-Authorization"] = f"Basic {secret.decode()}"
            return urllib3.ProxyManager(self.url, proxy_headers=headers, **settings)
        if importlib.util.find_spec("socks") is None:
            raise RegistryError(
                f"{self.url} is a SOCKS proxy, which needs the package PySocks",
                where=self.variable,
                hint="pip install pysocks, or use an http:// proxy",
            )
        from urllib3.contrib.socks import SOCKSProxyManager

        return SOCKSProxyManager(
            self.url, username=self.user, password=self.password or None, **settings
        )

    def refuse(self) -> RegistryError:
        """Return the error for a proxy that wants another name and password, or any."""
        asks = "does not accept the name and password that it was given"
        if self.user is None:
            asks = "asks for a name and a password"
        host = self.url.partition("://")[2]
        return RegistryError(
            f"the proxy {self.url} {asks} (407)",
            where=self.variable,
            hint=f"set {self.variable}=http://NAME:PASSWORD@{host}, special characters as %XX",
        )


def find_proxy(url: str) -> Proxy | None:
    """Return the proxy that the environment names for a URL, or None for none.

    Raises:
        RegistryError: For a proxy that cannot be read; the message does not show a password.
    """
    target = urllib.parse.urlsplit(url)
    named = urllib.request.getproxies()
    kind = target.scheme if named.get(target.scheme) else "all"
    text = named.get(kind, "").strip()
    if not text or urllib.request.proxy_bypass(target.netloc):
        return None
    variable = f"{kind}_proxy"
    if "://" not in text:
        text = f"http://{text}"
    try:
        parts = urllib.parse.urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or parts.scheme not in ("http", "https", *_SOCKS) or parts.query or parts.fragment:
        raise RegistryError(
            "is not the address of a proxy",
            where=variable,
            hint="write http://HOST:PORT or http://NAME:PASSWORD@HOST:PORT, "
            "special characters in the password as %XX",
        )
    shown = f"[{host}]" if ":" in host else host
    return Proxy(
        url=f"{parts.scheme}://{shown}" + (f":{port}" if port is not None else ""),
        variable=variable,
        user=None if parts.username is None else urllib.parse.unquote(parts.username),
        password=urllib.parse.unquote(parts.password or ""),
    )
