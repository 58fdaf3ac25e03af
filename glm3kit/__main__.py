"""The command line: `python -m glm3kit VERB`, or `glm3kit VERB`; every step of the notebooks without a notebook.

Exit status: 0, 1 for a run that failed, 2 for a wrong call (unknown verb or option, faulty configuration or override).

    glm3kit launch configs/tiny.yaml train.total_steps=20
"""

import os
import sys
from collections.abc import Sequence

from glm3kit import __version__
from glm3kit.cli import data, jobs, model, setup, weights
from glm3kit.cli.arguments import find_verb, format_help
from glm3kit.errors import ConfigError, Glm3KitError

SUBJECTS = {"set up": setup.VERBS, "weights": weights.VERBS, "data": data.VERBS, "jobs": jobs.VERBS,
            "model": model.VERBS}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status; an error of the kit is one message on stderr, without a traceback."""
    os.environ.setdefault("GLOG_v", "3")  # read when MindSpore is imported: print errors only
    words = list(sys.argv[1:] if argv is None else argv)
    match words:
        case [] | ["-h" | "--help", *_] | ["rank-table", "-h" | "--help", *_]:
            print(format_help(SUBJECTS))
            return 0
        case ["--version", *_]:
            print(f"glm3kit {__version__}")
            return 0
    verb, rest = find_verb(words, SUBJECTS)
    args = verb.parse(rest)
    try:
        return verb.run(args) or 0
    except (Glm3KitError, OSError) as err:
        print(err, file=sys.stderr)
        return 2 if isinstance(err, ConfigError) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
