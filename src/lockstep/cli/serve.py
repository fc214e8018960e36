"""`lockstep serve`: the OpenAI API on rank 0's host."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from typing import Annotated

import msgspec
import typer
from typer import Option

from lockstep.cli import options as o
from lockstep.cli.start import Where
from lockstep.cli.terminal import Spinner, complain, write
from lockstep.engine.wire import ENVIRONMENT as LINK
from lockstep.engine.wire import LinkConfig, link_from_environment
from lockstep.errors import UsageError
from lockstep.launch import launcher, names, planning
from lockstep.launch.supervisor import Policy, Supervisor, link_port
from lockstep.model.light import leave_out_tokenizers
from lockstep.observe.logging import LogFormat, LogLevel
from lockstep.runtime.environment import is_rank
from lockstep.runtime.options import LONGEST_S, Deadlines, EngineOptions, ModelOptions
from lockstep.runtime.place import Place
from lockstep.server import child
from lockstep.server.auth import load_keys
from lockstep.server.listening import check_certificate, listen
from lockstep.server.settings import ENVIRONMENT as SETTINGS_VARIABLE
from lockstep.server.settings import ServerSettings

SETTINGS = ServerSettings()
"""Where nothing else is said."""


def serve(
    ranks: o.Ranks = None,
    hostfile: o.Hosts = None,
    backend: o.Backend = None,
    model: o.Model = None,
    parallel: o.Parallel = "pipeline",
    split: o.Split = "auto",
    context: o.Context = None,
    host: Annotated[str, Option(help="Address to listen on.")] = SETTINGS.host,
    port: Annotated[int, Option(min=0, max=65535, help="0 takes any free port.")] = SETTINGS.port,
    served_name: Annotated[str, Option(help="The model's id in the API; default: its name.")] = "",
    max_rows: Annotated[int, Option(min=1, help="Sequences per micro-batch.")] = EngineOptions.max_rows,
    max_queue: Annotated[int, Option(min=0, help="Requests that may wait in the engine.")] = (
        EngineOptions.max_queue
    ),
    max_requests: Annotated[int, Option(min=1, help="Unfinished answers at once; more get a 429.")] = (
        SETTINGS.max_requests
    ),
    max_prompt_tokens: Annotated[
        int | None, Option(min=1, help="Longest prompt; default: the context.")
    ] = None,
    max_body_bytes: Annotated[int, Option(min=1024, help="Largest request body.")] = SETTINGS.max_body_bytes,
    prefill_chunk: Annotated[
        int | None, Option(min=1, help="Most prompt tokens per prefill step; default: 512, on CPUs 256.")
    ] = None,
    prompt_cache_tokens: Annotated[int, Option(min=0, help="Tokens kept for shared prefixes.")] = (
        EngineOptions.prompt_cache_tokens
    ),
    api_key: Annotated[list[str] | None, Option(help="Accept this key; may be repeated.")] = None,
    api_key_file: Annotated[str, Option(help="File with one key per line.")] = "",
    no_auth: Annotated[bool, Option("--no-auth", help="Listen beyond loopback without a key.")] = False,
    ssl_certfile: Annotated[str, Option(help="Certificate (PEM), for HTTPS.")] = "",
    ssl_keyfile: Annotated[str, Option(help="Its private key (PEM).")] = "",
    cors_origin: Annotated[list[str] | None, Option(help="Allow this origin; may be repeated.")] = None,
    requests_per_minute: Annotated[int | None, Option(min=1, help="For each key.")] = None,
    recovery_timeout: Annotated[
        float, Option(min=0, max=LONGEST_S, help="Seconds to wait for the engine.")
    ] = SETTINGS.recovery_timeout_s,
    drain_timeout: Annotated[
        float, Option(min=0, max=LONGEST_S, help="Seconds to finish requests at the end.")
    ] = SETTINGS.drain_timeout_s,
    restarts: Annotated[
        int, Option(min=0, help="Starts of the ranks after failures, per 10 min.")
    ] = Policy.restarts,
    min_ranks: Annotated[int, Option(min=1, help="Go on without hosts that are gone, down to this.")] = (
        Policy.min_ranks
    ),
    spare_front: Annotated[
        bool, Option(help="Keep a second HTTP process, idle, that takes over at once.")
    ] = Policy.spare_front,
    join_timeout: Annotated[
        float,
        Option(min=0.1, max=LONGEST_S, envvar="LOCKSTEP_JOIN_TIMEOUT", help="Seconds for all ranks to meet."),
    ] = Deadlines.join_s,
    load_timeout: Annotated[
        float,
        Option(min=0.1, max=LONGEST_S, envvar="LOCKSTEP_LOAD_TIMEOUT", help="Seconds to load the model."),
    ] = Deadlines.load_s,
    step_timeout: Annotated[
        float,
        Option(min=0.1, max=LONGEST_S, envvar="LOCKSTEP_STEP_TIMEOUT", help="Least seconds given to a step."),
    ] = Deadlines.step_s,
    self_test: Annotated[bool, Option(help="Try the ranks before serving.")] = True,
    log_format: Annotated[LogFormat, Option(help="Of the log, on stderr.")] = "text",
    log_level: Annotated[LogLevel, Option(help="The least that is logged.")] = "info",
    log_prompts: Annotated[bool, Option("--log-prompts", help="Write prompts to the log.")] = False,
    python: o.Python = None,
    env: o.Env = None,
    cwd: o.Cwd = None,
    ring_port: o.Port = None,
    dry_run: o.DryRun = False,
) -> None:
    """Serve the OpenAI API."""
    options = ModelOptions(model, parallel, split, context, self_test)
    deadlines = Deadlines(join_timeout, load_timeout, step_timeout)
    settings = ServerSettings(
        model=model or "",
        served_name=served_name,
        host=host,
        port=port,
        api_keys=api_key or [],
        api_key_file=api_key_file,
        no_auth=no_auth,
        ssl_certfile=ssl_certfile,
        ssl_keyfile=ssl_keyfile,
        cors_origins=cors_origin or [],
        max_body_bytes=max_body_bytes,
        max_prompt_tokens=max_prompt_tokens,
        max_context=context,
        max_requests=max_requests,
        requests_per_minute=requests_per_minute,
        load_timeout_s=load_timeout,
        recovery_timeout_s=recovery_timeout,
        drain_timeout_s=drain_timeout,
        log_format=log_format,
        log_level=log_level,
        log_prompts=log_prompts,
    )
    if is_rank(os.environ):
        engine = EngineOptions(max_rows, max_queue, prefill_chunk, prompt_cache_tokens)
        place = Place.take(deadlines)
        return _serve_rank(place, options, engine, settings)
    where = Where(ranks, hostfile, backend, python, env, cwd, ring_port, dry_run)
    hosts = where.hosts()
    front_is_here = names.is_local(hosts.hosts[0].ssh)
    if front_is_here:
        # What the front process would refuse is refused before anything is started.
        load_keys(settings)
        check_certificate(settings)
        listen(host, 0 if dry_run else port).close()
    if min_ranks > len(hosts.hosts):
        raise UsageError(f"--min-ranks {min_ranks} is more than the {len(hosts.hosts)} ranks of this run")
    where.check(hosts, options)
    meeting_port = link_port(hosts.hosts[0], taken=port)
    link = LinkConfig.make(meeting_port)
    if port == 0 and front_is_here:
        # A front process that is started again must be where its clients look for it.
        settings = msgspec.structs.replace(settings, port=link_port(hosts.hosts[0], meeting_port))
    job = where.job(hosts, stdin=False, env={LINK: link.encode()})
    if dry_run:
        write(launcher.dry_run(job) + "\n")
        return None
    policy = Policy(
        restarts,
        min_ranks,
        drain_timeout,
        spare_front,
        deadlines.join_s,
        lambda rest: planning.check(replace(hosts, hosts=tuple(rest)), options),
    )
    raise typer.Exit(Supervisor(job, {SETTINGS_VARIABLE: settings.encode()}, policy).run())


def _serve_rank(place: Place, options: ModelOptions, engine: EngineOptions, settings: ServerSettings) -> None:
    leave_out_tokenizers()
    link = link_from_environment()
    front: subprocess.Popen[bytes] | None = None
    if place.env.rank == 0 and link is None:
        link, front = child.start(settings)
    from lockstep.runtime.serve import serve

    with Spinner(shown=place.env.rank == 0) as spinner:
        serve(place, options, engine, link, front, spinner.tell)
    if front is not None and front.returncode:
        status = front.returncode if front.returncode > 0 else 128 - front.returncode
        complain(f"the front process ended with status {status}: see what it has written")
        raise typer.Exit(status)
