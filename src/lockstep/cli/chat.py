"""`lockstep chat`: a conversation in the terminal."""

from __future__ import annotations

import sys

from lockstep.cli import options as o
from lockstep.cli.start import Where, enter
from lockstep.cli.terminal import Spinner, stderr, write
from lockstep.engine.request import Sampling
from lockstep.runtime.options import ModelOptions


def chat(
    ranks: o.Ranks = None,
    hostfile: o.Hosts = None,
    backend: o.Backend = None,
    model: o.Model = None,
    parallel: o.Parallel = "pipeline",
    split: o.Split = "auto",
    context: o.Context = None,
    max_tokens: o.MaxTokens = 1024,
    temperature: o.Temperature = 0.0,
    top_p: o.TopP = 1.0,
    top_k: o.TopK = 0,
    min_p: o.MinP = 0.0,
    seed: o.Seed = 0,
    python: o.Python = None,
    env: o.Env = None,
    cwd: o.Cwd = None,
    ring_port: o.Port = None,
    dry_run: o.DryRun = False,
) -> None:
    """Talk in the terminal."""
    options = ModelOptions(model, parallel, split, context)
    where = Where(ranks, hostfile, backend, python, env, cwd, ring_port, dry_run)
    place = enter(where, options, stdin=True)
    from lockstep.runtime.chat import HELP, chat

    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed)
    with Spinner(shown=place.env.rank == 0) as spinner:

        def ask() -> str | None:
            spinner.end()
            write("> ")
            try:
                return sys.stdin.buffer.readline().decode(errors="replace") or None
            except OSError:  # It is open for writing alone, or its terminal has gone.
                return None

        if place.env.rank == 0:
            stderr.print(HELP, markup=False)
        chat(place, options, sampling, max_tokens, spinner.tell, ask, write)
