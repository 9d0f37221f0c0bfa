"""A server in this process with a small untrained model, and what asks it over its socket."""

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from m2rec.nn.encoder import Encoder
from m2rec.serving.http.server import build_server, open_socket
from m2rec.serving.http.service import Service, ServiceOptions
from m2rec.serving.recommender import Recommender
from m2rec.serving.saved_model import build_saved_model
from m2rec.settings import ModelSettings

V, L, T0 = 40, 12, 16
TOKENS = ["[PAD]", *(f"i{k}" for k in range(1, V))]
TOKEN = "a-token-of-the-tests"
HISTORY = ["i4", "i9", "i2", "i9"]
TITLES = {f"i{k}": f"Tea of the year {1900 + k}" for k in range(1, V)} | {"i3": "Élan <b>& co</b>"}


def save_model(
    folder: Path, seed: int = 0, text: dict[str, Any] | None = None, n_items: int = V, **settings: Any
) -> Path:
    """Write an untrained model of M2Rec with text; returns its folder."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "inner_size": 32, "head_dim": 8, "d_state": 8}
    made = ModelSettings(**{**sizes, **settings})
    encoder = Encoder(made, n_items, L, torch.randn(n_items, 6))
    torch.nn.init.normal_(encoder.id_embedding.weight)
    config = {**made.model_dump(), "MAX_ITEM_LIST_LENGTH": L, "model": "M2Rec", "dataset": "toy"}
    model = build_saved_model(
        encoder,
        [*TOKENS, *(f"i{k}" for k in range(V, n_items))][:n_items],
        titles=TITLES,
        counts=range(n_items),
        config=config,
        text_mean=torch.randn(T0),
        text_basis=torch.randn(T0, 6),
        text_source={"model": "tiny", "columns": "title category"} if text is None else text,
    )
    Recommender(model).save(folder)
    return folder


def as_pairs(ranking: list[Any]) -> list[tuple[str, Any]]:
    """Tokens and scores of a ranking, to compare with."""
    return [(entry.item, pytest.approx(entry.score, abs=1e-4)) for entry in ranking]


@dataclass
class Client:
    """Asks one server."""

    port: int
    service: Service | None = None
    token: str = ""

    def ask(
        self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """Status and content of an answer, which must be JSON; bytes are sent as they are."""
        status, content, _ = self.ask_raw(method, path, body, headers)
        return status, json.loads(content)

    def ask_raw(
        self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes, dict[str, str]]:
        """Status, content and headers of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        sent = {"Content-Type": "application/json"} if body is not None else {}
        sent |= {"Authorization": f"Bearer {self.token}"} if self.token else {}
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        try:
            connection.request(method, path, data, {**sent, **(headers or {})})
            answer = connection.getresponse()
            return answer.status, answer.read(), {k.lower(): v for k, v in answer.getheaders()}
        finally:
            connection.close()

    def items(self, method: str, path: str, body: object = None) -> list[tuple[str, float]]:
        """Tokens and scores of a ranking."""
        status, content = self.ask(method, path, body)
        assert status == 200, content
        return [(entry["item"], entry["score"]) for entry in content["items"]]


@contextmanager
def serve(folder: Path, token: str = "", **options: Any) -> Iterator[Client]:
    """Answer requests from another thread of this process."""
    service = Service(ServiceOptions(folder, **options))
    ready = threading.Event()
    server = build_server(service, token, ready.set)
    with open_socket("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
        thread.start()
        assert ready.wait(60)
        yield Client(listener.getsockname()[1], service, token)
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
