"""As in Colab: the page of a port is seen through a proxy, with the proxy's name as its host."""

import http.client

from google import colab

PROXY = "https://xyz-{}-colab.googleusercontent.com/"


def eval_js(code: str) -> str:
    colab.note("eval_js", code)
    return PROXY.format(code.removeprefix("google.colab.kernel.proxyPort(").removesuffix(")"))


def serve_kernel_port_as_window(port: int) -> None:
    """Opens the page: what its browser is answered through the proxy, and another site's page beside it."""
    origin = PROXY.format(port).rstrip("/")
    answers = []
    for host, page in (
        (origin, origin),
        (origin, "https://elsewhere.example"),
        ("https://elsewhere.example", None),
    ):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        headers = {"Host": host.removeprefix("https://"), **({"Origin": page} if page else {})}
        connection.request("GET", "/", headers=headers)
        answers.append(connection.getresponse().status)
        connection.close()
    colab.note("window", [port, *answers])
