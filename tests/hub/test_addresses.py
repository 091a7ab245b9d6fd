"""A server that points into the user's own network: nothing there is ever requested (S13).

Every attempt to connect is recorded; the addresses of names come from a table instead of a name server.
"""

import dataclasses
import socket
import ssl
import threading
from pathlib import Path

import httpx2
import pytest

from onecard.config.tools import DownloadConfig
from onecard.errors import UNSAFE, USAGE, UserError
from onecard.hub import addresses, transfer
from onecard.hub import download as hub_download
from onecard.hub.addresses import Hosts
from tests.support import bad_hub
from tests.support.bad_hub import NAME

PUBLIC, OTHER_PUBLIC = "93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"
NAMES = {  # what the stand-in for the name server answers
    "public.example": [PUBLIC, OTHER_PUBLIC],
    "private.example": ["10.1.2.3"],
    "mixed.example": [PUBLIC, "127.0.0.1"],
    "many.example": [f"93.184.215.{n}" for n in range(1, 250)] + ["192.168.0.7"],
    "metadata.example": ["169.254.169.254"],
    "mapped.example": ["::ffff:10.0.0.1"],
    "nat64.example": ["64:ff9b::a00:1"],
    "tunnel.example": ["2002:7f00:1::"],
    "own.example": ["127.0.0.1"],
    "localhost": ["127.0.0.1", "::1"],
    "x.localhost": ["127.0.0.1"],
    "nothing.example": [],
}
HOSTILE = """
http://127.1:{port}/ http://127.0.1:{port}/ http://0:{port}/ http://0.0.0.0:{port}/
http://127.0.0.2:{port}/ http://127.255.255.254:{port}/ http://2130706433:{port}/
http://0x7f000001:{port}/ http://017700000001:{port}/ http://0177.0.0.1:{port}/ http://0x7f.0.0.1:{port}/
http://0x7f.1:{port}/ http://127.0.0.1.:{port}/ http://0x7F.0x0.0x0.0x1:{port}/ http://127.0x1:{port}/
http://%31%32%37.0.0.1:{port}/ http://[::1]:{port}/ http://[::]:{port}/ http://[0:0:0:0:0:0:0:1]:{port}/
http://[::127.0.0.1]:{port}/ http://[::ffff:127.0.0.1]:{port}/ http://[::ffff:7f00:1]:{port}/
http://[::ffff:169.254.169.254]/ http://[::ffff:10.0.0.1]/ http://[64:ff9b::7f00:1]/
http://[64:ff9b::169.254.169.254]/ http://[64:ff9b:1::a00:1]/ http://[2002:7f00:1::]/
http://[2002:a9fe:a9fe::1]/ http://[2001:0:5ef5:79fd::1]/ http://[fe80::1]/ http://[fe80::1%25lo]/
http://[fc00::1]/ http://[fd12:3456::1]/ http://[fec0::1]/ http://[ff02::1]/ http://[2001:db8::1]/
http://[100::1]/ http://169.254.169.254/latest/meta-data/ http://169.254.1.1/ http://2852039166/
http://0xa9fea9fe/ http://0251.0376.0251.0376/ http://169.254.43518/ http://10.0.0.1/ http://172.16.0.1/
http://172.31.255.255/ http://192.168.1.1/ http://100.64.0.1/ http://192.0.2.1/ http://198.51.100.1/
http://203.0.113.9/ http://224.0.0.1/ http://239.255.255.250/ http://240.0.0.1/ http://255.255.255.255/
http://localhost:{port}/ http://LOCALHOST:{port}/ http://x.localhost:{port}/ http://own.example:{port}/
http://private.example/ http://mixed.example/ http://many.example/ http://metadata.example/
http://mapped.example/ http://nat64.example/ http://tunnel.example/ http://nothing.example/
http://user@public.example/ http://a:b@public.example/ http://public.example@localhost:{port}/
http://public.example:80@127.1/ http://public.example\\@localhost/ http:\\\\localhost:{port}/
http://localhost\\.public.example/ http:/\\localhost:{port}/ //localhost:{port}/ //127.1:{port}/
///localhost\\x http://public.example:99999/ file:///etc/passwd file://localhost/etc/passwd
ftp://public.example/ gopher://localhost:{port}/_GET data:text/plain,hello unix:///var/run/x.sock
http://[::1 http://①②⑦.⓪.⓪.①:{port}/ http://127。0。0。2:{port}/ http://ⓛocalhost:{port}/
https://localhost:{port}/ https://169.254.169.254/
""".split()  # noqa: SIM905 (a list would be a hundred lines)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(transfer, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(transfer, "LONGEST_WAIT", 0.01)
    for name in ("HF_TOKEN", "HF_ENDPOINT", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def names(monkeypatch):
    """A table of names in place of the name server; the system itself reads addresses."""
    table, ask = {name: list(ips) for name, ips in NAMES.items()}, socket.getaddrinfo

    def answer(host, port, *rest, **options):
        if host in table:
            return [(0, 0, 0, "", (ip, port)) for ip in table[host]]
        return ask(host, port, *rest, **{**options, "flags": socket.AI_NUMERICHOST})

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    return table


@pytest.fixture
def connections(monkeypatch):
    """The hosts to which a connection was tried; only those to this machine are made."""
    tried, connect = [], socket.create_connection

    def note(address, *rest, **options):
        tried.append(address[0])
        if address[0] not in ("127.0.0.1", "::1"):
            raise ConnectionRefusedError("not from a test")
        return connect(address, *rest, **options)

    monkeypatch.setattr(socket, "create_connection", note)
    return tried


@pytest.fixture
def served(names):
    with bad_hub.serving(bad_hub.hub_of({"config.json": b"{}", "model.safetensors": b"x" * 1000})) as hub:
        yield hub


def port(served: bad_hub.Hub) -> str:
    return served.address.rpartition(":")[2]


def ask(url: str, *typed: str) -> UserError | None:
    """Return the error of a client whose user typed these addresses, or None for an answer."""
    try:
        with transfer.connect(Hosts(typed)) as client:
            transfer.get(client, url, {}, "x")
    except UserError as error:
        return error
    return None


def download(served: bad_hub.Hub, folder: Path, **options) -> UserError | None:
    settings = DownloadConfig(model_path=NAME, to=str(folder), endpoint=served.address)
    try:
        hub_download.run(dataclasses.replace(settings, **options))
    except UserError as error:
        return error
    return None


def test_there_are_enough():
    assert len(set(HOSTILE)) >= 60


@pytest.mark.parametrize("url", HOSTILE)
def test_nothing_is_asked(served, connections, tmp_path, url):
    """Typed or redirected to by the user's host, an address gets not one connection (S13)."""
    url = url.replace("{port}", port(served))
    absolute = url if not url.startswith("//") else f"http:{url}"
    assert ask(absolute).code in (UNSAFE, USAGE)
    assert connections == []
    served.faults["model.safetensors"] = [(302, {"Location": url.encode().decode("latin-1")})] * 30
    error = download(served, tmp_path / "m")
    assert error is not None
    if "nothing.example" not in url:
        assert error.code == UNSAFE
    assert set(connections) == {"127.0.0.1"}
    assert {host for host, _, _ in served.asked} == {served.address.removeprefix("http://")}
    redirected = served.files("model.safetensors")
    assert len(redirected) == 1 or "nothing.example" in url
    assert not list((tmp_path / "m").glob("*.safetensors*"))


def test_a_name_that_changes_its_answer(names, connections):
    """Its address is public when checked and private later: the checked one is connected to (S13)."""
    hosts = []

    def fickle(host, *_, **__):
        hosts.append(host)
        return [(0, 0, 0, "", (PUBLIC if len(hosts) == 1 else "127.0.0.1", 0))]

    for typed in ([], ["http://fickle.example"]):
        hosts.clear()
        connections.clear()
        with transfer.connect(Hosts(typed, fickle)) as client:
            with pytest.raises(UserError, match="cannot be reached"):
                transfer.get(client, "http://fickle.example/", {}, "x")
            assert connections == [PUBLIC]
            assert hosts == ["fickle.example"]  # looked up once for a request, and nowhere else
            with pytest.raises(UserError, match="not a public address") as caught:
                transfer.get(client, "http://fickle.example/", {}, "x")
        assert caught.value.code == UNSAFE
        assert connections == [PUBLIC]


def test_all_public_addresses_are_tried(names, connections):
    """They are tried one after the other, but only up to a limit."""
    assert "cannot be reached" in str(ask("http://public.example/"))
    assert connections == [PUBLIC, OTHER_PUBLIC]
    connections.clear()
    names["many.example"].pop()
    ask("http://many.example/")
    assert len(connections) == addresses.MOST


def test_what_the_user_typed_may_be_private(served, connections, tmp_path):
    """It is a mirror on this machine, by address or name; its other ports are allowed too."""
    assert download(served, tmp_path / "a") is None
    by_name = f"http://own.example:{port(served)}"
    assert download(served, tmp_path / "b", endpoint=by_name) is None
    assert served.asked[-1][0] == by_name.removeprefix("http://")  # the name, not the address
    with bad_hub.serving(bad_hub.hub_of({"model.safetensors": b"x" * 1000})) as second:
        served.faults["model.safetensors"] = [
            (302, {"Location": f"{second.address}/plain/model.safetensors"})
        ]
        assert download(served, tmp_path / "c") is None
        assert second.files("/plain/")


def test_typed_addresses_are_read_strictly(served, connections, tmp_path):
    for endpoint in (
        f"http://127.1:{port(served)}",
        f"http://user:secret@127.0.0.1:{port(served)}",
        f"http://public.example\\@127.0.0.1:{port(served)}",
        f"http://127.0.0.1:{port(served)}\x01",
    ):
        error = download(served, tmp_path / "m", endpoint=endpoint)
        assert error is not None
        assert error.code == UNSAFE
        assert "secret" not in str(error)
    assert connections == []


def test_https_stays_https(monkeypatch):
    """Otherwise anybody on the line could choose the bytes, even for the same host over http."""
    requests = []

    def answer(self, request):
        requests.append((str(request.url), request.headers["Host"], request.extensions["sni_hostname"]))
        target = "http://public.example/x" if request.url.path == "/down" else "/down"
        return httpx2.Response(302, headers={"Location": target})

    monkeypatch.setattr(httpx2.HTTPTransport, "handle_request", answer)
    hosts = Hosts(["https://public.example"], lambda *_, **__: [(0, 0, 0, "", (PUBLIC, 0))])
    with transfer.connect(hosts) as client, pytest.raises(UserError, match="from https to http") as caught:
        transfer.get(client, "https://public.example/start", {}, "x")
    assert caught.value.code == UNSAFE
    there = ("public.example", "public.example")
    assert requests == [(f"https://{PUBLIC}/start", *there), (f"https://{PUBLIC}/down", *there)]


def test_the_certificate_is_the_names(names):
    """TLS names the host, although the connection goes to its address."""
    messages = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def receive() -> None:
            with server.accept()[0] as line:
                messages.append(line.recv(4096))

        thread = threading.Thread(target=receive)
        thread.start()
        url = f"https://own.example:{server.getsockname()[1]}/"
        assert isinstance(ask(url, url), UserError)
        thread.join(10)
    assert b"own.example" in messages[0]  # the first message of TLS holds the name
    assert isinstance(httpx2.create_ssl_context(), ssl.SSLContext)
    assert httpx2.create_ssl_context().check_hostname


def test_a_proxy_does_the_asking(served, connections, names, monkeypatch):
    """Names go to the proxy unresolved; private addresses and this machine's own name do not."""
    monkeypatch.setenv("http_proxy", served.address)
    names.pop("localhost")
    assert "404" in str(ask("http://unknown.example/x"))
    assert served.asked[-1][0] == "unknown.example"
    served.asked.clear()
    for url in ("http://169.254.169.254/", "http://localhost/", "http://[::1]/", "http://2130706433/"):
        assert ask(url).code == UNSAFE
    assert served.asked == []
    monkeypatch.setenv("no_proxy", "private.example")
    assert ask("http://private.example/").code == UNSAFE
    assert served.asked == []


@pytest.mark.parametrize(
    "ip", ["198.18.0.1", PUBLIC, OTHER_PUBLIC, "8.8.8.8", "64:ff9b::808:808", "::ffff:8.8.8.8"]
)
def test_public(ip):
    assert addresses.is_public(ip)
