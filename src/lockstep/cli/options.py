"""Options that several commands share, each with its one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from lockstep.launch.hostfile import MOST_RANKS
from lockstep.runtime import environment, options

Ranks = Annotated[
    int | None,
    Option(
        "-n", "--ranks", min=1, max=MOST_RANKS, help="Ranks on this machine, without a hostfile; default: 1."
    ),
]
Hosts = Annotated[Path | None, Option("--hostfile", help="mlx hostfile (JSON): one rank per host.")]
Backend = Annotated[environment.Backend | None, Option(help="Default: the hostfile's, or ring.")]
Model = Annotated[str | None, Option(help="Folder or Hub name; default SmolLM2-135M-Instruct.")]
Parallel = Annotated[options.Parallel, Option(help="auto: by measured speed.")]
Split = Annotated[
    str, Option(help="auto, equal, memory, or numbers, rank 0 first: layers (10,9,9), in tensor parts (2,1).")
]
Layers = Annotated[str, Option(help="auto, equal, memory, or numbers of layers, rank 0 first (10,9,9).")]
Context = Annotated[int | None, Option(min=1, help="Tokens of context to make room for.")]
MaxTokens = Annotated[int, Option(min=1, help="Tokens of the answer, at most.")]
Temperature = Annotated[float, Option(min=0.0, max=2.0, help="0 is greedy.")]
TopP = Annotated[float, Option(min=0.0, max=1.0, help="1 keeps all.")]
TopK = Annotated[int, Option(min=0, help="0 keeps all.")]
MinP = Annotated[float, Option(min=0.0, max=1.0, help="0 keeps all.")]
Seed = Annotated[int, Option(min=0, help="The same seed gives the same text.")]
Python = Annotated[str | None, Option(help="Python on the hosts; default: the same path as here.")]
Env = Annotated[list[str] | None, Option(help="NAME=VALUE for every rank; may be repeated.")]
Cwd = Annotated[str | None, Option(help="Working folder on the hosts; default: the same as here.")]
Port = Annotated[int | None, Option("--ring-port", min=1024, max=65535, help="First port of the data plane.")]
DryRun = Annotated[bool, Option("--dry-run", help="Print what would be started, and start nothing.")]
