"""`nanobanana listen`: print callbacks as they arrive, to test a tunnel."""

import sys

import click

from nanobanana_async._text import sanitize_line
from nanobanana_async.callbacks import Receive, Scope, Send, parse_callback
from nanobanana_async.cli.runtime import exit_on_bind_error, json_option, print_json, print_result
from nanobanana_async.errors import ProtocolError

_MAX_BODY_BYTES = 2**20


@click.command()
@click.option("--port", default=8788, show_default=True, type=click.IntRange(0, 65535), help="0 selects a free port.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@json_option
def listen(*, port: int, host: str, as_json: bool) -> None:
    """Print callbacks as they arrive, on any path. Use it to test a tunnel. Nothing is verified."""
    try:
        import uvicorn  # noqa: PLC0415 - needs an extra

        from nanobanana_async.simulator.server import open_listener  # noqa: PLC0415 - needs an extra
    except ModuleNotFoundError as exc:
        sys.exit(f"nanobanana: listen needs {exc.name}. In a clone, run: pip install '.[cli,simulator]'")
    with exit_on_bind_error(host, port):
        socket = open_listener(host, port)
    address = f"http://{host}:{socket.getsockname()[1]}"
    click.echo(f"listening on {address} for callbacks (press Ctrl-C to stop)", err=True)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body") or len(body) > _MAX_BODY_BYTES:
                break
        _show(scope, body, as_json=as_json)
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False, lifespan="off"))
    try:
        server.run(sockets=[socket])
    except KeyboardInterrupt:  # uvicorn shuts down, then raises the signal again
        sys.exit(130)


def _show(scope: Scope, body: bytes, *, as_json: bool) -> None:
    path = scope["path"]
    try:
        payload = parse_callback(body, content_encoding=dict(scope["headers"]).get(b"content-encoding", b"").decode())
    except ProtocolError as exc:
        if as_json:
            print_json({"method": scope["method"], "path": path, "task_id": None, "error": str(exc)})
        else:
            print_result(sanitize_line(f"{scope['method']} {path}: {exc}"))
    else:
        if as_json:
            print_json({"method": scope["method"], "path": path, **payload.raw})
        else:
            print_result(sanitize_line(f"{scope['method']} {path}: task {payload.task_id} {payload.status}"))
    sys.stdout.flush()
