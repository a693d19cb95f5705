"""Commands that run a model."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from composable.cli.output import Json, note_guards, show
from composable.cli.routing import Show, choose_show
from composable.errors import ComposableError

if TYPE_CHECKING:
    from composable.model.model import Model

app = typer.Typer(rich_markup_mode=None)

Experts = Annotated[
    list[str] | None,
    typer.Option(
        metavar="REQ",
        help="An expert; by default what the project has installed.",
        show_default=False,
    ),
]
Backbone = Annotated[str | None, typer.Option(metavar="NAME|DIR", help="By default the project's.")]
Registry = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Where --experts come from; by default the project's."),
]
Alone = Annotated[bool, typer.Option("--alone", help="The backbone alone; no project is needed.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Tokens to make, at most.")]
Temperature = Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")]
TopP = Annotated[
    float, typer.Option(help="Draw from the likeliest tokens that together have this probability.")
]
Seed = Annotated[int, typer.Option(help="Seed of the draws.")]
Safe = Annotated[
    bool, typer.Option("--safe", help="Mix probabilities of whole paths: slower, bounded.")
]
ShowRouting = Annotated[
    bool, typer.Option("--show-routing", help="Show which expert each piece of text is due to.")
]


@app.command()
@note_guards()
def generate(
    prompt: Annotated[str | None, typer.Argument(metavar="[PROMPT]", show_default=False)] = None,
    experts: Experts = None,
    backbone: Backbone = None,
    registry: Registry = None,
    is_alone: Alone = False,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Continue every prompt of a file: one a line, or JSON lines with `prompt`.",
            show_default=False,
        ),
    ] = None,
    max_tokens: MaxTokens = 100,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End before this text.", show_default=False),
    ] = None,
    seed: Seed = 0,
    is_safe: Safe = False,
    shows_routing: ShowRouting = False,
    as_json: Json = False,
) -> None:
    """Continue a text, or every text of a file.

    With --prompts, a line of JSON is printed for each: prompt and text.
    """
    if (prompt is None) == (prompts is None):
        raise typer.BadParameter("give either a prompt or --prompts FILE")
    model = _load(backbone, experts, registry, is_alone)
    settings: dict[str, Any] = {
        "temperature": temperature,
        "top_p": top_p,
        "stop": stop or (),
        "seed": seed,
        "mode": "safe" if is_safe else "mix",
    }
    if prompts is not None:
        for text in _read_prompts(prompts):
            pieces = model.stream(text, max_tokens, **settings)
            made = "".join(piece.text for piece in pieces)
            print(json.dumps({"prompt": text, "text": made}, ensure_ascii=False), flush=True)
        return
    pieces = model.stream(prompt or "", max_tokens, **settings)
    if as_json:
        traced: list[dict[str, Any]] = [
            {"text": piece.text, "weights": _weights(model, piece.weight_E)} for piece in pieces
        ]
        text = "".join(entry["text"] for entry in traced)
        show("", {"prompt": prompt, "text": text, "pieces": traced}, as_json=True)
        return
    _print_pieces(pieces, choose_show(model.names, is_wanted=shows_routing))


@app.command()
@note_guards()
def chat(
    experts: Experts = None,
    backbone: Backbone = None,
    registry: Registry = None,
    is_alone: Alone = False,
    system: Annotated[
        str, typer.Option(metavar="TEXT", help="Instructions before the first turn.")
    ] = "",
    max_tokens: MaxTokens = 400,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    seed: Seed = 0,
    is_safe: Safe = False,
    shows_routing: ShowRouting = False,
) -> None:
    """Talk with a model; an empty line or the end of input ends it.

    Turns are read from standard input, one a line.
    """
    model = _load(backbone, experts, registry, is_alone)
    talk = model.converse(
        system,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        mode="safe" if is_safe else "mix",
    )
    display = choose_show(model.names, is_wanted=shows_routing)
    while said := _read_turn():
        _print_pieces(talk.reply(said, max_tokens), display)


def _load(
    backbone: str | None, experts: list[str] | None, registry: Path | None, is_alone: bool
) -> Model:
    from composable.assembly.load import load

    return load(backbone, [] if is_alone else experts, registry=registry)


def _print_pieces(pieces: Any, display: Show) -> None:
    """Print text as it is made, and what the display adds."""
    for piece in pieces:
        sys.stdout.write(display.piece(piece.text, piece.weight_E))
        sys.stdout.flush()
    print(display.end())


def _read_turn() -> str:
    """Return the user's next line, empty at the end."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().rstrip("\n")


def _read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if path.suffix != ".jsonl":
            return lines
        return [str(json.loads(line)["prompt"]) for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ComposableError(
            f"cannot be read as prompts: {error!r}",
            where=str(path),
            hint='one prompt a line, or a .jsonl file of {"prompt": "..."}',
        ) from error


def _weights(model: Model, weight_E: Any) -> dict[str, float]:
    """Return the weights of those that are trusted at all, by name."""
    pairs = zip(model.names, weight_E, strict=True)
    return {name: round(float(w), 4) for name, w in pairs if name is not None and w >= 5e-5}


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
