"""Names of hosts, in the form in which they are compared."""

from __future__ import annotations

import ipaddress
import re

from clead.errors import UserError

ANY = "*"
_AUTHORITY = re.compile(r"(?:\[(?P<v6>[0-9a-fA-F:.]+)\]|(?P<name>[A-Za-z0-9_.-]+))(?::(?P<port>\d{0,5}))?", re.ASCII)


def host_of(authority: str) -> str | None:
    """Return the host of ``host:port``: lower case, no port, no brackets, no final dot, addresses in one form; None if malformed.

    >>> host_of("LocalHost.:8000"), host_of("[0:0::1]:80"), host_of("a b"), host_of("x:99999")
    ('localhost', '::1', None, None)
    """
    match = _AUTHORITY.fullmatch(authority)
    if match is None or int(match["port"] or 0) > 65535:
        return None
    if match["v6"] is not None:
        try:
            return ipaddress.IPv6Address(match["v6"]).compressed
        except ValueError:
            return None
    return match["name"].lower().removesuffix(".") or None


def allowed_name(text: str) -> str:
    """Return one entry of ``--allowed-hosts`` in the form that is compared; raises UserError if it is none."""
    name = text.strip()
    if name == ANY:
        return ANY
    star = "*." if name.startswith("*.") else ""
    plain = name.removeprefix("*.")
    bare = plain.strip("[]")
    host = host_of(f"[{bare}]" if ":" in bare else bare)  # a port makes it no address
    if host is None:
        raise UserError(
            f"--allowed-hosts: must be names or addresses without http://, port or path, got {text!r}; write for instance "
            "--allowed-hosts demo.example.org,10.0.0.7"
        )
    return star + host
