"""The command line: a thin shell around the verbs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from edgekd import __version__
from edgekd.cli_facts import FACTS
from edgekd.cli_stages import STAGES
from edgekd.errors import EdgekdError, RecipeError, nearest

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Compress a trained vision model for a device: distill, quantize, export, check, measure.",
)
GATE_FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


@app.command()
def run(
    recipe: Annotated[
        str,
        typer.Argument(help="A recipe file, or the name of a shipped one (edgekd init --list)."),
    ],
    change: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one value; repeatable."),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="A target instead of the recipe's; repeatable."),
    ] = None,
    latency: Annotated[
        list[str] | None,
        typer.Option(help="Choose the student under this budget: 5ms, or TARGET=5ms; repeatable."),
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(help="Measure a target over a link: TARGET=ssh://user@host; repeatable."),
    ] = None,
    require_measured: Annotated[
        bool, typer.Option("--require-measured", help="A budget that is only estimated fails.")
    ] = False,
    out: Annotated[Path, typer.Option(help="The folder of runs.")] = Path("runs"),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Do every stage again, whatever is done already.")
    ] = False,
) -> None:
    """Carry out a recipe, from data to checked artifacts and a report.

    Ended early (Ctrl-C, a kill, a power cut), the same command goes on where it was.
    Exits 1 if a gate is not passed or a budget is missed, 2 on bad input.

    With a budget, the student is the largest of its family that keeps to it: priced by the latency
    model, built as it will ship and measured, before any training. A target that is neither this
    host nor behind a --device is estimated, and its budget certified by nothing.

    Example: edgekd run fashion-mnist-quick --set quantize.epochs=2 --target host-onnxruntime

    Example: edgekd run my.toml --target jetson-orin-nano --latency 5ms --device ssh://me@orin
    """
    from edgekd.pipeline import run as run_recipe
    from edgekd.recipe import Recipe

    changes = [*(change or ()), *(["budget.require_measured=true"] if require_measured else ())]
    loaded = Recipe.load(
        recipe, changes=changes, targets=target or (), latency=latency or (), devices=device or ()
    )
    report = run_recipe(loaded, out=out, fresh=fresh)
    report.print(Console(width=None if sys.stdout.isatty() else 140))
    if not report.passed:
        raise typer.Exit(GATE_FAILED)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("recipe.toml"),
    recipe: Annotated[
        str, typer.Option("--from", help="The shipped recipe to start from.")
    ] = "fashion-mnist",
    show: Annotated[bool, typer.Option("--list", help="Only list the shipped recipes.")] = False,
) -> None:
    """Write a recipe with comments, to change and run.

    Example: edgekd init my.toml && edgekd run my.toml
    """
    from edgekd.recipe import shipped_recipes

    shipped = shipped_recipes()
    if show:
        for name, text in sorted(shipped.items()):
            print(f"{name:<24}{text.splitlines()[0].lstrip('# ')}")
        return
    if recipe not in shipped:
        raise RecipeError(f"no recipe {recipe!r}{nearest(recipe, shipped)}")
    if path.exists():
        raise RecipeError(f"{path} exists; choose another name, or remove it first")
    path.write_text(shipped[recipe])
    print(f"wrote {path}; run it: edgekd run {path}")


for command in (*STAGES, *FACTS):
    app.command()(command)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point: errors of ours and of the system end in one line, not in a traceback."""
    sys.path.insert(0, str(Path.cwd()))  # package.module:callable is found beside the recipe
    try:
        app()
    except EdgekdError as error:
        _end(str(error), BAD_INPUT)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        _end(f"{error.strerror or error}{where}; what was done before is intact", BAD_INPUT)
    except (KeyboardInterrupt, SystemExit) as end:
        # typer turns Ctrl-C inside a command into an exit of its own
        if isinstance(end, SystemExit) and end.code != INTERRUPTED:
            raise
        _end("interrupted; the same command goes on from here", INTERRUPTED)


def _end(message: str, code: int) -> None:
    text = f"[bold red]error:[/] {escape(message)}"  # edgekd[openvino] is no markup
    Console(stderr=True).print(text, soft_wrap=True, highlight=False)
    raise SystemExit(code)
