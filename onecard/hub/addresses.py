"""Which addresses of the network requests may go to: hosts that the user typed, and public ones.

A server can point elsewhere, and a name can answer with an address inside the user's own network. So every
hop is looked at anew: how it is spelled, its scheme, and all addresses of its host. The connection then goes
to one of the addresses that were looked at, without asking again; with a proxy, the proxy asks. This file
knows no hub.
"""

import ipaddress
import re
import socket
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx2

from onecard.errors import UNSAFE, UserError

Resolve = Callable[..., list[tuple[Any, ...]]]  # as socket.getaddrinfo
MOST = 6  # addresses of a host that are tried, at most
UNICAST = ipaddress.ip_network("2000::/3")  # all of IPv6 that is given out for the public network
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052: an IPv4 address is in the last four bytes
# RFC 2544, in no network that is used: proxies on the user's own machine answer with these for any name
STAND_INS = ipaddress.ip_network("198.18.0.0/15")
TEREDO = ipaddress.ip_network("2001::/32")  # leads through somebody's tunnel
NUMBERS = re.compile(r"(0x[0-9a-f]*|[0-9]+)(\.(0x[0-9a-f]*|[0-9]+))*\.?", re.IGNORECASE)
FIX = "If it is a mirror of your own, name it yourself (--endpoint, or the address in --url_list)."


class Hosts:
    """Those that the user typed may lie anywhere, at any port; all others have to be public.

    A typed name that was public once stays so: its owner cannot turn it into a way in here.
    """

    def __init__(self, typed: Iterable[str] = (), resolve: Resolve | None = None):
        """typed: addresses (https://...) as the user gave them; raises UserError for misleading ones."""
        self._typed = {_parsed(text).raw_host for text in typed}
        self._were_public: set[bytes] = set()
        self._resolve = resolve

    def check(self, url: httpx2.URL) -> list[str]:
        """IP addresses of the host, to connect to one of them; raises UserError (exit 8) or OSError."""
        check_form(url)
        host = url.raw_host.decode()
        resolve = self._resolve or socket.getaddrinfo
        answers = resolve(host, None, type=socket.SOCK_STREAM)
        ips = list(dict.fromkeys(str(answer[4][0]) for answer in answers))
        if not ips:
            raise OSError(f"{host} has no address")
        closed = [ip for ip in ips if not is_public(ip)]
        if closed and (url.raw_host not in self._typed or url.raw_host in self._were_public):
            what = host if host == closed[0] else f"{host} is {closed[0]}, which"
            raise UserError(f"{what} is not a public address, so no request was sent.", FIX, UNSAFE)
        if not closed:
            self._were_public.add(url.raw_host)
        return ips[:MOST]

    def check_unresolved(self, url: httpx2.URL) -> None:
        """What can be said where a proxy asks for the host's addresses; raises UserError (exit 8)."""
        check_form(url)
        host = url.raw_host.decode()
        is_own = host == "localhost" or host.endswith((".localhost", "localhost."))
        is_closed = is_own or (_is_ip(host) and not is_public(host))
        if is_closed and url.raw_host not in self._typed:
            raise UserError(f"{host} is not a public address, so no request was sent.", FIX, UNSAFE)


class Checked(httpx2.BaseTransport):
    """Requests to hosts that are allowed, at the address that was checked; each hop comes through here."""

    def __init__(self, hosts: Hosts):
        self._hosts = hosts
        # by host: a kept connection to an address that two share was proven for one of their names
        self._transports: dict[str, httpx2.HTTPTransport] = {}

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        proxy = _proxy(request.url)
        if proxy:
            self._hosts.check_unresolved(request.url)
            response = self._transport(proxy, proxy).handle_request(request)
        else:
            response = self._pinned(request)
        try:
            _check_redirect(request.url, response)
        except UserError:
            response.close()
            raise
        return response

    def close(self) -> None:
        for transport in self._transports.values():
            transport.close()

    def _pinned(self, request: httpx2.Request) -> httpx2.Response:
        url = request.url
        try:
            ips = self._hosts.check(url)
        except (OSError, UnicodeError) as error:
            raise httpx2.ConnectError(str(error), request=request) from error
        host = url.raw_host.decode()
        extensions = {**request.extensions, "sni_hostname": host}  # whom the certificate has to name
        for ip in ips:
            last = ip == ips[-1]
            there = httpx2.Request(
                request.method,
                url.copy_with(host=ip),
                headers=request.headers,  # Host is among them
                stream=request.stream,
                extensions=extensions,
            )
            try:
                return self._transport(host).handle_request(there)
            except (httpx2.ConnectError, httpx2.ConnectTimeout):
                if last:
                    raise
        raise AssertionError

    def _transport(self, key: str, proxy: str | None = None) -> httpx2.HTTPTransport:
        if key not in self._transports:
            self._transports[key] = httpx2.HTTPTransport(proxy=proxy)
        return self._transports[key]


def is_public(ip: str) -> bool:
    """Whether an IP address belongs to the public network, also the one that is packed into another."""
    try:
        address = ipaddress.ip_address(ip.partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in NAT64:
            inner = ipaddress.IPv4Address(address.packed[-4:])
        if inner is not None:
            return is_public(str(inner))
        if address not in UNICAST or address in TEREDO:
            return False
    if address in STAND_INS:
        return True
    return address.is_global and not (address.is_multicast or address.is_reserved)


def check_form(url: httpx2.URL) -> None:
    """Raise UserError (exit 8) unless it is http or https, and its host is written in the usual way."""
    check_spelling(str(url))
    host = url.raw_host.decode()
    if not host:
        raise _misleading(str(url), "no host")
    if "%" in host:
        raise _misleading(str(url), "a percent sign in the host")
    if NUMBERS.fullmatch(host) and not _is_ip(host):
        raise _misleading(str(url), "a number in another form than 1.2.3.4")


def check_spelling(text: str) -> None:
    """Raise UserError (exit 8) for another scheme, and for what two readers may understand differently."""
    if "\\" in text:
        raise _misleading(text, "a backslash")
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in text):
        raise _misleading(text, "a control character")
    try:
        parts = urlsplit(text)
        has_user = "@" in parts.netloc
        _ = parts.port
    except ValueError:
        raise _misleading(text, "a host that cannot be read") from None
    if has_user:
        raise _misleading(text, "a user's name before the host")
    if parts.scheme not in ("", "http", "https"):
        raise UserError(
            f"{_shown(text)} is not an http or https address, so no request was sent.",
            "Use another address.",
            UNSAFE,
        )


def _check_redirect(url: httpx2.URL, response: httpx2.Response) -> None:
    """Raise UserError for a redirect that the next hop's check would not see as it was written."""
    if not response.has_redirect_location:
        return
    location = response.headers["Location"]
    target = _parsed(location, url)
    if url.scheme == "https" and target.scheme == "http":
        problem = f"{url.host} redirects from https to http ({target.host}); the redirect was not followed."
        raise UserError(problem, "Use another source.", UNSAFE)


def _parsed(text: str, base: httpx2.URL | None = None) -> httpx2.URL:
    check_spelling(text)
    try:
        return base.join(text) if base else httpx2.URL(text)
    except (httpx2.InvalidURL, ValueError):
        raise _misleading(text, "a host that cannot be read") from None


def _proxy(url: httpx2.URL) -> str | None:
    """The proxy that the environment names for this address."""
    proxies = getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if not proxy or proxy_bypass(url.host):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def _misleading(text: str, why: str) -> UserError:
    return UserError(
        f"{_shown(text)}: the address has {why}, so no request was sent.", "Use another address.", UNSAFE
    )


def _shown(text: str) -> str:
    """Without a query, which may be a signature, and without a password."""
    return re.sub(r"//[^/]*@", "//", ascii(text.partition("?")[0])[1:-1])[:120]
