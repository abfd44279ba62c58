"""The page at `/`: drop a picture, ask, and watch the answer arrive. Plain HTML and JavaScript, with no other resources."""

from dataclasses import fields
from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from PIL import Image

from twigvlm.inputs import build_inputs, user_turn
from twigvlm.pruning.budget import average_kept
from twigvlm.serving.checks import public_name
from twigvlm.serving.service import Service
from twigvlm.visualize import seen_box

EXAMPLES = (
    ("scene", "Describe this image in detail."),
    ("signs", "Read all signs from top to bottom."),
    ("halves", "Tell me what the top and the bottom half show."),
)
"""Example pictures that the page offers, each with a question."""

_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/patches.js": ("patches.js", "text/javascript; charset=utf-8"),
    "/stream.js": ("stream.js", "text/javascript; charset=utf-8"),
}
_HEADERS = {
    # Scripts and styles are the page's files alone: text of an answer can never become code.
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI, service: Service, needs_key: bool) -> None:
    """Add the page to an application.

    Args:
        app: the application.
        service: the service whose model the page shows.
        needs_key: whether the page must ask its user for the API key.
    """

    def serve(path: str, data: bytes, kind: str) -> None:
        @app.api_route(path, methods=["GET", "HEAD"], include_in_schema=False)
        async def file() -> Response:
            return Response(data, media_type=kind, headers=_HEADERS)

    for path, (name, kind) in _FILES.items():
        serve(path, _file("twigvlm.serving.page", name), kind)
    serve("/examples/scene", _file("twigvlm.sapling", "demo.png"), "image/png")
    for name, _ in EXAMPLES[1:]:
        serve(f"/examples/{name}", _file("twigvlm.serving.page", f"{name}.webp"), "image/webp")
    settings = page_settings(service, needs_key)

    @app.get("/page/settings", include_in_schema=False)
    async def page() -> Response:
        return JSONResponse(settings, headers=_HEADERS)


def page_settings(service: Service, needs_key: bool) -> dict[str, Any]:
    """What the page needs to know about the model and its defaults, JSON-able."""
    base, twig, defaults = service.model.base, service.model.twig.config, service.defaults
    visual = _visual_tokens(service)
    low, high = 32.0, 576.0  # of bases whose visual tokens depend on the picture; what a picture cannot have is fitted
    budget: float | None = defaults.pruning.retain
    if budget is None:
        budget = defaults.pruning.keep
    if visual is not None:
        shape = visual, base.num_layers, *twig.cut_layers(base.num_layers)
        low, high = (average_kept(keep, *shape) for keep in (1, visual))
        if defaults.pruning.keep is not None:
            budget = average_kept(min(defaults.pruning.keep, visual), *shape)
    elif budget is not None:
        low, high = min(low, budget), max(high, budget)
    ways = ["none", "chain", "tree", "lookup"] if service.has_twig else ["none", "lookup"]
    return {
        "model": service.name,
        "needs_key": needs_key,
        "has_twig": service.has_twig,
        "retain": {"low": low, "high": high, "default": budget},
        "prunes": defaults.pruning.active,
        "ways": ways if defaults.speculate in ways else [*ways, defaults.speculate],
        "way": defaults.speculate,
        "refocus": defaults.pruning.refocus,
        "pruning": _pruning(service),
        "max_tokens": min(256, service.limits.max_tokens),
        "max_pixels": service.limits.max_pixels,
        "square": _seen_square(service.processor),
        "examples": [{"picture": f"/examples/{name}", "question": question} for name, question in EXAMPLES],
    }


def _seen_square(processor: Any) -> str | None:
    """Which square of a picture the model sees: "inner" (cropped) or "outer" (padded); None: the picture as it is."""
    box = seen_box(processor, Image.new("RGB", (2, 4)))
    return None if box is None else "inner" if box[0] == 0 else "outer"


def _visual_tokens(service: Service) -> int | None:
    """M, number of visual tokens of a picture; None: it depends on the picture's shape."""
    counts = set()
    for shape in ((200, 200), (100, 400)):
        messages = [user_turn("?", Image.new("RGB", shape))]
        inputs = build_inputs(service.processor, [messages], service.model.device, service.model.dtype)
        counts.add(int(service.model.base.visual_mask(inputs["input_ids"]).sum()))
    return counts.pop() if len(counts) == 1 else None


def _pruning(service: Service) -> dict[str, Any]:
    """Further options of pruned answers: the server's defaults or, if it does not prune, `diverse`."""
    pruning = service.defaults.pruning
    if not pruning.active:
        return {"diverse": True} if service.has_twig else {}
    asked = {option.name: getattr(pruning, option.name) for option in fields(pruning)}
    if pruning.pruner is not None:
        asked["pruner"] = public_name(pruning.pruner)
    controls = ("retain", "keep", "refocus")  # the page has controls of its own for these
    return {
        name: value
        for name, value in asked.items()
        if value is not None and value is not False and name not in controls
    }


def _file(package: str, name: str) -> bytes:
    return (files(package) / name).read_bytes()
