"""A run's parts as bars: what went on at the same time is in lanes below each other."""

from __future__ import annotations

from fluxrun.record.schema import SpanRecord
from fluxrun.report.lanes import lanes


def span(name: str, start: float, end: float) -> SpanRecord:
    return SpanRecord(name=name, start_s=start, end_s=end)


def test_one_after_the_other_is_one_lane_and_overlaps_are_several():
    found = lanes(
        [span("load", 2, 6), span("import", 1, 2), span("encode", 4, 5), span("apply", 6, 11), span("?", 4, 7)]
    )
    assert [[bar.name for bar in lane] for lane in found] == [["import", "load", "apply"], ["?"], ["encode"]]
    first = found[0][1]
    assert (first.left, first.width, first.seconds, first.colour) == (10.0, 40.0, 4.0, "load")
    assert found[1][0].colour == "other"


def test_nothing_recorded_is_no_lane_and_no_time_can_still_be_seen():
    assert lanes([]) == []
    (only,) = lanes([span("save", 3, 3)])[0]
    assert only.width > 0
