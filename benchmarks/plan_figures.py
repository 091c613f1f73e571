"""The figures of scaling, each from a plan of the real model for the real slice.

    python benchmarks/plan_figures.py --cache plans

1. 8B on 16 chips of v5e and of v6e, 70B on 64 and 512 chips of v5p compile and fit.
2. Every method on a manifold moves less than 1 % more bytes than LoRA.
3. The optimiser takes less than 1 % of the step, by the roofline.
4. From 64 to 512 chips at the same work a chip, bytes a chip grow by less than 10 %.

libtpu 0.0.42.1, which jax 0.10.2 requires, sometimes fails on float32 products for v6e
("RET_CHECK failure … live_range_finder"), and so with every method but lora there;
0.0.52 compiles them. Plans that fail are reported and skipped.

Needs libtpu (the [tpu] extra) and no TPU. A compilation takes minutes; each plan is
saved as JSON in --cache, and the next call resumes from there.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from manifold_lora.methods import METHODS

SMALL = ("--model", "llama-3.1-8b", "--batch-size", "32", "--sequence-length", "2048")
LARGE = ("--model", "llama-3.1-70b", "--sequence-length", "2048")
V5E = (*SMALL, "--topology", "v5e:4x4", "--mesh", "fsdp=16")
V6E = (*SMALL, "--topology", "v6e:4x4", "--mesh", "fsdp=16")
CASES = {
    "8b on v5e:4x4": (*V5E, "--method", "stella"),
    "8b on v6e:4x4": (*V6E, "--method", "lora"),
    "stella on v6e:4x4": (*V6E, "--method", "stella"),
    "70b on v5p:4x4x4": (
        *(*LARGE, "--topology", "v5p:4x4x4", "--mesh", "fsdp=16,tensor=4"),
        *("--batch-size", "64", "--method", "stella"),
    ),
    "70b on v5p:8x8x8": (
        *(*LARGE, "--topology", "v5p:8x8x8", "--mesh", "fsdp=128,tensor=4"),
        *("--batch-size", "512", "--method", "stella"),
    ),
} | {
    f"{name} on v5e:4x4": (*V5E, "--method", name)
    for name in METHODS
    if name != "stella"
}
_COMMAND = "from manifold_lora.cli.main import main; main()"


def planned(name: str, cache: Path) -> dict | None:
    """The plan of a case, from the cache if it is there; None if it fails."""
    file = cache / f"{name.replace(' ', '_').replace(':', '_')}.json"
    if not file.exists():
        command = [sys.executable, "-c", _COMMAND, "plan", *CASES[name]]
        done = subprocess.run([*command, "--out", str(file)], check=False)
        if not file.exists():
            print(f"{name}: the plan failed with exit code {done.returncode}")
            return None
    return json.loads(file.read_text())


def over(value: float, limit: float) -> str:
    """The value, and whether it is under its limit."""
    return f"{value:8.3%} {'<' if value < limit else '≥ !'} {limit:.0%}"


def main() -> None:
    """Plan every case and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="folder of the plans")
    cache = parser.parse_args().cache
    made = {name: planned(name, cache) for name in CASES}
    plans = {name: plan for name, plan in made.items() if plan is not None}

    print("1. Fits, peak of what a chip has; compiled in")
    for name, plan in plans.items():
        memory = plan["memory"]
        peak, limit = memory["peak"] / 2**30, memory["available"] / 2**30
        fits = "fits" if plan["fits"] else "does NOT fit"
        took = f", {plan['compile_seconds']:.0f} s" if plan["fits"] else ""
        print(f"   {name:26} {fits} {peak:6.2f} of {limit:5.2f} GiB{took}")
    whole = {name: plan for name, plan in plans.items() if plan["fits"]}

    print("2. Bytes received over those of LoRA, same model and slice")
    lora = whole["lora on v5e:4x4"]["collective_bytes"]
    for name, plan in whole.items():
        if name.endswith("v5e:4x4") and plan["method"] != "lora":
            print(f"   {name:26} {over(plan['collective_bytes'] / lora - 1, 0.01)}")

    print("3. Optimiser's share of the step by the roofline")
    for name, plan in whole.items():
        print(f"   {name:26} {over(plan['optimizer']['share'], 0.01)}")

    print("4. Growth of bytes received by a chip from 64 to 512 chips")
    sizes = ("70b on v5p:4x4x4", "70b on v5p:8x8x8")
    if all(name in whole for name in sizes):
        few, many = (whole[name]["collective_bytes"] for name in sizes)
        print(
            f"   {few / 1e9:.2f} GB to {many / 1e9:.2f} GB {over(many / few - 1, 0.1)}"
        )

    print("Time of a step, tokens a second and a chip, cost of a billion tokens")
    for name, plan in whole.items():
        each = plan["tokens_per_second"] / plan["devices"]
        step, cost = plan["seconds"]["step"], plan["dollars_per_billion_tokens"]
        print(f"   {name:26} {step:7.3f} s {each:8.0f} ${cost:8.2f}")


if __name__ == "__main__":
    main()
