"""Commands that run a model."""

from __future__ import annotations

import itertools
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from composable.cli import bars
from composable.cli.options import (
    Alone,
    Backbone,
    Experts,
    ExpertsRegistry,
    Json,
    MaxTokens,
    MinP,
    RepetitionPenalty,
    Safe,
    SamplingSeed,
    ShowRouting,
    Temperature,
    TopK,
    TopP,
)
from composable.cli.output import show
from composable.cli.routing import PieceFormat, choose_format
from composable.errors import TextError
from composable.files.reading import read_bytes
from composable.files.text import decode_text, has_json_lines, parse_json_lines, parse_plain_text
from composable.printable import printable, printable_json

if TYPE_CHECKING:
    from composable.model.model import Model
    from composable.model.text import Piece

app = typer.Typer(rich_markup_mode=None)


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(metavar="[PROMPT]", show_default=False)] = None,
    experts: Experts = None,
    backbone: Backbone = None,
    registry: ExpertsRegistry = None,
    is_alone: Alone = False,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Continue each prompt in FILE: one per line, or .jsonl with a `prompt` field.",
            show_default=False,
        ),
    ] = None,
    max_tokens: MaxTokens = 100,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Stop before this text; repeatable.", show_default=False),
    ] = None,
    seed: SamplingSeed = 0,
    is_safe: Safe = False,
    shows_routing: ShowRouting = False,
    as_json: Json = False,
) -> None:
    """Generate text from a prompt, or from each prompt in a file.

    With --prompts, prints one line of JSON per prompt, with the fields prompt and text; with
    --show-routing, each prompt and its continuation as text.
    """
    if (prompt is None) == (prompts is None):
        raise typer.BadParameter("expected either PROMPT or --prompts FILE")
    model = _load(backbone, experts, registry, is_alone, is_quiet=as_json)
    display = choose_format(model.names, is_wanted=shows_routing)
    settings: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop": stop or (),
        "seed": seed,
        "mode": "safe" if is_safe else "mix",
    }
    if prompts is not None:
        for text in _read_prompts(prompts):
            pieces = model.stream(text, max_tokens, **settings)
            if shows_routing:
                print(printable(text, keep="\n\t") if sys.stdout.isatty() else text, end="")
                _print_pieces(pieces, display)
                continue
            generated = "".join(piece.text for piece in pieces)
            print(printable_json({"prompt": text, "text": generated}), flush=True)
        return
    pieces = model.stream(prompt or "", max_tokens, **settings)
    if as_json:
        traced: list[dict[str, Any]] = [
            {"text": piece.text, "weights": _weights(model, piece.weight_E)} for piece in pieces
        ]
        text = "".join(entry["text"] for entry in traced)
        show("", {"prompt": prompt, "text": text, "pieces": traced}, as_json=True)
        return
    _print_pieces(pieces, display)


@app.command()
def chat(
    experts: Experts = None,
    backbone: Backbone = None,
    registry: ExpertsRegistry = None,
    is_alone: Alone = False,
    system: Annotated[
        str, typer.Option(metavar="TEXT", help="System prompt, before the first turn.")
    ] = "",
    max_tokens: MaxTokens = 400,
    temperature: Temperature = 0.7,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: SamplingSeed = 0,
    is_safe: Safe = False,
    shows_routing: ShowRouting = False,
) -> None:
    """Chat with a model; an empty line or end of input quits.

    Reads one turn per line from standard input.
    """
    model = _load(backbone, experts, registry, is_alone)
    conversation = model.converse(
        system,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        mode="safe" if is_safe else "mix",
    )
    display = choose_format(model.names, is_wanted=shows_routing)
    while turn := _read_turn():
        _print_pieces(conversation.reply(turn, max_tokens), display)


def _load(
    backbone: str | None,
    experts: list[str] | None,
    registry: str | None,
    is_alone: bool,
    *,
    is_quiet: bool = False,
) -> Model:
    """Return the model of a project or of options, and show what is waited for."""
    with bars.show_wait("loading the model", is_quiet=is_quiet):
        from composable.assembly.load import load

        model = load(backbone, [] if is_alone else experts, registry=registry)
    bars.await_kernels(is_quiet=is_quiet)
    return model


def _print_pieces(pieces: Iterable[Piece], display: PieceFormat) -> None:
    """Print text as it is generated, formatted piece by piece; exactly, unless to a terminal."""
    is_terminal = sys.stdout.isatty()
    for piece in _await_first(pieces):
        text = printable(piece.text, keep="\n\t") if is_terminal else piece.text
        sys.stdout.write(display.piece(text, piece.weight_E))
        sys.stdout.flush()
    print(display.end())


def _await_first(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Yield pieces, and show that the first one is waited for: its program may have to compile."""
    waiting = iter(pieces)
    with bars.show_wait("reading the prompt"):
        first = list(itertools.islice(waiting, 1))
    return itertools.chain(first, waiting)


def _read_turn() -> str:
    """Return the user's next line; an empty string at end of input."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    return decode_text(sys.stdin.buffer.readline(), "standard input").rstrip("\r\n")


def _read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file.

    Raises:
        TextError: If it is missing, or holds something else.
    """
    try:
        data = read_bytes(path)
    except FileNotFoundError as error:
        raise TextError("no such file of prompts", where=str(path)) from error
    if has_json_lines(path):
        return [record["prompt"] for record, _ in parse_json_lines(data, str(path), ["prompt"])]
    text = parse_plain_text(data, str(path), ["prompt"])
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [line for line in lines if line.strip()]


def _weights(model: Model, weight_E: Any) -> dict[str, float]:
    """Return the router weights by name, without those that round to zero."""
    pairs = zip(model.names, weight_E, strict=True)
    return {name: round(float(w), 4) for name, w in pairs if name is not None and w >= 5e-5}


@app.command()
def demo(
    folder: Annotated[
        Path, typer.Argument(metavar="[DIR]", help="Working folder of the demo.")
    ] = Path("demo"),
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", help="Write all results to FILE as JSON.", show_default=False
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Also write the HTML report to FILE.", show_default=False
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Random seed for training and for spliced documents.")
    ] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps per expert.")] = None,
) -> None:
    """Train, publish, install and evaluate three experts, and write a report."""
    from composable.demo.run import STEPS, run_demo

    run_demo(folder, seed=seed, steps=steps or STEPS, json_file=json_file)
    if report is not None:
        shutil.copyfile(folder / "report.html", report)
