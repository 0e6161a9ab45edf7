"""The report of packing: counts, histograms and what was left out."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clipx.data.files import write_atomic


def write(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomic(path, text.encode("utf-8", "replace"))


def merge(parts: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Merge the (split, report) of each shard to one report per split; histograms map a value to its count."""
    splits: dict[str, dict[str, Any]] = {}
    for split, part in parts:
        total = splits.setdefault(
            split,
            {"shards": 0, "samples": 0, "captions": 0, "bytes": 0, "short_side": Counter(), "caption_words": Counter()},
        )
        total["shards"] += 1
        for key in ("samples", "captions", "bytes"):
            total[key] += part[key]
        for key in ("short_side", "caption_words"):
            total[key].update({int(value): count for value, count in part[key].items()})
    for total in splits.values():
        for key in ("short_side", "caption_words"):
            total[key] = dict(sorted(total[key].items()))
    return splits


def describe_report(report: Mapping[str, Any], out: Path | None) -> Iterator[str]:
    """Yield the report as lines of text; ``out`` holds the list of what was left out."""
    for split, total in report["splits"].items():
        yield (
            f"{split:<9} {total['samples']:,} pictures with {total['captions']:,} captions, "
            f"{total['bytes'] / 1e6:,.1f} MB in {total['shards']:,} shards"
        )
        if not total["samples"]:
            continue
        yield f"          short side    {describe_histogram(total['short_side'])} pixels"
        yield f"          caption       {describe_histogram(total['caption_words'])} words"
    if report.get("scores"):
        yield f"scores    {', '.join(f'{name} {value:.3f}' for name, value in report['scores'].items())}"
    if report["dropped"]:
        where = f"; see {out / 'dropped.jsonl'}" if out else ""
        yield f"left out  {listed(report['dropped'])}{where}"


def count_reasons(dropped: Iterable[Mapping[str, str]]) -> dict[str, int]:
    """Count reasons, without the details after a colon."""
    return dict(Counter(row["reason"].partition(":")[0] for row in dropped).most_common())


def listed(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())


def describe_histogram(histogram: Mapping[int | str, int]) -> str:
    """Describe the range and percentiles of a histogram."""
    values, counts = [int(value) for value in histogram], list(histogram.values())
    few, half, most = np.quantile(values, (0.05, 0.5, 0.95), weights=counts, method="inverted_cdf")
    return f"{min(values)} to {max(values)}, median {half}; 5 % up to {few}, 95 % up to {most}"
