"""The program as `python -m vinedresser.cli`."""

import sys

from vinedresser.cli import main

if __name__ == "__main__":
    sys.exit(main())
