"""`python -m peftfast` is the `peftfast` command."""

from peftfast.cli import main

if __name__ == "__main__":
    main()
