"""Print what run.sh measured as Markdown: speed, memory and utilisation; the most expensive kernels; the loader.

python experiments/gpu/table.py OUT
"""

import json
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def step_rows(out: Path, profiles: dict[str, dict[str, Any]]) -> Iterator[str]:
    """One row for each model, batch and mode; a measurement that failed has none."""
    yield "| model | batch | compile | clipx, samples/s | clipx / open_clip | MFU | peak memory, GB | memory ratio |"
    yield "|---|---|---|---|---|---|---|---|"
    for path in sorted(
        out.glob("*-compile=*.json"), key=lambda path: [int(n) for n in re.findall(r"-(\d+)-", path.name)]
    ):
        model, batch, mode = re.fullmatch(r"(.*)-(\d+)-compile=(\w+)", path.stem).groups()
        step = read(path)["step"]
        ours = [one["samples_per_s"] for one in step["rounds"]["clipx"]]
        ratios = [one / other["samples_per_s"] for one, other in zip(ours, step["rounds"]["open_clip"], strict=True)]
        speed, profile = statistics.median(ours), profiles.get(model, {})
        peak = profile.get("peak_flops")
        utilisation = f"{profile['flops_per_sample'] * speed / peak:.0%}" if peak else "unknown"
        yield (
            f"| {model} | {int(batch):,} | {mode} | {speed:,.0f} | **{step['ratio_samples_per_s']:.2f}** "
            f"({min(ratios):.2f} to {max(ratios):.2f}) | {utilisation} | {step['memory_gb']['clipx']:.2f} | "
            f"{step['memory']:.2f} |"
        )


def main() -> None:
    out = Path(sys.argv[1])
    profiles = {path.stem.removesuffix("-profile"): read(path)["step"] for path in out.glob("*-profile.json")}
    lines = list(step_rows(out, profiles))
    for model, profile in profiles.items():
        shares = ", ".join(f"{part} {share:.0%}" for part, share in profile["shares"].items())
        lines += ["", f"{model}, share of a step's time: {shares}. Its most expensive kernels:", ""]
        lines += [f"- {share:.0%} `{name}`" for name, share in profile["operations"].items()]
    if (out / "loader.json").exists():
        rounds = [one["pictures_per_s"] for one in read(out / "loader.json")["loader"]["rounds"]]
        speed, low, high = statistics.median(rounds), min(rounds), max(rounds)
        lines += ["", f"Loader, 640 x 480 JPEGs, all cores: {speed:,.0f} pictures/s ({low:,.0f} to {high:,.0f})."]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
