"""`python -m twigvlm` is the `twigvlm` command."""

import sys

from twigvlm.cli.main import main

sys.exit(main())
