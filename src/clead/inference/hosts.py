"""Which names the server answers to: ``Host`` and ``Origin`` of a request are compared with them.

A page from elsewhere can let its own domain name point at this machine (DNS rebinding): the browser then takes the server for a
part of that page and lets it read the answers. Its requests still carry the page's own name in ``Host``.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass

from starlette.types import Scope

from clead.errors import UserError
from clead.inference.problems import Problem

ANY = "*"
_AUTHORITY = re.compile(r"(?:\[(?P<v6>[0-9a-fA-F:.]+)\]|(?P<name>[A-Za-z0-9_.-]+))(?::(?P<port>\d{0,5}))?", re.ASCII)


@dataclass(frozen=True)
class Hosts:
    """The names and addresses that a server answers to, in the form of ``host_of``.

    Attributes:
        names: such as ``example.org`` or ``::1``; ``*.example.org`` stands for every name below it.
        addresses: whether any IP address is good as ``Host``: rebinding needs a name.
    """

    names: frozenset[str]
    addresses: bool = False

    def refusal(self, scope: Scope) -> Problem | None:
        """Return why a request is not for this server, or None: 400, 421 (``Host``) or 403 (``Origin``)."""
        headers = scope["headers"]
        given = [value.decode("latin-1") for name, value in headers if name == b"host"]
        close = {"Connection": "close"}
        if len(given) != 1:
            return Problem(400, f"Host: must be given once, got {len(given)} times; send one", close)
        host = host_of(given[0])
        if host is None:
            return Problem(400, f"Host: must be a name or an address, got {given[0][:60]!r}; correct it", close)
        if not self._knows(host) and not (self.addresses and _is_address(host)):
            text = f"Host: this server does not answer to the name {host[:60]!r}; if it is meant to"
            return Problem(421, f"{text}, start it with --allowed-hosts {host[:60]}", close)
        for value in (value.decode("latin-1") for name, value in headers if name == b"origin"):
            scheme, _, rest = value.partition("://")
            origin = host_of(rest) if scheme in ("http", "https") else None
            if origin is None or (origin != host and not self._knows(origin)):
                text = f"Origin: pages of {value[:60]!r} may not use this server; if they are meant to"
                return Problem(403, f"{text}, start it with --allowed-hosts and their host's name", close)
        return None

    def _knows(self, host: str) -> bool:
        if host in self.names:
            return True
        above = host.split(".")
        return any("*." + ".".join(above[i:]) in self.names for i in range(1, len(above)))


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


def hosts_of(names: Iterable[str], host: str | None = None, bound: str | None = None) -> Hosts | None:
    """Return what a server answers to: ``names``, what it is bound to, and this machine as itself; None: to every name.

    Args:
        names: of ``--allowed-hosts``; ``*`` among them turns the check off.
        host: as given with ``--host``.
        bound: the address that this became; with 0.0.0.0 or :: any IP address is allowed, and the name of this machine.
    """
    known = {allowed_name(name) for name in names}
    if ANY in known:
        return None
    known |= {"localhost", "127.0.0.1", "::1"}
    if host is not None and (name := host_of(f"[{host}]" if ":" in host else host)) is not None:
        known.add(name)
    if bound is None:
        return Hosts(frozenset(known))
    address = ipaddress.ip_address(bound.partition("%")[0])
    if not address.is_unspecified:
        known.add(address.compressed)
    if not address.is_loopback:
        name = socket.gethostname().lower()
        known |= {name, name.partition(".")[0]}
    return Hosts(frozenset(known), address.is_unspecified)


def _is_address(host: str) -> bool:
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return False
