"""Read by a SuperNode that is to be killed in the middle of an upload.

While the file $LIFL_HALT exists, of the first large object half of the body is sent; then $LIFL_HALT.half is made, and
nothing comes any more.
"""

import os
import pathlib
import time


def halt(told: pathlib.Path) -> None:
    """Changes httpx, through which the SuperNode sends to the SuperLink, and its ClientApp to the SuperNode."""
    import httpx

    send = httpx.Client.send

    class Half(httpx.SyncByteStream):
        def __init__(self, content: bytes) -> None:
            self._content = content

        def __iter__(self):
            yield self._content[: len(self._content) // 2]
            told.with_suffix(".half").touch()
            time.sleep(3600)

    def send_half(client, request, **options):
        if request.url.path == "/v1/fleet/push-object" and len(request.content) > 2**20 and told.exists():
            request.stream = Half(request.content)
        return send(client, request, **options)

    httpx.Client.send = send_half


if "LIFL_HALT" in os.environ:
    halt(pathlib.Path(os.environ["LIFL_HALT"]))
