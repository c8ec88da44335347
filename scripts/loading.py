"""From `from_pretrained` to ready: a real checkpoint folder, page cache cold and warm, beside what `dd` reads.

    python scripts/loading.py OUT.json --folder /big/disk/klein --architecture klein_4b   # makes it if it is not there
    python scripts/loading.py OUT.json --folder /tmp/tiny --architecture tiny --device cpu      # a dry run
    python scripts/loading.py OUT.json --folder /big/disk/dev --architecture dev --blocks 2 8 --text-layers 8

Weights are random, in bfloat16, at real size; `--blocks` cuts the transformer to so many double and single blocks and
`--text-layers` the text encoder, where the disk is too small for all (what was cut is in the result). Cold: every page
of the folder is dropped (posix_fadvise), which the bytes read from the disk prove. Each figure is of a new process that
has imported all, and woken the GPU, before the clock starts. Memory of the process's own is RssAnon, not what mapped
files take. klein-4B takes about two minutes: 16 GB are written, then read four times.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

DD_BLOCK = "bs=16M"


def make(folder: Path, given: argparse.Namespace) -> None:
    """Write a checkpoint folder with random weights, cut to fewer blocks and layers where that is asked."""
    from fluxrun.options.model import Flux2Model
    from fluxrun.weights import loading, random_weights

    name = given.architecture
    sizes = random_weights.architecture(name, "dev" if name == "dev" else "klein")
    if given.blocks:
        sizes.transformer.update(num_layers=given.blocks[0], num_single_layers=given.blocks[1])
    if given.text_layers:
        config = sizes.text_encoder.get("text_config", sizes.text_encoder)
        config["num_hidden_layers"] = given.text_layers
    random_weights.architecture = lambda *_: sizes
    model = Flux2Model(weights="random", architecture=name, pipeline=sizes.pipeline, text_encoder_layers="all")
    loading.load(model, dtype=given.dtype, device=given.device).pipeline.save_pretrained(folder, max_shard_size="5GB")


def weight_files(folder: Path) -> list[Path]:
    """All weight files of a folder."""
    return sorted(folder.glob("*/*.safetensors"))


def drop(folder: Path) -> None:
    """No page of the folder's weights stays in memory."""
    for file in weight_files(folder):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_speed(folder: Path) -> dict[str, float]:
    """Bytes a second that `dd` reads, from the disk and from the page cache."""
    size = sum(file.stat().st_size for file in weight_files(folder))
    found = {}
    drop(folder)
    for state in ("cold", "warm"):
        started = time.perf_counter()
        for file in weight_files(folder):
            subprocess.run(["dd", f"if={file}", "of=/dev/null", DD_BLOCK, "status=none"], check=True)
        found[state] = size / (time.perf_counter() - started)
    return found


# --- in a process of its own ------------------------------------------------------------------------------------------


@contextmanager
def watched_memory() -> Iterator[dict[str, int]]:
    """The rise of this process's own memory (RssAnon) within, at most."""
    found, over = {"before": own_memory(), "most": 0}, threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            found["most"] = max(found["most"], own_memory())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()


def own_memory() -> int:
    """Anonymous memory of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def read_bytes() -> int:
    """What this process has read from disks."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def load_once(folder: Path, read_layers: list[int], given: argparse.Namespace, ahead: bool) -> dict[str, Any]:
    """Load a folder as a run does; seconds until every weight is on the device."""
    import torch

    from fluxrun.options.model import Flux2Model
    from fluxrun.weights.find import find_weights
    from fluxrun.weights.loading import load
    from fluxrun.weights.readahead import read_ahead

    model = Flux2Model(path=folder, text_encoder_out_layers=read_layers or None)
    located, dtype, device = find_weights(model), given.dtype, given.device
    load(Flux2Model(weights="random", architecture="tiny"), dtype=dtype, device=device)  # all is imported by then
    read, started = read_bytes(), time.perf_counter()
    with watched_memory() as memory:
        reading = read_ahead(located.weight_files) if ahead else None
        base = load(model, dtype=dtype, device=device, located=located)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        taken = time.perf_counter() - started
    if reading is not None:
        reading.stop()
    return {
        "seconds": round(taken, 3),
        "loaded_bytes": base.bytes,
        "read_bytes": read_bytes() - read,
        "own_memory_rise_bytes": memory["most"] - memory["before"],
    }


def apart(work: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a new process, which has imported everything by then."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("spawn").Process(target=answer, args=(sender, work, arguments))
    child.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        raise SystemExit(f"{work.__name__} failed") from None
    child.join()
    return found


def answer(sender: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """In the new process: import what a run has imported before it loads, do the work, send its result."""
    import diffusers.pipelines.flux2.pipeline_flux2
    import diffusers.pipelines.flux2.pipeline_flux2_klein  # noqa: F401

    sender.send(work(*arguments))


def main() -> None:
    """Make the folder, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--architecture", default="klein_4b", choices=["klein_4b", "klein_9b", "dev", "tiny"])
    parser.add_argument("--blocks", type=int, nargs=2, metavar=("DOUBLE", "SINGLE"), help="of the transformer")
    parser.add_argument("--text-layers", type=int, help="of the text encoder; the last one's output is the embedding")
    parser.add_argument("--only", nargs="+", help="ways to load: cold, 'cold ahead', warm, 'warm ahead'")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    if not given.folder.exists():
        apart(make, given.folder, given)
    read = [given.text_layers] if given.text_layers else []
    size = sum(file.stat().st_size for file in weight_files(given.folder))
    largest = max(file.stat().st_size for file in weight_files(given.folder))
    result: dict[str, Any] = {
        "command": ["python", "scripts/loading.py", *sys.argv[1:]],
        "architecture": given.architecture,
        "blocks": given.blocks,
        "text_layers": given.text_layers,
        "files_bytes": size,
        "largest_file_bytes": largest,
        "dd_bytes_per_s": disk_speed(given.folder),
        "loads": [],
    }
    for state, ahead in itertools.product(("cold", "warm"), (False, True)):
        name = f"{state} ahead" if ahead else state
        if not given.only or name in given.only:
            if state == "cold":
                drop(given.folder)
            way = {"cache": state, "read_ahead": ahead}
            row = {**way, **apart(load_once, given.folder, read, given, ahead)}
            row["of_dd"] = round(row["loaded_bytes"] / row["seconds"] / result["dd_bytes_per_s"][state], 3)
            row["own_memory_of_largest_file"] = round(row["own_memory_rise_bytes"] / largest, 3)
            print(row, flush=True)
            result["loads"].append(row)
            given.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
