"""`python -m llmkit` is `llmkit`."""

import sys

from llmkit.cli import main

sys.exit(main())
