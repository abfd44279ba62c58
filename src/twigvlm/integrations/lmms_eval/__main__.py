"""`python -m twigvlm.integrations.lmms_eval --tasks`: the folder of tasks, for lmms-eval's `--include_path`."""

import sys
from importlib.util import find_spec

from twigvlm.integrations.lmms_eval import NEEDS, TASKS

if sys.argv[1:] != ["--tasks"]:
    sys.exit("usage: python -m twigvlm.integrations.lmms_eval --tasks")
if find_spec("lmms_eval") is None:
    sys.exit(f"twigvlm: error: {NEEDS}")
print(TASKS)
