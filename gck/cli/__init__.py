"""The command line: `gck doctor`, `gck plan` and `gck demo`.

The commands are imported when they run, so that one whose parts are missing does not take the others
along.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gck.version import __version__

__all__ = ["app"]

# Commands have private names: `gck.cli.doctor` and so on are the modules.
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gck {__version__}")
        raise typer.Exit


@app.callback()
def _gck(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it, and stop.")
    ] = False,
) -> None:
    """Gradient compression kernels."""


@app.command("demo")
def _demo(
    steps: Annotated[int, typer.Option(min=2, help="Training steps of each configuration.")] = 120,
    workers: Annotated[int, typer.Option(min=2, max=64, help="Worker processes.")] = 4,
    rate: Annotated[str, typer.Option(help="Rate of each link, such as 100mbit or 1gbit.")] = "100mbit",
    out: Annotated[Path, typer.Option(help="Folder for the picture and the JSON file.")] = Path(
        "results/demo"
    ),
    no_links: Annotated[bool, typer.Option("--no-links", help="Use bare loopback, not slowed down.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="A configuration; may be repeated.")] = None,
    limit: Annotated[float, typer.Option(min=1, help="Seconds that one configuration may take.")] = 300,
) -> None:
    """Trains a small network over slow links, dense and compressed, and compares.

    Slow links need root: without it the workers talk over bare loopback, and the output says so.
    """
    from gck.cli.demo.command import main

    raise typer.Exit(
        main(
            steps=steps,
            workers=workers,
            rate=rate,
            out=out,
            use_links=not no_links,
            only=only or [],
            limit=limit,
        )
    )


@app.command("doctor")
def _doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Says what works on this machine, what does not, and what to do about it.

    The exit status is 0 if the CPU path works.
    """
    from gck.cli.doctor import main

    raise typer.Exit(main(as_json))


@app.command("plan")
def _plan(
    numel: Annotated[str, typer.Option(help="Elements of the gradient, such as 124M, 7B or 25e6.")],
    world_size: Annotated[
        int, typer.Option(help="Ranks; or nodes, of a HierarchicalGroup, behind a link each.")
    ],
    rate: Annotated[
        str, typer.Option(help="Rate of each link, in each direction, such as 100mbit or 1gbit.")
    ],
    latency_ms: Annotated[
        float, typer.Option(help="What a message takes beside its bytes: of small ones, with their software.")
    ] = 0.5,
    backward_ms: Annotated[
        float | None,
        typer.Option(help="Of a step, the time in which links could be busy; unknown if left out."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Where gradients are: cpu or cuda; none: on no machine like this.")
    ] = "cpu",
    compressor: Annotated[
        list[str] | None, typer.Option(help='One more, such as "TopK(ratio=0.001)"; may be repeated.')
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for a picture and a JSON file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Predicts what compressing gains, or does not, on a link.

    Bytes and rounds follow from the configuration; the time to compress is measured on this machine, which
    should be one that trains. docs/collectives.md compares such predictions with measured times.
    """
    from gck.cli.plan.command import main

    raise typer.Exit(
        main(
            numel=numel,
            world_size=world_size,
            rate=rate,
            latency_ms=latency_ms,
            backward_ms=backward_ms,
            device=device,
            compressors=compressor or [],
            out=out,
            as_json=as_json,
        )
    )
