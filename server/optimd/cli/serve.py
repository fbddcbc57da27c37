"""`optimd serve`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from optimd.cli.logs import configure
from optimd.cli.settings import Chosen, with_settings
from optimd.server import Server, run


@with_settings
def serve(
    chosen: Chosen,
    *,
    print_config: Annotated[
        bool,
        typer.Option("--print-config", help="Print all settings and where each comes from, as TOML; do not serve."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --print-config: print them as JSON.")] = False,
) -> None:
    """Hold training jobs' parameters and optimizer state, and step them, until SIGTERM or SIGINT.

    With --data-dir jobs outlive the server, whatever becomes of it; without, they end with it. A first signal waits for
    open steps, a second one does not.

    Every setting can be given as a flag, in the environment (--data-dir is OPTIMD_DATA_DIR) or in a TOML file that
    --config names, in that order.
    """
    config = chosen.server_config()
    if print_config:
        typer.echo(json.dumps(chosen.as_json(), indent=2) if as_json else chosen.as_toml(), nl=as_json)
        return
    configure(chosen.values["log_format"], chosen.values["log_level"])
    run(config, on_ready=_announce)


def _announce(server: Server) -> None:
    typer.echo(f"optimd is ready: pass server={server.address!r} to the optimizers of your workers")
