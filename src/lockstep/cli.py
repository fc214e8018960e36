"""The `lockstep` command. Outside a rank it is the launcher; inside one it is the rank."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Annotated, NoReturn

import msgspec
import typer
from rich.console import Console
from rich.status import Status
from rich.table import Table

from lockstep.engine.link import ENVIRONMENT as LINK
from lockstep.engine.link import LinkConfig, link_from_environment
from lockstep.engine.request import Sampling
from lockstep.errors import LockstepError, LostPeer, UsageError
from lockstep.launch import launcher, lifeline, planning
from lockstep.launch.hostfile import Hostfile
from lockstep.launch.job import Job
from lockstep.launch.supervisor import Policy, Supervisor, link_port
from lockstep.model.light import leave_out_tokenizers
from lockstep.model.partition import gigabytes
from lockstep.model.precision import prepare_blas
from lockstep.runtime.environment import RankEnvironment, is_rank
from lockstep.runtime.options import Deadlines, EngineOptions, ModelOptions, Prompt
from lockstep.runtime.watchdog import Watchdog
from lockstep.server import child
from lockstep.server.settings import ENVIRONMENT as SETTINGS
from lockstep.server.settings import ServerSettings

app = typer.Typer(
    help="Run one large language model across several machines with MLX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
stderr = Console(stderr=True, highlight=False, soft_wrap=True)

Ranks = Annotated[
    int, typer.Option("-n", "--ranks", min=1, help="Ranks on this machine, without a hostfile.")
]
Hosts = Annotated[Path | None, typer.Option("--hostfile", help="mlx hostfile (JSON): one rank per host.")]
Backend = Annotated[str | None, typer.Option(help="ring (default), jaccl, jaccl-ring, mpi or nccl.")]
Model = Annotated[str | None, typer.Option(help="Folder or Hub name; default SmolLM2-135M-Instruct.")]
Parallel = Annotated[str, typer.Option(help="pipeline, tensor, or auto: by measured speed.")]
Split = Annotated[str, typer.Option(help="auto, equal, memory, or layers per rank: 10,9,9 (rank 0 first).")]
Context = Annotated[int | None, typer.Option(min=1, help="Tokens of context to make room for.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Tokens of the answer, at most.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 is greedy.")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="1 keeps all.")]
TopK = Annotated[int, typer.Option(min=0, help="0 keeps all.")]
MinP = Annotated[float, typer.Option(min=0.0, max=1.0, help="0 keeps all.")]
Seed = Annotated[int, typer.Option(min=0, help="The same seed gives the same text.")]
Python = Annotated[str | None, typer.Option(help="Python on the hosts; default: the same path as here.")]
Env = Annotated[list[str] | None, typer.Option(help="NAME=VALUE for every rank; may be repeated.")]
Cwd = Annotated[str | None, typer.Option(help="Working folder on the hosts; default: the same as here.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be started, and start nothing.")]


@app.command()
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; read from stdin when left out or '-'.")
    ] = None,
    ranks: Ranks = 1,
    hostfile: Hosts = None,
    backend: Backend = None,
    model: Model = None,
    parallel: Parallel = "pipeline",
    split: Split = "auto",
    context: Context = None,
    raw: Annotated[bool, typer.Option("--raw", help="Do not apply the chat template.")] = False,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    seed: Seed = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; may be repeated.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
    python: Python = None,
    env: Env = None,
    cwd: Cwd = None,
    dry_run: DryRun = False,
) -> None:
    """Answer one prompt."""
    options = ModelOptions(model, parallel, split, context)
    if not is_rank(os.environ):
        if prompt not in (None, "-"):
            _check_prompt(prompt)
        hosts = planning.hosts(ranks, hostfile)
        planning.check(hosts, options)
        if ranks > 1 or hostfile or dry_run:
            job = _job(hosts, backend, python, _pairs(env), cwd, stdin=prompt in (None, "-"))
            _launch(job, dry_run)
    place = RankEnvironment.read(os.environ)
    watchdog = Watchdog(place.rank, Deadlines.read(os.environ))
    blas = prepare_blas(place.local_size)
    from lockstep.runtime.generate import generate

    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed)
    text = _read_prompt(prompt) if place.rank == 0 else ""
    with _Progress(shown=place.rank == 0) as progress:

        def show(piece: str) -> None:
            progress.end()
            if not as_json:
                _write(piece)

        asked = Prompt(text, raw, max_tokens, stop or [], sampling)
        answer = generate(place, blas, options, asked, progress.tell, show, watchdog)
    if answer is not None:
        _write(msgspec.json.encode(answer).decode() + "\n" if as_json else "\n")


@app.command()
def chat(
    ranks: Ranks = 1,
    hostfile: Hosts = None,
    backend: Backend = None,
    model: Model = None,
    parallel: Parallel = "pipeline",
    split: Split = "auto",
    context: Context = None,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    seed: Seed = 0,
    python: Python = None,
    env: Env = None,
    cwd: Cwd = None,
    dry_run: DryRun = False,
) -> None:
    """Talk in the terminal."""
    options = ModelOptions(model, parallel, split, context)
    if not is_rank(os.environ):
        hosts = planning.hosts(ranks, hostfile)
        planning.check(hosts, options)
        if ranks > 1 or hostfile or dry_run:
            _launch(_job(hosts, backend, python, _pairs(env), cwd, stdin=True), dry_run)
    place = RankEnvironment.read(os.environ)
    watchdog = Watchdog(place.rank, Deadlines.read(os.environ))
    blas = prepare_blas(place.local_size)
    from lockstep.runtime.chat import HELP, chat

    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed)
    with _Progress(shown=place.rank == 0) as progress:

        def ask() -> str | None:
            progress.end()
            _write("> ")
            return sys.stdin.readline() or None

        if place.rank == 0:
            stderr.print(HELP, markup=False)
        chat(place, blas, options, sampling, max_tokens, progress.tell, ask, _write, watchdog)


@app.command()
def serve(
    ranks: Ranks = 1,
    hostfile: Hosts = None,
    backend: Backend = None,
    model: Model = None,
    parallel: Parallel = "pipeline",
    split: Split = "auto",
    context: Context = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free port.")] = 8080,
    max_rows: Annotated[int, typer.Option(min=1, help="Sequences per micro-batch.")] = 32,
    max_queue: Annotated[int, typer.Option(min=0, help="Requests that may wait.")] = 256,
    prefill_chunk: Annotated[int, typer.Option(min=1, help="Prompt tokens per prefill step.")] = 512,
    prompt_cache_tokens: Annotated[int, typer.Option(min=0, help="Tokens kept for shared prefixes.")] = 16384,
    api_key: Annotated[list[str] | None, typer.Option(help="Accept this key; may be repeated.")] = None,
    api_key_file: Annotated[str, typer.Option(help="File with one key per line.")] = "",
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Listen beyond loopback without a key.")] = False,
    ssl_certfile: Annotated[str, typer.Option()] = "",
    ssl_keyfile: Annotated[str, typer.Option()] = "",
    cors_origin: Annotated[list[str] | None, typer.Option(help="Allow this origin; may be repeated.")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="For each key.")] = None,
    recovery_timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait for the engine.")] = 120,
    drain_timeout: Annotated[float, typer.Option(min=0, help="Seconds to finish requests at the end.")] = 30,
    restarts: Annotated[int, typer.Option(min=0, help="Starts of the ranks after failures, per 10 min.")] = 3,
    min_ranks: Annotated[
        int, typer.Option(min=1, help="Go on without hosts that are gone, down to this.")
    ] = 1,
    self_test: Annotated[bool, typer.Option(help="Try the ranks before serving.")] = True,
    log_format: Annotated[str, typer.Option(help="text or json.")] = "text",
    python: Python = None,
    env: Env = None,
    cwd: Cwd = None,
    dry_run: DryRun = False,
) -> None:
    """Serve the OpenAI API."""
    options = ModelOptions(model, parallel, split, context, self_test)
    settings = ServerSettings(
        model=model or "",
        host=host,
        port=port,
        api_keys=api_key or [],
        api_key_file=api_key_file,
        no_auth=no_auth,
        ssl_certfile=ssl_certfile,
        ssl_keyfile=ssl_keyfile,
        cors_origins=cors_origin or [],
        max_context=context,
        requests_per_minute=requests_per_minute,
        recovery_timeout_s=recovery_timeout,
        drain_timeout_s=drain_timeout,
        log_format=log_format,
    )
    if is_rank(os.environ):
        engine = EngineOptions(max_rows, max_queue, prefill_chunk, prompt_cache_tokens)
        return _serve_rank(options, engine, settings)
    hosts = planning.hosts(ranks, hostfile)
    planning.check(hosts, options)
    link = LinkConfig.make(link_port(hosts.hosts[0]))
    job = _job(hosts, backend, python, {LINK: link.encode()} | _pairs(env), cwd, stdin=False)
    if dry_run:
        _write(launcher.dry_run(job) + "\n")
        return None
    policy = Policy(
        restarts,
        min_ranks,
        drain_timeout,
        lambda rest: planning.check(replace(hosts, hosts=tuple(rest)), options),
    )
    raise typer.Exit(Supervisor(job, {SETTINGS: settings.encode()}, policy).run())


@app.command()
def plan(
    ranks: Ranks = 1,
    hostfile: Hosts = None,
    model: Model = None,
    split: Split = "auto",
    context: Context = None,
) -> None:
    """Show which rank would compute which layers, without loading anything."""
    proposed, problem = planning.propose(planning.hosts(ranks, hostfile), model, split, context)
    table = Table("rank", "host", "layers", "weights", "KV cache", "memory", "left")
    for share in proposed.shares:
        sizes = (share.weight_bytes, share.kv_bytes, share.memory_bytes, share.free_bytes)
        first, end = share.span
        table.add_row(str(share.rank), share.host, f"{first}-{end - 1}", *map(gigabytes, sizes))
    table.caption = f"{proposed.strategy} split, {proposed.context} tokens of context"
    Console(highlight=False).print(table)
    if problem:
        raise UsageError(problem)


def main() -> NoReturn:
    """Run the command; a LockstepError becomes one line and its exit status."""
    lifeline.watch()
    try:
        app()
    except LostPeer as error:
        if "LOCKSTEP_BACKEND" not in os.environ:  # our launcher names the culprit itself
            _complain(str(error))
        _leave(error.exit_status)
    except LockstepError as error:
        _complain(f"error: {error}")
        _leave(error.exit_status)
    raise AssertionError("typer always exits")


class _Progress:
    """What is being done, on stderr: a spinner on a terminal, lines elsewhere. `end` clears it."""

    def __init__(self, shown: bool) -> None:
        self._shown = shown
        self._status: Status | None = None

    def __enter__(self) -> _Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def tell(self, text: str) -> None:
        if not self._shown:
            return
        if not stderr.is_terminal:
            stderr.print(text, markup=False)
        elif self._status is None:
            self._status = stderr.status(text)
            self._status.start()
        else:
            self._status.update(text)

    def end(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None


def _job(
    hosts: Hostfile,
    backend: str | None,
    python: str | None,
    env: dict[str, str],
    cwd: str | None,
    stdin: bool,
) -> Job:
    """This very command, once for each host."""
    return Job(
        argv=("-m", "lockstep", *sys.argv[1:]),
        hosts=hosts.hosts,
        backend=backend or hosts.backend or "ring",
        env={**hosts.env, **env},
        cwd=cwd,
        python=python or sys.executable,
        stdin=stdin,
    )


def _pairs(texts: list[str] | None) -> dict[str, str]:
    for text in texts or []:
        if "=" not in text:
            raise UsageError(f"--env {text}: give NAME=VALUE")
    return dict(text.split("=", 1) for text in texts or [])


def _serve_rank(options: ModelOptions, engine: EngineOptions, settings: ServerSettings) -> None:
    place = RankEnvironment.read(os.environ)
    watchdog = Watchdog(place.rank, Deadlines.read(os.environ))
    blas = prepare_blas(place.local_size)
    leave_out_tokenizers()
    link = link_from_environment()
    if place.rank == 0 and link is None:
        link = child.start(settings)
    from lockstep.runtime.serve import serve

    with _Progress(shown=place.rank == 0) as progress:
        serve(place, blas, options, engine, link, progress.tell, watchdog)


def _launch(job: Job, dry: bool) -> NoReturn:
    """Start the ranks, wait for them, and exit with their status."""
    if dry:
        _write(launcher.dry_run(job) + "\n")
        raise typer.Exit(0)
    raise typer.Exit(launcher.run(job))


def _read_prompt(prompt: str | None) -> str:
    return _check_prompt(sys.stdin.read() if prompt in (None, "-") else prompt)


def _check_prompt(text: str) -> str:
    if not text.strip():
        raise UsageError("the prompt is empty: give it as an argument or on stdin")
    return text


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _complain(line: str) -> None:
    stderr.print(f"lockstep: {line}", markup=False)


def _leave(status: int) -> NoReturn:
    """End now: waiting for the backend to finalize could mean waiting for a peer that never answers."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
