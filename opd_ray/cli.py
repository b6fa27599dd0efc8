"""The console command: ``opd-ray VERB ...`` is ``python -m opd_ray.MODULE ...``, from any folder."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

VERBS = {
    "train": ("opd_ray.main", "train a student: opd-ray train +experiment=lsm_block64"),
    "evaluate": ("opd_ray.evaluate", "judge a model on benchmarks: opd-ray evaluate model=FOLDER benchmarks=[math500]"),
    "compare": ("opd_ray.compare", "compare runs by variant: opd-ray compare runs/*"),
    "inspect": ("opd_ray.inspect", "look into one trajectory of a run: opd-ray inspect runs/latest"),
    "plan": ("opd_ray.plan", "what a run needs, before anything starts: opd-ray plan +experiment=lsm_block64"),
}
EXIT_USAGE = 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Hand the rest of the command line to the verb's module; exit code 2 where the verb is missing or unknown."""
    verb, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if verb in ("-h", "--help"):
        sys.stdout.write(_usage())
        return
    if verb not in VERBS:
        sys.stderr.write(f"opd-ray: error: there is no verb {verb!r}: give one of {', '.join(VERBS)}\n")
        sys.exit(EXIT_USAGE)
    # The verbs read sys.argv, as they do when they are run as modules.
    sys.argv = [f"opd-ray {verb}", *rest]
    importlib.import_module(VERBS[verb][0]).main()


def _usage() -> str:
    width = max(len(verb) for verb in VERBS)
    lines = [f"  {verb:<{width}}  {text}" for verb, (_, text) in VERBS.items()]
    return "\n".join(["usage: opd-ray VERB [arguments]", "", *lines, "", "opd-ray VERB --help says more of each.", ""])


if __name__ == "__main__":
    main()
