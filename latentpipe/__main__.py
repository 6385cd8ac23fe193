"""python -m latentpipe"""

from latentpipe.cli import main

raise SystemExit(main())
