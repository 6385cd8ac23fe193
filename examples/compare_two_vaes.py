"""Two VAEs on the same pictures, to an HTML page: python examples/compare_two_vaes.py FOLDER [FIRST SECOND] [OUT.html]"""

import sys
from pathlib import Path

from latentpipe import compare_vaes


def main(folder: str, first: str = "emoji", second: str = "emoji-decoder-ft", out: str = "out/examples/report.html") -> None:
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    found = compare_vaes([first, second], Path(folder), max_images=64, out=Path(out))
    for name, outcome in found.outcomes.items():
        print(f"{name}: {outcome}")
    # each evaluation holds its set, its N and the interval of every score
    for evaluation in found.evaluations:
        print(evaluation.name, evaluation.scores["PSNR"])
    print(out)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
