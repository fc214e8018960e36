"""`lockstep generate`: one prompt, one answer."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import msgspec
from typer import Argument, Option

from lockstep.cli import options as o
from lockstep.cli.start import Where, enter
from lockstep.cli.terminal import Spinner, write
from lockstep.engine.request import Sampling
from lockstep.errors import UsageError
from lockstep.runtime.environment import is_rank
from lockstep.runtime.options import ModelOptions, Prompt


def generate(
    prompt: Annotated[
        str | None, Argument(help="The prompt; read from stdin when left out or '-'.", show_default=False)
    ] = None,
    ranks: o.Ranks = None,
    hostfile: o.Hosts = None,
    backend: o.Backend = None,
    model: o.Model = None,
    parallel: o.Parallel = "pipeline",
    split: o.Split = "auto",
    context: o.Context = None,
    raw: Annotated[bool, Option("--raw", help="Do not apply the chat template.")] = False,
    max_tokens: o.MaxTokens = 256,
    temperature: o.Temperature = 0.0,
    top_p: o.TopP = 1.0,
    top_k: o.TopK = 0,
    min_p: o.MinP = 0.0,
    seed: o.Seed = 0,
    stop: Annotated[list[str] | None, Option(help="Stop before this text; may be repeated.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object instead of text.")] = False,
    python: o.Python = None,
    env: o.Env = None,
    cwd: o.Cwd = None,
    ring_port: o.Port = None,
    dry_run: o.DryRun = False,
) -> None:
    """Answer one prompt."""
    options = ModelOptions(model, parallel, split, context)
    where = Where(ranks, hostfile, backend, python, env, cwd, ring_port, dry_run)
    if prompt == "-":
        prompt = None
    if prompt is not None:
        _check(prompt)
    elif where.alone and not is_rank(os.environ):
        prompt = _typed()
    place = enter(where, options, stdin=_typed if prompt is None else False)
    text = _typed() if prompt is None and place.env.rank == 0 else prompt or ""
    from lockstep.runtime.generate import generate

    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed)
    asked = Prompt(text, raw, max_tokens, stop or [], sampling)
    with Spinner(shown=place.env.rank == 0) as spinner:

        def show(piece: str) -> None:
            spinner.end()
            if not as_json:
                write(piece)

        answer = generate(place, options, asked, spinner.tell, show)
    if answer is not None:
        write(msgspec.json.encode(answer).decode() + "\n" if as_json else "\n")


def _typed() -> str:
    try:
        typed = sys.stdin.buffer.read()
    except OSError as error:  # It is open for writing alone.
        raise UsageError(f"cannot read the prompt from standard input: {error.strerror}") from error
    return _check(typed.decode(errors="surrogateescape"))


def _check(prompt: str) -> str:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the prompt is not UTF-8 text: see its character {error.start + 1}") from error
    if not prompt.strip():
        raise UsageError("the prompt is empty: give it as an argument or on stdin")
    return prompt
