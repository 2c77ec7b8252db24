"""The verb `serve`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from chameleon.cli.options import Verbs, add_model_options, load_model
from chameleon.errors import BadInput

KEY_VARIABLE = "CHAMELEON_API_KEY"
MISSING = "needs the extra `serve`"


def add_verbs(verbs: Verbs) -> None:
    parser = verbs.add("serve", serve, "Serve a model: an API in the forms of OpenAI's, and a page.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port (default: 8000; 0 takes a free one)")
    parser.add_argument("--name", help="name of the model in answers (default: that of the bundle's folder)")
    parser.add_argument("--api-key", metavar="KEY", help=f"ask clients for this key (default: ${KEY_VARIABLE})")
    parser.add_argument("--api-keys", metavar="FILE", help="ask for one of these: lines of KEY [REQUESTS-PER-MINUTE]")
    parser.add_argument("--open", action="store_true", help="let others use the server without a key")
    parser.add_argument("--max-batch-size", type=int, default=48, help="sequences that run at a time (default: 48)")
    parser.add_argument("--max-waiting", type=int, default=64, help="requests in the queue at most (default: 64)")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="longest request (default: 600)")
    add_model_options(parser)


def serve(arguments: argparse.Namespace) -> None:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise BadInput(f"{error.name} is missing", where="serve", remedy="pip install 'open-chameleon[serve]'") from None
    from chameleon.serve.app import build_app
    from chameleon.serve.server import bind
    from chameleon.serve.server import serve as serve_app
    from chameleon.serve.settings import ApiKey, Limits, check_exposure, read_keys

    keys = read_keys(Path(arguments.api_keys)) if arguments.api_keys else []
    if key := arguments.api_key or os.environ.get(KEY_VARIABLE):
        keys.append(ApiKey(key))
    check_exposure(arguments.host, keys, arguments.open)
    if not (arguments.max_waiting >= 1 and 0 < arguments.timeout < float("inf")):
        raise BadInput("--max-waiting and --timeout must be positive", where="serve")
    limits = Limits(waiting=arguments.max_waiting, seconds=arguments.timeout)
    bound = bind(arguments.host, arguments.port)
    model = load_model(arguments)
    app = build_app(model, name=arguments.name or bundle_name(arguments.model), limits=limits, keys=keys)
    host, port = bound.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    serve_app(app, bound, lambda: print(f"{address}/ (API: {address}/docs)", flush=True))


def bundle_name(model: str | None) -> str:
    """Return the name of a bundle: that of its folder."""
    return Path(model).resolve().name if model else "chameleon"
