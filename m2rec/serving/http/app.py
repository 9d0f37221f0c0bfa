"""The routes: each reads a request, asks the service, and answers in JSON."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Annotated, Any

from fastapi import FastAPI, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, PlainTextResponse, Response

from m2rec import __version__
from m2rec.errors import UserError
from m2rec.serving.formatting import build_json_object
from m2rec.serving.http import schemas
from m2rec.serving.http.direct_routes import DirectRoute, DirectRoutes
from m2rec.serving.http.errors import RequestError, answer_error, answer_json, answer_mistake
from m2rec.serving.http.jobs import AddEvent, Options, RankHistory, RankUser, StoredEvent, Tokens
from m2rec.serving.http.new_items import describe_abilities
from m2rec.serving.http.pages import read_page, render_api_page
from m2rec.serving.http.security import Guard
from m2rec.serving.http.service import Service
from m2rec.serving.ranker import Ranking
from m2rec.serving.recommender import Recommender

MAX_REASONS = 5
"""Items of the history of each kind, for one explained item."""

_Name = Annotated[str, Path(min_length=1, max_length=200)]
_K = Annotated[int, Query(ge=1, le=schemas.MAX_K)]
_NameList = Annotated[list[schemas.Name], Query(max_length=schemas.MAX_HISTORY)]
_FewNames = Annotated[list[schemas.Name], Query(max_length=20)]
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": schemas.ErrorAnswer, "description": "A mistake: key, value, cure."}
}


def build_app(service: Service, token: str, watch: Callable[[Service], None] | None = None) -> Guard:
    """The application behind its guard.

    Args:
        service: what answers.
        token: that requests must bear; empty for none.
        watch: is called once the event loop runs.
    """
    app = FastAPI(
        title="M2Rec",
        version=__version__,
        description="Recommendations of a trained run. Errors are JSON with one key, error.",
        docs_url=None,  # FastAPI's own page loads scripts from another host
        redoc_url=None,
        redirect_slashes=False,
        responses=_ERRORS,
        lifespan=_make_lifespan(service, watch),
    )
    for kind in (UserError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _answer_mistake)
    app.add_exception_handler(404, _answer_unknown_route)
    app.add_exception_handler(405, _answer_unknown_route)
    app.add_exception_handler(Exception, _answer_failure)
    direct = [_add_recommend_route(app, service), _add_event_route(app, service)]
    _add_ranking_routes(app, service)
    _add_user_routes(app, service)
    _add_item_routes(app, service)
    _add_server_routes(app, service)
    _add_pages(app)
    return Guard(DirectRoutes(app, direct), token, service.metrics)


def _make_lifespan(
    service: Service, watch: Callable[[Service], None] | None
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if watch is not None:
            watch(service)
        yield
        await service.close()

    return lifespan


def _add_recommend_route(app: FastAPI, service: Service) -> DirectRoute:
    @app.post("/recommend", response_model=schemas.ExplainedAnswer)
    async def recommend(body: schemas.RecommendRequest) -> Response:
        """The best items after a history, or for a user of POST /events; with explain, why.

        The reasons are those of GET /explain.
        """
        options = Options(
            body.exclude_seen, _freeze(body.candidates), _freeze(body.exclude), body.skip_unknown
        )
        job: RankHistory | RankUser
        if body.user is not None:
            job = RankUser(body.user, body.k, options)
        else:
            job = RankHistory(_freeze(body.history) or (), body.k, options)
        if body.explain:
            return answer_json({"items": list(map(build_json_object, await service.explain_ranking(job)))})
        return _answer_ranking(await service.submit(job))

    return DirectRoute("/recommend", schemas.RecommendRequest, recommend)


def _add_event_route(app: FastAPI, service: Service) -> DirectRoute:
    @app.post("/events", response_model=schemas.EventAnswer)
    async def add_event(body: schemas.EventRequest) -> Response:
        """Add a user's next event, and rank after it.

        With the status 200 the event is stored, with --state on the disk. If the ranking fails afterwards,
        warning says so and items is empty; after any other status nothing is stored.
        """
        job = AddEvent(body.user, body.item, body.k, Options(body.exclude_seen))
        stored: StoredEvent = await service.submit(job)
        items = [entry._asdict() for entry in stored.ranking]
        return answer_json({"items": items, "warning": stored.warning})

    return DirectRoute("/events", schemas.EventRequest, add_event)


def _add_ranking_routes(app: FastAPI, service: Service) -> None:
    @app.get("/explain", response_model=schemas.ExplainAnswer)
    async def explain(
        history: _NameList = [],  # noqa: B006 - FastAPI copies it
        user: schemas.Name | None = None,
        item: _FewNames = [],  # noqa: B006
        n: Annotated[int, Query(ge=1, le=MAX_REASONS)] = 3,
    ) -> Response:
        """The gate's weights at each event, and why the given items have their rank.

        An item's reasons are by leave-one-out: the change of its log-probability without an item of the
        history, exact, for the last 50 items that are distinct.
        """
        if bool(history) == (user is not None):
            raise RequestError(422, "history: give either history or user")
        events = None if user is None else await service.read_history(user)

        def look(model: Recommender) -> dict[str, Any]:
            known = history if events is None else [token for token in events if token in model.model.ids]
            return _explain(model, known, item, n)

        return answer_json(await service.look_up(look))

    @app.get("/similar/{item:path}", response_model=schemas.RankingAnswer)
    async def similar(item: _Name, k: _K = 10) -> Response:
        """The items most similar to an item: the score is the cosine of their rows of the item table."""
        return _answer_ranking(await service.look_up(lambda model: model.similar_items(item, k)))


def _add_user_routes(app: FastAPI, service: Service) -> None:
    @app.get("/users/{user:path}/recommendations", response_model=schemas.RankingAnswer)
    async def recommend_user(user: _Name, k: _K = 10, exclude_seen: bool | None = None) -> Response:
        """The best items for a user of POST /events."""
        return _answer_ranking(await service.submit(RankUser(user, k, Options(exclude_seen))))

    @app.delete("/users/{user:path}", response_model=schemas.DeletedAnswer)
    async def delete_user(user: _Name) -> Response:
        """Forget a user and all events."""
        return answer_json({"deleted": await service.delete_user(user)})


def _add_item_routes(app: FastAPI, service: Service) -> None:
    @app.post("/items", response_model=schemas.AddedAnswer)
    async def add_items(body: schemas.ItemsRequest) -> Response:
        """Take in items that training did not see, all of them or none: they can be ranked from now on."""
        await service.add_items(body.items)
        return answer_json({"added": [item.item for item in body.items]})

    @app.get("/items", response_model=schemas.FoundAnswer)
    async def find_items(search: Annotated[str, Query(min_length=1, max_length=200)]) -> Response:
        """Items by token, or by a part of the title, misspelt too."""
        return answer_json({"items": await service.look_up(lambda model: _find_titles(model, search))})


def _add_server_routes(app: FastAPI, service: Service) -> None:
    @app.get("/model", response_model=schemas.ModelAnswer)
    async def describe_model() -> Response:
        """What is served."""
        return answer_json(_describe_service(service))

    @app.post("/reload", response_model=schemas.ModelAnswer)
    async def reload() -> Response:
        """Read the run folder again. No request is dropped; if the folder is broken the old model stays."""
        await service.reload()
        return answer_json(_describe_service(service))

    @app.get("/healthz", response_model=schemas.HealthAnswer)
    async def check_health() -> Response:
        """Answers while the server does."""
        return answer_json({"status": "ok"})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def read_metrics() -> Response:
        """Counters in Prometheus's text format."""
        return PlainTextResponse(service.metrics.format_text(), media_type="text/plain; version=0.0.4")


def _add_pages(app: FastAPI) -> None:
    page = read_page()
    api_page = render_api_page(app.openapi())

    @app.get("/", include_in_schema=False)
    async def show_page() -> Response:
        return HTMLResponse(page.content, headers={"Content-Security-Policy": page.policy})

    @app.get("/docs", include_in_schema=False)
    async def show_api() -> Response:
        return HTMLResponse(api_page.content, headers={"Content-Security-Policy": api_page.policy})


def _freeze(tokens: list[str] | None) -> Tokens | None:
    return None if tokens is None else tuple(tokens)


def _answer_ranking(ranking: Ranking) -> Response:
    return answer_json({"items": [entry._asdict() for entry in ranking]})


def _explain(model: Recommender, history: list[str], items: list[str], n: int) -> dict[str, Any]:
    reasons = model.find_reasons(history, items, n) if items else []
    return {
        "events": [event._asdict() for event in model.explain(history)],
        "reasons": list(map(build_json_object, reasons)),
    }


def _find_titles(recommender: Recommender, text: str) -> list[dict[str, str]]:
    search = recommender.model.title_search
    return [{"item": token, "title": search.names[token]} for token in search.find(text)]


def _describe_service(service: Service) -> dict[str, Any]:
    model = service.recommender.model
    encoder = service.text_encoder
    abilities = describe_abilities(service.recommender, encoder)
    run, folder = service.options.run, service.recommender.folder
    return {
        "run": run if isinstance(run, str) else folder.name if folder else "",
        "model": str(model.config.get("model", "")),
        "dataset": str(model.config.get("dataset", "")),
        "items": len(model.tokens) - 1,
        "added_items": service.n_added,
        "titles": len(model.titles),
        "branches": model.encoder.branches,
        "learned_gate": model.encoder.has_learned_gate,
        "loaded": service.loaded_at.isoformat(timespec="seconds"),
        "text_encoder": encoder.fingerprint_fields["model"] if encoder else "",
        "text_form": _describe_text_form(model.text_source),
        **abilities._asdict(),
    }


def _describe_text_form(source: Mapping[str, Any]) -> str:
    """The template of a run's texts, or their columns as they were joined."""
    return str(source.get("template") or ". ".join(str(source.get("columns", "")).split()))


async def _answer_mistake(_: Request, error: Exception) -> Response:
    return answer_mistake(error)


async def _answer_unknown_route(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    method = request.method if len(request.method) < 10 else "method"
    return answer_error(status, f"{method} {request.url.path[:60]!r} is not a route; GET /docs lists them")


async def _answer_failure(_: Request, __: Exception) -> Response:
    return answer_error(500, "the server made a mistake; its log says which")
