"""Commands that run a model."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(rich_markup_mode=None)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", show_default=False)],
    experts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REQ",
            help="An expert; by default what the project has installed.",
            show_default=False,
        ),
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(metavar="NAME|DIR", help="By default the project's.")
    ] = None,
    registry: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where --experts come from; by default the project's."),
    ] = None,
    is_alone: Annotated[
        bool, typer.Option("--alone", help="The backbone alone; no project is needed.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to make.")] = 100,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 always takes the likeliest token.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    is_safe: Annotated[
        bool, typer.Option("--safe", help="Mix probabilities of whole paths: slower, bounded.")
    ] = False,
) -> None:
    """Continue a text."""
    from composable.assembly.project import load

    model = load(backbone, [] if is_alone else experts, registry=registry)
    for piece in model.stream(
        prompt,
        max_tokens,
        temperature=temperature,
        seed=seed,
        mode="safe" if is_safe else "mix",
    ):
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where the demo works.")] = Path(
        "demo"
    ),
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write all figures there.", show_default=False),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Copy the report there.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of training and of spliced texts.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps per expert.")] = None,
) -> None:
    """Run the main job from start to finish and report on it."""
    from composable.demo.run import STEPS, run_demo

    run_demo(folder, seed=seed, steps=steps or STEPS, json_file=json_file)
    if report is not None:
        shutil.copyfile(folder / "report.html", report)
