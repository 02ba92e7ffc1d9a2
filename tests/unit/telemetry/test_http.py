from __future__ import annotations

import asyncio
import json
import signal

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from runner import config, errors
from runner.telemetry import http

TOKEN = "correct-horse-battery"


async def page(request):
    return JSONResponse({"page": request.path_params["name"]})


async def endless(_request):
    async def chunks():
        while True:
            yield b"x"
            await asyncio.sleep(0.05)

    return StreamingResponse(chunks())


@pytest.fixture
async def serve():
    servers = []

    async def start(*, token=None, host="127.0.0.1", readiness=lambda: http.Readiness(ready=True)):
        server = http.HttpServer(
            config.Http(host=host, port=0, token=token),
            render_metrics=lambda: b"# TYPE a gauge\na 1\n",
            readiness=readiness,
            routes=[
                Route("/pages/{name}", page),
                Route("/act", page, methods=["POST"]),
                Route("/endless", endless),
            ],
        )
        servers.append(server)
        return server, await server.start()

    yield start
    for server in servers:
        await server.stop()


async def get(address, path, *, method="GET", host="localhost", **headers):
    reader, writer = await asyncio.open_connection(*address)
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), head.decode().lower(), body


async def test_health_and_metrics_are_open(serve):
    _, address = await serve()
    status, head, body = await get(address, "/metrics", host="example.com")
    assert status == 200
    assert "content-type: text/plain; version=0.0.4; charset=utf-8" in head
    assert [family.name for family in text_string_to_metric_families(body.decode())] == ["a"]
    status, _, body = await get(address, "/healthz", host="example.com")
    assert (status, json.loads(body)["status"]) == (200, "ok")


async def test_not_ready_is_503_and_names_the_account_without_its_password(serve):
    state = http.Readiness(ready=False, accounts={"a": "amqp://u:hunter22@h is away", "b": None})
    _, address = await serve(readiness=lambda: state)
    status, _, body = await get(address, "/readyz")
    assert status == 503
    assert json.loads(body) == {"ready": False, "accounts": {"a": "amqp://***@h is away", "b": "ok"}}


async def test_ready_is_200(serve):
    _, address = await serve()
    assert (await get(address, "/readyz"))[0] == 200


async def test_unknown_paths_and_methods_are_json(serve):
    _, address = await serve()
    status, _, body = await get(address, "/nothing")
    assert (status, json.loads(body)) == (404, {"error": "Not Found"})
    assert (await get(address, "/metrics", method="POST"))[0] == 405


@pytest.mark.parametrize("host", ["localhost", "localhost:9090", "127.0.0.1:1", "[::1]:9090", "[::1]"])
async def test_local_programs_reach_the_pages(serve, host):
    _, address = await serve()
    status, _, body = await get(address, "/pages/x", host=host)
    assert (status, json.loads(body)) == (200, {"page": "x"})


@pytest.mark.parametrize(
    ("host", "headers"),
    [
        ("evil.example.com", {}),  # a name that was made to resolve to 127.0.0.1
        ("evil.example.com:9090", {}),
        ("localhost.evil.com", {}),
        ("127.0.0.1.evil.com", {}),
        ("", {}),
        ("localhost", {"Origin": "http://evil.example.com"}),
        ("localhost", {"Origin": "null"}),
        ("localhost", {"X_Forwarded_For": "127.0.0.1"}),
        ("localhost", {"Forwarded": "for=10.0.0.1"}),
        ("localhost", {"Authorization": f"Bearer {TOKEN}"}),
    ],
)
async def test_the_guard_refuses_what_a_local_program_would_not_send(serve, host, headers):
    _, address = await serve()
    if "Authorization" in headers:  # without a configured token none opens, and the rest still decides
        host = "evil.example.com"
    assert (await get(address, "/pages/x", host=host, **headers))[0] == 403


async def test_the_token_opens_from_everywhere(serve):
    _, address = await serve(token=TOKEN)
    elsewhere = {"host": "runner.example.com"}
    assert (await get(address, "/pages/x", **elsewhere, Authorization=f"Bearer {TOKEN}"))[0] == 200
    for wrong in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": TOKEN},
        {"Authorization": "Bearer "},
    ):
        status, head, _ = await get(address, "/pages/x", **elsewhere, **wrong)
        assert status == 401
        assert "www-authenticate: bearer" in head


async def test_a_taken_port_is_a_usage_error_that_names_the_address(serve):
    _, (host, port) = await serve()
    second = http.HttpServer(
        config.Http(host=host, port=port), render_metrics=bytes, readiness=lambda: http.Readiness(ready=True)
    )
    with pytest.raises(
        errors.UsageError, match=rf"--prom-address=127\.0\.0\.1:{port}: Address already in use"
    ):
        await second.start()


async def test_all_interfaces_answer_on_loopback(serve):
    _, address = await serve(host="")
    assert address[0] == "127.0.0.1"
    assert (await get(address, "/pages/x"))[
        0
    ] == 200  # also when the socket shows the peer as ::ffff:127.0.0.1


async def test_answers_that_follow_something_are_told_to_end(serve):
    server, _ = await serve()
    waiting = asyncio.create_task(server.closing.wait())
    await server.stop()
    assert await waiting


async def test_signal_handlers_stay_the_daemons_own(serve):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    server, _ = await serve()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    await server.stop()
    await server.stop()


async def test_stop_does_not_wait_for_a_reader_that_never_ends(serve):
    server, address = await serve()
    reader, writer = await asyncio.open_connection(*address)
    writer.write(b"GET /endless HTTP/1.1\r\nHost: localhost\r\n\r\n")
    await reader.readuntil(b"x\r\n")
    async with asyncio.timeout(30):
        await server.stop()
    writer.close()
    with pytest.raises(OSError):
        await get(address, "/healthz")
