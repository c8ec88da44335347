"""Downloads from the Hugging Face hub into its cache: they show how far they are, can be ended at once, and resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fluxrun.errors import FluxrunError, one_line
from fluxrun.formatting import gigabytes
from fluxrun.weights.folder import check_sizes, check_whole
from fluxrun.weights.hub import cached_file
from fluxrun.weights.location import Located


def download(located: Located, progress: Callable[[str], None] | None = None) -> Path:
    """The checkpoint folder of ``located``, fetched first if it must be; finished files are never fetched twice.

    ``progress`` gets the announcement and then a line about once a second. Raises FluxrunError when the
    download breaks off; the next one goes on from there.
    """
    if located.folder is not None:
        return located.folder
    arrived = _arrived(located)
    if arrived is not None:  # since ``located`` was made, by an earlier job of the same sweep for example
        return arrived
    say = progress or (lambda line: None)
    say(located.announcement() or f"fetching {located.id}")
    folder = _fetch(located, say)
    check_whole(folder, located.variant, "delete it from the cache and run again")
    check_sizes(folder, located.variant)
    return folder


def download_file(located: Located, progress: Callable[[str], None]) -> Path:
    """The file that ``locate_file`` found, fetched first if it must be."""
    if located.folder is not None:
        return located.folder / located.files[0]
    assert located.id is not None
    if (file := cached_file(located.id, located.files[0])) is not None:
        return file
    progress(located.announcement() or f"fetching {located.id}")
    return _fetch(located, progress) / located.files[0]


def _arrived(located: Located) -> Path | None:
    """The snapshot folder, if every file of ``located`` is in the cache by now."""
    from huggingface_hub import try_to_load_from_cache

    assert located.id is not None
    files = [try_to_load_from_cache(located.id, name, revision=located.revision) for name in located.files]
    if not all(isinstance(file, str) for file in files):
        return None
    return Path(str(files[located.files.index("model_index.json")])).parent


# Run in a child process: the hub client's worker threads finish whole files, gigabytes of them, before they let
# an interrupt through; a child can be ended at once. It ends by itself when its standard input does, that is when
# the parent is gone.
_CHILD = """
import json, os, sys, threading
threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(1)), daemon=True).start()
from huggingface_hub import snapshot_download
try:
    print(snapshot_download(**json.loads(sys.argv[1])), flush=True)
    os._exit(0)
except Exception as error:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    print(type(error).__name__ + ": " + " ".join(lines)[:300], file=sys.stderr, flush=True)
    os._exit(1)
"""


def _fetch(located: Located, say: Callable[[str], None], every_s: float = 1.0) -> Path:
    """Download ``located.files`` into the hub's cache and return the snapshot folder."""
    from huggingface_hub import HfApi

    assert located.id is not None
    assert located.cache is not None
    arguments = {
        "repo_id": located.id,
        "revision": located.asked_revision,
        "allow_patterns": located.files,
        "cache_dir": str(located.cache),
        "endpoint": HfApi().endpoint,
    }
    blobs = located.cache / f"models--{located.id.replace('/', '--')}" / "blobs"
    partial, before = set(blobs.glob("*.incomplete")), _folder_bytes(blobs)
    read_end, write_end = os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, json.dumps(arguments)],
        stdin=read_end,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
    )
    try:
        while True:
            try:
                answer, complaint = child.communicate(timeout=every_s)
                break
            except subprocess.TimeoutExpired:
                # Measured in the cache, not by the client's counters: those differ between its versions.
                arrived = min(max(_folder_bytes(blobs) - before, 0), located.download_bytes)
                say(f"downloaded {gigabytes(arrived)} of {gigabytes(located.download_bytes)}")
    finally:
        child.kill()
        child.wait()
        os.close(read_end)
        os.close(write_end)
        for leftover in set(blobs.glob("*.*.incomplete")) - partial:  # named for the child, of no use to another
            leftover.unlink(missing_ok=True)
    if child.returncode != 0:
        why = one_line(RuntimeError(complaint.strip().rpartition("\n")[2] or f"exit code {child.returncode}"), 200)
        raise FluxrunError(f"the download of {located.id} broke off ({why}); run again to go on from there")
    return Path(answer.strip().rpartition("\n")[2])


def _folder_bytes(folder: Path) -> int:
    total = 0
    for file in folder.glob("*"):
        with suppress(OSError):  # a finished file is renamed between listing and asking
            total += file.stat().st_size
    return total
