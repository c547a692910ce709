"""The server: what it lets in, what it answers, and that it goes on while the model is at work."""

import asyncio
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the explorer's tests need its extra: pip install 'hafs-jax[explore]'")
from starlette.testclient import TestClient

from hafs_evaluate.explore import app as app_module
from hafs_evaluate.explore.app import FILES, make_app
from hafs_evaluate.explore.explorer import Explorer
from hafs_evaluate.explore.requests import MAX_BODY, MAX_CHARACTERS, MAX_NEW_TOKENS
from hafs_evaluate.explore.worker import MAX_WAITING, Job
from hafs_jax.base.errors import UserError
from tests.evaluate.explore.conftest import RUNS

PORT = 8471
OWN = f"http://127.0.0.1:{PORT}"
POSTS = ("read", "latent", "search", "compare", "steer")


class Fake:
    """Answers at once, or once `gate` is open, and notes what it was asked."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.asked: list[Any] = []
        self.began: list[Any] = []

    def state(self) -> dict[str, Any]:
        return {"runs": []}

    def read(self, request: Any) -> dict[str, Any]:
        self.began.append(request)
        self.gate.wait(20)
        self.asked.append(request)
        if request.text == "wrong":
            raise UserError("this is wrong")
        if request.text == "bug":
            raise KeyError("a bug")
        return {"text": request.text}

    latent = search = compare = read

    def steer(self, request: Any, is_stopped: Any) -> Iterator[dict[str, Any]]:
        if request.text == "wrong":
            raise UserError("this is wrong")
        for number in range(request.new_tokens):
            if is_stopped():
                self.asked.append("stopped")
                return
            yield {"number": number}
            if request.text == "bug":
                raise KeyError("a bug")
            time.sleep(0.005)
        self.asked.append("ended")


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
def client(fake: Fake, tmp_path: Path) -> TestClient:
    return TestClient(make_app(fake, tmp_path, PORT, "hafs explore"), base_url=OWN)


def post(client: TestClient, path: str, body: Any, **headers: str) -> Any:
    content = body if isinstance(body, (bytes, str, Iterator)) else json.dumps(body)
    return client.post(f"/api/{path}", content=content, headers={"Content-Type": "application/json", **headers})


READ = {"text": "a", "runs": []}


def test_the_page_and_what_it_loads_come_with_their_headers(client: TestClient) -> None:
    page = client.get("/")
    for path in FILES:
        answer = client.get(path)
        assert answer.status_code == 200 and answer.content == FILES[path].read_bytes()
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in answer.headers
        if path != "/":
            assert f'"{path}"' in page.text
    assert "onclick=" not in page.text and "<script>" not in page.text and "style=" not in page.text


def test_the_report_is_shown_where_there_is_one(fake: Fake, tmp_path: Path, client: TestClient) -> None:
    assert client.get("/report/").status_code == 404 and not client.get("/api/state").json()["has_report"]
    (tmp_path / "latents").mkdir()
    (tmp_path / "index.html").write_text("<p>the report</p>")
    (tmp_path / "latents" / "strict-s0.js").write_text("x = 1")
    (tmp_path / "results.json").write_text("{}")
    client = TestClient(make_app(fake, tmp_path, PORT, "hafs explore"), base_url=OWN)
    assert client.get("/api/state").json()["has_report"]
    report = client.get("/report/")
    assert report.text == "<p>the report</p>" and "'unsafe-inline'" in report.headers["content-security-policy"]
    assert client.get("/report/latents/strict-s0.js").text == "x = 1"
    assert client.get("/report/results.json").status_code == 404  # not a file that the page reads


@pytest.mark.parametrize(
    "path",
    [
        "/report/../../secret",
        "/report/%2e%2e/secret",
        "/..%2f..%2fsecret",
        "//etc/passwd",
        "/report//etc/passwd",
        "/api/read/../../x",
    ],
)
def test_no_path_leads_to_another_file(fake: Fake, tmp_path: Path, path: str) -> None:
    (tmp_path / "report" / "latents").mkdir(parents=True)
    (tmp_path / "report" / "index.html").write_text("report")
    (tmp_path / "secret").write_text("secret")
    client = TestClient(make_app(fake, tmp_path / "report", PORT, "hafs explore"), base_url=OWN)
    answer = client.get(OWN + path, follow_redirects=False)
    assert answer.status_code in (404, 307) and "secret" not in answer.text.replace("secret not", "")


@pytest.mark.parametrize(
    "host", ["evil.example", f"evil.example:{PORT}", "127.0.0.1", "127.0.0.1:80", f"127.0.0.1.evil.example:{PORT}", ""]
)
def test_another_host_is_refused(client: TestClient, fake: Fake, host: str) -> None:
    for answer in (client.get("/", headers={"Host": host}), post(client, "read", READ, Host=host)):
        assert answer.status_code == 403 and "Host" in answer.json()["error"]
    assert not fake.asked
    assert client.get("/", headers={"Host": f"localhost:{PORT}"}).status_code == 200


@pytest.mark.parametrize("second", ["evil.example", f"127.0.0.1:{PORT}"])
def test_a_second_host_is_refused(client: TestClient, second: str) -> None:
    answer = client.get("/", headers=[("Host", f"127.0.0.1:{PORT}"), ("Host", second)])
    assert answer.status_code == 403 and "Host" in answer.json()["error"]


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "null",
        f"https://127.0.0.1:{PORT}",
        "http://127.0.0.1",
        f"http://127.0.0.1:{PORT}.evil.example",
    ],
)
def test_another_origin_is_refused(client: TestClient, fake: Fake, origin: str) -> None:
    for answer in (client.get("/api/state", headers={"Origin": origin}), post(client, "read", READ, Origin=origin)):
        assert answer.status_code == 403 and "another site" in answer.json()["error"]
    assert not fake.asked
    assert post(client, "read", READ, Origin=OWN).status_code == 200
    assert post(client, "read", READ, **{"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert post(client, "read", READ, **{"Sec-Fetch-Site": "same-origin"}).status_code == 200


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "application/jsonp"]
)
def test_only_json_is_taken(client: TestClient, fake: Fake, kind: str) -> None:
    assert post(client, "read", READ, **{"Content-Type": kind}).status_code == 415
    assert not fake.asked
    assert post(client, "read", READ, **{"Content-Type": "application/json; charset=utf-8"}).status_code == 200


def test_other_methods_are_refused(client: TestClient) -> None:
    assert {client.request(method, "/api/read").status_code for method in ("GET", "PUT", "DELETE", "OPTIONS")} == {405}
    assert client.options("/api/read", headers={"Origin": OWN}).status_code == 405  # a preflight finds no permission
    for path in ("/", "/api/read", "/nowhere"):  # by the guard, whatever the path
        assert client.request("PUT", path).json()["error"] == "expected GET or POST"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("", "expected a request in JSON"),
        ("{", "expected a request in JSON"),
        ("[" * 100_000, "expected a request in JSON"),
        (b"\xff\xfe\x00", "expected a request in JSON"),
        ('{"text": "a", "runs": [], "top": NaN}', "NaN is no number"),
        ([], "expected an object with ReadRequest's keys"),
        ({}, "ReadRequest lacks text, runs"),
        ({"text": 3, "runs": []}, "text: expected str, found 3"),
        ({**READ, "runs": "baseline-s0"}, "runs"),
        ({**READ, "runs": [["a"]]}, r"runs\[0\]: expected str"),
        ({**READ, "runs": ["a", "a"]}, "expected at most 8 different names"),
        ({**READ, "runs": [str(n) for n in range(9)]}, "expected at most 8 different names, found 9"),
        ({**READ, "top": 0}, "top=0: expected 1 to 32"),
        ({**READ, "top": 10**9}, "expected 1 to 32"),
        ({**READ, "top": True}, "top: expected int"),
        ({**READ, "txt": 1}, "unknown key 'txt'; did you mean 'text'"),
        ({**READ, "text": "a" * (MAX_CHARACTERS + 1)}, "the text has 20,001 characters; expected at most 20,000"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_one_line(client: TestClient, fake: Fake, body: Any, reason: str) -> None:
    answer = post(client, "read", body)
    assert answer.status_code == 400 and re.search(reason, answer.json()["error"]), answer.text
    assert "\n" not in answer.json()["error"] and not fake.asked


def test_lengths_are_bounded(client: TestClient, fake: Fake) -> None:
    longest = {**READ, "text": "\u0001" * MAX_CHARACTERS}
    assert len(json.dumps(longest)) < MAX_BODY and post(client, "read", longest).status_code == 200
    assert post(client, "read", b" " * (MAX_BODY + 1)).status_code == 413
    assert post(client, "read", (part for part in [b" " * MAX_BODY, b" "])).status_code in (400, 413)
    steer = {"text": "a", "run": "r"}
    for wrong in (
        {"new_tokens": MAX_NEW_TOKENS + 1},
        {"strength": 51.0},
        {"temperature": -1.0},
        {"mode": "x"},
        {"latent": -1},
        {"seed": 2**31},
    ):
        answer = post(client, "steer", {**steer, **wrong})
        assert answer.status_code == 400 and next(iter(wrong)) in answer.json()["error"]
    assert post(client, "compare", {"text": "a", "runs": ["a"]}).json()["error"] == "runs: expected two names, found 1"


def test_halves_of_characters_become_the_replacement_character(client: TestClient) -> None:
    assert post(client, "read", '{"text": "a\\ud83d\\ude00b\\ud800c", "runs": []}').json() == {"text": "a😀b\ufffdc"}


def test_errors_are_one_line_and_the_server_goes_on(client: TestClient) -> None:
    assert post(client, "read", {**READ, "text": "wrong"}).json() == {"error": "this is wrong"}
    answer = post(client, "read", {**READ, "text": "bug"})
    assert answer.status_code == 500
    assert answer.json() == {"error": "the explorer failed (KeyError); the terminal says where"}
    lines = post(client, "steer", {"text": "wrong", "run": "r"}).text.splitlines()
    assert [json.loads(line) for line in lines] == [{"error": "this is wrong"}]
    lines = post(client, "steer", {"text": "bug", "run": "r"}).text.splitlines()
    assert json.loads(lines[-1])["error"].startswith("the explorer failed (KeyError)")
    assert post(client, "read", READ).json() == {"text": "a"}


def test_two_at_once_are_both_answered_and_the_page_meanwhile(client: TestClient, fake: Fake) -> None:
    with client:  # one event loop for all of it
        fake.gate.clear()
        answers: list[Any] = []
        threads = [
            threading.Thread(target=lambda text=text: answers.append(post(client, "read", {**READ, "text": text})))
            for text in ("first", "second")
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: client.get("/api/at-work").json() == {"at_work": 2})
        assert client.get("/").status_code == 200 and len(fake.began) == 1 and not answers
        fake.gate.set()
        for thread in threads:
            thread.join(20)
    assert {answer.json()["text"] for answer in answers} == {"first", "second"}
    assert client.get("/api/at-work").json() == {"at_work": 0}


def test_too_many_are_told_to_try_again(fake: Fake, tmp_path: Path) -> None:
    """Without a client: one of many threads."""
    fake.gate.clear()

    async def many() -> list[int]:
        app = make_app(fake, tmp_path, PORT, "hafs explore")
        running = [asyncio.ensure_future(status(app, READ)) for _ in range(MAX_WAITING + 3)]
        await asyncio.sleep(0.2)
        fake.gate.set()
        return await asyncio.gather(*running)

    assert sorted(asyncio.run(many())) == [200] * (MAX_WAITING + 1) + [503] * 2


def test_who_leaves_is_dropped_from_the_queue(fake: Fake, tmp_path: Path) -> None:
    fake.gate.clear()

    async def leave() -> None:
        app = make_app(fake, tmp_path, PORT, "hafs explore")
        gone = asyncio.Event()
        first = asyncio.ensure_future(status(app, {**READ, "text": "stays"}))
        await asyncio.sleep(0.05)
        second = asyncio.ensure_future(status(app, {**READ, "text": "leaves"}, gone))
        await asyncio.sleep(0.05)
        gone.set()
        assert await second == 499
        fake.gate.set()
        assert await first == 200
        assert await status(app, {**READ, "text": "comes"}) == 200

    asyncio.run(leave())
    assert [request.text for request in fake.asked] == ["stays", "comes"]


def test_a_continuation_ends_when_its_reader_leaves(client: TestClient, fake: Fake, tmp_path: Path) -> None:
    with client:
        with client.stream(
            "POST",
            "/api/steer",
            content=json.dumps({"text": "a", "run": "r", "new_tokens": 3}),
            headers={"Content-Type": "application/json"},
        ) as answer:
            assert [json.loads(line) for line in answer.iter_lines()] == [{"number": number} for number in range(3)]
        assert fake.asked == ["ended"]

    async def leave() -> None:
        app = make_app(fake, tmp_path, PORT, "hafs explore")
        gone = asyncio.Event()
        asyncio.get_running_loop().call_later(0.1, gone.set)
        await status(app, {"text": "a", "run": "r", "new_tokens": 200}, gone, "steer")
        await asyncio.sleep(0.2)

    asyncio.run(leave())
    assert fake.asked == ["ended", "stopped"]


def test_a_job_whose_loop_has_ended_does_no_harm() -> None:
    async def submitted() -> Job:
        return Job(lambda job: 1)

    job = asyncio.run(submitted())
    job.run()
    assert job.is_cancelled()


async def status(app: Any, body: Any, gone: asyncio.Event | None = None, path: str = "read") -> int:
    """The status of a request whose client stays, or leaves once `gone` is set."""
    content = json.dumps(body).encode()
    headers = {"host": f"127.0.0.1:{PORT}", "content-type": "application/json", "content-length": str(len(content))}
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
        "method": "POST", "scheme": "http",
        "path": f"/api/{path}", "raw_path": f"/api/{path}".encode(), "query_string": b"", "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }  # fmt: skip
    parts = [{"type": "http.request", "body": content, "more_body": False}]
    sent: list[Any] = []

    async def receive() -> Any:
        if parts:
            return parts.pop()
        await (gone or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent[0]["status"]


def wait_until(holds: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_the_whole_of_it_over_http(explorer: Explorer) -> None:
    client = TestClient(make_app(explorer, explorer.workspace.report, PORT, "hafs explore"), base_url=OWN)
    text = "glass </script><script>alert(1)</script> & \u202e <|endoftext|>"
    state = client.get("/api/state").json()
    assert [run["name"] for run in state["runs"]] == list(RUNS) and state["hook_point"] == "blocks.2.hook_resid_post"
    bodies = {
        "read": {"text": text, "runs": RUNS},
        "latent": {"run": RUNS[0], "latent": 3, "text": text, "runs": RUNS},
        "search": {"run": RUNS[0], "text": text},
        "compare": {"text": text, "runs": RUNS},
        "steer": {"text": text, "run": RUNS[1], "latent": 3, "new_tokens": 2},
    }
    assert bodies.keys() == set(POSTS)
    for path, body in bodies.items():
        answer = post(client, path, body)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith(("application/json", "application/x-ndjson"))
        first = json.loads(answer.text.splitlines()[0])
        assert first.get("live", first)["kinds"][0] == "bos"
    assert post(client, "read", {"text": text, "runs": ["../../store"]}).status_code == 400
    assert post(client, "latent", {"run": RUNS[0], "latent": 10**6}).status_code == 400
    loaded = client.get("/api/state").json()["runs"]
    assert all(run["megabytes"] is not None and run["seconds"] is not None for run in loaded)


def test_the_terminal_says_where_it_failed(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []
    monkeypatch.setattr(app_module.LOG, "warning", lambda text, exc_info: said.append(exc_info))
    post(client, "read", {**READ, "text": "bug"})
    assert [type(error) for error in said] == [KeyError]
