"""Labels from a language model, against a server on this machine that speaks the OpenAI form."""

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from hafs_evaluate.cli import main
from hafs_evaluate.labels import prompts
from hafs_evaluate.labels.endpoint import Endpoint
from hafs_evaluate.labels.labels_file import Label, read_labels, write_labels
from hafs_evaluate.report.report import write_report
from hafs_jax.base.errors import UserError
from tests.support.report_workspace import make_workspace, page_of, write_many_latents

RUNS = ("baseline-s0", "adaptive-s0")


class Stub(ThreadingHTTPServer):
    """Names every latent "kind N"; finds the texts that hold the word it looks for; refuses what it is told to."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.refuse: list[int] = []  # status codes of the next answers
        self.answer: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.keys.append(self.headers.get("Authorization"))
        if self.server.refuse:
            self._send(self.server.refuse.pop(0), {"error": {"message": "not now"}}, {"Retry-After": "0.01"})
            return
        self.server.asked.append(body)
        user = body["messages"][1]["content"]
        numbers = [int(number) for number in re.findall(r"^(\d+)\. ", user, flags=re.MULTILINE)]
        text = f"I think [{numbers[0]}]" if user.startswith("Description:") else f'"kind {len(self.server.asked)}."'
        text = text if self.server.answer is None else self.server.answer
        self._send(200, {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"],
                         "choices": [{"index": 0, "finish_reason": "stop",
                                      "message": {"role": "assistant", "content": text}}]})  # fmt: skip

    def _send(self, status: int, values: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        body = json.dumps(values).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Stub]:
    with Stub() as stub:
        thread = threading.Thread(target=stub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield stub
        stub.shutdown()
        thread.join()


@pytest.fixture
def folder(tmp_path):
    folder = make_workspace(tmp_path / "offline", RUNS)
    for number, run in enumerate(RUNS):
        write_many_latents(folder, run, 12, 12, number)
    return folder


def command(folder, server, *more: str) -> int:
    place = ["--out", str(folder.parent), "--profile", folder.name]
    try:
        return main(["label", "--endpoint", server.url, "--model", "tiny", *place, *more])
    except SystemExit as stop:
        return int(stop.code or 0)


def test_labels_are_named_scored_and_shown(folder, server, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert command(folder, server, "--latents", "3") == 0
    assert "labels.csv: 6 labels added" in capsys.readouterr().out
    labels = read_labels(folder / "labels.csv")
    assert sorted(label.variant for label in labels) == sorted(3 * RUNS)
    assert {label.source for label in labels} == {"model tiny"}
    assert all(re.fullmatch(r"kind \d+", label.text) for label in labels)
    latents = json.loads((folder / "eval" / "baseline-s0" / "latents.json").read_text())["latents"]
    most = sorted(latents, key=lambda latent: -latent["selectivity"]["auroc"])[:3]
    assert [label.latent for label in labels if label.variant == "baseline-s0"] == [one["index"] for one in most]
    rare = {latent["index"] for latent in latents if latent["density"] <= 0.01}
    own = [label for label in labels if label.variant == "baseline-s0"]
    assert [label.score is not None for label in own] == [label.latent in rare for label in own]
    assert set(server.keys) == {"Bearer secret"}
    assert {body["model"] for body in server.asked} == {"tiny"}
    write_report(folder)
    page = page_of(folder)
    assert page.json("data-labels")["baseline"][str(own[0].latent)][:2] == [own[0].text, "model tiny"]


def test_an_interrupted_call_goes_on_and_people_are_never_overwritten(folder, server):
    write_labels(folder / "labels.csv", [])
    command(folder, server, "--latents", "2", "--runs", "baseline-s0", "--no-score")
    first = read_labels(folder / "labels.csv")
    assert len(first) == len(server.asked) == 2
    mine = Label("baseline", first[0].latent, "mine")  # by the arm's name, in the place of the model's
    write_labels(folder / "labels.csv", [mine, first[1]])
    command(folder, server, "--latents", "3", "--runs", "baseline-s0", "--no-score")
    assert len(server.asked) == 3
    assert read_labels(folder / "labels.csv")[:2] == [mine, first[1]]
    command(folder, server, "--latents", "3", "--runs", "baseline-s0", "--no-score")
    assert len(server.asked) == 3
    write_labels(folder / "labels.csv", [Label("baseline-s0", mine.latent, "machine", "model x"), mine])
    write_report(folder)
    assert page_of(folder).json("data-labels")["baseline"][str(mine.latent)][0] == "mine"


def test_a_busy_server_is_waited_for_and_a_lasting_refusal_is_one_line(folder, server, capsys):
    server.refuse = [429, 503]
    assert command(folder, server, "--latents", "1", "--runs", "baseline-s0", "--no-score") == 0
    assert len(server.keys) == 3
    endpoint = Endpoint(server.url, "tiny", retries=1)
    for codes, said in (
        ([429] * 2, "still refuses the rate of requests after 1 retries"),
        ([401], "refuses the key: .*not now"),
        ([404], "has no model 'tiny'"),
        ([400], "answers 400"),
    ):
        server.refuse = list(codes)
        with pytest.raises(UserError, match=said) as found:
            endpoint.ask([], 5)
        assert "\n" not in str(found.value)
    with pytest.raises(UserError, match="cannot be reached"):
        Endpoint("http://127.0.0.1:9/v1", "tiny", retries=0).ask([], 5)
    capsys.readouterr()
    server.refuse = [401]
    assert command(folder, server, "--runs", "adaptive-s0") == 2
    assert "refuses the key" in capsys.readouterr().err
    assert [label.variant for label in read_labels(folder / "labels.csv")] == ["baseline-s0"]


def test_an_empty_answer_is_no_label(folder, server, capsys):
    server.answer = "  \n"
    assert command(folder, server, "--latents", "2", "--runs", "baseline-s0") == 0
    assert "0 labels added; 2 answers held none" in capsys.readouterr().out
    assert not (folder / "labels.csv").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--latents", "0"], "--latents 0: expected at least 1"),
        (["--runs", "basline-s0"], "no run 'basline-s0'"),
        (["--key-from", "NO_SUCH_KEY"], "--key-from NO_SUCH_KEY: expected a key"),
        (["--endpoint", "localhost:1"], "--endpoint localhost:1: expected an address"),
    ],
)
def test_a_mistake_is_one_line(folder, server, capsys, more, said):
    assert command(folder, server, *more) == 2
    assert said in capsys.readouterr().err


def test_a_name_is_tested_on_texts_that_it_was_not_made_from():
    def context(document: int, word: str) -> dict[str, Any]:
        return {"document": document, "peak": 1, "tokens": ["a", word], "values": [0.0, 2.0]}

    latent = {"contexts": [context(n, f" top{n}") for n in range(20)], "max_activation": 2.0,
              "random_contexts": [context(30 + n, f" mid{n}") for n in range(10)]}  # fmt: skip
    other = {"contexts": [context(0, " shared"), context(90, " far"), context(91, " off")]}
    shown = prompts.naming(latent)[1]["content"]
    messages, is_own = prompts.detection("x", latent, [other, other, other], 0)
    tested = messages[1]["content"]
    assert "<< top0>>" in shown and "<<" not in tested
    assert not {word for word in re.findall(r"(?:top|mid)\d+\b", shown)} & set(re.findall(r"(?:top|mid)\d+\b", tested))
    assert "shared" not in tested  # the latent is active in that document
    assert sum(is_own) == 8 and len(is_own) - sum(is_own) == 6
    own = {number for number, mine in enumerate(is_own, 1) if mine}
    assert prompts.balanced_accuracy(own, is_own) == 1
    assert prompts.balanced_accuracy(set(range(1, 15)), is_own) == 0.5
    assert prompts.detected("thus [9, 1, 77]", 14) == {1, 9}
    assert prompts.detected("none", 14) is None and prompts.detected("[]", 14) == set()
    assert prompts.label_of('\nLabel: "names of months."\nmore') == "names of months"
