"""The tables of docs/scale.md: pictures an hour on many GPUs, from what was measured of one and of the driver."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measured import results

from fluxrun.workers.actor import TOGETHER_S

GPUS = (1, 10, 100, 1000)

PRICE = 4.0
"""Dollars for an H200 an hour on demand at a specialised provider in May 2026 (3.50 to 4.50; 2.50 to 7 elsewhere)."""

GPUS_A_MACHINE = 8
STORE_BYTES_S = 10e9
"""What one file store hands out to all machines together: an assumption, put in your own."""

PICTURE_BYTES = 1.5e6
"""A 1024x1024 PNG of a photograph, about."""

SET = 10_000
"""The most images that one command draws."""

PART = 100
"""Images in a part."""

DRIVER_ABOUT = "on a slow core: `workers_driver_cpu.json`"
RATE_ABOUT = "`workers_rate_h200.json`"


@dataclass(frozen=True)
class Model:
    """What was measured of a model on one GPU."""

    name: str
    picture_s: float
    weights_bytes: float
    start_s: float
    """A worker's process until it can draw, its compiled code at hand and the weights in the machine's memory."""


@dataclass(frozen=True)
class Driver:
    """What was measured of the command and the workers."""

    picture_s: float
    """CPU time for a picture in a message of many."""
    message_s: float
    """CPU time for a message."""
    part_s: float
    worker_part_s: float
    """What a worker waits between two parts."""
    ray_s: float
    """Until Ray is started."""


def models(root: Path) -> list[Model]:
    """klein-4B and dev with ``h100_fast`` on an H200, 1024x1024."""
    picture_s = _rates(root)[0]["worker_ms_per_picture"] / 1e3
    image = _setting(results(root, "speed_h200/image.json"))["samples"]
    steps = _setting(results(root, "speed_h200/dev.json"))["samples"]["forward_ms"]
    loading = {run["architecture"]: run for run in results(root, "loading_h200.json")["runs"]}
    first = results(root, "startup_h200/first_picture.json")["rows"]
    start = min(row["process_s"] for row in first if row["state"].startswith("warm"))
    klein_bytes = loading["klein_4b"]["files_bytes"]
    warm = min(load["seconds"] for load in loading["dev"]["loads"] if load["cache"] == "warm")
    dev_bytes = 112e9  # conf/model/flux2_dev.yaml
    dev_load = warm * dev_bytes / loading["dev"]["files_bytes"]
    dev_picture = 50 * _median(steps) / 1e3 + _median(image["decode_s"])
    return [
        Model("klein-4B, 4 steps", picture_s, klein_bytes, start),
        Model("dev, 50 steps", dev_picture, dev_bytes, start + dev_load),
    ]


def driver(root: Path) -> Driver:
    """As scripts/workers.py has measured it."""
    told = results(root, "workers_driver_cpu.json")["driver_cpu_ms"]
    return Driver(
        told["a picture, many in a message"] / 1e3,
        told["a picture, alone in its message"] / 1e3,
        told["a part of one picture"] / 1e3,
        _rates(root)[0]["ms_per_part_on_top"] / 1e3,
        13.0,
    )


def _rates(root: Path) -> list[dict[str, Any]]:
    """Ray's workers drawing klein-4B, a GPU each: one of them, then two."""
    rows: list[dict[str, Any]] = results(root, "workers_rate_h200.json")["rows"]
    return rows


def _setting(file: Mapping[str, Any], name: str = "h100_fast") -> Any:
    return next(row for row in file["rows"] if row["setting"] == name)


def _median(samples: Any) -> float:
    flat = [value for sample in samples for value in (sample if isinstance(sample, list) else [sample])]
    if flat and isinstance(flat[0], list):
        return _median(flat)
    return statistics.median(flat)


# --- what follows -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """What so many GPUs come to."""

    gpus: int
    a_second: float
    start_s: float
    limit: str

    @property
    def dollars(self) -> float:
        """For a thousand pictures, while they are drawn."""
        return self.gpus * PRICE / (self.a_second * 3600) * 1000

    @property
    def set_s(self) -> float:
        """For as many images as one command draws, from its start to its end."""
        return self.start_s + SET / self.a_second


def figures(model: Model, driver: Driver, gpus: int) -> Figures:
    """The slowest of what all need: GPUs, the driver, the file store; and what comes before the first picture."""
    each = model.picture_s + driver.worker_part_s / PART
    together = max(1.0, TOGETHER_S / each)
    rates = {
        "GPUs": gpus / each,
        "the driver": 1 / (driver.picture_s + driver.message_s / together + driver.part_s / PART),
        "the file store (pictures)": STORE_BYTES_S / PICTURE_BYTES,
    }
    limit = min(rates, key=lambda name: rates[name])
    machines = -(-gpus // GPUS_A_MACHINE)
    weights_s = model.weights_bytes * machines / STORE_BYTES_S
    start = driver.ray_s + model.start_s + weights_s
    return Figures(gpus, rates[limit], start, limit)


def scale_table(root: Path) -> str:
    """Pictures an hour and cost by number of GPUs."""
    measured = driver(root)
    columns = ("model", "GPUs", "pictures an hour", "a second", "$ a thousand", "until the first picture",
               "10,000 images", "limited by")  # fmt: skip
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for model in models(root):
        for gpus in GPUS:
            found = figures(model, measured, gpus)
            rows.append(
                f"| {model.name} | {gpus:,} | {_digits(found.a_second * 3600)} | {_digits(found.a_second)} | "
                f"{_digits(found.dollars)} | {_time(found.start_s)} | {_time(found.set_s)} | {found.limit} |"
            )
    return "\n".join(rows)


def inputs_table(root: Path) -> str:
    """What the table above is made of."""
    klein, dev = models(root)
    told = driver(root)
    at_hand = "a process to its first picture, all at hand; 31 s without: `startup_h200/first_picture.json`"
    dev_about = "50 steps of `speed_h200/dev.json` and klein's decode; without its text encoder, which was not measured"
    bytes_about = "the same, and its bytes at the rate of `loading_h200.json`, warm: an extrapolation"
    gigabytes = " and ".join(f"{model.weights_bytes / 1e9:.0f}" for model in (klein, dev))
    store = f"{STORE_BYTES_S / 1e9:.0f} GB/s, {PICTURE_BYTES / 1e6:.1f} MB a picture"
    price_about = "on demand, specialised providers, May 2026: 3.50 to 4.50; elsewhere 2.50 to 7"
    rows = [
        ("a picture, klein-4B", f"{klein.picture_s:.3f} s", f"`h100_fast`, by a Ray worker, a file each: {RATE_ABOUT}"),
        ("a picture, dev", f"{dev.picture_s:.1f} s", f"`h100_fast`, {dev_about}"),
        ("a worker's start, klein-4B", f"{klein.start_s:.0f} s", at_hand),
        ("a worker's start, dev", f"{dev.start_s:.0f} s", bytes_about),
        ("weights", f"{gigabytes} GB", f"read once by a machine of {GPUS_A_MACHINE} GPUs, from one store"),
        ("the driver, a picture", f"{told.picture_s * 1e3:.2f} ms of CPU", DRIVER_ABOUT),
        (
            "the driver, a message",
            f"{told.message_s * 1e3:.1f} ms of CPU",
            f"of up to {TOGETHER_S:g} s; {DRIVER_ABOUT}",
        ),
        ("the driver, a part", f"{told.part_s * 1e3:.2f} ms of CPU", DRIVER_ABOUT),
        ("a worker between two parts", f"{told.worker_part_s * 1e3:.0f} ms", RATE_ABOUT),
        ("Ray's start", f"{told.ray_s:.0f} s", "12 to 15 s on two slow cores that others used, too"),
        ("a store for all machines", store, "assumed: put in your own"),
        ("an H200 an hour", f"${PRICE:.2f}", price_about),
    ]
    return "\n".join(["| input | | from |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)])


def rate_table(root: Path) -> str:
    """One worker and two, a GPU each, beside the sum."""
    klein, told = models(root)[0], driver(root)
    one = _rates(root)[0]["pictures_an_hour"]
    columns = (
        "workers, a GPU each",
        "pictures",
        "pictures an hour",
        "times one",
        "computed",
        "until the first picture",
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in _rates(root):
        computed = figures(klein, told, row["workers"]).a_second * 3600
        rate, first = row["pictures_an_hour"], row["seconds_to_the_first"]
        figure = f"{rate:,.0f} | {rate / one:.2f} | {computed:,.0f} | {first:.0f} s"
        lines.append(f"| {row['workers']} | {row['pictures']} | {figure} |")
    return "\n".join(lines)


def checked_table(root: Path) -> str:
    """The same sum for the pool that was run here, beside what it took."""
    run = results(root, "workers_prompts_cpu.json")
    each = run["worker_ms_per_picture"] + run["ms_per_part_on_top"] / PART
    taken = statistics.median(row["ms_per_picture"] for row in run["by_fifth"])
    bytes_ = [row["driver_bytes_per_picture"] for row in run["by_fifth"]]
    rows = [
        ("pictures, different ones, files", f"{run['pictures']:,}, {run['different_pictures']:,}, {run['files']:,}"),
        ("recorded before the kill", f"{run['recorded_when_killed']:,}"),
        ("of them drawn again", f"{run['recorded_and_drawn_again']}"),
        ("milliseconds a picture: computed, measured", f"{each / run['workers']:.1f}, {taken:.1f}"),
        ("measured, by fifths", " ".join(f"{row['ms_per_picture']:.1f}" for row in run["by_fifth"])),
        ("bytes that the driver wrote for a picture, by fifths", " ".join(map(str, bytes_))),
        ("seconds in all, two starts of Ray among them", f"{run['whole_s']:.0f}"),
    ]  # fmt: skip
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _digits(value: float) -> str:
    """Two significant digits: the inputs have no more."""
    return f"{float(f'{value:.2g}'):,.10g}"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{_digits(seconds)} s"
    return f"{_digits(seconds / 60)} min" if seconds < 7200 else f"{_digits(seconds / 3600)} h"
