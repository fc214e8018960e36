"""Try every architecture of mlx-lm in every parallel form, on tiny random checkpoints made here.

    python benchmarks/architectures.py [NAME ...] [--jobs 2]

Compares one rank with pipelines of 2 and 3 stages (inside one process) and with a tensor cut over 2 ranks
(two processes, ring): prefill, decode, batches that join, shrink and are padded. Writes the table that the
product's refusals read, src/lockstep/model/architectures.json, and docs/architectures.md from it. With
names, only these entries are renewed. No model is downloaded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "src" / "lockstep" / "model" / "architectures.json"
PAGE = ROOT / "docs" / "architectures.md"
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
TOLERANCE = 1e-4
PER_ARCHITECTURE_S = 120
BATCHES = ("joined", "padded")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--worker", choices=("pipeline", "tensor"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.names, options.folder)
        return
    from model import tiny

    began = time.monotonic()
    names = options.names or tiny.architectures()
    table = json.loads(TABLE.read_text()) if TABLE.exists() and options.names else {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        try_all("pipeline", names, folder, options.jobs)
        try_all(
            "tensor", [n for n in names if (folder / n / "config.json").exists()], folder, options.jobs // 2
        )
        table |= {name: entry(folder, name) for name in names}
    TABLE.write_text(json.dumps(dict(sorted(table.items())), indent=1) + "\n")
    PAGE.write_text(page(table))
    works = {form: sum(row[form] is None for row in table.values()) for form in ("pipeline", "tensor")}
    print(json.dumps(works | {"architectures": len(table), "seconds": round(time.monotonic() - began)}))


def try_all(form: str, names: list[str], folder: Path, jobs: int) -> None:
    """Every name gets a result file, also one whose process crashes or hangs."""
    from ranks import run_ranks

    def run(part: list[str]) -> None:
        while part := [n for n in part if not result_file(folder, form, n).exists()]:
            command = [__file__, "--worker", form, "--folder", str(folder), *part]
            try:
                if form == "tensor":
                    run_ranks(command, 2, timeout_s=PER_ARCHITECTURE_S * len(part))
                else:
                    limit_s = PER_ARCHITECTURE_S * len(part)
                    subprocess.run(
                        [sys.executable, *command], capture_output=True, timeout=limit_s, check=False
                    )
            except (TimeoutError, subprocess.TimeoutExpired):
                pass  # The one that was begun and not finished is told below.
            done = [n for n in part if result_file(folder, form, n).exists()]
            if len(done) < len(part):
                stuck = part[len(done)]
                begun = folder / f"{stuck}.{form}.begun"
                doing = begun.read_text() if begun.exists() else "start"
                failed = {"refused": f"its process ended or hung ({doing})"}
                if (folder / f"{stuck}.nobatch").exists():
                    failed = {"refused": "mlx-lm itself crashes with it on one rank"}
                if doing == "one rank, batch":
                    # The model itself is at fault; without batches there is something to be told.
                    (folder / f"{stuck}.nobatch").touch()
                    continue
                result_file(folder, form, stuck).write_text(json.dumps(failed))

    size = max(1, len(names) // (4 * jobs))
    parts = [names[i : i + size] for i in range(0, len(names), size)]
    with ThreadPoolExecutor(max(1, jobs)) as pool:
        list(pool.map(run, parts))


def result_file(folder: Path, form: str, name: str) -> Path:
    return folder / f"{name}.{form}.json"


def work(form: str, names: list[str], folder: Path) -> None:
    """What a worker process does: one result file for each name."""
    import mlx.core as mx

    group = mx.distributed.init(strict=True, backend="ring") if form == "tensor" else None
    for name in names:
        if result_file(folder, form, name).exists():
            continue

        def doing(what: str, begun: Path = folder / f"{name}.{form}.begun") -> None:
            begun.write_text(what)

        result = try_tensor(name, folder, group) if group else try_pipeline(name, folder, doing)
        if group is None or group.rank() == 0:
            result_file(folder, form, name).write_text(json.dumps(result))
        print(name, result, flush=True)


def try_pipeline(name: str, folder: Path, doing: Any) -> dict[str, Any]:
    from lockstep.errors import LockstepError
    from lockstep.model import checkpoint
    from lockstep.model.architectures import Support
    from lockstep.model.loader import load, open_model, stages_may_begin
    from model import scenario, tiny

    path = folder / name
    tried = Support(name, None, None)
    try:
        doing("checkpoint")
        tiny.save(name, path)
        doing("costs")
        found = checkpoint.inspect(path)
        checkpoint.costs(found, held="float32")
        doing("one rank")
        whole = load(found, (0, 0), 0, 1, None, known=tried).shard
        expected = {"single": scenario.single([whole])}
    except (Exception, SystemExit) as error:  # noqa: BLE001  whatever mlx-lm raises is the answer
        return {"refused": f"it cannot be tried on one rank here: {brief(error)}"}
    result: dict[str, Any] = {"batch": not (folder / f"{name}.nobatch").exists()}
    for batch in BATCHES if result["batch"] else ():
        doing("one rank, batch")
        try:
            expected[batch] = getattr(scenario, batch)([whole])
        except Exception as error:  # noqa: BLE001
            result |= {"batch": False, "why": brief(error)}
    if not result["batch"]:
        expected = {"single": expected["single"]}
    try:
        doing("structure")
        begin = stages_may_begin(found, known=tried)
    except LockstepError as error:
        return result | {"refused": getattr(error, "reason", str(error))}
    layers = len(open_model(path)[0].layers)
    result |= {"begin": begin, "layers": layers, "error": 0.0}
    if not begin:
        return result | {"refused": "later layers reuse what earlier layers computed, wherever it is cut"}
    cuts = [(begin[len(begin) // 2],), (begin[0],), (begin[0], begin[-1]), begin[:2]]
    for cut in dict.fromkeys(c for c in cuts if len(set(c)) == len(c)):
        try:
            doing(f"stages that begin at {cut}")
            stages = [loaded.shard for loaded in chain(found, cut, layers, tried)]
            for kind, wanted in expected.items():
                deviation = scenario.difference(getattr(scenario, kind)(stages), wanted)
                result["error"] = max(result["error"], deviation)
        except Exception as error:  # noqa: BLE001
            return result | {"refused": f"fails in stages: {brief(error)}"}
    if not result["error"] <= TOLERANCE:
        result["refused"] = f"logits differ by {result['error']:.1e} of the largest"
    return result


def chain(found: Any, cuts: tuple[int, ...], layers: int, known: Any) -> list[Any]:
    """All stages in this process, first layers first, with lists for wires."""
    from lockstep.model.loader import load
    from model.memory_wire import Wire

    spans = list(zip((0, *cuts), (*cuts, layers), strict=True))
    wires = [Wire() for _ in range(len(spans) + 1)]
    count = len(spans)
    return [
        load(found, span, count - 1 - i, count, wires[i].to(wires[i + 1]), known=known)
        for i, span in enumerate(spans)
    ]


def try_tensor(name: str, folder: Path, group: Any) -> dict[str, Any]:
    from lockstep.errors import LockstepError
    from lockstep.model.architectures import Support
    from lockstep.model.checkpoint import inspect
    from lockstep.model.loader import load
    from lockstep.model.tensor import loader as tensor
    from model import scenario

    path = folder / name
    tried = Support(name, None, None)
    pipeline = json.loads(result_file(folder, "pipeline", name).read_text())
    if "batch" not in pipeline:
        return {"refused": pipeline["refused"]}
    try:
        found = inspect(path)
        tensor.check(found, [1.0, 1.0], group, tried)
        mine = tensor.load(found, [1.0, 1.0], group, known=tried).shard
    except LockstepError as error:
        return {"refused": str(error)}
    except Exception as error:  # noqa: BLE001
        return {"refused": f"fails while it is cut: {brief(error)}"}
    whole = load(found, (0, 0), 0, 1, None, known=tried).shard
    result: dict[str, Any] = {"error": 0.0}
    try:
        for kind in ("single", *(BATCHES if pipeline["batch"] else ())):
            outputs = getattr(scenario, kind)([mine])
            deviation = scenario.difference(outputs, getattr(scenario, kind)([whole]))
            result["error"] = max(result["error"], deviation)
    except Exception as error:  # noqa: BLE001
        return {"refused": f"fails when cut: {brief(error)}"}
    if not result["error"] <= TOLERANCE:
        result["refused"] = f"logits differ by {result['error']:.1e} of the largest"
    return result


def brief(error: BaseException) -> str:
    text = str(error).split("\n")[0]
    if "No Metal back-end" in text:
        return "its kernels need Metal"
    if isinstance(error, SystemExit):
        return "mlx-lm asks for a package that is not installed"
    return f"{type(error).__name__}: {text[:120]}"


def entry(folder: Path, name: str) -> dict[str, Any]:
    pipeline = json.loads(result_file(folder, "pipeline", name).read_text())
    file = result_file(folder, "tensor", name)
    tensor = json.loads(file.read_text()) if file.exists() else pipeline
    row = {
        "pipeline": pipeline.get("refused"),
        "tensor": tensor.get("refused"),
        "batch": pipeline.get("batch", False),
    }
    free = len(pipeline.get("begin", ())) == pipeline.get("layers", 0) - 1
    return row | (
        {}
        if free or row["pipeline"]
        else {"stages_begin_only": pipeline["begin"], "of_layers": pipeline["layers"]}
    )


def page(table: dict[str, dict[str, Any]]) -> str:
    """docs/architectures.md"""
    count = {form: sum(row[form] is None for row in table.values()) for form in ("pipeline", "tensor")}
    lines = [
        "# Architectures",
        "",
        "Written by `python benchmarks/architectures.py`, which tries every model type of mlx-lm on a",
        "tiny random checkpoint: one rank against pipelines of 2 and 3 stages and a tensor cut over",
        "2 ranks; prefill, then decode; one sequence, then batches of different lengths. *Works* means",
        f"that all logits agree within {TOLERANCE:g} of the largest one. What is refused here is refused",
        "by the program, before anything is loaded.",
        "",
        "*Not every split*: late layers reuse keys and values of earlier ones, which must then be on the",
        "same rank. The layers in brackets are those of the tiny model; a real one is asked when it starts.",
        "",
        f"{len(table)} architectures, named by their module in mlx-lm: pipeline {count['pipeline']},",
        f"tensor {count['tensor']}. *One at a time* in the batch column: mlx-lm itself fails with a batch.",
        "",
        "| architecture | pipeline | tensor | batch |",
        "|---|---|---|---|",
    ]
    for name, row in sorted(table.items(), key=lambda item: item[0].lower()):
        pipeline = row["pipeline"] and f"refused: {row['pipeline']}" or "works"
        if "stages_begin_only" in row:
            tried = ", ".join(map(str, row["stages_begin_only"]))
            pipeline = f"works; not every split (of {row['of_layers']} layers a stage may begin at {tried})"
        tensor = row["tensor"] and f"refused: {row['tensor']}" or "works"
        batch = "yes" if row["batch"] else "one at a time"
        lines.append(f"| {name} | {pipeline} | {tensor} | {batch} |".replace("\n", " "))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
